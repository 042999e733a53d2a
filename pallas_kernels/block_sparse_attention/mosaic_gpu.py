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
_REGISTERS = {1: 256, 2: 232}  # of a thread that multiplies, by how many warpgroups do
_FEW_REGISTERS = 40  # of a thread that fetches


def refusal(mask: BlockMask, heads: Heads) -> str | None:
    """Why this kernel cannot run these operands; None if it can."""
    for operand in heads[:3]:
        if operand.dtype not in (jnp.bfloat16, jnp.float16):
            return f"operands must be bfloat16 or float16, got {operand.dtype}"
    others = "use 'pallas_gpu' or 'xla'"
    if heads.segments is not None:
        return f"it has no segments; {others}"
    if heads.by_row is not None:
        return f"its rules are the same in all rows; {others}"
    if mask.rest:
        return f"it gives no second result over all keys; {others}"
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
    if not interpret and (found := _capability()) not in (None, "9.0"):
        raise NotImplementedError(
            f"block_sparse_attention, implementation 'pallas_mosaic_gpu': it runs on GPUs of "
            f"compute capability 9.0 (Hopper), this one has {found}; use 'pallas_gpu'"
        )
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
    kernel = _kernel(mask, arithmetic, padded, result, interpret=interpret)

    def block_sparse_attention(*operands: Array) -> Any:
        return kernel(*operands)

    run = declared(
        block_sparse_attention,
        flops=cost.flops,
        bytes_accessed=cost.bytes_accessed,
        elements=int(np.prod(result[0].shape)),
    )
    lists = [jnp.asarray(x) for x in (mask.index, mask.count, mask.full)]
    with jax.named_scope("block_sparse_attention"):
        out, lse = run(*lists, softmax.table(mask, padded), q, k.swapaxes(2, 3), v)
    return out[:, :, :queries, :value_width], lse[:, :, :queries]


