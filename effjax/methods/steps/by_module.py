"""What caches of single attentions share: an output is computed in some calls, predicted in others.

Norms, gates and feed-forward layers run in every call. State: what each attention's memory holds,
several arrays like its output, which for large models is more than the weights (FLUX.1-dev at 1024
pixels in bfloat16 with two arrays: 57 layers of 54 MB for a sample); the caches of whole stacks
hold one or two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import jax.numpy as jnp
from flax import nnx

from effjax.context import Context, PyTree, Step, is_static, when
from effjax.fields import NotNegative
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.methods.steps.series import Series
from effjax.targets import AttentionKind, Wrapper, original, wrap
from effjax.transform import Pair, Plan, Transform

Mask = tuple[bool, ...]


@dataclasses.dataclass(frozen=True)
class TimedPlan(Plan):
    """A plan that goes by the times of the network calls.

    Attributes:
        times: of the network calls, `sampler.schedule.times`.
    """

    times: tuple[NotNegative, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.times:
            raise ValueError("times must be those of the network calls: sampler.schedule.times")

    @property
    def calls(self) -> int:
        """Network calls that the plan is made for."""
        return len(self.times)


class Memory(Protocol):
    """What remembers outputs of an attention, and predicts them; an `nnx.Module` with states."""

    def renew(self, new: PyTree, step: Step) -> None:
        """Take in an output that was computed at this step."""

    def predict(self, like: PyTree, step: Step) -> PyTree:
        """The output at this step; `like` has its shapes and dtypes."""
        ...


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
        check_attentions(name, forward, params, *masks)
        return forward.patch(AttentionCaching(tuple(masks.items()), order)), params

    return Transform(name, plan, apply)


def check_attentions(name: str, forward: Forward, params: Params, *kinds: AttentionKind) -> None:
    """Check that a model has attention that a method caches.

    Raises:
        ValueError: if it has none of these kinds.
    """
    if not attentions(forward.module(params), *kinds):
        raise ValueError(
            f"{forward.model.__name__} has no attention that {name} caches; it caches "
            f"{', '.join(kinds)}"
        )


def check_step(step: Step, calls: int) -> None:
    """Check that a plan for so many network calls has this one.

    Raises:
        ValueError: if it has not.
    """
    if is_static(step) and not 0 <= step < calls:
        raise ValueError(f"step {step} lies outside the plan, which is for {calls} network calls")


@dataclasses.dataclass(frozen=True)
class AttentionCaching:
    """The patch: attentions are computed or predicted.

    Attributes:
        masks: whether each call computes, by the kind of attention.
        order: of the series that predicts.
    """

    masks: tuple[tuple[AttentionKind, Mask], ...]
    order: int

    @property
    def calls(self) -> int:
        return len(self.masks[0][1])

    def __call__(self, module: nnx.Module, context: Context) -> None:
        check_step(context.step, self.calls)
        memory = partial(Series, order=self.order)
        for kind, mask in self.masks:
            for target in attentions(module, kind):
                wrap(module, target.path, CachedAttention, mask, memory, context.step)


class CachedAttention(Wrapper):
    """An attention that is computed in some calls and predicted in others.

    Args:
        mask: whether each call computes.
        memory: makes what remembers its outputs.
        step: index of the network call.
    """

    inner: Callable[..., Any]

    def __init__(
        self, inner: nnx.Module, mask: Mask, memory: Callable[[nnx.Module], Memory], step: Step
    ):
        super().__init__(inner)
        self.mask = mask
        self.step = step if is_static(step) else nnx.data(step)
        self.memory: Memory = memory(inner)

    def __call__(self, x: PyTree, *others: PyTree) -> PyTree:
        step = self.step
        computes = self.mask[int(step)] if is_static(step) else jnp.asarray(self.mask)[step]
        return when(computes, _compute, _predict, self, x, *others)


def _compute(cache: CachedAttention, x: PyTree, *others: PyTree) -> PyTree:
    out = cache.inner(x, *others)
    cache.memory.renew(out, cache.step)
    return out


def _predict(cache: CachedAttention, x: PyTree, *others: PyTree) -> PyTree:
    made = getattr(original(cache), "outputs", None)  # streams that get an output
    like = x if made is None else {name: x[name] for name in made}
    return cache.memory.predict(like, cache.step)
