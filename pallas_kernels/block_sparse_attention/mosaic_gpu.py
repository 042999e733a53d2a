"""Block-sparse attention on a Hopper GPU (Mosaic): one warpgroup fetches what others multiply.

A block of queries belongs to one or two warpgroups, 64 rows each, which walk the same list. One
more copies the listed keys and values into a ring of buffers ahead of them. Blocks that the rule
does not cut come first and skip the mask. Heads are [B, H, S, D] here, keys [B, K, D, T].
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention import online_softmax as softmax
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.marks import declared
from pallas_kernels.tiling import pad_axis, round_up

# Sides of the blocks that a rule is cut into.
BLOCKS = {"smallest": 64, "largest": 128}

_ROWS = 64  # of a warpgroup's product
_WIDTH = 64  # 16-bit numbers in a swizzled line of shared memory
_STAGES = 2  # blocks of keys and values in shared memory
_REGISTERS = 232, 40  # of a thread that multiplies, and of one that fetches


def refusal(mask: BlockMask, heads: Heads) -> str | None:
    """Why this kernel cannot run these operands; None if it can."""
    for operand in heads[:3]:
        if operand.dtype not in (jnp.bfloat16, jnp.float16):
            return f"operands must be bfloat16 or float16, got {operand.dtype}"
    if heads.segments is not None or heads.scales is not None or mask.rest:
        return "segments, codes and a second result over all keys are the Triton kernel's alone"
    for block in (mask.block_q, mask.block_k):
        if block not in (64, 128):
            return f"blocks must be of 64 or 128 tokens, got {mask.block_q} x {mask.block_k}"
    widths = heads.q.shape[-1], heads.v.shape[-1]
    if max(widths) > 128:
        return f"heads must be at most 128 wide, got {widths[0]} and {widths[1]}"
    return None


def forward(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, *, interpret: bool = False
) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S]."""
    queries, value_width = heads.q.shape[2], heads.v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    q, k, v = (
        pad_axis(pad_axis(x, 2, block), 3, _WIDTH)
        for x, block in zip(heads[:3], (block_q, block_k, block_k))
    )
    padded = Heads(q, k, v)
    result = (
        jax.ShapeDtypeStruct((*q.shape[:3], v.shape[-1]), jnp.dtype(arithmetic.out)),
        jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
    )
    cost = softmax.cost(mask, padded, arithmetic.out)
    run = declared(
        _kernel(mask, arithmetic, padded, result, interpret=interpret),
        flops=cost.flops,
        bytes_accessed=cost.bytes_accessed,
        elements=int(np.prod(result[0].shape)),
    )
    lists = [jnp.asarray(x) for x in (mask.index, mask.count, mask.full)]
    with jax.named_scope("block_sparse_attention"):
        out, lse = run(*lists, softmax.table(mask), q, k.swapaxes(2, 3), v)
    return out[:, :, :queries, :value_width], lse[:, :, :queries]


