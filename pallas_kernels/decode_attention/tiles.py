"""What the programs of decode attention share: how caches are cut in tiles, and what a tile does.

Attention over a cache is one loop, whatever the cache holds. A cache's keys are a `Side`: the
arrays that a tile of keys is made of (`Part`s: which axis is the batch, the tokens, the heads) and
a function (queries, tile of each array) -> scores; its values are another, with (weights, tiles)
-> outputs. Plain, quantized and low-rank caches differ in these functions alone.

B batch, S queries, H query heads, K key heads, G = H / K, M = S G query rows of a key head (row
m = s G + g), D and W widths, N length of a cache's token axis.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Part:
    """How an array of a cache is cut: the role of each of its axes.

    Attributes:
        roles: "batch", "tokens" and "heads" are cut; of "columns" (heads side by side on one axis)
            each head takes its `width`; "whole" axes are taken whole.
        every: tokens for each entry of the token axis, as with a scale for 32 tokens.
        width: columns of a head.
        planes: into how many planes products split the last axis; a program that cannot split
            arrays loads a tuple of them.
        turned: whether tiles are stored [W, tokens]; products take them turned back.
    """

    roles: tuple[str, ...]
    every: int = 1
    width: int = 0
    planes: int = 1
    turned: bool = False

    @property
    def shared(self) -> bool:
        """Whether all heads see the same."""
        return "heads" not in self.roles and "columns" not in self.roles

    def entries(self, tile: int) -> int:
        """Entries of the token axis that a tile of tokens needs."""
        return max(1, tile // self.every)

    def kept(self) -> tuple[str, ...]:
        """Roles of the axes of a head's tile."""
        return tuple(role for role in self.roles if role not in ("batch", "heads"))


@dataclasses.dataclass(frozen=True)
class Side:
    """Keys or values: the arrays they are made of and the product with a tile of them.

    Attributes:
        parts: arrays; those that belong to a head come before those that all heads share.
        product: keys: (queries, *tiles) -> float32[M, tile] scores; values: (float32[M, tile]
            weights, *tiles) -> tuple of float32[M, width].
        widths: last axes of the queries, or of the outputs; more than one where a head's channels
            are stored in planes.
        prepare: turns the tiles of the shared parts into what `product` takes, once for all heads.
        rebuild: FLOPs that it costs to make one token's key of one head.
        narrows: whether the product takes the first channels of a tile alone.
    """

    parts: tuple[Part, ...]
    product: Callable[..., Any]
    widths: tuple[int, ...]
    prepare: Callable[..., tuple[Array, ...]] = lambda *tiles: tiles
    rebuild: int = 0
    narrows: bool = False

    @property
    def shared(self) -> bool:
        """Whether all heads see the same."""
        return all(part.shared for part in self.parts)

    def flops(self, rows: int) -> int:
        """FLOPs for each token and head."""
        return 2 * rows * sum(self.widths) + self.rebuild


@dataclasses.dataclass(frozen=True)
class Problem:
    """Everything static about one call.

    Attributes:
        heads, group, queries: K, G and S.
        keys, values: the cache's two sides.
        tokens: N.
        starts, capacities: each head's place on the token axis; (0, N) where all heads share it.
        scale: factor on the scores.
        tile, splits: as asked for; None leaves the choice to the program.
    """

    heads: int
    group: int
    queries: int
    keys: Side
    values: Side
    tokens: int
    starts: tuple[int, ...]
    capacities: tuple[int, ...]
    scale: float
    tile: int | None = None
    splits: int | None = None

    @property
    def rows(self) -> int:
        """M, query rows of a key head."""
        return self.queries * self.group

    @property
    def flat(self) -> bool:
        """Whether each head has a place of its own on the token axis."""
        return self.keys.shared

    def tile_or(self, default: int) -> int:
        """The tile asked for, or about `default` tokens: whole groups of tokens with one scale."""
        every = max(part.every for part in self.keys.parts)
        if self.tile is not None:
            return min(self.tile, self.tokens)
        fits = default % every == 0 or every % default == 0
        return min(default if fits else math.lcm(every, 128), self.tokens)


class Operands(NamedTuple):
    """Arrays of one call: queries [B, K, M, D] (by plane), int32[B, K] lengths, the parts."""

    queries: tuple[Array, ...]
    lengths: Array
    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def hidden(rows: Array, *, queries: int, group: int) -> Array:
    """How many of the last keys a query row does not see: S - 1 - rows // G."""
    after = jnp.full_like(rows, queries - 1)
    for query in range(1, queries):
        after -= (rows >= query * group).astype(after.dtype)
    return after


def dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    """Matrix product with float32 sums; float32 operands are not rounded."""
    exact = a.dtype == jnp.float32
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )


# --- sides ---------------------------------------------------------------------------------------

TOKENS = ("batch", "tokens", "heads", "whole")  # [B, T, K, W]
FLAT = ("batch", "tokens", "whole")  # [B, N, W]
ALONG = ("batch", "heads", "whole", "tokens")  # [B, K, 1, T], a number for each token
FLAT_ALONG = ("batch", "whole", "tokens")  # [B, 1, N]


def plain_keys(roles: tuple[str, ...], width: int) -> Side:
    """Keys as they are."""
    return Side((Part(roles),), _plain_scores, (width,))


def plain_values(roles: tuple[str, ...], width: int) -> Side:
    """Values as they are."""
    return Side((Part(roles),), _plain_outputs, (width,))


def leading_values(roles: tuple[str, ...], width: int) -> Side:
    """Values that are the first channels of keys."""
    product = partial(_leading_outputs, width=width)
    return Side((Part(roles),), product, (width,), narrows=True)


def _leading_outputs(weights: Array, k: Array, *, width: int) -> tuple[Array, ...]:
    return _plain_outputs(weights, k[:, :width])


def _plain_scores(queries: tuple[Array, ...], k: Array) -> Array:
    return dot(queries[0], k, (1, 1))


def _plain_outputs(weights: Array, v: Array) -> tuple[Array, ...]:
    return (dot(weights.astype(v.dtype), v, (1, 0)),)


