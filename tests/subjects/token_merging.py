"""Token merging: attention runs on fewer image tokens, the most similar ones joined (ToMe).

Every second token in a row is a source; those that are most like some destination are averaged into
it before attention, and get what it gets afterwards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax import testing
from effjax.context import Context, PyTree, current_layout, tokens_as
from effjax.fields import Range
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.targets import Wrapper, wrap
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class TokenMergingPlan(Plan):
    """How many image tokens are merged.

    Attributes:
        ratio: of all image tokens, at most a half.
    """

    ratio: Annotated[float, Range(0, 0.5)]


def transform(plan: TokenMergingPlan) -> Transform:
    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(TokenMerging(plan)), params

    return Transform(METHOD.name, plan, apply)


@dataclasses.dataclass(frozen=True)
class TokenMerging:
    plan: TokenMergingPlan

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in attentions(module, "self", "joint"):
            wrap(module, target.path, MergedTokens, self.plan.ratio)


class MergedTokens(Wrapper):
    def __init__(self, inner: nnx.Module, ratio: float):
        super().__init__(inner)
        self.ratio = ratio

    def __call__(self, x: PyTree) -> PyTree:
        image = x["image"] if isinstance(x, Mapping) else x
        layout = current_layout()
        if layout is not None:
            layout.raster("token_merging")  # sources and destinations alternate in a row
        count = int(self.ratio * image.shape[1])
        if not count:
            return self.inner(x)
        merged, owner = merge(image, count)
        fewer = None
        if layout is not None:
            fewer = layout.without_raster(merged.shape[1], METHOD.name)
        with tokens_as(fewer):
            out = self.inner({**x, "image": merged} if isinstance(x, Mapping) else merged)
        if isinstance(x, Mapping):
            return {**out, "image": take(out["image"], owner)}
        return take(out, owner)


def merge(x: Float[Array, "B S C"], count: int) -> tuple[Float[Array, "B M C"], Int[Array, "B S"]]:
    """Tokens with `count` of them merged, and the place that each token went to."""
    batch, tokens, _ = x.shape
    normed = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-6)
    sources, targets = normed[:, 1::2], normed[:, ::2]
    likeness = jnp.einsum("bsc,btc->bst", sources, targets)
    best, place = jnp.max(likeness, axis=-1), jnp.argmax(likeness, axis=-1)
    chosen = jnp.argsort(jnp.argsort(-best, axis=-1), axis=-1) < count  # of the sources
    # Unmerged sources stand behind the destinations, in their order.
    behind = targets.shape[1] + jnp.cumsum(~chosen, axis=-1) - 1
    owner = jnp.zeros((batch, tokens), jnp.int32)
    owner = owner.at[:, ::2].set(jnp.arange(targets.shape[1]))
    owner = owner.at[:, 1::2].set(jnp.where(chosen, place, behind).astype(jnp.int32))
    rows, empty = jnp.arange(batch)[:, None], jnp.zeros((batch, tokens - count, x.shape[2] + 1))
    counted = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, 0), (0, 1)), constant_values=1.0)
    sums = empty.at[rows, owner].add(counted)
    return (sums[..., :-1] / sums[..., -1:]).astype(x.dtype), owner


def take(x: Float[Array, "B M C"], owner: Int[Array, "B S"]) -> Float[Array, "B S C"]:
    """What each token's place holds."""
    return jnp.take_along_axis(x, owner[..., None], axis=1)


def declaration(tiny: Any) -> Method:
    return Method(
        name="token_merging",
        paper="in the manner of Token Merging for Stable Diffusion, arXiv 2303.17604",
        seams=("patches",),
        plan=TokenMergingPlan,
        transform=transform,
        domain="images",
        identity=lambda subject: TokenMergingPlan(0.0),
        ladder=lambda subject: tuple(map(TokenMergingPlan, (0.125, 0.25, 0.5))),
        tiny=tiny,
    )


METHOD = declaration(testing.tiny_dit)
