"""The only place where images meet a quantized convolution.

    y = s_x s_w (sum q_x q_w - z_w sum q_x - z_x sum (q_w - z_w))        sums over a window, int32

At borders windows are whole too: what pads the quantized values is z_x, the quantized zero.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.quant.product import Path
from effjax.quant.quantizer import dequantize
from effjax.quant.tensor import QTensor

Padding = tuple[tuple[int, int], tuple[int, int]]


def qconv(x: Array, w: QTensor, *, stride: int, padding: Padding, path: Path = "integer") -> Array:
    """Correlate images with a quantized kernel, in their dtype.

    Args:
        x: float[B, H, W, I].
        w: [R, S, I, O].
        stride: step between windows, in pixels.
        padding: zero pixels, ((above, below), (left, right)).
        path: "integer" multiplies quantized values: int8 with int8 where images are quantized,
            floats with quantized values else. "reference" multiplies what the quantized values
            stand for, in float32: the specification.

    Returns:
        [B, Y, X, O] in x's dtype. Gradients of the integer path are straight through the quantized
        values of the images.

    Raises:
        ValueError: for images that do not fit, windows whose sums exceed int32, or an unknown path.
    """
    if x.ndim != 4 or not w.convolution or x.shape[3] != w.matrix[2]:
        raise ValueError(
            f"images {list(x.shape)} do not fit a kernel {list(w.shape)}: they must be "
            f"[B, H, W, I] and [R, S, I, O]"
        )
    if path not in ("integer", "reference"):
        raise ValueError(f'path must be "integer" or "reference", got {path!r}')
    if w.rows > 2**16:
        raise ValueError(
            f"sums of {w.rows} products of quantized values, in a window of {list(w.shape[:3])}, "
            "can exceed "
            f"int32; leave this layer unquantized"
        )
    if path == "reference":
        values = x.astype(jnp.float32)
        if w.activations is not None:
            values = dequantize(*_quantized_images(values, w))
        return _correlate((stride, padding), values, _matrix(w)).astype(x.dtype)
    return _integer((stride, padding), x, w)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _integer(how: tuple[int, Padding], x: Array, w: QTensor) -> Array:
    kernel = w.qvalues().reshape(w.shape)
    if w.activations is None:
        if w.zero_point is not None:  # at most 255: exact in bfloat16 too
            kernel = kernel.astype(jnp.int32) - w.zero_point[0]
        return (_correlate(how, x, kernel.astype(x.dtype)) * w.scale[0]).astype(x.dtype)
    qvalues, scale, zero = _quantized_images(x.astype(jnp.float32), w)
    stride, padding = how
    fill = jnp.zeros((), jnp.int8) if zero is None else zero.astype(jnp.int8)
    qvalues = jax.lax.pad(qvalues, fill, [(0, 0, 0), *((*side, 0) for side in padding), (0, 0, 0)])
    sums = _correlate((stride, ((0, 0), (0, 0))), qvalues, kernel)
    if w.zero_point is not None:
        every = jnp.sum(qvalues, axis=3, keepdims=True, dtype=jnp.int32)
        window, steps = (1, *w.shape[:2], 1), (1, stride, stride, 1)
        every = jax.lax.reduce_window(every, np.int32(0), jax.lax.add, window, steps, "valid")
        sums -= every * w.zero_point[0]
    out = sums.astype(jnp.float32) * scale * w.scale[0]
    if zero is not None:
        out -= scale * zero.astype(jnp.float32) * w.column_sums
    return out.astype(x.dtype)


def _forward(how: Any, x: Array, w: QTensor) -> tuple[Array, Any]:
    return _integer(how, x, w), (x, w)


def _backward(how: Any, saved: Any, gradient: Array) -> Any:
    """Straight through the quantized values of the images."""

    def smooth(x: Array, w: QTensor) -> Array:
        return _correlate(how, x.astype(jnp.float32), _matrix(w)).astype(x.dtype)

    return jax.vjp(smooth, *saved)[1](gradient)


_integer.defvjp(_forward, _backward)


def _matrix(w: QTensor) -> Array:
    return w.dequantize().reshape(w.shape)


def _quantized_images(x: Array, w: QTensor) -> tuple[Array, Array, Array | None]:
    """Values int8[B, H, W, I] of images, scales float32[] or [B, 1, 1, 1], and a zero point."""
    assert w.activations is not None
    quantizer = w.activations.quantizer
    if w.activations.dynamic:
        scale, zero = quantizer.fit_axes(x, (1, 2, 3))
    else:
        scale, zero = w.input_scale, w.input_zero_point
    return quantizer.quantize(x, scale, zero), scale, zero


def _correlate(how: tuple[int, Padding], x: Array, kernel: Array) -> Array:
    """Summed in int32 for quantized values, in float32 for floats."""
    stride, padding = how
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision="highest" if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.int32 if x.dtype == jnp.int8 else jnp.float32,
    )
