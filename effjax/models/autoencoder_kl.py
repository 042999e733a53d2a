"""AutoencoderKL: the image autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752).

Parity target: diffusers' `AutoencoderKL`. Diffusion models work on shifted and scaled latents,
(z - shift) * scale, here called *model space*. A forward of this model, and so the functions
`encode` and `decode`, speak model space; only the module's own methods speak of z itself.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Key

from effjax.context import Layout, Model, PyTree
from effjax.fields import Checked, Count, FloatName, Positive
from effjax.layers.attention import SelfAttention
from effjax.layers.convolution import Conv2d, upsample_nearest_2x
from effjax.layers.norms import GroupNorm
from effjax.layers.stack import Stack

_LOG_VARIANCE_RANGE = (-30.0, 20.0)

Moments = tuple[Float[Array, "B Y X Z"], Float[Array, "B Y X Z"]]


@dataclasses.dataclass(frozen=True)
class AutoencoderKLConfig(Checked):
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

    def __post_init__(self) -> None:
        super().__post_init__()
        widths = self.block_out_channels
        if not widths or any(width % self.norm_groups for width in widths):
            raise ValueError(
                f"block_out_channels must have a multiple of norm_groups for each level; "
                f"got block_out_channels={widths}, norm_groups={self.norm_groups}"
            )

    @property
    def computed(self) -> str:
        """The dtype that is computed in: `dtype`, or float32 if that is to be upcast."""
        half = jnp.dtype(self.dtype) == jnp.float16
        return "float32" if self.force_upcast and half else self.dtype

    @property
    def downscale(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


class ResidualBlock(nnx.Module):
    """Twice group norm, SiLU, 3x3 convolution; the skip is a 1x1 convolution if widths differ."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        def norm(channels: int) -> GroupNorm:
            return GroupNorm(channels, groups=groups, eps=1e-6, param_dtype=param_dtype)

        def conv(inputs: int, size: int) -> Conv2d:
            options = {"kernel_size": size, "padding": size // 2, "param_dtype": param_dtype}
            return Conv2d(inputs, out_channels, **options, rngs=rngs)

        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, 3)
        self.shortcut = None if in_channels == out_channels else conv(in_channels, 1)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        return h + (x if self.shortcut is None else self.shortcut(x))


class AttentionBlock(nnx.Module):
    """Group norm and one-head attention over all pixels, with a skip."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        width, param_dtype = config.block_out_channels[-1], config.param_dtype
        self.norm = GroupNorm(width, groups=config.norm_groups, eps=1e-6, param_dtype=param_dtype)
        self.attn = SelfAttention(
            width, heads=1, head_dim=width, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attn(tokens).reshape(x.shape)


class MidBlock(nnx.Module):
    """At the lowest resolution: residual block, attention (if any), residual block."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        width = config.block_out_channels[-1]
        options = {"groups": config.norm_groups, "param_dtype": config.param_dtype, "rngs": rngs}
        attend = config.mid_block_add_attention
        self.block1 = ResidualBlock(width, width, **options)
        self.attention = AttentionBlock(config, rngs=rngs) if attend else None
        self.block2 = ResidualBlock(width, width, **options)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = self.block1(x)
        return self.block2(x if self.attention is None else self.attention(x))


