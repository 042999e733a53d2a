"""Block-sparse attention on a Hopper GPU (Mosaic): one warpgroup fetches what others multiply.

A block of 64 queries belongs to one warpgroup, which copies the listed keys and values into a ring
of buffers ahead of its products; a multiprocessor has several of these. A block of 128 queries
belongs to two, which walk the same list, one of them multiplying while the other takes its softmax,
and to a third that copies. Blocks that the rule does not cut come first and skip the mask. The
kernel reads heads where a model left them, [B, S, H, D].
"""

from __future__ import annotations

import math
from collections.abc import Callable
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

_ROWS = 64  # of a warpgroup's product
_WIDTH = 64  # 16-bit numbers in a swizzled line of shared memory
_SHARED = {1: 113 << 10, 2: 227 << 10}  # bytes for a block of queries: one has half of all
_STAGES = {64: 2, 128: 3}  # blocks of so many keys, and values, in shared memory at most
_REGISTERS = 232, 40  # of a thread of two warpgroups that multiply, and of the one that copies


def blocks(width: int) -> dict[str, Any]:
    """What a rule is cut into, see `choose_block`, for heads `width` wide."""
    # Wide heads need two warpgroups' registers; of narrow ones several blocks share a processor.
    wide = width > _WIDTH
    return {"smallest": 64, "largest": 128 if wide else 64, "even": (128 if wide else 64, 128)}


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
    if arithmetic.scale < 0:  # which the kernel multiplies the largest logits by
        heads = heads._replace(q=-heads.q)
        arithmetic = arithmetic._replace(scale=-arithmetic.scale)
    queries, value_width = heads.q.shape[2], heads.v.shape[-1]
    block_q, block_k = mask.block_q, mask.block_k
    q, k, v = (
        pad_axis(pad_axis(x, 2, block), 3, _WIDTH)
        for x, block in zip(heads[:3], (block_q, block_k, block_k))
    )
    padded = Heads(q, k, v)
    batch, of_heads, rows, _ = q.shape
    result = (
        jax.ShapeDtypeStruct((batch, rows, of_heads, v.shape[-1]), jnp.dtype(arithmetic.out)),
        jax.ShapeDtypeStruct((batch, of_heads, rows), jnp.float32),
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
        # XLA drops these transpositions against those of the callers.
        out, lse = run(*lists, softmax.table(mask, padded), *(x.swapaxes(1, 2) for x in (q, k, v)))
    return out.swapaxes(1, 2)[:, :, :queries, :value_width], lse[:, :, :queries]


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
    alone = workers == 1
    stages = _stages(workers, block_k, width, value_width)
    shared = [size == 1 for size in mask.index.shape[:2]]  # by the batch, by the heads
    rows = mask.index.shape[2]
    factor = arithmetic.scale * softmax.LOG2E
    tile, line = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)

    def as_layout(x: Array, layout: Any) -> Array:
        """Where the numbers lie among the threads, of which interpret mode knows nothing."""
        return x if interpret else plgpu.layout_cast(x, layout)

    def iota(axis: int) -> Array:
        return as_layout(lax.broadcasted_iota(jnp.int32, (_ROWS, block_k), axis), tile)

    def logits_of(q: Any, k: Any, while_it_runs: Callable[[], None]) -> Array:
        """q [64, D] and k [N, D] in shared memory: float32[64, N]."""
        if interpret:  # where no product takes a transposed reference
            block = k[...]
            plgpu.commit_smem()
            while_it_runs()
            return jnp.dot(q[...], block.T, preferred_element_type=jnp.float32)

        def multiply(sums: Any) -> Array:
            plgpu.wgmma(sums, q, k.transpose((1, 0)))
            while_it_runs()
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
        key_head = lax.div(h, jnp.int32(group))

        def fetch(name: str, w: Array, block: Array) -> None:
            """One block of the list, on its way into its buffer."""
            stage, tokens = lax.rem(w, jnp.int32(stages)), pl.ds(block * block_k, block_k)
            source = {"k": k_ref, "v": v_ref}[name].at[b, tokens, key_head]
            arrived = scratch[f"{name}_arrived"].at[stage]
            plgpu.copy_gmem_to_smem(source, scratch[name].at[stage], arrived)

        def take_turns(*, done: bool = True, wait: bool = True) -> None:
            """Of two warpgroups, one has the tensor cores."""
            if not alone and done:
                plgpu.barrier_arrive(scratch["turn"])
            if not alone and wait:
                plgpu.barrier_wait(scratch["turn"])

        @pl.when(worker < workers)
        def _():
            if not alone:
                plgpu.set_max_registers(_REGISTERS[0], action="increase")
            first = m * block_q + worker * _ROWS
            plgpu.copy_gmem_to_smem(
                q_ref.at[b, pl.ds(first, _ROWS), h],
                q_shared.at[worker],
                scratch["q_arrived"].at[worker],
            )
            if alone:

                @pl.loop(0, lax.min(visits, jnp.int32(stages)))
                def _(w):
                    fetch("k", w, index[(*own, w)])
                    fetch("v", w, index[(*own, w)])

            plgpu.barrier_wait(scratch["q_arrived"].at[worker])
            pl.when(worker == 1)(take_turns)
            parameters = softmax.parameters(mask, table, h)

            def release(name: str, w: Array, following: Array | None) -> None:
                """Of a buffer that is filled again."""

                @pl.when(w + stages < visits)
                def _():
                    if following is None:
                        consumed = scratch[f"{name}_consumed"]
                        plgpu.barrier_arrive(consumed.at[lax.rem(w, jnp.int32(stages))])
                    else:
                        fetch(name, w + stages, following)

            def visit(w: Array, carry: Any, *, cut: bool) -> Any:
                peak, total, weighted = carry
                stage, following = lax.rem(w, jnp.int32(stages)), None
                if alone:  # read early: it takes long
                    following = index[(*own, lax.min(w + stages, visits - 1))]
                plgpu.barrier_wait(scratch["k_arrived"].at[stage])
                logits = logits_of(q_shared.at[worker], k_shared.at[stage], take_turns)
                release("k", w, following)
                if cut:
                    column = index[(*own, w)] * block_k + iota(1)
                    seen = mask.rule.visible(first + iota(0), column, mask.keys, *parameters)
                    logits = jnp.where(seen, logits, softmax.MASKED)
                # The factor comes late, as part of a subtraction.
                new = jnp.maximum(peak, logits.max(axis=1) * factor)
                weights = jnp.exp2(logits * factor - across(new, block_k))
                if cut:
                    weights = jnp.where(seen, weights, 0.0)
                shrink = jnp.exp2(peak - new)
                total = shrink * total + weights.sum(axis=1)
                weighted = across(shrink, value_width) * weighted
                weights = weights.astype(dtype)
                # None of this may move behind the other's turn.
                new, total, weighted, weights = lax.optimization_barrier(
                    (new, total, weighted, weights)
                )
                take_turns(wait=False)
                plgpu.barrier_wait(scratch["v_arrived"].at[stage])
                take_turns(done=False)
                weighted = add_values(weighted, weights, v_shared.at[stage])
                release("v", w, following)
                return new, total, weighted

            carry = (
                as_layout(jnp.full((_ROWS,), softmax.MASKED, jnp.float32), line),
                as_layout(jnp.zeros((_ROWS,), jnp.float32), line),
                as_layout(jnp.zeros((_ROWS, value_width), jnp.float32), tile),
            )
            whole = full[own]
            carry = lax.fori_loop(0, whole, partial(visit, cut=False), carry)
            peak, total, weighted = lax.fori_loop(whole, visits, partial(visit, cut=True), carry)
            pl.when(worker == 0)(take_turns)
            some = total > 0
            safe = jnp.where(some, total, 1.0)
            out_shared.at[worker][...] = (weighted / across(safe, value_width)).astype(
                out_shared.dtype
            )
            lse = (peak + jnp.log2(safe)) * math.log(2)
            lse_shared.at[worker][...] = jnp.where(some, lse, -jnp.inf)
            plgpu.commit_smem()
            place = pl.ds(first, _ROWS)
            plgpu.copy_smem_to_gmem(out_shared.at[worker], out_ref.at[b, place, h])
            plgpu.copy_smem_to_gmem(lse_shared.at[worker], lse_ref.at[b, h, place])
            plgpu.wait_smem_to_gmem(0)

        if alone:
            return

        @pl.when(worker == workers)
        def _():
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")

            @pl.loop(0, visits)
            def _(w):
                block = index[(*own, w)]
                for name in ("k", "v"):

                    @pl.when(w >= stages)
                    def _(name=name):
                        consumed = scratch[f"{name}_consumed"]
                        plgpu.barrier_wait(consumed.at[lax.rem(w, jnp.int32(stages))])

                    fetch(name, w, block)

    def tiles(*shape: int) -> Any:
        layouts: Any = plgpu  # JAX 0.12 annotates its transforms as abstract classes
        swizzled = layouts.TilingTransform((8, _WIDTH)), layouts.SwizzleTransform(128)
        return plgpu.SMEM(shape, dtype, transforms=swizzled)

    arrived = plgpu.Barrier(num_barriers=stages)
    consumed = plgpu.Barrier(num_arrivals=workers, num_barriers=stages)
    between_warpgroups = {
        "turn": plgpu.Barrier(num_arrivals=workers),
        "k_consumed": consumed,
        "v_consumed": consumed,
    }
    return plgpu.kernel(
        kernel,
        out_type=result,
        scratch_types={
            "q": tiles(workers, _ROWS, width),
            "k": tiles(stages, block_k, width),
            "v": tiles(stages, block_k, value_width),
            "out": tiles(workers, _ROWS, value_width),
            "lse": plgpu.SMEM((workers, _ROWS), jnp.float32),
            "q_arrived": plgpu.Barrier(num_barriers=workers),
            "k_arrived": arrived,
            "v_arrived": arrived,
        }
        | ({} if alone else between_warpgroups),
        grid=(batch, of_heads, rows),  # the last one is fastest: its programs share keys and values
        grid_names=("batch", "heads", "rows"),
        num_threads=1 if alone else workers + 1,
        thread_name="warpgroup",
        kernel_name="block_sparse_attention",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if interpret else None,
    )


def _stages(workers: int, block_k: int, width: int, value_width: int) -> int:
    """How many blocks of keys and values, of 16-bit numbers, fit beside queries and results."""
    of_key, rows = 2 * (width + value_width), workers * _ROWS
    room = _SHARED[workers] - rows * of_key - 2048  # barriers and the like
    return max(1, min(_STAGES[block_k], room // (block_k * of_key)))


def _interpreter() -> Any:
    # Not every supported JAX exports it. Barriers, copies and races between warpgroups are checked.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(detect_races=True)


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands, whose heads it pads."""
    widths = (round_up(x.shape[-1], _WIDTH) for x in (heads.q, heads.v))
    return softmax.flops(mask, heads.q.shape[0] * heads.q.shape[1], *widths)
