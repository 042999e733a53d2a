"""Block-sparse attention on a GPU (Triton): one program walks the list of a block of queries.

Blocks that the rule does not cut come first and skip the mask. The kernel reads heads where a model
left them, [B, S, H, D].
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
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.tiling import pad_axis

# Shared memory of a multiprocessor that programs can count on (A100; an H100 has more).
SHARED_BYTES = 163 << 10

_STAGES = 2


def blocks(width: int) -> dict[str, Any]:
    """What a rule is cut into, see `choose_block`, for heads `width` wide."""
    return {"smallest": 64, "largest": 64, "even": (64, 128 if width <= 64 else 64)}


def refusal(mask: BlockMask, heads: Heads) -> str | None:
    """Why the GPU kernel cannot run these operands; None if it can."""
    q, v = heads.q, heads.v
    smallest = _least(heads)
    for block in (mask.block_q, mask.block_k):
        if block < smallest or block & (block - 1):
            return f"blocks must be powers of two of at least {smallest}, got {block}"
    if max(q.shape[-1], v.shape[-1]) > 256:
        return f"heads must be at most 256 wide, got {q.shape[-1]} and {v.shape[-1]}"
    width, value_width = _widths(heads)
    of_key = width * heads.k.dtype.itemsize + value_width * v.dtype.itemsize
    needed = mask.block_q * width * q.dtype.itemsize + _STAGES * mask.block_k * of_key
    if needed > SHARED_BYTES:
        return (
            f"blocks of {mask.block_q} x {mask.block_k} tokens, {q.shape[-1]} and {v.shape[-1]} "
            f"wide in {q.dtype} and {v.dtype}, take {needed} bytes of shared memory; there are "
            f"{SHARED_BYTES}. Use smaller blocks, or bfloat16"
        )
    return None


def forward(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, *, interpret: bool = False
) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S], of `mask.rest` also of all keys."""
    batch, of_heads, queries, _ = heads.q.shape
    group, value_width = of_heads // heads.k.shape[1], heads.v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    rows, longest = mask.index.shape[2:]
    ragged = mask.keys % block_k != 0
    table, by_row = softmax.table(mask, heads), heads.by_row is not None
    uncut = softmax.whole_blocks(mask, heads)
    heads = _arranged(mask, heads)
    shape = heads.q.shape[:3]
    lists = [jnp.asarray(x.reshape(*x.shape[:3], -1)) for x in (mask.index, mask.count, mask.full)]

    def key_head(h: Array) -> Array:
        return jax.lax.div(h, jnp.int32(group))

    def of_lists(x: Array) -> pl.BlockSpec:
        shared = [size == 1 for size in x.shape[:2]]  # by the batch, by the heads

        def place(m: Array, h: Array, b: Array) -> tuple[Any, ...]:
            return 0 if shared[0] else b, 0 if shared[1] else h, m, 0

        return pl.BlockSpec((None, None, None, x.shape[-1]), place)

    def of_queries(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, block_q, None, x.shape[-1]), lambda m, h, b: (b, m, h, 0))

    def of_keys(x: Array) -> pl.BlockSpec:
        tokens, width = x.shape[2:]
        return pl.BlockSpec((None, tokens, None, width), lambda m, h, b: (b, 0, key_head(h), 0))

    own_rows = pl.BlockSpec((None, None, block_q), lambda m, h, b: (b, h, m))
    specs = Heads(of_queries(heads.q), of_keys(heads.k), of_keys(heads.v))
    if heads.segments is not None:
        specs = specs._replace(
            segments=(
                pl.BlockSpec((None, block_q), lambda m, h, b: (b, m)),
                pl.BlockSpec((None, heads.k.shape[2]), lambda m, h, b: (b, 0)),
            )
        )
    if heads.scales is not None:
        of_columns = pl.BlockSpec(
            (None, None, heads.k.shape[2]), lambda m, h, b: (b, key_head(h), 0)
        )
        specs = specs._replace(scales=(own_rows, of_columns))

    def kernel(index, count, full, table, refs, *results):
        m, h, b = (pl.program_id(axis) for axis in range(3))
        q = refs.q[...]
        row_scale = None if refs.scales is None else softmax.LOG2E * refs.scales[0][...][:, None]
        row_segment = None if refs.segments is None else refs.segments[0][...][:, None]
        row = m * block_q + jnp.arange(block_q)[:, None]
        parameters = softmax.parameters(mask, table, b * of_heads + h if by_row else h)

        def visit(w: Array, carries: Any, *, inside: bool, outside: bool) -> Any:
            """One block, in which something is seen, or something is not, or both."""
            keys = pl.ds(index[w] * block_k, block_k)
            column = index[w] * block_k + jnp.arange(block_k)[None]
            logits = softmax.product(q, refs.k[keys, :], ((1,), (1,)))
            if row_scale is None:
                logits *= arithmetic.scale * softmax.LOG2E
            else:
                logits *= row_scale * refs.scales[1][keys][None]
            seen = None
            if inside and outside:
                seen = mask.rule.visible(row, column, mask.keys, *parameters)
                if row_segment is not None:
                    seen &= row_segment == refs.segments[1][keys][None]
            add = partial(
                softmax.accumulate,
                logits=logits,
                values=refs.v[keys, :],
                levels=arithmetic.levels,
                unit=arithmetic.unit,
                rows=row < mask.queries if mask.queries % block_q else None,
            )
            carries = list(carries)
            if inside:
                carries[0] = add(carries[0], seen=seen)
            if outside and mask.rest:
                exists = column < mask.keys if ragged or seen is not None else None
                beyond = exists if seen is None else exists & ~seen
                carries[1] = add(carries[1], seen=beyond)
            return tuple(carries)

        whole = full[0] if uncut else jnp.int32(0)
        carries = (softmax.empty(block_q, heads.v.shape[-1]),) * (1 + mask.rest)
        walk = jax.lax.fori_loop
        carries = walk(0, whole, partial(visit, inside=True, outside=False), carries)
        carries = walk(whole, count[0], partial(visit, inside=True, outside=True), carries)
        if mask.rest:
            carries = walk(count[0], longest, partial(visit, inside=False, outside=True), carries)
            carries = carries[0], softmax.merge(*carries)
        for (out_ref, lse_ref), carry in zip(results, carries):
            out, lse = softmax.finish(carry)
            out_ref[...] = out.astype(out_ref.dtype)
            lse_ref[...] = lse[:, 0]

    parts = 1 + mask.rest
    # More warps share a block's products, and wait for each other in its softmax.
    few = block_q * block_k <= 64 * 64 or max(_widths(heads)) <= 64
    out_shape = batch, shape[2], of_heads, heads.v.shape[-1]
    result = (
        jax.ShapeDtypeStruct(out_shape, jnp.dtype(arithmetic.out)),
        jax.ShapeDtypeStruct(shape, jnp.float32),
    )
    # XLA drops these transpositions against those of the callers.
    laid_out = heads._replace(**{name: getattr(heads, name).swapaxes(1, 2) for name in "qkv"})
    results = pl.pallas_call(
        kernel,
        name="block_sparse_attention",
        grid=(rows, of_heads, batch),  # programs that run together share keys and values
        in_specs=[
            *map(of_lists, lists),
            pl.BlockSpec(table.shape, lambda m, h, b: (0,)),
            specs,
        ],
        out_specs=[(of_queries(heads.v), own_rows)] * parts,
        out_shape=[result] * parts,
        compiler_params=plgpu.CompilerParams(num_warps=4 if few else 8, num_stages=_STAGES),
        cost_estimate=softmax.cost(mask, heads, arithmetic.out),
        interpret=interpret,
    )(*lists, table, laid_out)
    results = [
        (out.swapaxes(1, 2)[:, :, :queries, :value_width], lse[:, :, :queries])
        for out, lse in results
    ]
    return tuple(results) if mask.rest else results[0]


