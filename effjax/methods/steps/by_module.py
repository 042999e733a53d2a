"""What caches of single attentions share: an output is computed in some calls, predicted in others.

Norms, gates and feed-forward layers run in every call. State: for each attention `order + 1` arrays
like its output, which for large models is more than the weights (FLUX.1-dev at 1024 pixels in
bfloat16 with order 1: 57 layers of 54 MB for a sample); the caches of whole stacks hold one or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effjax.context import Context, PyTree, Step, is_static, when
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.methods.steps.series import Series
from effjax.targets import AttentionKind, Wrapper, original, wrap
from effjax.transform import Pair, Plan, Transform

Mask = tuple[bool, ...]


def attention_cache(
    name: str, plan: Plan, masks: Mapping[AttentionKind, Mask], *, order: int = 0
) -> Transform:
    """The transform that caches attentions of these kinds.

    Args:
        name, plan: of the method.
        masks: whether each call computes, by the kind of attention.
        order: of the series that predicts; 0 holds what was computed last.

    Raises:
        ValueError: when it is applied, for a model without such attention.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        module = forward.module(params)
        if not attentions(module, *masks):
            raise ValueError(
                f"{forward.model.__name__} has no attention that {name} caches; it caches "
                f"{', '.join(masks)}"
            )
        return forward.patch(AttentionCaching(tuple(masks.items()), order)), params

    return Transform(name, plan, apply)


@dataclasses.dataclass(frozen=True)
class AttentionCaching:
    """The patch: attentions are computed or predicted."""

    masks: tuple[tuple[AttentionKind, Mask], ...]
    order: int

    @property
    def calls(self) -> int:
        return len(self.masks[0][1])

    def __call__(self, module: nnx.Module, context: Context) -> None:
        if is_static(context.step) and not 0 <= context.step < self.calls:
            raise ValueError(
                f"step {context.step} lies outside the plan, which is for {self.calls} network "
                f"calls"
            )
        for kind, mask in self.masks:
            for target in attentions(module, kind):
                wrap(module, target.path, CachedAttention, mask, self.order, context.step)


class CachedAttention(Wrapper):
    """An attention that is computed in some calls and predicted in others.

    Args:
        mask: whether each call computes.
        order: of the series.
        step: index of the network call.
    """

    inner: Callable[..., Any]

    def __init__(self, inner: nnx.Module, mask: Mask, order: int, step: Step):
        super().__init__(inner)
        self.mask = mask
        self.step = step if is_static(step) else nnx.data(step)
        self.series = Series(inner, order)

    def __call__(self, x: PyTree, *others: PyTree) -> PyTree:
        step = self.step
        computes = self.mask[int(step)] if is_static(step) else jnp.asarray(self.mask)[step]
        return when(computes, _compute, _predict, self, x, *others)


def _compute(cache: CachedAttention, x: PyTree, *others: PyTree) -> PyTree:
    out = cache.inner(x, *others)
    cache.series.renew(out, cache.step)
    return out


def _predict(cache: CachedAttention, x: PyTree, *others: PyTree) -> PyTree:
    made = getattr(original(cache), "outputs", None)  # streams that get an output
    like = x if made is None else {name: x[name] for name in made}
    return cache.series.predict(like, cache.step)
