"""Ranges of values, from which quantizers take scales: all that is seen, or a part of it."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from effjax.quant.quantizer import Quantizer, fake_quantize

Axes: TypeAlias = int | tuple[int, ...] | None


class Range(NamedTuple):
    """Smallest and largest value, float32 with the reduced axes kept."""

    low: Array
    high: Array


def minmax(x: Array, axes: Axes = None) -> Range:
    """The range of all values."""
    x = x.astype(jnp.float32)
    return Range(jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True))


def percentile(x: Array, axes: Axes = None, *, percent: float = 99.9) -> Range:
    """The range without the outermost values. The same share is left out at both ends.

    Raises:
        ValueError: for a percentage outside of 50 ... 100.
    """
    if not 50 <= percent <= 100:
        raise ValueError(f"percent must lie in 50 ... 100, got {percent}")
    x = x.astype(jnp.float32)
    ends = jnp.array([100 - percent, percent])
    low, high = jnp.percentile(x, ends, axis=axes, keepdims=True)
    return Range(low, high)


def least_squares(x: Array, quantizer: Quantizer, axes: Axes = None, *, steps: int = 40) -> Range:
    """The range with the least mean squared error, out of several smaller ranges.

    Args:
        x: float[...].
        quantizer: whose quantized values.
        axes: which axes share a range.
        steps: ranges to try, from all that is seen down to a `steps`th of it.
    """
    x = x.astype(jnp.float32)
    full = minmax(x, axes)

    def error(share: Array) -> Array:
        quantized = fake_quantize(x, quantizer, low=share * full.low, high=share * full.high)
        return jnp.mean(jnp.square(quantized - x), axes, keepdims=True)

    shares = jnp.arange(steps, 0, -1) / steps
    best = shares[jnp.argmin(jax.lax.map(error, shares), axis=0)]
    return Range(best * full.low, best * full.high)


def union(a: Range | None, b: Range) -> Range:
    """The range that contains both. None stands for an empty range."""
    return b if a is None else Range(jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def moving_average(a: Range | None, b: Range, *, decay: float = 0.95) -> Range:
    """decay a + (1 - decay) b, starting with the first (MixDQ and ViDiT-Q: 0.95)."""
    if a is None:
        return b
    return Range(*(decay * old + (1 - decay) * new for old, new in zip(a, b)))