class Upsample(nnx.Module):
    """Nearest-neighbor doubling and a 3x3 convolution."""

    def __init__(self, channels: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.conv = Conv2d(channels, channels, padding=1, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B 2*H 2*W C"]:
        return self.conv(upsample_nearest_2x(x))


class Level(nnx.Module):
    """Residual blocks at one resolution, then a change of resolution (`resample`, if any)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        groups: int,
        resample: nnx.Module | None,
        param_dtype: jax.typing.DTypeLike,
        rngs: nnx.Rngs,
    ):
        options = {"groups": groups, "param_dtype": param_dtype}
        inputs = [in_channels] + [out_channels] * (blocks - 1)
        self.blocks = Stack(
            [ResidualBlock(channels, out_channels, **options, rngs=rngs) for channels in inputs]
        )
        self.resample = resample

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Y X O"]:
        x = self.blocks(x)
        return x if self.resample is None else self.resample(x)


def _levels(
    widths: Sequence[int],
    *,
    blocks: int,
    resample: Callable[[int], nnx.Module],
    config: AutoencoderKLConfig,
    rngs: nnx.Rngs,
) -> Stack:
    """Levels of these widths in order, with `resample(width)` behind every one but the last."""
    levels = []
    for index, width in enumerate(widths):
        last = index == len(widths) - 1
        level = Level(
            widths[max(index - 1, 0)],
            width,
            blocks=blocks,
            groups=config.norm_groups,
            resample=None if last else resample(width),
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        levels.append(level)
    return Stack(levels)


class Encoder(nnx.Module):
    """Images to latent moments before the quant convolution."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths, param_dtype = config.block_out_channels, config.param_dtype
        numerics = {"param_dtype": param_dtype, "rngs": rngs}

        def halve(width: int) -> Conv2d:
            # Padded on the right and below only, as the published weights expect.
            return Conv2d(width, width, stride=2, padding=((0, 1), (0, 1)), **numerics)

        blocks = config.layers_per_block
        self.conv_in = Conv2d(config.in_channels, widths[0], padding=1, **numerics)
        self.levels = _levels(widths, blocks=blocks, resample=halve, config=config, rngs=rngs)
        self.mid = MidBlock(config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=config.norm_groups, param_dtype=param_dtype)
        self.conv_out = Conv2d(widths[-1], 2 * config.latent_channels, padding=1, **numerics)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Y X M"]:
        x = self.mid(self.levels(self.conv_in(x)))
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Latents behind the post-quant convolution to images; `levels[0]` is the lowest resolution."""

    def __init__(self, config: AutoencoderKLConfig, *, rngs: nnx.Rngs):
        widths, param_dtype = config.block_out_channels[::-1], config.param_dtype
        numerics = {"param_dtype": param_dtype, "rngs": rngs}

        def double(width: int) -> Upsample:
            return Upsample(width, **numerics)

        blocks = config.layers_per_block + 1
        self.conv_in = Conv2d(config.latent_channels, widths[0], padding=1, **numerics)
        self.mid = MidBlock(config, rngs=rngs)
        self.levels = _levels(widths, blocks=blocks, resample=double, config=config, rngs=rngs)
        self.norm_out = GroupNorm(widths[-1], groups=config.norm_groups, param_dtype=param_dtype)
        self.conv_out = Conv2d(widths[-1], config.out_channels, padding=1, **numerics)

    def __call__(self, z: Float[Array, "B Y X Z"]) -> Float[Array, "B H W O"]:
        x = self.levels(self.mid(self.conv_in(z)))
        return self.conv_out(nnx.silu(self.norm_out(x)))


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
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = pointwise(2 * latents) if config.use_quant_conv else None
        self.post_quant_conv = pointwise(latents) if config.use_post_quant_conv else None

    def layout(self, latents: Array | None, images: Array | None = None) -> Layout:
        """Token layout of the mid blocks' attention."""
        if images is None:
            _, rows, columns, _ = _image_shape("latents", latents)
            return Layout(grid=(1, rows, columns))
        _, height, width, _ = _image_shape("images", images)
        factor = self.config.downscale
        return Layout(grid=(1, height // factor, width // factor))

    def encode(self, images: Float[Array, "B H W I"]) -> Moments:
        """Mean and logarithm of the variance of z, both float32 [B, H/f, W/f, latent_channels].

        Args:
            images: values in -1 ... 1.

        Raises:
            ValueError: for another number of channels, or a size that `downscale` does not divide.
        """
        config, factor = self.config, self.config.downscale
        _, height, width, channels = _image_shape("images", images)
        if channels != config.in_channels:
            raise ValueError(
                f"this autoencoder encodes images of {config.in_channels} channels (NHWC), got "
                f"{list(images.shape)}"
            )
        if height % factor or width % factor:
            raise ValueError(
                f"height and width must be multiples of {factor}, got {height} x {width}. Crop, "
                f"pad or resize the images."
            )
        moments = self.encoder(images.astype(config.computed))
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, log_variance = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
        return mean, jnp.clip(log_variance, *_LOG_VARIANCE_RANGE)

    def decode(self, z: Float[Array, "B Y X Z"]) -> Float[Array, "B H W O"]:
        """Images, in about -1 ... 1 and `config.computed`, of latents z.

        Raises:
            ValueError: for another number of channels.
        """
        config = self.config
        if _image_shape("latents", z)[3] != config.latent_channels:
            raise ValueError(
                f"this autoencoder decodes latents of {config.latent_channels} channels (NHWC), "
                f"got {list(z.shape)}"
            )
        z = z.astype(config.computed)
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


def _image_shape(what: str, x: Array | None) -> tuple[int, int, int, int]:
    if x is None or x.ndim != 4:
        raise ValueError(
            f"{what} must be an array [batch, height, width, channels], got "
            f"{None if x is None else list(x.shape)}"
        )
    batch, height, width, channels = x.shape
    return batch, height, width, channels


MODEL = AutoencoderKL
