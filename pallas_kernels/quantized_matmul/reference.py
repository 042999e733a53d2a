"""The specification of quantized products: whole matrices, plainly.

Operands are grouped as in `pallas_kernels.quantized_matmul.xla`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.packing import unpack


def int8_matmul(floats: Any, qvalues: Any, *, out_dtype: Any) -> jax.Array:
    """Zero points are added to the weights' quantized values."""
    (x_scale, w_scale), (x_qvalues, w_qvalues, w_zero, _) = floats, qvalues
    weights = w_qvalues.astype(jnp.int32)
    weights = weights if w_zero is None else weights + w_zero
    product = jnp.matmul(x_qvalues.astype(jnp.int32), weights).astype(jnp.float32)
    return (product * x_scale * w_scale).astype(out_dtype)


def packed_matmul(floats: Any, qvalues: Any, *, bits: int, out_dtype: Any) -> jax.Array:
    """The whole matrix in float32, and one product."""
    (x, x_scale, scale), (x_qvalues, planes, zero) = floats, qvalues
    x = (x_qvalues if x is None else x).astype(jnp.float32)
    repeat = partial(jnp.repeat, repeats=x.shape[1] // scale.shape[0], axis=0)
    weights = unpack(planes, bits, x.shape[1]).astype(jnp.float32)
    if zero is not None:
        weights += repeat(zero.astype(jnp.float32))
    weights *= repeat(scale.astype(jnp.float32))
    product = jnp.matmul(x, weights, precision=jax.lax.Precision.HIGHEST)
    return (product if x_scale is None else product * x_scale).astype(out_dtype)