def _kernel(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads, result: Any, *, interpret: bool
) -> Any:
    # Imported when it is used: this takes a second, and not every build of JAX has it.
    from jax.experimental.pallas import mosaic_gpu as plgpu

    batch, of_heads, _, width = heads.q.shape
    value_width, dtype = heads.v.shape[-1], heads.q.dtype
    group = of_heads // heads.k.shape[1]
    block_q, block_k = mask.block_q, mask.block_k
    workers = block_q // _ROWS
    shared = [size == 1 for size in mask.index.shape[:2]]  # by the batch, by the heads
    rows = mask.index.shape[2]
    tile, line = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def as_layout(x: Array, layout: Any) -> Array:
        """Where the numbers lie among the threads, of which interpret mode knows nothing."""
        return x if interpret else plgpu.layout_cast(x, layout)

    def iota(axis: int) -> Array:
        return as_layout(lax.broadcasted_iota(jnp.int32, (_ROWS, block_k), axis), tile)

    def multiply(x: Any, y: Any) -> Array:
        """x [64, C] in shared memory or registers, y [C, N] in shared memory: float32[64, N]."""
        if interpret and isinstance(x, jax.Array):  # there, a product takes shared memory alone
            block = y[...]
            plgpu.commit_smem()  # orders this read before the next copy, as a product's own is
            return jnp.dot(x, block, preferred_element_type=jnp.float32)

        def accumulate(sums: Any) -> Array:
            plgpu.wgmma(sums, x, y)
            return sums[...]

        sums = plgpu.ACC((_ROWS, y.shape[-1]), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        return pl.run_scoped(accumulate, sums)

    def columns(x: Array) -> Array:
        return lax.broadcast_in_dim(x, (_ROWS, block_k), (0,))

    def across(x: Array) -> Array:
        return lax.broadcast_in_dim(x, (_ROWS, value_width), (0,))

    def kernel(index, count, full, table, q_ref, k_ref, v_ref, out_ref, lse_ref, **scratch):
        q_shared, k_shared, v_shared = (scratch[name] for name in ("q", "k", "v"))
        out_shared, lse_shared = scratch["out"], scratch["lse"]
        h, m, b = (lax.axis_index(name) for name in ("heads", "rows", "batch"))
        worker = lax.axis_index("warpgroup")
        own = (0 if shared[0] else b, 0 if shared[1] else h, m)
        visits = count[own]

        @pl.when(worker < workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[0], action="increase")
            first = m * block_q + worker * _ROWS
            plgpu.copy_gmem_to_smem(
                q_ref.at[b, h, pl.ds(first, _ROWS)],
                q_shared.at[worker],
                scratch["q_there"].at[worker],
            )
            plgpu.barrier_wait(scratch["q_there"].at[worker])
            parameters = softmax.parameters(mask, table, h)

            def release(name: str, w: Array) -> None:
                """Of a buffer that is filled again."""

                @pl.when(w + _STAGES < visits)
                def _():
                    plgpu.barrier_arrive(scratch[name].at[lax.rem(w, jnp.int32(_STAGES))])

            def visit(w: Array, carry: Any, *, cut: bool) -> Any:
                peak, total, weighted = carry
                stage = lax.rem(w, jnp.int32(_STAGES))
                plgpu.barrier_wait(scratch["k_there"].at[stage])
                logits = multiply(q_shared.at[worker], k_shared.at[stage])
                release("k_done", w)
                logits = logits * (arithmetic.scale * math.log2(math.e))  # weights are powers of 2
                if cut:
                    column = index[(*own, w)] * block_k + iota(1)
                    seen = mask.rule.visible(first + iota(0), column, mask.keys, *parameters)
                    logits = jnp.where(seen, logits, softmax.MASKED)
                new = jnp.maximum(peak, logits.max(axis=1))
                weights = jnp.exp2(logits - columns(new))
                if cut:
                    weights = jnp.where(seen, weights, 0.0)
                shrink = jnp.exp2(peak - new)
                total = shrink * total + weights.sum(axis=1)
                weights = weights.astype(dtype)
                plgpu.barrier_wait(scratch["v_there"].at[stage])
                weighted = across(shrink) * weighted + multiply(weights, v_shared.at[stage])
                release("v_done", w)
                return new, total, weighted

            carry = (
                as_layout(jnp.full((_ROWS,), softmax.MASKED, jnp.float32), line),
                as_layout(jnp.zeros((_ROWS,), jnp.float32), line),
                as_layout(jnp.zeros((_ROWS, value_width), jnp.float32), tile),
            )
            whole = full[own]
            carry = lax.fori_loop(0, whole, partial(visit, cut=False), carry)
            peak, total, weighted = lax.fori_loop(whole, visits, partial(visit, cut=True), carry)
            some = total > 0
            safe = jnp.where(some, total, 1.0)
            out_shared.at[worker][...] = (weighted / across(safe)).astype(out_shared.dtype)
            lse = (peak + jnp.log2(safe)) * math.log(2)
            lse_shared.at[worker][...] = jnp.where(some, lse, -jnp.inf)
            plgpu.commit_smem()
            place = b, h, pl.ds(first, _ROWS)
            plgpu.copy_smem_to_gmem(out_shared.at[worker], out_ref.at[place])
            plgpu.copy_smem_to_gmem(lse_shared.at[worker], lse_ref.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")
            key_head = lax.div(h, jnp.int32(group))

            @pl.loop(0, visits)
            def _(w):
                stage = lax.rem(w, jnp.int32(_STAGES))
                keys = pl.ds(index[(*own, w)] * block_k, block_k)
                blocks = {"k": k_ref.at[b, key_head, :, keys], "v": v_ref.at[b, key_head, keys]}
                for name, block in blocks.items():

                    @pl.when(w >= _STAGES)
                    def _(name=name):
                        plgpu.barrier_wait(scratch[f"{name}_done"].at[stage])

                    plgpu.copy_gmem_to_smem(
                        block, scratch[name].at[stage], scratch[f"{name}_there"].at[stage]
                    )

    def tiles(*shape: int) -> Any:
        swizzled = plgpu.TilingTransform((8, _WIDTH)), plgpu.SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    there = plgpu.Barrier(num_barriers=_STAGES)
    done = plgpu.Barrier(num_arrivals=workers, num_barriers=_STAGES)
    return plgpu.kernel(
        kernel,
        out_type=result,
        scratch_types={
            "q": tiles(workers, _ROWS, width),
            "k": tiles(_STAGES, width, block_k),
            "v": tiles(_STAGES, block_k, value_width),
            "out": tiles(workers, _ROWS, value_width),
            "lse": plgpu.SMEM((workers, _ROWS), jnp.float32),
            "q_there": plgpu.Barrier(num_barriers=workers),
            "k_there": there,
            "v_there": there,
            "k_done": done,
            "v_done": done,
        },
        grid=(of_heads, rows, batch),
        grid_names=("heads", "rows", "batch"),
        num_threads=workers + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if interpret else None,
    )


def _interpreter() -> Any:
    # Not every supported JAX exports it. Barriers, copies and races between warpgroups are checked.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands, whose heads it pads."""
    widths = (round_up(x.shape[-1], _WIDTH) for x in (heads.q, heads.v))
    return softmax.flops(mask, heads.q.shape[0] * heads.q.shape[1], *widths)
