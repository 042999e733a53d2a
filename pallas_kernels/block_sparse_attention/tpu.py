"""Block-sparse attention on a TPU (Mosaic): a grid over the entries of the lists.

The lists are prefetched to scalar memory, and the pipeline fetches the next listed block of keys
while one is computed; entries beyond a count repeat the last block, so nothing is fetched for them.
Blocks that the rule does not cut come first and skip the mask. Heads are [B, H, S, D] here.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_mask import EVERYTHING, BlockMask
from pallas_kernels.block_sparse_attention import online_softmax as softmax
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.tiling import pad_axis, round_up

# Scalar memory of a TPU core holds 2^18 integers; the lists share it with the compiler's own.
SCALARS = 3 << 16

# Logits of a step: some arrays of so many float32 must fit in fast memory beside the operands.
LOGITS = 1 << 19

# Heads of a step share its overhead and fill each other's gaps, as far as their operands, results
# and sums take so many bytes of fast memory.
TILE, TILE_BYTES = 8, 8 << 20

# Logits in base 2 up to which a softmax needs no peak: weights of 2^-40 ... 2^40 and their sums
# stay far from the ends of float32. Scalar memory has room to say of so many tiles that theirs are.
SMALL, SMALL_TILES = 40.0, 1 << 14

_LANES = 128


def blocks(width: int) -> dict[str, Any]:
    """What a rule is cut into, see `choose_block`, for heads `width` wide."""
    # Large ones keep the units of a core busy.
    return {"smallest": 128, "largest": 512, "even": (512, 1024)}


def refusal(mask: BlockMask, heads: Heads) -> str | None:
    """Why the TPU kernel cannot run these operands; None if it can."""
    if mask.block_q % _LANES or mask.block_k % _LANES:
        return f"blocks must be multiples of 128 tokens, got {mask.block_q} x {mask.block_k}"
    if mask.block_q * mask.block_k > LOGITS:
        return (
            f"the logits of a block must be at most {LOGITS} to fit in fast memory, got "
            f"{mask.block_q} x {mask.block_k}"
        )
    if _pieces(mask, heads) is None:
        return (
            f"lists of {_entries(mask, heads)} entries do not fit in scalar memory, which takes "
            f"{SCALARS}. Use larger blocks, or lists that heads share"
        )
    for x in (heads.q, heads.v):
        if x.dtype in (jnp.float16, jnp.float8_e4m3fn):
            return f"the kernel has no {x.dtype}, as most TPUs have none; use bfloat16 or int8"
    return None


def forward(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, *, interpret: bool = False
) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S], of `mask.rest` also of all keys."""
    pieces = _pieces(mask, heads)
    assert pieces is not None
    if pieces != (1, 1):
        return _by_pieces(mask, arithmetic, heads, pieces=pieces, interpret=interpret)
    return _forward(mask, arithmetic, heads, interpret=interpret)


def _entries(mask: BlockMask, heads: Heads) -> int:
    """Integers in scalar memory."""
    lists = sum(int(np.prod(x.shape)) for x in (mask.index, mask.count, mask.full))
    return lists + (mask.rule.parameters if heads.by_row is None else heads.by_row).size


