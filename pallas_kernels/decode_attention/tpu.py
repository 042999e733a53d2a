"""Decode attention on a TPU: one core walks the list of all tiles that hold valid keys.

For each batch row, scalar memory holds a list of visits (group of heads, tile). In a cache whose
heads share the token axis, a tile holds all heads of a group (mostly all there are) and is visited
once; in a flat cache a group is one head, and a tile that two heads share is visited by both in
turn, without being read twice. Visits beyond the end of a row's list repeat the last one and do
nothing: no bandwidth is spent on tiles beyond a row's length, and no further balancing is needed,
since the core's work is the sum over all rows anyway.

Arrays whose last axis is no multiple of 128 enter with the tokens last, [B, K, W, T]: this is how
XLA stores such arrays on a TPU (nothing is padded), so that nothing is copied.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.decode_attention.tiles import (
    TOKENS,
    Operands,
    Part,
    Problem,
    hidden,
    tile_list,
)

SIZES = (512, 256, 128)
# Of a tile's tokens, of what all tiles need, and of both at the very most; each is held twice.
TILE_BYTES, WHOLE_BYTES, MOST_BYTES = 2 << 20, 2 << 20, 5 << 20


def tpu_refusal(problem: Problem, operands: Operands) -> str | None:
    """Why the kernel cannot run this, or None."""
    if operands.queries[0].dtype == jnp.float16:
        return "TPUs have no float16; use bfloat16 or float32"
    if problem.tile and problem.tile % 128 and problem.tile < problem.tokens:
        return f"a tile must be a multiple of 128 tokens, or all of them; got {problem.tile}"
    tile, together = _blocks(problem, operands)
    if (needed := sum(_bytes(problem, operands, tile, together))) > MOST_BYTES:
        return (
            f"a tile of {tile} tokens takes {needed} bytes on the chip, of which {MOST_BYTES} fit; "
            f"choose a smaller tile, and a power of two of tokens for each scale"
        )
    return None


def pallas_tpu(
    problem: Problem, operands: Operands, *, interpret: bool
) -> tuple[tuple[Array, ...], Array]:
    """Outputs [B, K, M, W] (by plane) and log-sum-exps float32[B, K, M]."""
    batch, heads = operands.lengths.shape
    tile, together = _blocks(problem, operands)
    rows, grouped = problem.rows, together * problem.rows
    visited, visits = _visits(problem, operands.lengths, tile, together)
    parts, arrays = [], []
    for side, given in ((problem.keys, operands.keys), (problem.values, operands.values)):
        for part, array in zip(side.parts, given):
            part, array = _tokens_last(part, array)
            parts.append(part)
            arrays.append(array)

    copies = [
        (array.shape[-1] // 128 * tile * together, 128)
        if _by_stride(part, array.shape, together)
        else None
        for part, array in zip(parts, arrays)
    ]

    def place(b: Any, j: Any, groups: Any, tiles: Any, *_: Any) -> tuple:
        return b, groups[b, j], tiles[b, j]

    def spec(part: Part, shape: tuple[int, ...]) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple:
            b, group, number = place(*grid)
            entry = jax.lax.div(number, max(1, part.every // tile))
            by_role = {"batch": b, "heads": group, "columns": group, "tokens": entry, "whole": 0}
            return tuple(by_role[role] for role in part.roles)

        return pl.BlockSpec(_block(part, shape, tile, together), index)

    def by_head(width: int) -> pl.BlockSpec:
        def index(*grid: Any) -> tuple:
            b, group, _ = place(*grid)
            return b, group, 0, 0

        return pl.BlockSpec((None, together, rows, width), index)

    widths, dtype = problem.values.widths, operands.queries[0].dtype
    shapes = [(width, dtype) for width in widths] + [(1, jnp.dtype(jnp.float32))]
    results = pl.pallas_call(
        partial(
            _kernel,
            problem=problem,
            parts=tuple(parts),
            copied=tuple(copy is not None for copy in copies),
            tile=tile,
            together=together,
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, visits),
            in_specs=[
                *(by_head(q.shape[-1]) for q in operands.queries),
                *(spec(part, array.shape) for part, array in zip(parts, arrays)),
            ],
            out_specs=[by_head(width) for width, _ in shapes],
            scratch_shapes=[
                pltpu.VMEM((grouped, tile), jnp.float32),  # scores, then weights
                pltpu.VMEM((grouped, 1), jnp.float32),  # peak
                pltpu.VMEM((grouped, 1), jnp.float32),  # sum
                *(pltpu.VMEM((grouped, width), jnp.float32) for width in widths),
                *(pltpu.VMEM(shape, jnp.float32) for shape in copies if shape),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((batch, heads, rows, width), dtype) for width, dtype in shapes
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        cost_estimate=_cost(problem, operands, parts, arrays, tile, together),
        name="decode_attention",
        interpret=interpret,
    )(
        *visited,
        operands.lengths,
        jnp.asarray(problem.starts, jnp.int32),
        *operands.queries,
        *arrays,
    )
    *planes, log_sum_exps = results
    return tuple(planes), log_sum_exps[..., 0]


def _kernel(
    groups: Any,
    tiles: Any,
    counts: Any,
    lengths: Any,
    starts: Any,
    *refs: Any,
    problem: Problem,
    parts: tuple[Part, ...],
    copied: tuple[bool, ...],
    tile: int,
    together: int,
) -> None:
    planes, outputs = len(problem.keys.widths), len(problem.values.widths)
    queries, blocks, results, (log_sum_exps, scores, peak, total), sums, copies = _split(
        refs, planes, len(parts), outputs, 4, outputs, sum(copied)
    )
    copies = list(copies)
    blocks = [
        _Block(ref, part, copies.pop(0) if copy else None)
        for ref, part, copy in zip(blocks, parts, copied)
    ]
    keys, values = _split(blocks, len(problem.keys.parts), len(problem.values.parts))
    b, j = pl.program_id(0), pl.program_id(1)
    before, after = jnp.maximum(j - 1, 0), jnp.minimum(j + 1, pl.num_programs(1) - 1)
    group, rows = groups[b, j], problem.rows

    @pl.when((j == 0) | (groups[b, before] != group))
    def start():
        peak[...] = jnp.full_like(peak, -jnp.inf)
        total[...] = jnp.zeros_like(total)
        for each in sums:
            each[...] = jnp.zeros_like(each)

    @pl.when(j < counts[b])
    def visit():
        # The tile's first slot, counted from each head's start, and each head's valid slots.
        own = [tiles[b, j] * tile - starts[group * together + h] for h in range(together)]
        ends = [lengths[b, group * together + h] for h in range(together)]
        columns = jax.lax.broadcasted_iota(jnp.int32, (rows, tile), 1)
        row = jax.lax.broadcasted_iota(jnp.int32, (rows, tile), 0)
        back = hidden(row, queries=problem.queries, group=problem.group)
        for block in blocks:
            block.unpack()
        for_all = problem.keys.prepare(*(key.load() for key in keys if key.part.shared))
        for h in range(together):
            mine = [key.load(h) for key in keys if not key.part.shared]
            product = problem.keys.product(tuple(q[h] for q in queries), *mine, *for_all)
            slots = columns + own[h]
            seen = (slots >= 0) & (slots < ends[h] - back)
            scores[h * rows : (h + 1) * rows] = jnp.where(seen, product * problem.scale, -jnp.inf)

        old = peak[...]
        new = jnp.maximum(old, jnp.max(scores[...], axis=1, keepdims=True))
        safe = jnp.where(new == -jnp.inf, 0.0, new)
        fade, weights = jnp.exp(old - safe), jnp.exp(scores[...] - safe)
        peak[...] = new
        total[...] = fade * total[...] + jnp.sum(weights, axis=1, keepdims=True)
        scores[...] = weights
        for each in sums:
            each[...] = fade * each[...]
        # Values that all heads share need one product for all of them.
        for h in range(1 if problem.values.shared else together):
            here = slice(None) if problem.values.shared else slice(h * rows, (h + 1) * rows)
            end = functools.reduce(jnp.maximum, ends) if problem.values.shared else ends[h]
            loaded = [value.load(h, own[h], end) for value in values]
            for each, product in zip(sums, problem.values.product(scores[here], *loaded)):
                each[here] = each[here] + product

    @pl.when((j == pl.num_programs(1) - 1) | (groups[b, after] != group))
    def finish():
        empty = total[...] == 0
        for h in range(together):
            here = slice(h * rows, (h + 1) * rows)
            divisor = jnp.where(empty[here], 1.0, total[here])
            for result, each in zip(results, sums):
                result[h] = (each[here] / divisor).astype(result.dtype)
            log_sum_exps[h] = jnp.where(empty[here], -jnp.inf, peak[here] + jnp.log(divisor))


def _split(items: Any, *counts: int) -> list:
    stops = list(itertools.accumulate(counts))
    return [items[stop - count : stop] for stop, count in zip(stops, counts)]


@dataclasses.dataclass(frozen=True)
class _Block:
    """An array's block in a kernel.

    Attributes:
        ref: the block; all of its heads.
        part: what its axes mean.
        copy: float32[W / 128 * tokens * heads, 128] memory for the block as rows, 128 columns after
            the others. A head's rows can be loaded with a stride, which memory of 32 bits and 128
            columns alone can do; taking them out of the packed block one by one would cost more
            than all else.
    """

    ref: Any
    part: Part
    copy: Any

    def unpack(self) -> None:
        """Fill the copy, if there is one."""
        if self.copy is not None:
            x = self.ref[...]
            if jnp.issubdtype(x.dtype, jnp.integer):
                x = x.astype(jnp.int32)
            x = x.astype(jnp.float32)
            tokens, together, width = x.shape
            rows = tokens * together
            for i in range(width // 128):
                columns = x[:, :, 128 * i : 128 * (i + 1)]
                self.copy[rows * i : rows * (i + 1)] = columns.reshape(rows, 128)

    def load(self, h: int = 0, own: Array | None = None, end: Array | None = None) -> Array:
        """A head's tile; with `end`, tokens that are not the head's are zero."""
        roles = [role for role in self.part.roles if role != "batch"]
        if self.copy is not None:
            tokens, together, width = self.ref.shape
            starts = range(h, width // 128 * tokens * together, tokens * together)
            columns = [self.copy[pl.ds(i, tokens, stride=together), :] for i in starts]
            x = jnp.concatenate(columns, axis=1)
            if jnp.issubdtype(self.ref.dtype, jnp.floating):
                x = x.astype(self.ref.dtype)
        else:
            index: list[Any] = [slice(None)] * len(roles)
            if "heads" in roles:
                index[roles.index("heads")] = h
            if "columns" in roles:
                index[roles.index("columns")] = pl.ds(h * self.part.width, self.part.width)
            x = self.ref[tuple(index)]
        kept = self.part.kept()
        if own is not None and end is not None and "tokens" in kept:
            slots = own + jax.lax.broadcasted_iota(jnp.int32, x.shape, kept.index("tokens"))
            x = jnp.where((slots >= 0) & (slots < end), x, jnp.zeros_like(x))
        return x.T if self.part.turned else x


def _by_stride(part: Part, shape: tuple[int, ...], together: int) -> bool:
    """Whether a block [tokens, heads, W] can become rows in memory as it stands."""
    rows = part.roles == TOKENS and part.every == 1
    return rows and not part.turned and together % 8 == 0 and shape[-1] % 128 == 0


def _visits(
    problem: Problem, lengths: Array, tile: int, together: int
) -> tuple[tuple[Array, Array, Array], int]:
    """int32[B, V] groups and tiles to visit, int32[B] how many; and V."""
    first, most = _reach(problem, np.asarray(problem.capacities), tile, together)
    visits = int(most.sum())
    longest = lengths.reshape(lengths.shape[0], -1, together).max(axis=2)
    stops = jnp.asarray(problem.starts[::together], jnp.int32) + longest
    reached = jnp.maximum(-(-stops // tile) - first, 1)  # an empty group has one visit: its zeros
    place = jnp.arange(visits, dtype=jnp.int32)

    def of_row(reached: Array) -> tuple[Array, Array, Array]:
        count = jnp.sum(reached)
        group, number = tile_list(reached, jnp.minimum(place, count - 1))
        return group, jnp.asarray(first, jnp.int32)[group] + number, count

    return jax.vmap(of_row)(reached.astype(jnp.int32)), visits


def _reach(
    problem: Problem, lengths: np.ndarray, tile: int, together: int
) -> tuple[np.ndarray, np.ndarray]:
    """First tile of each group of heads, and number of tiles that host lengths [K] reach."""
    starts = np.asarray(problem.starts, np.int32)[::together]
    longest = lengths.reshape(-1, together).max(axis=1)
    first = starts // tile
    return first, np.maximum(-(-(starts + longest) // tile) - first, 1)


def _tokens_last(part: Part, array: Array) -> tuple[Part, Array]:
    """Arrays with a short last axis with the tokens last."""
    if "tokens" not in part.roles[:-1] or part.every > 1 or array.shape[-1] % 128 == 0:
        return part, array
    axis = part.roles.index("tokens")
    order = [i for i in range(array.ndim) if i != axis] + [axis]
    roles = tuple(part.roles[i] for i in order)
    return dataclasses.replace(part, roles=roles, turned=True), array.transpose(order)


def _block(part: Part, shape: tuple[int, ...], tile: int, together: int) -> tuple[int | None, ...]:
    by_role = {"batch": None, "heads": together, "columns": together * part.width}
    by_role["tokens"] = part.entries(tile)
    return tuple(by_role.get(role, size) for role, size in zip(part.roles, shape))


def _blocks(problem: Problem, operands: Operands) -> tuple[int, int]:
    """Tokens in a tile and heads in a group, so that a tile's arrays fit the memory."""
    heads = problem.heads
    fewer = [n for n in range(heads - 1, 7, -1) if n % 8 == 0 and heads % n == 0]
    groups = [1] if problem.flat else [heads, *fewer]
    tiles = [problem.tile] if problem.tile else SIZES
    choices = [(problem.tile_or(tile), together) for together in groups for tile in tiles]
    for choice in choices:
        of_tile, of_all = _bytes(problem, operands, *choice)
        if of_tile <= TILE_BYTES and of_all <= WHOLE_BYTES:
            return choice
    return min(choices, key=lambda choice: sum(_bytes(problem, operands, *choice)))


