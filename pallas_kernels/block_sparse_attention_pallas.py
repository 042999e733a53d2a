"""Block-sparse attention as Pallas kernels: one for TPUs (Mosaic), one for GPUs (Triton).

Both walk the list of a block of queries with an online softmax; blocks that the rule does not cut
come first and skip the mask. On a TPU the lists are prefetched to scalar memory and the pipeline
fetches the next listed block while one is computed; entries beyond the count repeat the last block,
so nothing is fetched for them. On a GPU a program loops over its own count. Heads are [B, H, S, D]
here; letters as in `block_sparse_attention`.
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
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.tiling import pad_axis

# Sides of the blocks that a rule is cut into.
TPU_BLOCKS = {"smallest": 128, "largest": 512}
GPU_BLOCKS = {"smallest": 64, "largest": 64}

# Scalar memory of a TPU core holds 2^18 integers; the lists share it with the compiler's own.
SCALARS = 3 << 16

_LANES = 128
_MASKED = -1e30  # finite, so that rows without any key stay numbers


def tpu_refusal(mask: BlockMask, q: Array, v: Array) -> str | None:
    """Why the TPU kernel cannot run these operands; None if it can."""
    if mask.block_q % _LANES or mask.block_k % _LANES:
        return f"blocks must be multiples of 128 tokens, got {mask.block_q} x {mask.block_k}"
    entries = int(np.prod(mask.index.shape))
    if entries > SCALARS:
        return (
            f"lists of {entries} entries do not fit in scalar memory, which takes {SCALARS}. Use "
            f"larger blocks, or lists that heads share"
        )
    return _dtype_refusal(q, v)


def gpu_refusal(mask: BlockMask, q: Array, v: Array) -> str | None:
    """Why the GPU kernel cannot run these operands; None if it can."""
    for block in (mask.block_q, mask.block_k):
        if block < 16 or block & (block - 1):
            return f"blocks must be powers of two of at least 16, got {block}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads must be at most 256 wide, got {q.shape[-1]} and {v.shape[-1]}"
    if q.dtype == jnp.float32 and max(q.shape[-1], v.shape[-1]) > 128:
        return "float32 heads wider than 128 do not fit in shared memory; use bfloat16"
    return _dtype_refusal(q, v)


def _dtype_refusal(q: Array, v: Array) -> str | None:
    if q.dtype != v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return (
            f"queries, keys and values must have one dtype of float32, bfloat16 and float16, got "
            f"{q.dtype} and {v.dtype}"
        )
    return None


def tpu_forward(
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
            peak_ref[...] = jnp.full_like(peak_ref, _MASKED)
            total_ref[...] = jnp.zeros_like(total_ref)
            sum_ref[...] = jnp.zeros_like(sum_ref)

        def visit(cut: bool) -> None:
            seen = None
            if cut:
                shape = (block_q, block_k)
                row = m * block_q + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
                first = index[own * longest + w] * block_k
                column = first + jax.lax.broadcasted_iota(jnp.int32, shape, 1)
                seen = mask.rule.visible(row, column, mask.keys, *_parameters(mask, table, h))
                if segment_refs:
                    of_rows, of_columns = segment_refs
                    seen &= of_rows[0, :, :1] == of_columns[0, :1, :]
            carry = peak_ref[:, :1], total_ref[:, :1], sum_ref[...]
            logits = _product(q_ref[0, 0], k_ref[0, 0], ((1,), (1,))) * scale
            peak, total, weighted = _accumulate(carry, logits, seen, v_ref[0, 0])
            peak_ref[...] = jnp.broadcast_to(peak, peak_ref.shape)
            total_ref[...] = jnp.broadcast_to(total, total_ref.shape)
            sum_ref[...] = weighted

        # Segments cut any block.
        whole = jnp.int32(0) if segment_refs else full[own]
        pl.when(w < whole)(partial(visit, cut=False))
        pl.when((w >= whole) & (w < count[own]))(partial(visit, cut=True))

        @pl.when(w == longest - 1)
        def _():
            out, lse = _finish(peak_ref[:, :1], total_ref[:, :1], sum_ref[...])
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
        cost_estimate=_cost(mask, q, v),
        interpret=interpret,
    )(*lists, _table(mask), *operands)
    return out[:, :, :queries], lse.reshape(batch, heads, -1)[:, :, :queries]


def gpu_forward(
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
    q = _pad_width(pad_axis(q, 2, block_q))
    k, v = (_pad_width(pad_axis(x, 2, block_k)) for x in (k, v))
    lists = [
        jnp.broadcast_to(x.reshape(*x.shape[:3], -1), (batch, heads, rows, x[0, 0, 0].size))
        for x in (mask.index, mask.count, mask.full)
    ]
    table = _table(mask)

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
        parameters = _parameters(mask, table, h)

        def visit(w: Array, carry: Any, *, cut: bool) -> Any:
            keys = pl.ds(index[w] * block_k, block_k)
            seen = None
            if cut:
                column = index[w] * block_k + jnp.arange(block_k)[None]
                seen = mask.rule.visible(row, column, mask.keys, *parameters)
                if segment_refs:
                    of_rows, of_columns = segment_refs
                    seen &= of_rows[...][:, None] == of_columns[keys][None]
            logits = _product(q_ref[...], k_ref[keys, :], ((1,), (1,))) * scale
            return _accumulate(carry, logits, seen, v_ref[keys, :])

        whole = jnp.int32(0) if segment_refs else full[0]
        carry = (
            jnp.full((block_q, 1), _MASKED, jnp.float32),
            jnp.zeros((block_q, 1), jnp.float32),
            jnp.zeros((block_q, v.shape[-1]), jnp.float32),
        )
        carry = jax.lax.fori_loop(0, whole, partial(visit, cut=False), carry)
        carry = jax.lax.fori_loop(whole, count[0], partial(visit, cut=True), carry)
        out, lse = _finish(*carry)
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
        cost_estimate=_cost(mask, q, v),
        interpret=interpret,
    )(*operands)
    return out[:, :, :queries, :value_width], lse[:, :, :queries]


def tpu_flops(mask: BlockMask, q: Array, v: Array) -> int:
    """FLOPs of `tpu_forward` on these operands."""
    return mask.flops(*q.shape[:2], head_dim=q.shape[-1], value_dim=v.shape[-1])


def gpu_flops(mask: BlockMask, q: Array, v: Array) -> int:
    """FLOPs of `gpu_forward` on these operands, whose heads it pads."""
    width, value_width = (_padded_width(x.shape[-1]) for x in (q, v))
    return mask.flops(*q.shape[:2], head_dim=width, value_dim=value_width)


def _cost(mask: BlockMask, q: Array, v: Array) -> pl.CostEstimate:
    """What a kernel does with these (padded) operands."""
    width = q.shape[-1] + v.shape[-1]
    executed = tpu_flops(mask, q, v)
    pairs = executed // (2 * width)
    rows = q.size // q.shape[-1]
    moved = (pairs // mask.block_q + rows) * width * q.dtype.itemsize
    return pl.CostEstimate(flops=executed, bytes_accessed=moved + 4 * rows, transcendentals=pairs)


def _accumulate(carry: Any, logits: Array, seen: Array | None, values: Array) -> Any:
    """One block of the online softmax; carry: running peak, total and weighted sum of values."""
    peak, total, weighted = carry
    if seen is not None:
        logits = jnp.where(seen, logits, _MASKED)
    higher = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - higher)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    shrink = jnp.exp(peak - higher)
    total = shrink * total + jnp.sum(weights, axis=1, keepdims=True)
    own = _product(weights.astype(values.dtype), values, ((1,), (0,)))
    return higher, total, shrink * weighted + own


def _finish(peak: Array, total: Array, weighted: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp; zeros and -inf for rows that saw nothing."""
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    return weighted / safe, jnp.where(some, peak + jnp.log(safe), -jnp.inf)


def _product(x: Array, y: Array, contracted: Any) -> Array:
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def _table(mask: BlockMask) -> Array:
    """The rule's per-head parameters, flat; one unused number if there are none."""
    table = mask.rule.parameters
    return jnp.asarray(table.reshape(-1) if table.size else np.zeros(1, np.int32))


def _parameters(mask: BlockMask, table: Any, head: Array) -> tuple[Any, ...]:
    heads, count = mask.rule.parameters.shape
    first = head * count if heads > 1 else 0
    return tuple(table[first + i] for i in range(count))


def _padded_width(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


def _pad_width(x: Array) -> Array:
    return pad_axis(x, -1, _padded_width(x.shape[-1]))
