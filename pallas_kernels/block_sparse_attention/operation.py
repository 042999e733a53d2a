"""Attention over lists of key blocks: softmax(q k^T scale) v where a mask lets keys be seen.

Work is that of the visited blocks on every platform; the rule inside of them is exact. A query that
sees nothing gives zeros, and -inf as its log-sum-exp.

Letters: B batch, S queries, T keys, H query heads, K key heads (H = K G, query head h reads key
head h // G), D head width, E value width; M and N blocks of queries and keys.
"""

from __future__ import annotations

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
)
from pallas_kernels.block_sparse_attention import gpu, reference, tpu, xla
from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.useful import useful

Segments = tuple[Array, Array]


def block_sparse_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask | Rule,
    *,
    scale: float | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attention of every query to the keys that a mask lets it see.

    Differentiable in q, k and v (reverse mode); the backward pass visits the same blocks.

    Args:
        q: [B, S, H, D], float32, bfloat16 or float16.
        k, v: [B, T, K, D] and [B, T, K, E] in q's dtype.
        mask: lists of blocks, or a rule, for which each implementation chooses its own blocks.
        scale: of the logits; D^-1/2 if None.
        segments: int32[B, S] and int32[B, T]; a query sees only keys of its own segment.
        return_lse: return (output, log-sum-exp float32[B, S, H]), so that results over different
            keys can be merged.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        [B, S, H, E] in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or a mask that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    _check(q, k, v, segments)
    batch, queries, heads, width = q.shape
    if not isinstance(mask, Rule):
        mask.check(batch, queries, heads, k.shape[1])
    known = isinstance(mask, Rule) or mask.static
    problem = _Problem(
        mask=mask if known else None,
        scale=width**-0.5 if scale is None else scale,
        implementation=implementation,
        interpret=interpret,
    )
    # Lists that are made at run time go in as an operand, so that no tracer is closed over.
    integers = (segments, None if known else mask)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    out, lse = _attend(problem, q, k, v, integers)
    out = out.swapaxes(1, 2)
    return (out, lse.swapaxes(1, 2)) if return_lse else out


def refusals(q: Array, k: Array, v: Array, mask: BlockMask | Rule) -> dict[str, str | None]:
    """Why kernels cannot run these operands [B, S, H, D]; None for those that can."""
    _check(q, k, v, None)
    problem = _Problem(mask, 1.0, None, False)
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return _refusals(problem, q, k, v, None)


@lru_cache(maxsize=256)
def choose_blocks(
    rule: Rule, queries: int, keys: int, *, smallest: int, largest: int, keys_in: int = 1
) -> BlockMask:
    """A mask in blocks that suit a rule: few, and little of them cut.

    Blocks of queries are about a quarter of what a query sees, blocks of keys a `keys_in`th of
    them.
    """
    seen = visible_pairs(rule, queries, keys) / (len(rule.parameters) * queries)
    block = 2 ** round(math.log2(max(seen, 4) / 4))
    block = min(max(block, smallest), largest)
    return block_mask(rule, queries, keys, block=(block, block // keys_in))


class _Problem(NamedTuple):
    """What is known while tracing."""

    mask: BlockMask | Rule | None  # None if the lists are made at run time
    scale: float
    implementation: Implementation | None
    interpret: bool

    def blocks(self, lists: BlockMask | None, q: Array, k: Array, **sizes: int) -> BlockMask:
        """The mask as lists, in the implementation's own blocks if it is a rule."""
        mask = lists or self.mask
        if isinstance(mask, BlockMask):
            return mask
        return choose_blocks(mask or EVERYTHING, q.shape[2], k.shape[2], **sizes)


# Jitted, so that the equal layers of a model trace it once.
@partial(jax.jit, static_argnums=0)
def _forward(problem: _Problem, q: Array, k: Array, v: Array, integers: Any) -> Any:
    interpret = problem.interpret
    programs = {
        "reference": (reference.forward, xla.BLOCKS, None),
        "xla": (xla.forward, xla.BLOCKS, xla.flops),
        "pallas_tpu": (partial(tpu.forward, interpret=interpret), tpu.BLOCKS, tpu.flops),
        "pallas_gpu": (partial(gpu.forward, interpret=interpret), gpu.BLOCKS, gpu.flops),
    }
    return dispatch(
        "block_sparse_attention",
        problem.implementation,
        {name: partial(_run, problem, *program) for name, program in programs.items()},
        *(q, k, v, integers),
        refusals=_refusals(problem, q, k, v, integers[1]),
        interpret=interpret,
    )


def _run(
    problem: _Problem,
    attend: Callable[..., Any],
    sizes: dict[str, int],
    flops: Callable[..., int] | None,
    q: Array,
    k: Array,
    v: Array,
    integers: Any,
) -> Any:
    """One program in its own blocks, marked with how much of its work is seen."""
    segments, lists = integers
    mask = problem.blocks(lists, q, k, **sizes)
    attend = partial(attend, mask, problem.scale)
    if flops is not None and mask.seen is not None and segments is None:
        copies = q.shape[0] * q.shape[1] // (mask.index.shape[0] * mask.index.shape[1])
        seen = 2 * mask.seen * copies * (q.shape[-1] + v.shape[-1])
        attend = useful(attend, seen, flops(mask, q, v))
    return attend(q, k, v, segments)


def _refusals(
    problem: _Problem, q: Array, k: Array, v: Array, lists: BlockMask | None
) -> dict[str, str | None]:
    return {
        "pallas_tpu": tpu.refusal(problem.blocks(lists, q, k, **tpu.BLOCKS), q, v),
        "pallas_gpu": gpu.refusal(problem.blocks(lists, q, k, **gpu.BLOCKS), q, v),
    }


def _attend_forward(problem: _Problem, q: Array, k: Array, v: Array, integers: Any) -> Any:
    out, lse = _forward(problem, q, k, v, integers)
    return (out, lse), (q, k, v, integers, out, lse)


def _attend_backward(problem: _Problem, saved: Any, gradients: Any) -> Any:
    q, k, v, (segments, mask), out, lse = saved
    mask = problem.blocks(mask, q, k, **xla.BLOCKS)
    d_q, d_k, d_v = xla.backward(mask, problem.scale, q, k, v, segments, out, lse, *gradients)
    return d_q, d_k, d_v, None


_attend = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_attend.defvjp(_attend_forward, _attend_backward)


def _check(q: Array, k: Array, v: Array, segments: Segments | None) -> None:
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
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"query heads must be a multiple of key heads; {shapes}")
    if segments is not None:
        wanted = (q.shape[:2], k.shape[:2])
        if (segments[0].shape, segments[1].shape) != wanted:
            raise ValueError(
                f"segments must be one number for every query and key, {list(wanted[0])} and "
                f"{list(wanted[1])}; got {list(segments[0].shape)} and {list(segments[1].shape)}"
            )
