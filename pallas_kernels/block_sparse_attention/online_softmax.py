"""The softmax over blocks of keys, as the kernels do it, and what it costs."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.heads import Heads, precision

LOG2E = math.log2(math.e)  # kernels compute logits in base 2, which is what processors exponentiate

MASKED = -1e30  # finite, so that rows without any key stay numbers
NOTHING = MASKED / 2  # the peak of such a row: beside it masked keys weigh nothing


class Carry(NamedTuple):
    """What is known of a block of queries so far: arrays, or references to them.

    A query's numbers may lie in one lane or across many, as its processor likes.

    Attributes:
        peak: largest logit in base 2, float32[block_q, lanes], the same in all lanes.
        total: sums of 2^(logit - peak), float32[block_q, lanes], to be added up over the lanes.
        weighted: sum of 2^(logit - peak) times values, float32[block_q, E].
    """

    peak: Any
    total: Any
    weighted: Any


def empty(rows: int, width: int, lanes: int = 1) -> Carry:
    """Nothing is known yet."""
    peak = jnp.full((rows, lanes), NOTHING, jnp.float32)
    return Carry(peak, jnp.zeros_like(peak), jnp.zeros((rows, width), jnp.float32))


def accumulate(
    carry: Carry,
    logits: Array,
    seen: Array | None,
    values: Array,
    levels: int | None,
    unit: str = "query",
    *,
    rows: Array | None = None,
    fixed: bool = False,
) -> Carry:
    """One more block of keys: logits float32[block_q, block_k] in base 2, values [block_k, E].

    Args:
        levels, unit: as in `Arithmetic`. The largest weight of a tile is that of the softmax so
            far.
        rows: bool[block_q, lanes], which queries there are; None for all.
        fixed: leave the peak, which is 0, as it is: for logits that are known to be small.
    """
    lanes = carry.peak.shape[1]
    if seen is not None:
        logits = jnp.where(seen, logits, MASKED)
    if fixed:
        weights = jnp.exp2(logits)
        weighted = product(weights.astype(values.dtype), values, ((1,), (0,)))
        return Carry(carry.peak, carry.total + _sums(weights, lanes), carry.weighted + weighted)
    own = jnp.maximum(jnp.max(logits, axis=1, keepdims=True), NOTHING)
    peak = jnp.maximum(carry.peak, own)
    by_query = levels is not None and unit == "query"
    weights = jnp.exp2(logits - (own if by_query else _across(peak, logits.shape[1])))
    shrink = jnp.exp2(carry.peak - peak)
    total = _sums(weights, lanes)
    if levels is None:
        weighted = product(weights.astype(values.dtype), values, ((1,), (0,)))
    else:
        grow = jnp.exp2(own - peak)  # a query's largest weight in the block
        if by_query:
            total = grow * total
        elif unit == "tile":
            there = own > NOTHING if rows is None else (own > NOTHING) & rows
            grow = jnp.max(jnp.where(there, grow, 0.0), axis=0, keepdims=True)
            grow = jnp.where(grow > 0, grow, 1.0)
            weights /= _across(grow, weights.shape[1])
        else:
            grow = jnp.ones_like(grow)
        qvalues = weight_qvalues(weights, levels, values.dtype)
        weighted = product(qvalues, values, ((1,), (0,)))
        weighted *= _across(grow * (1 / levels), weighted.shape[1])
    old = _across(shrink, weighted.shape[1]) * carry.weighted
    return Carry(peak, shrink * carry.total + total, old + weighted)


def _across(x: Array, width: int) -> Array:
    """The number in all lanes of `x`, as one or in `width` lanes."""
    lanes = x.shape[1]
    return x if lanes == 1 else jnp.tile(x, (1, -(-width // lanes)))[:, :width]


def _sums(x: Array, lanes: int) -> Array:
    """Sums of rows, or of every `lanes`th number of them."""
    if lanes == 1:
        return jnp.sum(x, axis=1, keepdims=True)
    return reduce(jnp.add, [x[:, first : first + lanes] for first in range(0, x.shape[1], lanes)])


def weight_qvalues(weights: Array, levels: int, dtype: Any) -> Array:
    """Weights 0 ... 1 as values 0 ... levels of a dtype, halves rounded up in integers."""
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.floor(weights * levels + 0.5).astype(jnp.int32).astype(dtype)
    return (weights * levels).astype(dtype)


def merge(a: Carry, b: Carry) -> Carry:
    """What is known of the keys of both."""
    peak = jnp.maximum(a.peak, b.peak)
    of_a, of_b = jnp.exp2(a.peak - peak), jnp.exp2(b.peak - peak)
    width = a.weighted.shape[1]
    weighted = _across(of_a, width) * a.weighted + _across(of_b, width) * b.weighted
    return Carry(peak, of_a * a.total + of_b * b.total, weighted)


def finish(carry: Carry) -> tuple[Array, Array]:
    """Output and (natural) log-sum-exp [block_q, 1]; zeros and -inf for rows that saw nothing."""
    total = jnp.sum(carry.total, axis=1, keepdims=True)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    lse = carry.peak[:, :1] / LOG2E + jnp.log(safe)
    return carry.weighted / safe, jnp.where(some, lse, -jnp.inf)


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


def whole_blocks(mask: BlockMask, heads: Heads) -> bool:
    """Whether nothing is masked in blocks that the lists say are not cut."""
    return heads.segments is None and (heads.by_row is None or mask.by_row)


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


def cost(mask: BlockMask, heads: Heads, out: str, sharing: int = 1) -> pl.CostEstimate:
    """What a kernel does with these (padded) operands, if `sharing` heads fetch keys once."""
    q, k, v = heads.q, heads.k, heads.v
    lines = q.shape[0] * q.shape[1]
    executed = flops(mask, lines, q.shape[-1], v.shape[-1])
    pairs = flops(mask, lines, 1, 0) // 2
    of_scale = 0 if heads.scales is None else 4
    of_result = v.shape[-1] * jnp.dtype(out).itemsize + 4
    of_query = q.shape[-1] * q.dtype.itemsize + of_scale + (1 + mask.rest) * of_result
    of_key = k.shape[-1] * k.dtype.itemsize + v.shape[-1] * v.dtype.itemsize + of_scale
    moved = lines * q.shape[2] * of_query + pairs // mask.block_q // sharing * of_key
    return pl.CostEstimate(flops=executed, bytes_accessed=moved, transcendentals=pairs)