def _pieces(mask: BlockMask, heads: Heads) -> tuple[int, int] | None:
    """Into how many parts of heads, and of blocks of queries, lists are cut to fit; None if not.

    Only lists under no rule, and of arrays without segments, are cut.
    """
    entries = _entries(mask, heads)
    if entries <= SCALARS:
        return 1, 1
    if heads.cut or mask.rest or mask.rule != EVERYTHING:
        return None
    own, rows = mask.index.shape[1:3]
    parts = [n for n in range(1, own + 1) if own % n == 0 and heads.k.shape[1] % n == 0]
    of_heads = next((n for n in parts if entries <= n * SCALARS), parts[-1])
    of_rows = -(-entries // (of_heads * SCALARS))
    return (of_heads, of_rows) if of_rows <= rows else None


def _by_pieces(
    mask: BlockMask,
    arithmetic: Arithmetic,
    heads: Heads,
    *,
    pieces: tuple[int, int],
    **options: Any,
) -> tuple[Array, Array]:
    """`forward` over parts of the heads, and of the blocks of queries, in turn."""
    of_heads, of_rows = pieces

    def cut(x: Any) -> Array:
        """[B, H, ...] as [parts, B, H / parts, ...]."""
        return jnp.moveaxis(jnp.reshape(x, (x.shape[0], of_heads, -1, *x.shape[2:])), 1, 0)

    rows = -(-mask.index.shape[2] // of_rows)
    known = mask.static or mask.listed is not None
    listed = mask.visited // (of_heads * of_rows) if known else None
    results = []
    for first in range(0, mask.index.shape[2], rows):
        start = first * mask.block_q
        stop = min(start + rows * mask.block_q, mask.queries)
        size: dict[str, Any] = {"queries": stop - start, "seen": None, "widths": None}
        own = dataclasses.replace(mask, listed=listed, **size)
        lists = [cut(x[:, :, first : first + rows]) for x in (mask.index, mask.count, mask.full)]
        scales = heads.scales
        if scales is not None:
            scales = cut(scales[0][:, :, start:stop]), cut(scales[1])
        parts = Heads(cut(heads.q[:, :, start:stop]), cut(heads.k), cut(heads.v), scales=scales)

        def part(operands: Any, own: BlockMask = own) -> tuple[Array, Array]:
            (index, count, full), parts = operands
            lists = dataclasses.replace(own, index=index, count=count, full=full)
            return _forward(lists, arithmetic, parts, **options)

        found = jax.lax.map(part, (lists, parts))
        results.append([jnp.moveaxis(x, 0, 1) for x in found])
    out, lse = (jnp.concatenate(each, axis=3) for each in zip(*results))
    return out.reshape(*heads.q.shape[:3], -1), lse.reshape(heads.q.shape[:3])


def _forward(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, *, interpret: bool = False
) -> Any:
    batch, of_heads, queries, width = heads.q.shape
    group, value_width = of_heads // heads.k.shape[1], heads.v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    rows, longest = mask.index.shape[2:]
    ragged = mask.keys % block_k != 0
    table, by_row = softmax.table(mask, heads), heads.by_row is not None
    uncut = softmax.whole_blocks(mask, heads)
    tile = heads_of_a_tile(mask, arithmetic, heads)
    heads = _arranged(mask, heads)
    small = None if arithmetic.levels else small_logits(mask, arithmetic.scale, heads, tile)
    lists = [jnp.asarray(x).reshape(-1) for x in (mask.index, mask.count, mask.full)]

    def line(b: Array, h: Array, m: Array) -> Array:
        """Place of a list among all."""
        lists_of_batch, lists_of_heads = mask.index.shape[:2]
        head = (b if lists_of_batch > 1 else 0) * lists_of_heads + (h if lists_of_heads > 1 else 0)
        return head * rows + m

    def key_heads(h: Array) -> Array:
        return jax.lax.div(h, jnp.int32(max(1, group // tile)))

    def of_queries(b, h, m, w, *_):
        return b, h, m, 0

    def of_rows(b, h, m, w, *_):
        return b, h, m, 0, 0

    def of_keys(b, h, m, w, index, *_):
        return b, key_heads(h), index[line(b, h, m) * longest + w], 0

    def of_columns(b, h, m, w, index, *_):
        return b, key_heads(h), 0, index[line(b, h, m) * longest + w]

    key_tile = max(1, tile // group)
    specs = Heads(
        q=pl.BlockSpec((1, tile, block_q, width), of_queries),
        k=pl.BlockSpec((1, key_tile, block_k, width), of_keys),
        v=pl.BlockSpec((1, key_tile, block_k, value_width), of_keys),
    )
    if heads.segments is not None:
        own_rows = pl.BlockSpec((1, block_q, _LANES), lambda b, h, m, w, *_: (b, m, 0))
        own_columns = pl.BlockSpec(
            (1, 8, block_k),
            lambda b, h, m, w, index, *_: (b, 0, index[line(b, h, m) * longest + w]),
        )
        specs = specs._replace(segments=(own_rows, own_columns))
    line_of_rows = pl.BlockSpec((1, tile, 1, 1, block_q), of_rows)
    if heads.scales is not None:
        of_scales = pl.BlockSpec((1, key_tile, 1, block_k), of_columns)
        specs = specs._replace(scales=(line_of_rows, of_scales))
    of_small = None
    if small is not None:
        of_small = pl.BlockSpec(
            (1, *small.shape[1:]), lambda b, *_: (b, 0, 0), memory_space=pltpu.SMEM
        )

    def kernel(index, count, full, table, refs, small, results, carries, scales):
        b, h, m, w = (pl.program_id(axis) for axis in range(4))
        own = line(b, h, m)
        fixed = None if small is None else small[0, 0, h * rows + m] != 0

        @pl.when(w == 0)
        def _():
            start = softmax.empty(block_q, value_width, _LANES)
            if fixed is not None:
                start = start._replace(peak=jnp.where(fixed, 0.0, start.peak))
            for carry in itertools.chain(*carries):
                _store(carry, start)
            for i, scale_ref in enumerate(scales or ()):
                scale = softmax.LOG2E * refs.scales[0][0, i, 0]
                scale_ref[...] = jnp.broadcast_to(scale, (_LANES, block_q)).T

        def visit(i: int, *, inside: bool, outside: bool, fixed: bool) -> None:
            """A head's block, in which something is seen, or something is not, or both."""
            j = i * key_tile // tile
            logits = softmax.product(refs.q[0, i], refs.k[0, j], ((1,), (1,)))
            if scales is None:
                logits *= arithmetic.scale * softmax.LOG2E
            else:
                logits *= scales[i][:, :1] * refs.scales[1][0, j]
            shape = (block_q, block_k)
            first = index[own * longest + w] * block_k
            column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            seen = None
            if inside and outside:
                row = m * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                head = h * tile + i
                parameters = softmax.parameters(
                    mask, table, b * of_heads + head if by_row else head
                )
                seen = mask.rule.visible(row, column, mask.keys, *parameters)
                if refs.segments is not None:
                    seen &= refs.segments[0][0, :, :1] == refs.segments[1][0, :1, :]

            def add(carry: softmax.Carry, seen: Array | None) -> None:
                values, levels = refs.v[0, j], arithmetic.levels
                rows = None
                if levels and mask.queries % block_q:
                    places = jax.lax.broadcasted_iota(jnp.int32, (block_q, _LANES), 0)
                    rows = m * block_q + places < mask.queries
                added = softmax.accumulate(
                    *(_load(carry), logits, seen, values, levels, arithmetic.unit),
                    rows=rows,
                    fixed=fixed,
                )
                _store(carry, added)

            if inside:
                add(carries[i][0], seen)
            if outside and mask.rest:
                exists = column < mask.keys if ragged or seen is not None else None
                add(carries[i][1], exists if seen is None else exists & ~seen)

        def when(condition: Array, **kind: bool) -> None:
            ways = {False: condition}
            if fixed is not None:
                ways = {True: condition & fixed, False: condition & ~fixed}
            for way, holds in ways.items():

                @pl.when(holds)
                def _(way=way):
                    for i in range(tile):
                        visit(i, **kind, fixed=way)

        whole = full[own] if uncut else jnp.int32(0)
        when(w < whole, inside=True, outside=False)
        when((w >= whole) & (w < count[own]), inside=True, outside=True)
        if mask.rest:
            when(w >= count[own], inside=False, outside=True)

        @pl.when(w == longest - 1)
        def _():
            for i in range(tile):
                parts = [_load(carry) for carry in carries[i]]
                if mask.rest:
                    parts[1] = softmax.merge(*parts)
                for (out_ref, lse_ref), part in zip(results, parts):
                    out, lse = softmax.finish(part)
                    out_ref[0, i] = out.astype(out_ref.dtype)
                    lse_ref[0, i, 0] = jnp.broadcast_to(lse, (block_q, _LANES)).T[:1]

    parts = 1 + mask.rest
    lanes = pltpu.VMEM((block_q, _LANES), jnp.float32)
    carry = softmax.Carry(lanes, lanes, pltpu.VMEM((block_q, value_width), jnp.float32))
    shape = heads.q.shape[:3]
    result = (
        jax.ShapeDtypeStruct((*shape, value_width), jnp.dtype(arithmetic.out)),
        jax.ShapeDtypeStruct((batch, of_heads, rows, 1, block_q), jnp.float32),
    )
    [results] = pl.pallas_call(
        kernel,
        name="block_sparse_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, of_heads // tile, rows, longest),
            in_specs=[specs, of_small],
            out_specs=[
                [(pl.BlockSpec((1, tile, block_q, value_width), of_queries), line_of_rows)] * parts
            ],
            scratch_shapes=[
                [[carry] * parts] * tile,
                None if heads.scales is None else [lanes] * tile,
            ],
        ),
        out_shape=[[result] * parts],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=softmax.cost(mask, heads, arithmetic.out, tile // key_tile),
        interpret=interpret,
    )(*lists, table, heads, small)
    results = [(out[:, :, :queries], lse.reshape(shape)[:, :, :queries]) for out, lse in results]
    return tuple(results) if mask.rest else results[0]


def heads_of_a_tile(mask: BlockMask, arithmetic: Arithmetic, heads: Heads) -> int:
    """Heads that a step computes: of one list, and whole groups of a key head, or parts of one."""
    q, v = heads.q, heads.v
    of_heads, group = q.shape[1], q.shape[1] // heads.k.shape[1]
    width, value_width = (round_up(x.shape[-1], _LANES) for x in (q, v))
    parts = 1 + mask.rest
    of_key = width * q.dtype.itemsize + value_width * v.dtype.itemsize
    of_result = parts * value_width * jnp.dtype(arithmetic.out).itemsize
    fetched = mask.block_q * (width * q.dtype.itemsize + of_result) + mask.block_k * of_key
    carried = mask.block_q * parts * (2 * _LANES + value_width) * 4
    most = min(
        TILE if mask.index.shape[1] == 1 else 1,
        LOGITS // (mask.block_q * mask.block_k),
        TILE_BYTES // (2 * fetched + carried),
    )
    fits = [n for n in range(2, most + 1) if of_heads % n == 0]
    return max((n for n in fits if group % n == 0 or n % group == 0), default=1)


def _arranged(mask: BlockMask, heads: Heads) -> Heads:
    """Whole blocks, and numbers of queries and keys as the logits need them."""
    q = pad_axis(heads.q, 2, mask.block_q)
    k, v = (pad_axis(x, 2, mask.block_k) for x in (heads.k, heads.v))
    segments = scales = None
    if heads.segments is not None:
        # Queries along sublanes, keys along lanes.
        rows = pad_axis(heads.segments[0], 1, mask.block_q)[:, :, None]
        columns = pad_axis(heads.segments[1], 1, mask.block_k)[:, None]
        segments = (
            jnp.broadcast_to(rows, (*rows.shape[:2], _LANES)),
            jnp.broadcast_to(columns, (rows.shape[0], 8, columns.shape[2])),
        )
    if heads.scales is not None:
        rows = pad_axis(heads.scales[0], 2, mask.block_q)
        columns = pad_axis(heads.scales[1], 2, mask.block_k)
        scales = rows.reshape(*rows.shape[:2], -1, 1, mask.block_q), columns[:, :, None]
    return Heads(q, k, v, segments, scales)


def small_logits(mask: BlockMask, scale: float, heads: Heads, tile: int) -> Array | None:
    """Which tiles of (arranged) queries have small logits alone, int32[B, 1, H / tile M].

    By |q . k| <= |q| max |k|, over all keys of a head. None if scalar memory has no room for them.
    """
    batch, of_heads, queries, _ = heads.q.shape
    rows = queries // mask.block_q
    if of_heads // tile * rows > SMALL_TILES:
        return None

    def norms(x: Array) -> Array:
        return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=-1))

    of_queries, of_keys = norms(heads.q), norms(heads.k)
    if heads.scales is not None:
        of_queries *= heads.scales[0].reshape(of_queries.shape)
        of_keys *= heads.scales[1][:, :, 0]
    of_queries = jnp.max(of_queries.reshape(batch, of_heads, rows, -1), axis=-1)
    of_keys = jnp.repeat(jnp.max(of_keys, axis=-1), of_heads // heads.k.shape[1], axis=1)
    bound = of_queries * of_keys[..., None] * (scale * softmax.LOG2E)
    bound = jnp.max(bound.reshape(batch, -1, tile, rows), axis=2)
    return (bound <= SMALL).astype(jnp.int32).reshape(batch, 1, -1)


def _load(refs: softmax.Carry) -> softmax.Carry:
    return softmax.Carry(*(ref[...] for ref in refs))


def _store(refs: softmax.Carry, carry: softmax.Carry) -> None:
    for ref, value in zip(refs, carry):
        ref[...] = value


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands."""
    lines = heads.q.shape[0] * heads.q.shape[1]
    return softmax.flops(mask, lines, heads.q.shape[-1], heads.v.shape[-1])
