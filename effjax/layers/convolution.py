"""Convolutions over NHWC images. All convolutions with weights go through `convolve`."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.quant import QTensor, qconv
from effjax.quant.convolution import Padding
from effjax.targets import Role

_INIT = nnx.initializers.lecun_normal()


def convolve(
    x: Float[Array, "B H W I"],
    weight: Float[Array, "R S I O"] | QTensor,
    *,
    stride: int,
    padding: Padding,
) -> Float[Array, "B Y X O"]:
    """Correlate an image with a weight leaf, an array or quantized, in the image's dtype."""
    if isinstance(weight, QTensor):
        return qconv(x, weight, stride=stride, padding=padding)
    return jax.lax.conv_general_dilated(
        x,
        weight.astype(x.dtype),
        window_strides=(stride, stride),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


class Conv2d(nnx.Module):
    """Square convolution with bias on NHWC images; the kernel is HWIO. Its role is "convolution".

    Args:
        kernel_size: side of the kernel.
        stride: step between windows, in pixels.
        padding: zero pixels as ((above, below), (left, right)), or one number for all four sides.
    """

    role: ClassVar[Role] = "convolution"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | Padding = 0,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        init: nnx.Initializer = _INIT,
        rngs: nnx.Rngs,
    ):
        self.stride = stride
        if isinstance(padding, int):
            padding = ((padding, padding), (padding, padding))
        self.padding = padding
        shape = (kernel_size, kernel_size, in_channels, out_channels)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((out_channels,), param_dtype))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Y X O"]:
        y = convolve(x, self.kernel.get_value(), stride=self.stride, padding=self.padding)
        return y + self.bias.get_value().astype(x.dtype)


def upsample_nearest_2x(x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
    """Repeat every pixel twice along both sides."""
    batch, height, width, channels = x.shape
    shape = (batch, height, 2, width, 2, channels)
    return jnp.broadcast_to(x[:, :, None, :, None], shape).reshape(
        batch, 2 * height, 2 * width, channels
    )
