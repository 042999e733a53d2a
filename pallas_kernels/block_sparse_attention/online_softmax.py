"""What the TPU and the GPU kernel share: the online softmax, block by block, and its cost."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.block_mask import BlockMask

MASKED = -1e30  # finite, so that rows without any key stay numbers


def accumulate(carry: Any, logits: Array, seen: Array | None, values: Array) -> Any:
    """One block of the online softmax; carry: running peak, total and weighted sum of values."""
    peak, total, weighted = carry
    if seen is not None:
        logits = jnp.where(seen, logits, MASKED)
    higher = jnp.maximum(peak, jnp.max(logits, axis=1, keepdims=True))
    weights = jnp.exp(logits - higher)
    if seen is not None:
        weights = jnp.where(seen, weights, 0.0)
    shrink = jnp.exp(peak - higher)
    total = shrink * total + jnp.sum(weights, axis=1, keepdims=True)
    own = product(weights.astype(values.dtype), values, ((1,), (0,)))
    return higher, total, shrink * weighted + own


def finish(peak: Array, total: Array, weighted: Array) -> tuple[Array, Array]:
    """Output and log-sum-exp; zeros and -inf for rows that saw nothing."""
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    return weighted / safe, jnp.where(some, peak + jnp.log(safe), -jnp.inf)


def product(x: Array, y: Array, contracted: Any) -> Array:
    """A product with float32 sums; exact for float32 operands."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x, y, (contracted, ((), ())), precision=exact, preferred_element_type=jnp.float32
    )


def table(mask: BlockMask) -> Array:
    """The rule's per-head parameters, flat; one unused number if there are none."""
    own = mask.rule.parameters
    return jnp.asarray(own.reshape(-1) if own.size else np.zeros(1, np.int32))


def parameters(mask: BlockMask, table: Any, head: Array) -> tuple[Any, ...]:
    """The rule's parameters of a head, read from `table` inside of a kernel."""
    heads, count = mask.rule.parameters.shape
    first = head * count if heads > 1 else 0
    return tuple(table[first + i] for i in range(count))


def cost(mask: BlockMask, q: Array, v: Array) -> pl.CostEstimate:
    """What a kernel does with these (padded) operands."""
    width = q.shape[-1] + v.shape[-1]
    executed = mask.flops(*q.shape[:2], head_dim=q.shape[-1], value_dim=v.shape[-1])
    pairs = executed // (2 * width)
    rows = q.size // q.shape[-1]
    moved = (pairs // mask.block_q + rows) * width * q.dtype.itemsize
    return pl.CostEstimate(flops=executed, bytes_accessed=moved + 4 * rows, transcendentals=pairs)
