"""Attention over lists of key blocks: softmax(q k^T scale) v where a mask lets keys be seen.

Use it for attention with windows, sinks or any other mask that leaves out blocks. On every platform
the work is that of the visited blocks, and within them the rule is exact. A query that sees no key
gives zeros, and -inf as its log-sum-exp.

Letters: B batch, S queries, T keys, H query heads, K key heads (H = K G, query head h reads key
head h // G), D head width, E value width; M and N blocks of queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_mask import (
    EVERYTHING,
    BlockMask,
    Rule,
    block_mask,
    visible_pairs,
    with_rest,
)
from pallas_kernels.block_sparse_attention import gpu, mosaic_gpu, reference, tpu, xla
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.implementation import Implementation, dispatch, has_sizes
from pallas_kernels.marks import useful
from pallas_kernels.on_mesh import Cut, on_several_devices
from pallas_kernels.tiling import round_up

Segments = tuple[Array, Array]

KERNELS: dict[Any, Any] = {
    "pallas_tpu": tpu,
    "pallas_gpu": gpu,
    "pallas_mosaic_gpu": mosaic_gpu,
}


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask | Rule,
    *,
    scale: float | None = None,
    segments: Segments | None = None,
    by_row: Array | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attend from every query to the keys that a mask lets it see.

    The result is differentiable in q, k and v (reverse mode). The backward pass visits the same
    blocks.

    Args:
        q: [B, S, H, D], float32, bfloat16 or float16.
        k, v: [B, T, K, D] and [B, T, K, E] in q's dtype.
        mask: lists of blocks (`BlockMask`), or a rule. For a rule each implementation chooses its
            own blocks.
        scale: factor on the logits; D^-1/2 if None.
        segments: int32[B, S] and int32[B, T]. A query sees only keys of its own segment.
        by_row: int32[B, H, P], the parameters of the rule for every row and head, where rows
            differ. The visited blocks are those of the rule in `mask`, which must show at least as
            much.
        return_lse: return (output, log-sum-exp float32[B, S, H]), so that you can merge results
            over different keys.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        [B, S, H, E] in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or a mask that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    check(q, k, v, segments)
    known, made = split_mask(mask, q, k)
    if by_row is not None:
        check_by_row(mask if isinstance(mask, Rule) else mask.rule, q, by_row)
    problem = Problem(
        operation="block_sparse_attention",
        mask=known,
        arithmetic=Arithmetic(logit_scale(scale, q), v.dtype.name),
        implementation=implementation,
        interpret=interpret,
    )
    out, lse = _differentiable(problem, *heads_first(q, k, v), (segments, by_row, made))
    out = out.swapaxes(1, 2)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


@lru_cache(maxsize=256)
def choose_block(
    rule: Rule,
    queries: int,
    keys: int,
    *,
    smallest: int,
    largest: int,
    keys_in: int = 1,
    worthwhile: int = 1,
    by_band: bool = False,
    even: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Blocks of queries and keys that suit a rule: few, and little of them cut.

    Blocks of queries are about a quarter of what a query sees, blocks of keys a `keys_in`th of
    them, and those of queries no smaller than `worthwhile` while there are four of them. With
    `by_band` it is a quarter of one band of several, whose blocks of keys are half as large. A rule
    that shows everything is cut evenly, into blocks of at most `even`.
    """
    if even is not None and rule == EVERYTHING:
        of_queries, of_keys = (
            round_up(-(-length // -(-length // most)), smallest)
            for length, most in zip((queries, keys), even)
        )
        return of_queries, of_keys
    seen = visible_pairs(rule, queries, keys) / (len(rule.parameters) * queries)
    if by_band and rule.bands > 1:
        seen, keys_in = seen / rule.bands, 2 * keys_in
    block = 2 ** round(math.log2(max(seen, 4) / 4))
    smallest = max(smallest, min(worthwhile, 2 ** (queries // 4).bit_length() // 2))
    block = min(max(block, smallest), largest)
    return block, block // keys_in


class Problem(NamedTuple):
    """What is known while tracing.

    Attributes:
        operation: its name, for messages.
        mask: lists or a rule; None if the lists are made at run time.
        arithmetic: how numbers are made.
        implementation, interpret: as in `block_sparse_attention`.
        rest: attend to all keys too, in the same pass.
    """

    operation: str
    mask: BlockMask | Rule | None
    arithmetic: Arithmetic
    implementation: Implementation | None
    interpret: bool
    rest: bool = False

    def lists(self, made: BlockMask | None, heads: Heads, program: Any) -> BlockMask:
        """The mask as lists, those made at run time or those of a rule in a program's blocks."""
        mask = made or self.mask
        if not isinstance(mask, Rule):
            assert mask is not None
            return mask
        lengths = heads.q.shape[2], heads.k.shape[2]
        block = choose_block(
            mask, *lengths, **program.blocks(max(heads.q.shape[-1], heads.v.shape[-1]))
        )
        return (with_rest if self.rest else block_mask)(mask, *lengths, block=block)


# Jitted, so that the equal layers of a model trace it once.
@partial(jax.jit, static_argnums=0)
def attend(problem: Problem, heads: Heads, made: BlockMask | None = None) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S], without gradients."""
    if made is not None and on_several_devices():
        # What all lists hold says nothing of those of one device.
        made = dataclasses.replace(made, seen=None, listed=None)
    return dispatch(
        problem.operation,
        problem.implementation,
        programs(problem),
        *(heads, made),
        refusal=partial(refusal, problem, heads, made),
        cut=_cut(problem, heads, made),
        interpret=problem.interpret,
    )


def _cut(problem: Problem, heads: Heads, made: BlockMask | None) -> Cut:
    """By rows and heads, but where lists or a rule that are known while tracing differ by them."""
    mask = made if problem.mask is None else problem.mask
    assert mask is not None
    rule = mask if isinstance(mask, Rule) else mask.rule
    lists = mask.index.shape[:2] if isinstance(mask, BlockMask) and made is None else (1, 1)
    whole = "b" * (lists[0] > 1) + "h" * (lists[1] > 1 or len(rule.parameters) > 1)
    letters = jax.tree.map(
        lambda leaf: "".join(
            letter if size > 1 else "." for letter, size in zip("bh", leaf.shape)
        ).ljust(leaf.ndim, "."),
        made,
    )
    by_head: Any = ("bh.", "bh.")
    by_token: Any = ("b.", "b.")
    parts = Heads(
        *("bh..",) * 3,
        segments=heads.segments and by_token,
        scales=heads.scales and by_head,
        by_row=None if heads.by_row is None else by_head[0],
    )
    both = ("bh..", "bh.")
    return Cut((parts, letters), (both, both) if problem.rest else both, whole)


def programs(problem: Problem) -> dict[str, Callable[[Heads, BlockMask | None], Any]]:
    """What each implementation runs."""
    interpret = problem.interpret
    known = {
        "reference": (reference.forward, xla, None),
        "xla": (xla.forward, xla, xla.flops),
    } | {
        name: (partial(kernel.forward, interpret=interpret), kernel, kernel.flops)
        for name, kernel in KERNELS.items()
    }
    return {name: partial(_run, problem, *program) for name, program in known.items()}


def refusal(problem: Problem, heads: Heads, made: BlockMask | None, name: str) -> str | None:
    """Why a kernel cannot run these operands; None if it can."""
    kernel = KERNELS[name]
    return kernel.refusal(problem.lists(made, heads, kernel), heads)


def _run(
    problem: Problem,
    forward: Callable[..., Any],
    own: Any,
    flops: Callable[..., int] | None,
    heads: Heads,
    made: BlockMask | None,
) -> Any:
    """One program on its own blocks, marked with how much of its work is seen."""
    mask = problem.lists(made, heads, own)
    forward = partial(forward, mask, problem.arithmetic)
    if flops is not None and mask.seen is not None and not heads.cut:
        lines = heads.q.shape[0] * heads.q.shape[1]
        copies = lines // (mask.index.shape[0] * mask.index.shape[1])
        pairs = lines * mask.queries * mask.keys if mask.rest else mask.seen * copies
        width = heads.q.shape[-1] + heads.v.shape[-1]
        forward = useful(forward, 2 * pairs * width, flops(mask, heads))
    return forward(heads)


def _forward(problem: Problem, q: Array, k: Array, v: Array, integers: Any) -> Any:
    segments, by_row, made = integers
    return attend(problem, Heads(q, k, v, segments, by_row=by_row), made)


def _forward_and_save(problem: Problem, q: Array, k: Array, v: Array, integers: Any) -> Any:
    out, lse = _forward(problem, q, k, v, integers)
    return (out, lse), (q, k, v, integers, out, lse)


def _backward(problem: Problem, saved: Any, gradients: Any) -> Any:
    q, k, v, (segments, by_row, made), out, lse = saved
    heads = Heads(q, k, v, segments, by_row=by_row)
    mask = problem.lists(made, heads, xla)
    return *xla.backward(mask, problem.arithmetic, heads, out, lse, *gradients), None


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_forward_and_save, _backward)


def split_mask(
    mask: BlockMask | Rule, q: Array, k: Array
) -> tuple[BlockMask | Rule | None, BlockMask | None]:
    """What of a mask is static, and lists that are made at run time.

    Those go into a program as an operand, so that no tracer is closed over.

    Raises:
        ValueError: if the mask does not fit operands [B, S, H, D], or if their sizes are symbols.
    """
    batch, queries, heads, _ = q.shape
    if not has_sizes((q, k)):
        raise ValueError(
            f"lists of blocks are made for sizes that are numbers, got q {q.shape}, k {k.shape}; "
            f"export one program for each of them"
        )
    mask.check(batch, queries, heads, k.shape[1])
    if isinstance(mask, Rule) or mask.static:
        return mask, None
    return None, mask


def check_by_row(rule: Rule, q: Array, by_row: Array) -> None:
    """Raise ValueError unless these are parameters of a rule for operands [B, S, H, D]."""
    wanted = (q.shape[0], q.shape[2], rule.parameters.shape[1])
    if by_row.shape != wanted or not jnp.issubdtype(by_row.dtype, jnp.integer):
        raise ValueError(
            f"by_row must be integers [batch, heads, parameters of the rule], {list(wanted)}; got "
            f"{by_row.dtype}{list(by_row.shape)}"
        )


def logit_scale(scale: float | None, q: Array) -> float:
    """The factor on the logits of operands [B, S, H, D]."""
    return q.shape[-1] ** -0.5 if scale is None else float(scale)


def heads_first(q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """[B, S, H, D] as [B, H, S, D]."""
    return q.swapaxes(1, 2), k.swapaxes(1, 2), v.swapaxes(1, 2)


def check(q: Array, k: Array, v: Array, segments: Segments | None = None) -> None:
    """Raise ValueError unless these operands [B, S, H, D] can be attended with."""
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(
            f"queries, keys and values must be [batch, tokens, heads, width]; {shapes}"
        )
    if q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"queries and keys must agree in batch and width, keys and values in batch, tokens "
            f"and heads; {shapes}"
        )
    floats = (jnp.float32, jnp.bfloat16, jnp.float16)
    if not q.dtype == k.dtype == v.dtype or q.dtype not in floats:
        raise ValueError(
            f"queries, keys and values must have one dtype of float32, bfloat16 and float16; got "
            f"{q.dtype}, {k.dtype} and {v.dtype}"
        )
    if 0 in (*q.shape, *k.shape, *v.shape):
        raise ValueError(f"there must be at least one of everything; {shapes}")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads; {shapes}")
    if segments is not None:
        wanted = (q.shape[:2], k.shape[:2])
        if (segments[0].shape, segments[1].shape) != wanted:
            raise ValueError(
                f"segments must be one number for every query and key, {list(wanted[0])} and "
                f"{list(wanted[1])}; got {list(segments[0].shape)} and {list(segments[1].shape)}"
            )