def _arranged(mask: BlockMask, heads: Heads) -> Heads:
    """Whole blocks, heads as wide as Triton's."""
    width, value_width = _widths(heads)

    def whole(x: Array, block: int, width: int) -> Array:
        return pad_axis(pad_axis(x, 2, block), 3, width)

    def numbers(pair: Any, axis: int) -> Any:
        if pair is None:
            return None
        return tuple(pad_axis(x, axis, size) for x, size in zip(pair, (mask.block_q, mask.block_k)))

    return Heads(
        whole(heads.q, mask.block_q, width),
        whole(heads.k, mask.block_k, width),
        whole(heads.v, mask.block_k, value_width),
        numbers(heads.segments, 1),
        numbers(heads.scales, 2),
    )


def _least(heads: Heads) -> int:
    """The smallest side of a product on tensor cores."""
    return 32 if min(heads.q.dtype.itemsize, heads.v.dtype.itemsize) == 1 else 16


def _widths(heads: Heads) -> tuple[int, int]:
    """Triton's blocks are powers of two."""
    width, value_width = (
        max(_least(heads), pl.next_power_of_2(x.shape[-1])) for x in (heads.q, heads.v)
    )
    return width, value_width


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands, whose heads it pads."""
    return softmax.flops(mask, heads.q.shape[0] * heads.q.shape[1], *_widths(heads))
