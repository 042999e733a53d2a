"""Decode attention in XLA: a few lanes share the list of all tiles that hold valid keys.

Rows are pairs of a batch row and a key head. The number of steps follows the lengths, so that short
rows take little time. Not differentiable in reverse: the loop's length is data.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode_attention.tiles import (
    Operands,
    Part,
    Problem,
    Side,
    hidden,
    tile_list,
)
from pallas_kernels.merge import merge_rows

LANES, TILE = 8, 256


def xla(problem: Problem, operands: Operands) -> tuple[tuple[Array, ...], Array]:
    """Outputs float32[B, K, M, W] (by plane) and log-sum-exps float32[B, K, M]."""
    batch, heads = operands.lengths.shape
    tile = problem.tile_or(TILE)
    tiles = (-(-operands.lengths // tile)).reshape(-1)
    most = batch * sum(-(-capacity // tile) for capacity in problem.capacities)
    lanes = max(1, min(problem.splits or LANES, most))
    total = jnp.sum(tiles)
    steps = -(-total // lanes)
    starts = jnp.asarray(problem.starts, jnp.int32)
    widths = problem.values.widths

    def lane(place: Array) -> tuple[Array, Array, Array]:
        """The partial result of one place in the list: row, [M, sum W], [M]."""
        row, number = tile_list(tiles, place)
        b, h = row // heads, row % heads
        length = jnp.where(place < total, operands.lengths[b, h], 0)
        wanted = number * tile  # slots of this head before the tile
        first = jnp.minimum(starts[h] + wanted, problem.tokens - tile)  # the last tile moves back
        slots = first - starts[h] + jnp.arange(tile, dtype=jnp.int32)
        fresh = (slots >= wanted) & (slots < length)
        back = hidden(jnp.arange(problem.rows), queries=problem.queries, group=problem.group)
        seen = fresh & (slots < length - back[:, None])  # [M, tile]

        queries = tuple(q[b, h] for q in operands.queries)
        keys = cut(problem.keys, operands.keys, b, h, first, tile)
        scores = problem.keys.product(queries, *keys) * problem.scale
        scores = jnp.where(seen, scores, -jnp.inf)
        peak = jnp.max(scores, axis=1, keepdims=True)
        peak = jnp.where(jnp.isfinite(peak), peak, 0.0)
        weights = jnp.where(seen, jnp.exp(scores - peak), 0.0)
        sums = jnp.sum(weights, axis=1, keepdims=True)
        values = cut(problem.values, operands.values, b, h, first, tile, fresh)
        outputs = jnp.concatenate(problem.values.product(weights, *values), axis=1)
        return row, outputs / jnp.where(sums > 0, sums, 1.0), (peak + jnp.log(sums))[:, 0]

    def step(i: Array, merged: tuple[Array, Array]) -> tuple[Array, Array]:
        places = jnp.arange(lanes, dtype=jnp.int32) * steps + i
        rows, outputs, log_sum_exps = jax.vmap(lane)(places)
        return merge_rows(
            jnp.concatenate([merged[0], outputs]),
            jnp.concatenate([merged[1], log_sum_exps]),
            jnp.concatenate([jnp.arange(batch * heads, dtype=jnp.int32), rows]),
            count=batch * heads,
        )

    empty = jnp.zeros((batch * heads, problem.rows, sum(widths)), jnp.float32)
    nothing = jnp.full(empty.shape[:2], -jnp.inf)
    outputs, log_sum_exps = jax.lax.fori_loop(0, steps, step, (empty, nothing))
    outputs = outputs.reshape(batch, heads, problem.rows, -1)
    ends = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
    planes = tuple(jnp.split(outputs, ends, axis=-1))
    return planes, log_sum_exps.reshape(batch, heads, problem.rows)


def cut(
    side: Side,
    arrays: tuple[Array, ...],
    b: Array,
    h: Array,
    first: Array,
    tile: int,
    valid: Array | None = None,
) -> list[Array]:
    """One head's tiles of a side's arrays, as its product takes them.

    With `valid`, bool[tile], what belongs to other tokens is zero.
    """
    tiles = [_slice(part, array, b, h, first, tile) for part, array in zip(side.parts, arrays)]
    if valid is not None:
        tiles = [
            jnp.where(jnp.expand_dims(valid, 1 - part.kept().index("tokens")), x, jnp.zeros_like(x))
            for part, x in zip(side.parts, tiles)
        ]
    own = [x for part, x in zip(side.parts, tiles) if not part.shared]
    return own + list(side.prepare(*tiles[len(own) :]))


def _slice(part: Part, array: Array, b: Array, h: Array, first: Array, tile: int) -> Array:
    starts, sizes = [], []
    for role, size in zip(part.roles, array.shape):
        start, size = {
            "batch": (b, 1),
            "heads": (h, 1),
            "tokens": (first // part.every, part.entries(tile)),
            "columns": (h * part.width, part.width),
            "whole": (jnp.zeros_like(first), size),
        }[role]
        starts.append(start)
        sizes.append(size)
    piece = jax.lax.dynamic_slice(array, starts, sizes)
    dropped = [axis for axis, role in enumerate(part.roles) if role in ("batch", "heads")]
    return jax.lax.squeeze(piece, dropped)
