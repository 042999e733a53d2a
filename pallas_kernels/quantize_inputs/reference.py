"""The specification: the rotation as one matrix.

Operands of all programs: x [B, T, C], modulation (shift, scale) [B, C] or None, multiplier
float32[C] or None, factors. Results: quantized values [B, T, C], scales [B, T, 1], sums [B, T, 1].
"""

from __future__ import annotations

from functools import reduce

import jax
import jax.numpy as jnp

Results = tuple[jax.Array, jax.Array, jax.Array]
Modulation = tuple[jax.Array, jax.Array] | None
Factors = tuple[jax.Array, ...]


def quantize_inputs(
    x: jax.Array,
    modulation: Modulation,
    multiplier: jax.Array | None,
    factors: Factors,
    *,
    bits: int,
) -> Results:
    """One product with the whole rotation."""
    y = prepare(x, modulation, multiplier)
    if factors:
        small = reduce(jnp.kron, factors)
        blocks = jnp.eye(x.shape[-1] // small.shape[0], dtype=jnp.float32)
        y = jnp.matmul(y, jnp.kron(blocks, small), precision="highest")
    return quantize_rows(y, bits)


def prepare(x: jax.Array, modulation: Modulation, multiplier: jax.Array | None) -> jax.Array:
    """Modulated and multiplied, float32[B, T, C]."""
    y = x.astype(jnp.float32)
    if modulation is not None:
        shift, scale = (part.astype(jnp.float32)[:, None] for part in modulation)
        y = y * (1 + scale) + shift
    return y if multiplier is None else y * multiplier


def quantize_rows(y: jax.Array, bits: int) -> Results:
    """Quantized values, scales and sums of rows float32[..., C]."""
    most = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(y), axis=-1, keepdims=True) / most
    scale = jnp.where(scale > 0, scale, 1.0)
    qvalues = jnp.clip(jnp.round(y / scale), -most - 1, most).astype(jnp.int32)
    return qvalues.astype(jnp.int8), scale, jnp.sum(qvalues, axis=-1, keepdims=True)
