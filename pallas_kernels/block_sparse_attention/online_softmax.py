"""The softmax over blocks of keys, as the kernels do it, and what it costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.heads import Heads, precision

MASKED = -1e30  # finite, so that rows without any key stay numbers


class Carry(NamedTuple):
    """What is known of a block of queries so far: arrays, or references to them.

    Attributes:
        peak: largest logit, float32[block_q, 1].
        total: sum of exp(logit - peak), float32[block_q, 1].
        weighted: sum of exp(logit - peak) times values, float32[block_q, E].
    """

    peak: Any
    total: Any
    weighted: Any


def empty(rows: int, width: int) -> Carry:
    """Nothing is known yet."""
    peak = jnp.full((rows, 1), MASKED, jnp.float32)
    return Carry(peak, jnp.zeros_like(peak), jnp.zeros((rows, width), jnp.float32))


def accumulate(
    carry: Carry, logits: Array, seen: Array | None, values: Array, levels: int | None
) -> Carry:
    """One more block of keys: logits float32[block_q, block_k], values [block_k, E]."""
    if seen is not None:
        logits = jnp.where(seen, logits, MASKED)
    own = jnp.max(logits, axis=1, keepdims=True)
    peak = jnp.maximum(carry.peak, own)
    weights = jnp.exp(logits - (peak if levels is None else own))
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    shrink = jnp.exp(carry.peak - peak)
    total = jnp.sum(weights, axis=1, keepdims=True)
    if levels is None:
        weighted = product(weights.astype(values.dtype), values, ((1,), (0,)))
    else:
        # Codes are in units of the block's largest weight: exp(own - peak).
        grow = jnp.exp(own - peak)
        total = grow * total
        codes = weight_codes(weights, levels, values.dtype)
        weighted = product(codes, values, ((1,), (0,))) * (grow * (1 / levels))
    return Carry(peak, shrink * carry.total + total, shrink * carry.weighted + weighted)


def weight_codes(weights: Array, levels: int, dtype: Any) -> Array:
    """Weights 0 ... 1 as codes 0 ... levels of a dtype, halves rounded up in integers."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.floor(weights * levels + 0.5).astype(jnp.int32).astype(dtype)
    return (weights * levels).astype(dtype)


def merge(a: Carry, b: Carry) -> Carry:
    """What is known of the keys of both."""
    peak = jnp.maximum(a.peak, b.peak)
    of_a, of_b = jnp.exp(a.peak - peak), jnp.exp(b.peak - peak)
    return Carry(peak, of_a * a.total + of_b * b.total, of_a * a.weighted + of_b * b.weighted)


def finish(carry: Carry) -> tuple[Array, Array]:
    """Output and log-sum-exp; zeros and -inf for rows that saw nothing."""
    some = carry.total > 0
    safe = jnp.where(some, carry.total, 1.0)
    return carry.weighted / safe, jnp.where(some, carry.peak + jnp.log(safe), -jnp.inf)


def product(x: Array, y: Array, contracted: Any) -> Array:
    """A product as float32: exact for integers and float32, with float32 sums for others."""
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    out = jax.lax.dot_general(
        x,
        y,
        (contracted, ((), ())),
        precision=precision(x.dtype),
        preferred_element_type=sums,
    )
    return out.astype(jnp.float32)


def table(mask: BlockMask, heads: Heads) -> Array:
    """The rule's parameters by head, or by row and head, flat; one unused number without any."""
    own = mask.rule.parameters if heads.by_row is None else heads.by_row
    return jnp.asarray(own.reshape(-1) if own.size else np.zeros(1), jnp.int32)


def parameters(mask: BlockMask, table: Any, line: Array) -> tuple[Any, ...]:
    """The rule's parameters, read from `table` inside of a kernel.

    Args:
        line: the head, or b H + h for a table by row and head; all share a table of one line.
    """
    count = mask.rule.parameters.shape[1]
    first = line * count if table.shape[0] > count else 0
    return tuple(table[first + i] for i in range(count))


def flops(mask: BlockMask, lines: int, width: int, value_width: int) -> int:
    """FLOPs of a kernel over `lines` heads; values of blocks in two results count twice."""
    copies = lines * mask.block_q * mask.block_k // (mask.index.shape[0] * mask.index.shape[1])
    logits = values = mask.visited
    if mask.rest:
        logits = int(np.prod(mask.index.shape))
        values = logits + int((mask.count - mask.full).sum())
    return 2 * copies * (logits * width + values * value_width)


def cost(mask: BlockMask, heads: Heads, out: str) -> pl.CostEstimate:
    """What a kernel does with these (padded) operands."""
    q, k, v = heads.q, heads.k, heads.v
    lines = q.shape[0] * q.shape[1]
    executed = flops(mask, lines, q.shape[-1], v.shape[-1])
    pairs = flops(mask, lines, 1, 0) // 2
    of_scale = 0 if heads.scales is None else 4
    of_result = v.shape[-1] * jnp.dtype(out).itemsize + 4
    of_query = q.shape[-1] * q.dtype.itemsize + of_scale + (1 + mask.rest) * of_result
    of_key = k.shape[-1] * k.dtype.itemsize + v.shape[-1] * v.dtype.itemsize + of_scale
    moved = lines * q.shape[2] * of_query + pairs // mask.block_q * of_key
    return pl.CostEstimate(flops=executed, bytes_accessed=moved, transcendentals=pairs)
