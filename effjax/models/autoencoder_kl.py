"""AutoencoderKL: the image autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752).

Parity target: diffusers' `AutoencoderKL`. Diffusion models work on shifted and scaled latents,
(z - shift) * scale, here called *model space*. A forward of this model, and so the functions
`encode` and `decode`, speak model space; only the module's own methods speak of z itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from effjax.context import Layout, Model, PyTree
from effjax.fields import Count, FloatName, Positive
from effjax.layers.autoencoder import (
    CoderConfig,
    CoderShape,
    Decoder,
    Encoder,
    check_images,
    check_latents,
    image_shape,
)
from effjax.layers.convolution import Conv2d

_LOG_VARIANCE_RANGE = (-30.0, 20.0)

Moments = tuple[Float[Array, "B Y X Z"], Float[Array, "B Y X Z"]]


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(CoderConfig):
    """Shape and numerics of an AutoencoderKL; the defaults are Stable Diffusion's.

    Attributes:
        in_channels, out_channels: channels of the images that go in and come out.
        latent_channels: channels of the latents.
        block_out_channels: width of each level, from full to lowest resolution; every level but the
            last halves height and width.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        norm_groups: groups of every group norm; it divides all widths.
        sample_size: side in pixels of the images it was trained on; other sizes work too.
        scaling_factor, shift_factor: latents in model space are (z - shift) * scale.
        use_quant_conv, use_post_quant_conv: 1x1 convolution behind the encoder, before the decoder.
        mid_block_add_attention: attention over all pixels at the lowest resolution.
        force_upcast: compute in float32 where `dtype` is float16, whose range the activations of
            published weights leave.
        dtype: dtype of the computation; norms, softmax and latent moments are float32.
        param_dtype: dtype of new parameters.
    """

    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 4
    block_out_channels: tuple[Count, ...] = (128, 256, 512, 512)
    layers_per_block: Count = 2
    norm_groups: Count = 32
    sample_size: Count = 512
    scaling_factor: Positive = 0.18215
    shift_factor: float = 0.0
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    mid_block_add_attention: bool = True
    force_upcast: bool = True
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    @property
    def computed(self) -> str:
        """The dtype that is computed in: `dtype`, or float32 if that is to be upcast."""
        half = jnp.dtype(self.dtype) == jnp.float16
        return "float32" if self.force_upcast and half else self.dtype


class AutoencoderKL(Model):
    """The network: encodes images to latent moments and decodes latents to images."""

    Config = AutoencoderKLConfig
    counts = {  # noqa: RUF012
        "block_out_channels": "encoder.levels",
        "layers_per_block": "encoder.levels.0.blocks",
    }

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        def pointwise(channels: int) -> Conv2d:
            options = {"kernel_size": 1, "param_dtype": config.param_dtype}
            return Conv2d(channels, channels, **options, rngs=rngs)

        self.config = config
        latents = config.latent_channels
        shape = CoderShape(
            widths=config.block_out_channels,
            blocks=config.layers_per_block,
            groups=config.norm_groups,
            mid_attention=config.mid_block_add_attention,
            param_dtype=config.param_dtype,
        )
        images = {"inputs": config.in_channels, "outputs": 2 * latents}
        self.encoder = Encoder(shape, **images, rngs=rngs)
        self.decoder = Decoder(shape, inputs=latents, outputs=config.out_channels, rngs=rngs)
        self.quant_conv = pointwise(2 * latents) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(latents) if config.use_post_quant_conv else None

    def layout(self, latents: Array | None, images: Array | None = None) -> Layout:
        """Token layout of the mid blocks' attention."""
        if images is None:
            _, rows, columns, _ = image_shape("latents", latents)
            return Layout(grid=(1, rows, columns))
        _, height, width, _ = image_shape("images", images)
        factor = self.config.downscale
        return Layout(grid=(1, height // factor, width // factor))

    def encode(self, images: Float[Array, "B H W I"]) -> Moments:
        """Mean and logarithm of the variance of z, both float32 [B, H/f, W/f, latent_channels].

        Args:
            images: values in -1 ... 1.

        Raises:
            ValueError: for another number of channels, or a size that `downscale` does not divide.
        """
        check_images(images, self.config.in_channels, self.config.downscale)
        moments = self.encoder(images.astype(self.config.computed))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCE_RANGE)

    def decode(self, z: Float[Array, "B Y X Z"]) -> Float[Array, "B H W O"]:
        """Images, in about -1 ... 1 and `config.computed`, of latents z.

        Raises:
            ValueError: for another number of channels.
        """
        check_latents(z, self.config.latent_channels)
        z = z.astype(self.config.computed)
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def __call__(
        self, latents: Float[Array, "B Y X Z"] | None, images: Float[Array, "B H W I"] | None = None
    ) -> Float[Array, "B H W O"] | Moments:
        """Decode latents of model space, or encode images to moments in model space.

        Exactly one of the two is given, and the other is None, which passes `jax.jit` as structure.

        Returns:
            Images, or (mean, logarithm of the variance).
        """
        scale, shift = self.config.scaling_factor, self.config.shift_factor
        if images is None and latents is not None:
            return self.decode(latents.astype(jnp.float32) / scale + shift)
        if latents is None and images is not None:
            mean, log_variance = self.encode(images)
            return (mean - shift) * scale, log_variance + 2 * math.log(scale)
        raise ValueError(
            "give either latents to decode or images to encode: forward(params, state, latents) "
            "or forward(params, state, None, images)"
        )


def encode(
    forward: Callable[..., tuple[PyTree, PyTree]],
    params: PyTree,
    images: Float[Array, "B H W I"],
    key: Key[Array, ""] | None = None,
) -> Float[Array, "B Y X Z"]:
    """Encode images to latents in model space, float32.

    The latents are the mean of their distribution, or a sample of it if there is a key.

    Args:
        forward: an AutoencoderKL's forward, with or without patches that keep no state.
        images: values in -1 ... 1, height and width multiples of `config.downscale`.
    """
    (mean, log_variance), _ = forward(params, {}, None, images)
    if key is None:
        return mean
    return mean + jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape, mean.dtype)


def decode(
    forward: Callable[..., tuple[PyTree, PyTree]],
    params: PyTree,
    latents: Float[Array, "B Y X Z"],
) -> Float[Array, "B H W O"]:
    """Decode latents in model space to images in about -1 ... 1.

    The forward is as in `encode`.
    """
    return forward(params, {}, latents)[0]


MODEL = AutoencoderKL
