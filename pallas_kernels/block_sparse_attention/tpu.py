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
from pallas_kernels.tiling import pad_axis

# Sides of the blocks that a rule is cut into.
BLOCKS = {"smallest": 128, "largest": 512}

# Scalar memory of a TPU core holds 2^18 integers; the lists share it with the compiler's own.
SCALARS = 3 << 16

_LANES = 128


def refusal(mask: BlockMask, q: Array, v: Array) -> str | None:
    """Why the TPU kernel cannot run these operands; None if it can."""
    if mask.block_q % _LANES or mask.block_k % _LANES:
        return f"blocks must be multiples of 128 tokens, got {mask.block_q} x {mask.block_k}"
    entries = int(np.prod(mask.index.shape))
    if entries > SCALARS:
        return (
            f"lists of {entries} entries do not fit in scalar memory, which takes {SCALARS}. Use "
            f"larger blocks, or lists that heads share"
        )
    if q.dtype == jnp.float16:
        return "TPUs have no float16; use bfloat16 or float32"
    return None


def forward(
    mask: BlockMask,
    scale: float,
    q: Array,
    k: Array,
    v: Array,
    segments: Any,
    *,
    interpret: bool = False,
) -> tuple[Array, Array]:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S]."""
    batch, heads, queries, width = q.shape
    group, value_width = heads // k.shape[1], v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    rows, longest = mask.index.shape[2:]
    q = pad_axis(q, 2, block_q)
    k, v = (pad_axis(x, 2, block_k) for x in (k, v))
    lists = [jnp.asarray(x).reshape(-1) for x in (mask.index, mask.count, mask.full)]

    def line(b: Array, h: Array, m: Array) -> Array:
        """Place of a list among all."""
        of_batch, of_heads = mask.index.shape[:2]
        head = (b if of_batch > 1 else 0) * of_heads + (h if of_heads > 1 else 0)
        return head * rows + m

    def of_queries(b, h, m, w, *_):
        return b, h, m, 0

    def of_keys(b, h, m, w, index, *_):
        return b, jax.lax.div(h, jnp.int32(group)), index[line(b, h, m) * longest + w], 0

    in_specs = [
        pl.BlockSpec((1, 1, block_q, width), of_queries),
        pl.BlockSpec((1, 1, block_k, width), of_keys),
        pl.BlockSpec((1, 1, block_k, value_width), of_keys),
    ]
    operands = [q, k, v]
    if segments is not None:
        # Along sublanes for queries and along lanes for keys, as the logits need them.
        of_rows = pad_axis(segments[0], 1, block_q)[:, :, None]
        of_columns = pad_axis(segments[1], 1, block_k)[:, None]
        operands += [
            jnp.broadcast_to(of_rows, (*of_rows.shape[:2], _LANES)),
            jnp.broadcast_to(of_columns, (batch, 8, of_columns.shape[2])),
        ]
        in_specs += [
            pl.BlockSpec((1, block_q, _LANES), lambda b, h, m, w, *_: (b, m, 0)),
            pl.BlockSpec(
                (1, 8, block_k),
                lambda b, h, m, w, index, *_: (b, 0, index[line(b, h, m) * longest + w]),
            ),
        ]

    def kernel(index, count, full, table, q_ref, k_ref, v_ref, *refs):
        *segment_refs, out_ref, lse_ref, peak_ref, total_ref, sum_ref = refs
        b, h, m, w = (pl.program_id(axis) for axis in range(4))
        own = line(b, h, m)

        @pl.when(w == 0)
        def _():
            peak_ref[...] = jnp.full_like(peak_ref, softmax.MASKED)
            total_ref[...] = jnp.zeros_like(total_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def visit(cut: bool) -> None:
            seen = None
            if cut:
                shape = (block_q, block_k)
                row = m * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                first = index[own * longest + w] * block_k
                column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
                seen = mask.rule.visible(
                    row, column, mask.keys, *softmax.parameters(mask, table, h)
                )
                if segment_refs:
                    of_rows, of_columns = segment_refs
                    seen &= of_rows[0, :, :1] == of_columns[0, :1, :]
            carry = peak_ref[:, :1], total_ref[:, :1], sum_ref[...]
            logits = softmax.product(q_ref[0, 0], k_ref[0, 0], ((1,), (1,))) * scale
            peak, total, weighted = softmax.accumulate(carry, logits, seen, v_ref[0, 0])
            peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)
            total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
            sum_ref[...] = weighted

        # Segments cut any block.
        whole = jnp.int32(0) if segment_refs else full[own]
        pl.when(w < whole)(partial(visit, cut=False))
        pl.when((w >= whole) & (w < count[own]))(partial(visit, cut=True))

        @pl.when(w == longest - 1)
        def _():
            out, lse = softmax.finish(peak_ref[:, :1], total_ref[:, :1], sum_ref[...])
            out_ref[0, 0] = out.astype(out_ref.dtype)
            lse_ref[0, 0, 0] = jnp.broadcast_to(lse, (block_q, _LANES)).T[:1]

    out, lse = pl.pallas_call(
        kernel,
        name="block_sparse_attention",
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(batch, heads, rows, longest),
            in_specs=in_specs,
            out_specs=[
                pl.BlockSpec((1, 1, block_q, value_width), of_queries),
                pl.BlockSpec((1, 1, 1, 1, block_q), lambda b, h, m, w, *_: (b, h, m, 0, 0)),
            ],
            scratch_shapes=[
                pltpu.VMEM((block_q, _LANES), jnp.float32),
                pltpu.VMEM((block_q, _LANES), jnp.float32),
                pltpu.VMEM((block_q, value_width), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], value_width), v.dtype),
            jax.ShapeDtypeStruct((batch, heads, rows, 1, block_q), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=softmax.cost(mask, q, v),
        interpret=interpret,
    )(*lists, softmax.table(mask), *operands)
    return out[:, :, :queries], lse.reshape(batch, heads, -1)[:, :, :queries]


def flops(mask: BlockMask, q: Array, v: Array) -> int:
    """FLOPs of `forward` on these operands."""
    return mask.flops(*q.shape[:2], head_dim=q.shape[-1], value_dim=v.shape[-1])