def _capability() -> str | None:
    """That of this machine's GPU, None without one: programs can be made for others' GPUs."""
    try:
        return getattr(jax.devices("cuda")[0], "compute_capability", None)
    except RuntimeError:
        return None


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

    def logits_of(q: Any, k: Any) -> Array:
        """q [64, D] and k [D, N] in shared memory: float32[64, N]."""

        def multiply(sums: Any) -> Array:
            plgpu.wgmma(sums, q, k)
            return sums[...]

        sums = plgpu.ACC((_ROWS, block_k), jnp.float32)  # pyright: ignore[reportPrivateImportUsage]
        return pl.run_scoped(multiply, sums)

    def add_values(sums: Array, weights: Array, v: Any) -> Array:
        """sums [64, E] + weights [64, N] in registers times v [N, E] in shared memory."""
        if interpret:  # where a product takes shared memory alone
            block = v[...]
            plgpu.commit_smem()  # orders this read before the next copy, as a product's own is
            return sums + jnp.dot(weights, block, preferred_element_type=jnp.float32)
        start = plgpu.ACC.init(sums)  # pyright: ignore[reportPrivateImportUsage]
        found: Any = pl.run_state(lambda sums: plgpu.wgmma(sums, weights, v))(start)
        return found

    def across(x: Array, width: int) -> Array:
        return lax.broadcast_in_dim(x, (_ROWS, width), (0,))

    def kernel(index, count, full, table, q_ref, k_ref, v_ref, out_ref, lse_ref, **scratch):
        q_shared, k_shared, v_shared = (scratch[name] for name in ("q", "k", "v"))
        out_shared, lse_shared = scratch["out"], scratch["lse"]
        h, m, b = (lax.axis_index(name) for name in ("heads", "rows", "batch"))
        worker = lax.axis_index("warpgroup")
        own = (0 if shared[0] else b, 0 if shared[1] else h, m)
        visits = count[own]

        @pl.when(worker < workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[workers], action="increase")
            first = m * block_q + worker * _ROWS
            plgpu.copy_gmem_to_smem(
                q_ref.at[b, h, pl.ds(first, _ROWS)],
                q_shared.at[worker],
                scratch["q_arrived"].at[worker],
            )
            plgpu.barrier_wait(scratch["q_arrived"].at[worker])
            parameters = softmax.parameters(mask, table, h)

            def release(name: str, w: Array) -> None:
                """Of a buffer that is filled again."""

                @pl.when(w + _STAGES < visits)
                def _():
                    plgpu.barrier_arrive(scratch[name].at[lax.rem(w, jnp.int32(_STAGES))])

            def visit(w: Array, carry: Any, *, cut: bool) -> Any:
                peak, total, weighted = carry
                stage = lax.rem(w, jnp.int32(_STAGES))
                plgpu.barrier_wait(scratch["k_arrived"].at[stage])
                logits = logits_of(q_shared.at[worker], k_shared.at[stage])
                release("k_consumed", w)
                logits = logits * (arithmetic.scale * softmax.LOG2E)
                if cut:
                    column = index[(*own, w)] * block_k + iota(1)
                    seen = mask.rule.visible(first + iota(0), column, mask.keys, *parameters)
                    logits = jnp.where(seen, logits, softmax.MASKED)
                new = jnp.maximum(peak, logits.max(axis=1))
                weights = jnp.exp2(logits - across(new, block_k))
                if cut:
                    weights = jnp.where(seen, weights, 0.0)
                shrink = jnp.exp2(peak - new)
                total = shrink * total + weights.sum(axis=1)
                weights = weights.astype(dtype)
                plgpu.barrier_wait(scratch["v_arrived"].at[stage])
                weighted = across(shrink, value_width) * weighted
                weighted = add_values(weighted, weights, v_shared.at[stage])
                release("v_consumed", w)
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
            out_shared.at[worker][...] = (weighted / across(safe, value_width)).astype(
                out_shared.dtype
            )
            lse = (peak + jnp.log2(safe)) * math.log(2)
            lse_shared.at[worker][...] = jnp.where(some, lse, -jnp.inf)
            plgpu.commit_smem()
            place = b, h, pl.ds(first, _ROWS)
            plgpu.copy_smem_to_gmem(out_shared.at[worker], out_ref.at[place])
            plgpu.copy_smem_to_gmem(lse_shared.at[worker], lse_ref.at[place])
            plgpu.wait_smem_to_gmem(0)

        @pl.when(worker == workers)
        def _():
            plgpu.set_max_registers(_FEW_REGISTERS, action="decrease")
            key_head = lax.div(h, jnp.int32(group))

            @pl.loop(0, visits)
            def _(w):
                stage = lax.rem(w, jnp.int32(_STAGES))
                keys = pl.ds(index[(*own, w)] * block_k, block_k)
                blocks = {"k": k_ref.at[b, key_head, :, keys], "v": v_ref.at[b, key_head, keys]}
                for name, block in blocks.items():

                    @pl.when(w >= _STAGES)
                    def _(name=name):
                        plgpu.barrier_wait(scratch[f"{name}_consumed"].at[stage])

                    plgpu.copy_gmem_to_smem(
                        block, scratch[name].at[stage], scratch[f"{name}_arrived"].at[stage]
                    )

    def tiles(*shape: int) -> Any:
        layouts: Any = plgpu  # JAX 0.12 annotates its transforms as abstract classes
        swizzled = layouts.TilingTransform((8, _WIDTH)), layouts.SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    arrived = plgpu.Barrier(num_barriers=_STAGES)
    consumed = plgpu.Barrier(num_arrivals=workers, num_barriers=_STAGES)
    return plgpu.kernel(
        kernel,
        out_type=result,
        scratch_types={
            "q": tiles(workers, _ROWS, width),
            "k": tiles(_STAGES, width, block_k),
            "v": tiles(_STAGES, block_k, value_width),
            "out": tiles(workers, _ROWS, value_width),
            "lse": plgpu.SMEM((workers, _ROWS), jnp.float32),
            "q_arrived": plgpu.Barrier(num_barriers=workers),
            "k_arrived": arrived,
            "v_arrived": arrived,
            "k_consumed": consumed,
            "v_consumed": consumed,
        },
        grid=(batch, of_heads, rows),  # the last one is fastest: its programs share keys and values
        grid_names=("batch", "heads", "rows"),
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
