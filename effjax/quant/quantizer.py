"""Numbers as quantized values: uniform quantizers, and fake quantization with bits as data.

    symmetric    s = max |x| / n                      x = q s          q = -n - 1 ... n
    asymmetric   s = (max - min) / (2^b - 1)          x = (q - z) s    q = -2^(b-1) ... 2^(b-1) - 1

with n = 2^(b-1) - 1, or n + 1/2 in the divisor ("n+1/2", qwix's levels, where "n" is that of the
papers). Quantized values are signed; an asymmetric range contains zero unless a quantizer says
otherwise. Rounding is half to even. Where a range is empty, the scale is 1.

Quantized values may also be numbers of float8_e4m3fn ("e4m3"), of which the largest is 448: s = max
|x| / 448.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax import Array

from effjax.fields import Checked, OneOf

BITS = (2, 3, 4, 5, 6, 7, 8)
FLOAT = 16  # bits, in plans, of numbers that stay floats
FLOAT8 = jnp.float8_e4m3fn
_E4M3 = 448  # its largest number


@dataclasses.dataclass(frozen=True)
class Quantizer(Checked):
    """A uniform quantizer.

    Attributes:
        bits: of a quantized value, 2 ... 8.
        symmetric: whether zero is in the middle of the quantized values.
        levels: what the largest magnitude of a symmetric range is divided by: "n" or "n+1/2"; or
            "e4m3" for quantized values of float8_e4m3fn, symmetric and of 8 bits.
        keeps_zero: whether an asymmetric range is widened to contain zero.
    """

    bits: Annotated[int, OneOf(*BITS)] = 8
    symmetric: bool = True
    levels: Literal["n", "n+1/2", "e4m3"] = "n"
    keeps_zero: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floats and (self.bits != 8 or not self.symmetric):
            raise ValueError(
                f'levels "e4m3" are symmetric and of 8 bits, got bits={self.bits}, '
                f"symmetric={self.symmetric}"
            )

    @property
    def floats(self) -> bool:
        """Whether quantized values are numbers of float8_e4m3fn."""
        return self.levels == "e4m3"

    def fit(self, low: Array, high: Array) -> tuple[Array, Array | None]:
        """Scale, and zero point (int32, None if symmetric), for values low ... high."""
        scale, zero = _fit(self, jnp.float32(self.bits), low, high)
        return scale, None if zero is None else zero.astype(jnp.int32)

    def fit_axes(self, x: Array, axes: int | tuple[int, ...]) -> tuple[Array, Array | None]:
        """`fit` to the smallest and largest value along axes, which are kept with length 1."""
        return self.fit(jnp.min(x, axes, keepdims=True), jnp.max(x, axes, keepdims=True))

    def quantize(self, x: Array, scale: Array, zero_point: Array | None = None) -> Array:
        """Quantized values int8, or float8_e4m3fn, of values."""
        if self.floats:
            return jnp.clip(x.astype(jnp.float32) / scale, -_E4M3, _E4M3).astype(FLOAT8)
        half = 2 ** (self.bits - 1)
        qvalues = jnp.round(x.astype(jnp.float32) / scale)
        if zero_point is not None:
            qvalues += zero_point.astype(jnp.float32)
        return jnp.clip(qvalues, -half, half - 1).astype(jnp.int8)


def dequantize(qvalues: Array, scale: Array, zero_point: Array | None = None) -> Array:
    """Values float32[...] of quantized values, (qvalue - zero_point) scale.

    Args:
        qvalues: integers [...].
        scale, zero_point: float32 and int32 that broadcast to the quantized values; None for zeros.
    """
    values = qvalues.astype(jnp.float32)
    if zero_point is not None:
        values -= zero_point.astype(jnp.float32)
    return values * scale


def fake_quantize(
    x: Array,
    quantizer: Quantizer,
    *,
    bits: Array | None = None,
    axes: int | tuple[int, ...] | None = None,
    low: Array | None = None,
    high: Array | None = None,
) -> Array:
    """Values rounded to what quantized values can say, in x's dtype.

    The gradient is straight through: that of the identity within the range, zero beyond it.

    Args:
        x: float[...].
        quantizer: how; its bits are replaced by `bits` if given.
        bits: float or int [] or broadcastable to x, 2 ... 8, or 16 and more for no rounding at all:
            data, so that one program tries all of them.
        axes: which axes share a range that is taken from x itself.
        low, high: a range that was calibrated instead, broadcastable to x.

    Raises:
        ValueError: unless either axes or a range is given, or for levels of floats.
    """
    if quantizer.floats:
        raise ValueError('only integer values are faked; levels are "n" or "n+1/2", not "e4m3"')
    if (axes is None) == (low is None) or (low is None) != (high is None):
        raise ValueError("give either axes, which share a range, or the range's low and high")
    width = jnp.asarray(quantizer.bits if bits is None else bits).astype(jnp.float32)
    values = x.astype(jnp.float32)
    if axes is not None:
        low, high = jnp.min(values, axes, keepdims=True), jnp.max(values, axes, keepdims=True)
    assert low is not None
    assert high is not None
    low, high = jax.lax.stop_gradient((low, high))
    scale, zero = _fit(quantizer, width, low, high)
    offset = 0.0 if zero is None else zero
    half = jnp.exp2(width - 1)
    least, most = (-half - offset) * scale, (half - 1 - offset) * scale
    # Without rounding, the gradient of clipping is the straight-through one.
    clipped = jnp.clip(values, least, most)
    rounded = (jnp.round(clipped / scale + offset) - offset) * scale
    quantized = clipped + jax.lax.stop_gradient(rounded - clipped)
    return jnp.where(width >= FLOAT, values, quantized).astype(x.dtype)


def _fit(quantizer: Quantizer, bits: Array, low: Array, high: Array) -> tuple[Array, Array | None]:
    low, high = low.astype(jnp.float32), high.astype(jnp.float32)
    if quantizer.symmetric:
        integers = jnp.exp2(bits - 1) - (1 if quantizer.levels == "n" else 0.5)
        most = jnp.float32(_E4M3) if quantizer.floats else integers
        return _positive(jnp.maximum(jnp.abs(low), jnp.abs(high)) / most), None
    if quantizer.keeps_zero:
        low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = _positive((high - low) / (jnp.exp2(bits) - 1))
    return scale, jnp.round(-low / scale) - jnp.exp2(bits - 1)


def _positive(scale: Array) -> Array:
    return jnp.where(scale > 0, scale, jnp.ones_like(scale))
