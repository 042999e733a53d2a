"""Block-sparse attention on a TPU (Mosaic): a grid over the entries of the lists.

The lists are prefetched to scalar memory, and the pipeline fetches the next listed block of keys
while one is computed; entries beyond a count repeat the last block, so nothing is fetched for them.
Blocks that the rule does not cut come first and skip the mask. Heads are [B, H, S, D] here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import online_softmax as softmax
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.tiling import pad_axis

# Sides of the blocks that a rule is cut into.
BLOCKS = {"smallest": 128, "largest": 512}

# Scalar memory of a TPU core holds 2^18 integers; the lists share it with the compiler's own.
SCALARS = 3 << 16

# Logits of a block: some arrays of so many float32 must fit in fast memory beside the operands.
LOGITS = 1 << 19

_LANES = 128


def refusal(mask: BlockMask, heads: Heads) -> str | None:
    """Why the TPU kernel cannot run these operands; None if it can."""
    if mask.block_q % _LANES or mask.block_k % _LANES:
        return f"blocks must be multiples of 128 tokens, got {mask.block_q} x {mask.block_k}"
    if mask.block_q * mask.block_k > LOGITS:
        return (
            f"the logits of a block must be at most {LOGITS} to fit in fast memory, got "
            f"{mask.block_q} x {mask.block_k}"
        )
    entries = sum(int(np.prod(x.shape)) for x in (mask.index, mask.count, mask.full))
    entries += (mask.rule.parameters if heads.by_row is None else heads.by_row).size
    if entries > SCALARS:
        return (
            f"lists of {entries} entries do not fit in scalar memory, which takes {SCALARS}. Use "
            f"larger blocks, or lists that heads share"
        )
    for x in (heads.q, heads.v):
        if x.dtype in (jnp.float16, jnp.float8_e4m3fn):
            return f"the kernel has no {x.dtype}, as most TPUs have none; use bfloat16 or int8"
    return None


def forward(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, *, interpret: bool = False
) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S], of `mask.rest` also of all keys."""
    batch, of_heads, queries, width = heads.q.shape
    group, value_width = of_heads // heads.k.shape[1], heads.v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    rows, longest = mask.index.shape[2:]
    ragged = mask.keys % block_k != 0
    table, cut, by_row = softmax.table(mask, heads), heads.cut, heads.by_row is not None
    heads = _arranged(mask, heads)
    lists = [jnp.asarray(x).reshape(-1) for x in (mask.index, mask.count, mask.full)]

    def line(b: Array, h: Array, m: Array) -> Array:
        """Place of a list among all."""
        lists_of_batch, lists_of_heads = mask.index.shape[:2]
        head = (b if lists_of_batch > 1 else 0) * lists_of_heads + (h if lists_of_heads > 1 else 0)
        return head * rows + m

    def key_head(h: Array) -> Array:
        return jax.lax.div(h, jnp.int32(group))

    def of_queries(b, h, m, w, *_):
        return b, h, m, 0

    def of_rows(b, h, m, w, *_):
        return b, h, m, 0, 0

    def of_keys(b, h, m, w, index, *_):
        return b, key_head(h), index[line(b, h, m) * longest + w], 0

    def of_columns(b, h, m, w, index, *_):
        return b, key_head(h), 0, index[line(b, h, m) * longest + w]

    specs = Heads(
        q=pl.BlockSpec((1, 1, block_q, width), of_queries),
        k=pl.BlockSpec((1, 1, block_k, width), of_keys),
        v=pl.BlockSpec((1, 1, block_k, value_width), of_keys),
    )
    if heads.segments is not None:
        own_rows = pl.BlockSpec((1, block_q, _LANES), lambda b, h, m, w, *_: (b, m, 0))
        own_columns = pl.BlockSpec(
            (1, 8, block_k),
            lambda b, h, m, w, index, *_: (b, 0, index[line(b, h, m) * longest + w]),
        )
        specs = specs._replace(segments=(own_rows, own_columns))
    line_of_rows = pl.BlockSpec((1, 1, 1, 1, block_q), of_rows)
    if heads.scales is not None:
        specs = specs._replace(scales=(line_of_rows, pl.BlockSpec((1, 1, 1, block_k), of_columns)))

    def kernel(index, count, full, table, refs, results, carries, scale_ref):
        b, h, m, w = (pl.program_id(axis) for axis in range(4))
        own = line(b, h, m)

        @pl.when(w == 0)
        def _():
            for carry in carries:
                _store(carry, softmax.empty(block_q, value_width, _LANES))
            if refs.scales is not None:
                scale = softmax.LOG2E * refs.scales[0][0, 0, 0]
                scale = jnp.broadcast_to(scale, (_LANES, block_q))
                scale_ref[...] = scale.T

        def visit(*, inside: bool, outside: bool) -> None:
            """One block, in which something is seen, or something is not, or both."""
            logits = softmax.product(refs.q[0, 0], refs.k[0, 0], ((1,), (1,)))
            if refs.scales is None:
                logits *= arithmetic.scale * softmax.LOG2E
            else:
                logits *= scale_ref[:, :1] * refs.scales[1][0, 0]
            shape = (block_q, block_k)
            first = index[own * longest + w] * block_k
            column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
            seen = None
            if inside and outside:
                row = m * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                parameters = softmax.parameters(mask, table, b * of_heads + h if by_row else h)
                seen = mask.rule.visible(row, column, mask.keys, *parameters)
                if refs.segments is not None:
                    seen &= refs.segments[0][0, :, :1] == refs.segments[1][0, :1, :]

            def add(carry: softmax.Carry, seen: Array | None) -> None:
                values, levels = refs.v[0, 0], arithmetic.levels
                _store(carry, softmax.accumulate(_load(carry), logits, seen, values, levels))

            if inside:
                add(carries[0], seen)
            if outside and mask.rest:
                exists = column < mask.keys if ragged or seen is not None else None
                add(carries[1], exists if seen is None else exists & ~seen)

        whole = jnp.int32(0) if cut else full[own]
        pl.when(w < whole)(partial(visit, inside=True, outside=False))
        pl.when((w >= whole) & (w < count[own]))(partial(visit, inside=True, outside=True))
        if mask.rest:
            pl.when(w >= count[own])(partial(visit, inside=False, outside=True))

        @pl.when(w == longest - 1)
        def _():
            parts = [_load(carry) for carry in carries]
            if mask.rest:
                parts[1] = softmax.merge(*parts)
            for (out_ref, lse_ref), part in zip(results, parts):
                out, lse = softmax.finish(part)
                out_ref[0, 0] = out.astype(out_ref.dtype)
                lse_ref[0, 0, 0] = jnp.broadcast_to(lse, (block_q, _LANES)).T[:1]

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
            grid=(batch, of_heads, rows, longest),
            in_specs=[specs],
            out_specs=[
                [(pl.BlockSpec((1, 1, block_q, value_width), of_queries), line_of_rows)] * parts
            ],
            scratch_shapes=[[carry] * parts, None if heads.scales is None else lanes],
        ),
        out_shape=[[result] * parts],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=softmax.cost(mask, heads, arithmetic.out),
        interpret=interpret,
    )(*lists, table, heads)
    results = [(out[:, :, :queries], lse.reshape(shape)[:, :, :queries]) for out, lse in results]
    return tuple(results) if mask.rest else results[0]


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


def _load(refs: softmax.Carry) -> softmax.Carry:
    return softmax.Carry(*(ref[...] for ref in refs))


def _store(refs: softmax.Carry, carry: softmax.Carry) -> None:
    for ref, value in zip(refs, carry):
        ref[...] = value


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands."""
    lines = heads.q.shape[0] * heads.q.shape[1]
    return softmax.flops(mask, lines, heads.q.shape[-1], heads.v.shape[-1])
