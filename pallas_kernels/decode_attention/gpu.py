"""Decode attention on a GPU (Triton): the list of all tiles, divided evenly among workers.

Each program takes one segment: consecutive tiles of one batch row and key head, at most
ceil(all tiles / workers) of them however the lengths differ, and writes a partial result. XLA
merges these by log-sum-exp. Loads are masked by the lengths: keys beyond a length are not read.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.decode_attention.tiles import Operands, Part, Problem, hidden, segments
from pallas_kernels.merge import merge_rows

WORKERS = 528  # four for each multiprocessor of a large GPU
TILE = 64
SIDE = 16  # the least side of a product on tensor cores


def gpu_refusal(problem: Problem, operands: Operands) -> str | None:
    """Why the kernel cannot run this, or None."""
    if problem.values.narrows:
        return "latents have no GPU kernel: 576 channels do not fit a program's tiles; use 'xla'"
    if problem.keys.rebuild:
        return (
            "low-rank keys have no GPU kernel: their basis does not fit beside a program's tiles; "
            "use 'xla'"
        )
    widest = max(*problem.keys.widths, *problem.values.widths)
    if widest > 256:
        return f"head dims up to 256 fit a program's registers, got {widest}; use 'xla'"
    tile = problem.tile
    if tile and (tile < SIDE or tile & (tile - 1)):
        return f"a tile must be a power of two of at least {SIDE} tokens, got {tile}"
    return None


def pallas_gpu(
    problem: Problem, operands: Operands, *, interpret: bool
) -> tuple[tuple[Array, ...], Array]:
    """Outputs float32[B, K, M, W] (by plane) and log-sum-exps float32[B, K, M]."""
    batch, heads = operands.lengths.shape
    tile = problem.tile or TILE
    tiles = (-(-operands.lengths // tile)).reshape(-1)
    most = batch * sum(-(-capacity // tile) for capacity in problem.capacities)
    row, first, stop = segments(tiles, min(problem.splits or WORKERS, most))
    count, rows = row.shape[0], max(SIDE, pl.next_power_of_2(problem.rows))
    queries = tuple(_padded(q, rows) for q in operands.queries)
    shapes = [(count, rows, _side(width)) for width in problem.values.widths] + [(count, rows)]
    arrays = *queries, *operands.keys, *operands.values
    *planes, log_sum_exps = pl.pallas_call(
        partial(_kernel, problem=problem, tile=tile),
        grid=(count,),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=_cost(problem, operands, most, rows, tile, shapes),
        name="decode_attention",
        interpret=interpret,
    )(row, first, stop, operands.lengths, jnp.asarray(problem.starts, jnp.int32), *arrays)

    outputs, log_sum_exps = merge_rows(
        jnp.concatenate(planes, axis=-1), log_sum_exps, row, count=batch * heads
    )
    outputs = outputs.reshape(batch, heads, rows, -1)[:, :, : problem.rows]
    ends = [sum(plane.shape[-1] for plane in planes[:i]) for i in range(1, len(planes))]
    pieces = jnp.split(outputs, ends, axis=-1)
    log_sum_exps = log_sum_exps.reshape(batch, heads, rows)[:, :, : problem.rows]
    return tuple(x[..., :width] for x, width in zip(pieces, problem.values.widths)), log_sum_exps


def _kernel(
    segment_row: Any,
    first: Any,
    stop: Any,
    lengths: Any,
    starts: Any,
    *refs: Any,
    problem: Problem,
    tile: int,
) -> None:
    planes, count = len(problem.keys.widths), len(problem.keys.parts)
    outputs = len(problem.values.widths)
    query_refs, keys = refs[:planes], refs[planes : planes + count]
    values, results = refs[planes + count : -outputs - 1], refs[-outputs - 1 :]
    segment = pl.program_id(0)
    row = segment_row[segment]
    b, h = row // problem.heads, row % problem.heads
    start, length = starts[h], lengths[b, h]
    queries = tuple(ref[b, h, :, :] for ref in query_refs)
    rows = queries[0].shape[0]
    back = hidden(jnp.arange(rows), queries=problem.queries, group=problem.group)

    def step(number: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        peak, total, *sums = carry
        slots = number * tile + jnp.arange(tile)
        load = partial(_load, b=b, h=h, tokens=start + slots, valid=slots < length)
        own = [load(ref, part) for ref, part in zip(keys, problem.keys.parts)]
        scores = problem.keys.product(queries, *own) * problem.scale
        seen = (slots[None, :] < length - back[:, None]) & (slots < length)[None, :]
        scores = jnp.where(seen, scores, -jnp.inf)
        new = jnp.maximum(peak, jnp.max(scores, axis=1))
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        fade, weights = jnp.exp(peak - safe), jnp.exp(scores - safe[:, None])
        own = [load(ref, part) for ref, part in zip(values, problem.values.parts)]
        products = problem.values.product(weights, *own)
        sums = [fade[:, None] * each + product for each, product in zip(sums, products)]
        return new, fade * total + jnp.sum(weights, axis=1), *sums

    carry = (
        jnp.full((rows,), -jnp.inf, jnp.float32),
        jnp.zeros((rows,), jnp.float32),
        *(jnp.zeros((rows, _side(width)), jnp.float32) for width in problem.values.widths),
    )
    peak, total, *sums = jax.lax.fori_loop(first[segment], stop[segment], step, carry)
    divisor = jnp.where(total > 0, total, 1.0)
    for result, each in zip(results, sums):
        result[segment, :, :] = each / divisor[:, None]
    results[-1][segment, :] = jnp.where(total > 0, peak + jnp.log(divisor), -jnp.inf)


def _load(ref: Any, part: Part, *, b: Array, h: Array, tokens: Array, valid: Array) -> Any:
    """A head's tile, [tokens, W] or [W, tokens], or its planes; zero for tokens not valid."""
    planes = []
    for plane in range(part.planes):
        index, masks = [], []
        for i, (role, size) in enumerate(zip(part.roles, ref.shape)):
            if role in ("batch", "heads"):
                index.append(b if role == "batch" else h)
                continue
            if role == "tokens":
                places, inside = jax.lax.div(tokens, part.every), valid
            else:
                last = i == len(ref.shape) - 1
                size = size // part.planes if last else size
                places = jnp.arange(_side(size, SIDE if last else 1))
                inside = places < size
                places += plane * size if last else 0
            axis = 1 if not masks else 0  # the two axes that remain broadcast against each other
            index.append(jnp.expand_dims(places, axis))
            masks.append(jnp.expand_dims(inside, axis))
        planes.append(plgpu.load(ref.at[tuple(index)], mask=masks[0] & masks[1], other=0))
    return planes[0] if part.planes == 1 else tuple(planes)


