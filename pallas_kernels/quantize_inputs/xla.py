"""Quantized values in XLA, on every platform: a small product for each factor of the rotation."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from pallas_kernels.quantize_inputs.factors import join
from pallas_kernels.quantize_inputs.reference import (
    Factors,
    Modulation,
    Results,
    prepare,
    quantize_rows,
)


def factor_cost(orders: tuple[int, ...]) -> int:
    """Multiply-adds of an element, and what a pass over all of them costs beside these."""
    return sum(orders) + 48 * len(orders)


def quantize_inputs(
    x: jax.Array,
    modulation: Modulation,
    multiplier: jax.Array | None,
    factors: Factors,
    *,
    bits: int,
) -> Results:
    """Results and results are those of the reference."""
    y = prepare(x, modulation, multiplier)
    factors = join(factors, factor_cost)
    orders = [factor.shape[0] for factor in factors]
    y = y.reshape(*x.shape[:2], x.shape[2] // math.prod(orders), *orders)
    for axis, factor in enumerate(factors, start=3):
        y = jnp.matmul(jnp.moveaxis(y, axis, -1), factor, precision="highest")
        y = jnp.moveaxis(y, -1, axis)
    return quantize_rows(y.reshape(x.shape), bits)
