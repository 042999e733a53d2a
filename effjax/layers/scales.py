"""Sequences of scales: maps of tokens from coarse to fine; each attends to all up to its own.

    scales = Scales((1, 2, 3, 4), start=2, stop=3)      the third map, 9 of 30 tokens

A call of a model has the tokens of some consecutive scales. Which ones is static: `Scales` is an
argument without arrays, so that positions are slices and attention knows its keys while tracing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.attention import Heads, KeyHeads, OneStream
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Levels
from pallas_kernels.block_sparse_attention import block_sparse_attention

Values = Float[Array, "B T K E"]  # which may be wider than keys
Outputs = Float[Array, "B S H E"]

Sides = tuple[int, ...]  # patch_nums: sides of the maps of tokens, coarse to fine


def token_starts(patch_nums: Sides) -> tuple[int, ...]:
    """First token of every scale, and the number of all tokens.

    Raises:
        ValueError: for sides that are none, or fall.
    """
    whole = [isinstance(side, int) and not isinstance(side, bool) for side in patch_nums]
    falling = any(a > b for a, b in pairwise(patch_nums))
    if not patch_nums or not all(whole) or patch_nums[0] < 1 or falling:
        raise ValueError(
            f"patch_nums are the sides of maps of tokens, coarse to fine: whole numbers of at "
            f"least 1 that do not fall; got {patch_nums}"
        )
    return (0, *accumulate(side**2 for side in patch_nums))


def whole_scales(patch_nums: Sides, tokens: int) -> int:
    """How many scales so many first tokens are.

    Raises:
        ValueError: for a number of tokens that whole scales do not have.
    """
    starts = token_starts(patch_nums)
    if tokens not in starts[1:]:
        raise ValueError(
            f"tokens of whole scales are {', '.join(map(str, starts[1:]))}; got {tokens} of each "
            f"image"
        )
    return starts.index(tokens)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(),
    meta_fields=("sides", "start", "stop", "kept", "wanted"),
)
@dataclasses.dataclass(frozen=True)
class Scales:
    """The scales start ... stop - 1 of a sequence, static.

    Attributes:
        sides: of all scales, those that are not meant included.
        start, stop: the first scale, and the one after the last.
        kept: how many scales the calls of this sequence have together, for caches; None for all.
        wanted: the first of these scales whose logits are wanted; None for all of them.
    """

    sides: Sides
    start: int
    stop: int
    kept: int | None = None
    wanted: int | None = None

    def __post_init__(self) -> None:
        token_starts(self.sides)
        if not 0 <= self.start < self.stop <= len(self.sides):
            raise ValueError(
                f"scales start ... stop - 1 are some of {len(self.sides)}, got {self.start} ... "
                f"{self.stop - 1}"
            )
        kept, wanted = self.kept or len(self.sides), self.wanted or self.start
        if not (self.stop <= kept <= len(self.sides) and self.start <= wanted < self.stop):
            raise ValueError(
                f"of the scales {self.start} ... {self.stop - 1} of {len(self.sides)} some are "
                f"wanted, and all are kept; got wanted={self.wanted}, kept={self.kept}"
            )

    @property
    def sizes(self) -> Sides:
        """Tokens of every scale up to the last one that is meant."""
        return tuple(side**2 for side in self.sides[: self.stop])

    @property
    def before(self) -> int:
        """Tokens of the scales before."""
        return sum(self.sizes[: self.start])

    @property
    def tokens(self) -> int:
        """Tokens of these scales."""
        return sum(self.sizes[self.start :])

    @property
    def all_tokens(self) -> int:
        """Tokens of the whole sequence, as far as it is kept."""
        return token_starts(self.sides)[self.kept or len(self.sides)]

    @property
    def unwanted(self) -> int:
        """Tokens before the first one whose logits are wanted."""
        return sum(self.sizes[self.start : self.wanted or self.start])


class ScaleCore(nnx.Module):
    """softmax(q k^T / sqrt(D)) v of tokens to their own scale and all scales before it.

    The place of a cache, which gives the keys and values of the scales before.
    """

    def __call__(self, q: Heads, k: KeyHeads, v: Values, scales: Scales) -> Outputs:
        """Attend.

        Args:
            q: of the tokens of `scales`.
            k, v: of these and of all before them.

        Raises:
            ValueError: for keys of other tokens.
        """
        keys = scales.before + scales.tokens
        if (q.shape[1], k.shape[1]) != (scales.tokens, keys):
            raise ValueError(
                f"scales {scales.start} ... {scales.stop - 1} of {scales.sides} are "
                f"{scales.tokens} tokens that attend to {keys}, got {q.shape[1]} and {k.shape[1]}: "
                f"the scales before come from a cache (effjax.caches.ScaleCaches), or are in the "
                f"same call"
            )
        with jax.named_scope("attention"):
            if scales.stop - scales.start == 1:
                return dense_attention(q, k, v)
            return block_sparse_attention(q, k, v, Levels(scales.sizes, scales.start))


class SlotCore(nnx.Module):
    """softmax(q k^T / sqrt(D)) v of tokens to themselves and all scales before their own."""

    def __call__(self, q: Heads, k: KeyHeads, v: KeyHeads, scales: Scales) -> Heads:
        with jax.named_scope("attention"):
            return block_sparse_attention(q, k, v, Levels(scales.sizes, whole=False))


class ScaleAttention(OneStream):
    """Self-attention of maps of tokens, with queries and keys of unit length.

    Args:
        options: of `Projections`. The projection of keys has no bias. Without `unit_norm` logits
            are q k^T / (4 sqrt(D)).
    """

    kind = "scales"

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, k_bias=False, **options)
        self.core = ScaleCore()

    def compared(
        self, x: Float[Array, "B S C"], source: Float[Array, "B T C"]
    ) -> tuple[Heads, KeyHeads]:
        q, k = super().compared(x, source)
        return (q / 4 if self.q_norm is None else q), k

    def __call__(self, x: Float[Array, "B S C"], scales: Scales) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x), scales))


def levels(scales: Scales) -> Sequence[int]:
    """The scale of every token."""
    return [scale for scale in range(scales.start, scales.stop) for _ in range(scales.sizes[scale])]