def _side(width: int, least: int = SIDE) -> int:
    """A side of a block: a power of two."""
    return max(least, pl.next_power_of_2(width))


def _padded(q: Array, rows: int) -> Array:
    widths = (0, 0), (0, 0), (0, rows - q.shape[2]), (0, _side(q.shape[3]) - q.shape[3])
    return jnp.pad(q, widths)


def _cost(
    problem: Problem,
    operands: Operands,
    tiles: int,
    rows: int,
    tile: int,
    shapes: list[tuple[int, ...]],
) -> pl.CostEstimate:
    """All tiles at full lengths: what each loads, and its products, padding included."""
    batch = operands.lengths.shape[0]
    sides = [_side(width) for width in problem.keys.widths + problem.values.widths]
    slots = batch * sum(problem.capacities)
    moved = 0
    for part, array in zip(
        (*problem.keys.parts, *problem.values.parts), (*operands.keys, *operands.values)
    ):
        entry = math.prod(size for role, size in zip(part.roles, array.shape) if role == "whole")
        times = -(-slots // part.every) if "tokens" in part.roles else tiles
        moved += entry * times * array.dtype.itemsize
    moved += sum(4 * math.prod(shape) for shape in shapes)
    segments_ = shapes[0][0]
    moved += segments_ * sum(rows * _side(q.shape[-1]) * q.dtype.itemsize for q in operands.queries)
    return pl.CostEstimate(
        flops=2 * tiles * tile * rows * sum(sides),
        bytes_accessed=moved,
        transcendentals=tiles * tile * rows,
    )