def _bytes(problem: Problem, operands: Operands, tile: int, together: int) -> tuple[int, int]:
    """Bytes of a visit's blocks: of those cut along the tokens, and of the others."""
    of_tile = of_all = 0
    parts = (*problem.keys.parts, *problem.values.parts)
    for part, array in zip(parts, (*operands.keys, *operands.values)):
        block = _size(_block(part, array.shape, tile, together)) * array.dtype.itemsize
        of_tile += block * ("tokens" in part.roles)
        of_all += block * ("tokens" not in part.roles)
    return of_tile, of_all


def _size(block: tuple[int | None, ...]) -> int:
    return math.prod(size or 1 for size in block)


def _cost(
    problem: Problem,
    operands: Operands,
    parts: list[Part],
    arrays: list[Array],
    tile: int,
    together: int,
) -> pl.CostEstimate:
    """The whole grid at full lengths: blocks that are read, products of all tiles."""
    batch, rows = operands.lengths.shape[0], problem.rows
    first, reached = _reach(problem, np.asarray(problem.capacities), tile, together)
    groups = np.repeat(np.arange(len(first)), reached)
    tiles = np.concatenate([np.arange(a, a + n) for a, n in zip(first, reached)])

    def read(part: Part, array: Array) -> int:
        """Bytes: a block is read when its place differs from that of the visit before."""
        size = _size(_block(part, array.shape, tile, together))
        entry = tiles * tile // max(part.every, tile)
        place = np.stack([groups * (not part.shared), entry * ("tokens" in part.roles)])
        changes = 1 + int(np.any(np.diff(place), axis=0).sum())
        own = "batch" in part.roles or changes > 1
        return size * array.dtype.itemsize * changes * (batch if own else 1)

    heads = batch * len(tiles) * together
    flops = heads * tile * (problem.keys.flops(rows) + problem.values.flops(rows))
    small = [*operands.queries, operands.lengths]
    moved = sum(map(read, parts, arrays)) + sum(x.size * x.dtype.itemsize for x in small)
    item = operands.queries[0].dtype.itemsize
    moved += batch * problem.heads * rows * (item * sum(problem.values.widths) + 4)
    return pl.CostEstimate(flops=flops, bytes_accessed=moved, transcendentals=heads * rows * tile)
