"""Block-sparse attention on a GPU (Triton): one program walks the list of a block of queries.

Blocks that the rule does not cut come first and skip the mask. Heads are [B, H, S, D] here.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import online_softmax as softmax
from pallas_kernels.tiling import pad_axis

# Sides of the blocks that a rule is cut into.
BLOCKS = {"smallest": 64, "largest": 64}


def refusal(mask: BlockMask, q: Array, v: Array) -> str | None:
    """Why the GPU kernel cannot run these operands; None if it can."""
    for block in (mask.block_q, mask.block_k):
        if block < 16 or block & (block - 1):
            return f"blocks must be powers of two of at least 16, got {block}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads must be at most 256 wide, got {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype == jnp.float32 and max(q.shape[-1], v.shape[-1]) > 128:
        return "float32 heads wider than 128 do not fit in shared memory; use bfloat16"
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
    batch, heads, queries, _ = q.shape
    group, value_width = heads // k.shape[1], v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    rows = mask.index.shape[2]
    # Triton's blocks are powers of two.
    q = _whole_width(pad_axis(q, 2, block_q))
    k, v = (_whole_width(pad_axis(x, 2, block_k)) for x in (k, v))
    lists = [
        jnp.broadcast_to(x.reshape(*x.shape[:3], -1), (batch, heads, rows, x[0, 0, 0].size))
        for x in (mask.index, mask.count, mask.full)
    ]
    table = softmax.table(mask)

    def of_lists(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, None, x.shape[-1]), lambda b, h, m: (b, h, m, 0))

    def of_queries(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, None, block_q, x.shape[-1]), lambda b, h, m: (b, h, m, 0))

    def of_keys(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec(
            (None, None, *x.shape[2:]), lambda b, h, m: (b, jax.lax.div(h, jnp.int32(group)), 0, 0)
        )

    operands = [*lists, table, q, k, v]
    in_specs = [
        *map(of_lists, lists),
        pl.BlockSpec(table.shape, lambda b, h, m: (0,)),
        of_queries(q),
        of_keys(k),
        of_keys(v),
    ]
    if segments is not None:
        of_rows, of_columns = pad_axis(segments[0], 1, block_q), pad_axis(segments[1], 1, block_k)
        operands += [of_rows, of_columns]
        in_specs += [
            pl.BlockSpec((None, block_q), lambda b, h, m: (b, m)),
            pl.BlockSpec((None, of_columns.shape[1]), lambda b, h, m: (b, 0)),
        ]

    def kernel(index, count, full, table, q_ref, k_ref, v_ref, *refs):
        *segment_refs, out_ref, lse_ref = refs
        h, m = pl.program_id(1), pl.program_id(2)
        row = m * block_q + jnp.arange(block_q)[:, None]
        parameters = softmax.parameters(mask, table, h)

        def visit(w: Array, carry: Any, *, cut: bool) -> Any:
            keys = pl.ds(index[w] * block_k, block_k)
            seen = None
            if cut:
                column = index[w] * block_k + jnp.arange(block_k)[None]
                seen = mask.rule.visible(row, column, mask.keys, *parameters)
                if segment_refs:
                    of_rows, of_columns = segment_refs
                    seen &= of_rows[...][:, None] == of_columns[keys][None]
            logits = softmax.product(q_ref[...], k_ref[keys, :], ((1,), (1,))) * scale
            return softmax.accumulate(carry, logits, seen, v_ref[keys, :])

        whole = jnp.int32(0) if segment_refs else full[0]
        carry = (
            jnp.full((block_q, 1), softmax.MASKED, jnp.float32),
            jnp.zeros((block_q, 1), jnp.float32),
            jnp.zeros((block_q, v.shape[-1]), jnp.float32),
        )
        carry = jax.lax.fori_loop(0, whole, partial(visit, cut=False), carry)
        carry = jax.lax.fori_loop(whole, count[0], partial(visit, cut=True), carry)
        out, lse = softmax.finish(*carry)
        out_ref[...] = out.astype(out_ref.dtype)
        lse_ref[...] = lse[:, 0]

    out, lse = pl.pallas_call(
        kernel,
        name="block_sparse_attention",
        grid=(batch, heads, rows),
        in_specs=in_specs,
        out_specs=[
            of_queries(v),
            pl.BlockSpec((None, None, block_q), lambda b, h, m: (b, h, m)),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), v.dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        compiler_params=plgpu.CompilerParams(num_warps=4, num_stages=2),
        cost_estimate=softmax.cost(mask, q, v),
        interpret=interpret,
    )(*operands)
    return out[:, :, :queries, :value_width], lse[:, :, :queries]


def flops(mask: BlockMask, q: Array, v: Array) -> int:
    """FLOPs of `forward` on these operands, whose heads it pads."""
    width, value_width = (_width(x) for x in (q, v))
    return mask.flops(*q.shape[:2], head_dim=width, value_dim=value_width)


def _width(x: Array) -> int:
    """Triton's blocks are powers of two, and its products at least 16 wide."""
    return max(16, pl.next_power_of_2(x.shape[-1]))


def _whole_width(x: Array) -> Array:
    return pad_axis(x, -1, _width(x))