def quantized_keys(width: int, *, bits: int, every: int | None, offset: bool) -> Side:
    """Quantized values [B, T, K, W], scales and perhaps offsets [B, T / every, K, W].

    `every` is None for one scale over all tokens.
    """
    planes = 8 // bits
    roles = TOKENS if every else ("batch", "whole", "heads", "whole")
    scales = (Part(roles, every=every or 1, planes=planes),) * (1 + offset)
    product = partial(_quantized_scores, bits=bits)
    return Side((Part(TOKENS), *scales), product, (width // planes,) * planes)


def token_quantized_keys(roles: tuple[str, ...], width: int, *, bits: int, offset: bool) -> Side:
    """Values [B, T, K, W] or [B, N, W], float32 scales and perhaps offsets with the tokens last."""
    planes = 8 // bits
    product = partial(_token_quantized_scores, bits=bits)
    return Side(_with_scales(roles, offset), product, (width // planes,) * planes)


def quantized_values(
    roles: tuple[str, ...], width: int, *, bits: int, offset: bool, dtype: jnp.dtype
) -> Side:
    """Values [B, T, K, W] or [B, N, W], float32 scales (and offsets) with the tokens last.

    Products run in `dtype`.
    """
    planes = 8 // bits
    product = partial(_quantized_outputs, bits=bits, dtype=dtype)
    return Side(_with_scales(roles, offset), product, (width // planes,) * planes)


def _with_scales(roles: tuple[str, ...], offset: bool) -> tuple[Part, ...]:
    along = ALONG if roles == TOKENS else FLAT_ALONG
    return (Part(roles), *(Part(along),) * (1 + offset))


def qvalue_planes(qvalues: Array, bits: int) -> tuple[Array, ...]:
    """Signed float32 quantized values: int8 as it is; of a uint8, the low and the high nibble."""
    if bits == 8:
        return (qvalues.astype(jnp.float32),)
    wide = qvalues.astype(jnp.int32)
    nibbles = wide & 15, wide >> 4
    return tuple(((nibble ^ 8) - 8).astype(jnp.float32) for nibble in nibbles)


def _quantized_scores(
    queries: tuple[Array, ...],
    qvalues: Array,
    scale: Array | tuple[Array, ...],
    offset: Array | tuple[Array, ...] | None = None,
    *,
    bits: int,
) -> Array:
    planes = len(queries)
    scales = _spread(scale, qvalues.shape[0], planes)
    offsets = [0.0] * planes if offset is None else _spread(offset, qvalues.shape[0], planes)
    products = [
        dot(q, (plane * scale + offset).astype(q.dtype), (1, 1))
        for q, plane, scale, offset in zip(queries, qvalue_planes(qvalues, bits), scales, offsets)
    ]
    return sum(products[1:], start=products[0])


def _token_quantized_scores(
    queries: tuple[Array, ...],
    qvalues: Array,
    scale: Array,
    offset: Array | None = None,
    *,
    bits: int,
) -> Array:
    # As with values: a token's scale is a factor on its score, and the quantized values are exact.
    planes = qvalue_planes(qvalues, bits)
    products = [dot(q, plane.astype(q.dtype), (1, 1)) for q, plane in zip(queries, planes)]
    scores = sum(products[1:], start=products[0]) * scale
    if offset is not None:
        sums = [jnp.sum(q.astype(jnp.float32), axis=1, keepdims=True) for q in queries]
        scores += sum(sums[1:], start=sums[0]) * offset
    return scores


def _spread(scale: Array | tuple[Array, ...], tokens: int, planes: int) -> list[Array]:
    """A scale for every few tokens, [n, W], over those of a tile, [tokens, W / planes] each."""
    if isinstance(scale, tuple):
        return [plane for each in scale for plane in _spread(each, tokens, 1)]
    entries, width = scale.shape
    scale = scale.astype(jnp.float32)
    if entries not in (1, tokens):
        shape = tokens // entries, width
        parts = [jnp.broadcast_to(scale[i : i + 1], shape) for i in range(entries)]
        scale = jnp.concatenate(parts)
    return [scale] if planes == 1 else jnp.split(scale, planes, axis=1)


def _quantized_outputs(
    weights: Array,
    qvalues: Array,
    scale: Array,
    offset: Array | None = None,
    *,
    bits: int,
    dtype: jnp.dtype,
) -> tuple[Array, ...]:
    # A token's scale is a factor on its weight: the quantized values themselves are exact in any
    # dtype.
    scaled = (weights * scale.astype(jnp.float32)).astype(dtype)
    outputs = [dot(scaled, plane.astype(dtype), (1, 0)) for plane in qvalue_planes(qvalues, bits)]
    if offset is not None:
        constant = jnp.sum(weights * offset.astype(jnp.float32), axis=1, keepdims=True)
        outputs = [output + constant for output in outputs]
    return tuple(outputs)


def low_rank_keys(width: int, rank: int) -> Side:
    """Basis [R, K W]; shared: features [B, T, R], positions [B, 1, T], frequencies [W / 2, 1]."""
    parts = (
        Part(("whole", "columns"), width=width),
        Part(FLAT),
        Part(("batch", "whole", "tokens")),
        Part(("whole", "whole")),
    )
    return Side(parts, _low_rank_scores, (width,), prepare=_angles, rebuild=2 * rank * width)


def _angles(features: Array, positions: Array, frequencies: Array) -> tuple[Array, ...]:
    angle = frequencies * positions.astype(jnp.float32)  # [D / 2, tile]
    return features, jnp.cos(angle), jnp.sin(angle)


def _low_rank_scores(
    queries: tuple[Array, ...], basis: Array, features: Array, cos: Array, sin: Array
) -> Array:
    # Rebuilt with the tokens along the last axis: the two halves of the channels are then slices
    # of rows, and the scores need no transposed product.
    k = dot(basis, features, (0, 1))  # [D, tile]
    first, second = k[: k.shape[0] // 2], k[k.shape[0] // 2 :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin])
    return dot(queries[0], rotated.astype(queries[0].dtype), (1, 0))


# --- the list of all tiles -----------------------------------------------------------------------


def tile_list(tiles: Array, index: Array) -> tuple[Array, Array]:
    """Row and tile within the row, of entries of the list of all tiles of all rows.

    Args:
        tiles: int32[R], tiles of each row.
        index: int32, places in the list; beyond the end, the last row's next tiles.
    """
    ends = jnp.cumsum(tiles)
    row = jnp.minimum(jnp.searchsorted(ends, index, side="right"), tiles.shape[0] - 1)
    row = row.astype(jnp.int32)
    return row, index - (ends - tiles)[row]


def segments(tiles: Array, workers: int) -> tuple[Array, Array, Array]:
    """Cut the list of all tiles evenly for a number of workers, and where a row ends.

    Each worker's share is a contiguous range of ceil(total / workers) tiles at most, whatever the
    rows' lengths (LeanAttention's balanced division); a range that spans several rows becomes
    several segments.

    Args:
        tiles: int32[R], tiles of each row.
        workers: P.

    Returns:
        int32[R + P - 1] each: row, first tile in the row, and stop; empty segments stop at their
        first.
    """
    ends = jnp.cumsum(tiles)
    total = ends[-1]
    share = -(-total // workers)
    cuts = jnp.minimum(jnp.arange(1, workers, dtype=jnp.int32) * share, total)
    first = jnp.sort(jnp.concatenate([ends - tiles, cuts]))
    stop = jnp.concatenate([first[1:], total[None]])
    row, start = tile_list(tiles, first)
    return row, start, start + stop - first
