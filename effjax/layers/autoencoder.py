"""Parts of convolutional autoencoders of images: residual blocks by level (arXiv 2012.09841).

Encoders and decoders of latent diffusion (`AutoencoderKL`) and of models whose latents are codes
(`VQVAE`, `VQModel`) are made of the same parts. They differ in widths, in where they attend, and in
what stands between the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count
from effjax.layers.attention import SelfAttention
from effjax.layers.convolution import Conv2d, upsample_nearest_2x
from effjax.layers.norms import GroupNorm
from effjax.layers.stack import Stack


@dataclasses.dataclass(frozen=True)
class CoderConfig(Checked):
    """The base of configurations of autoencoders.

    Attributes:
        block_out_channels: width of each level, from full to lowest resolution; every level but the
            last halves height and width.
        norm_groups: groups of every group norm.

    Raises:
        ValueError: for widths of levels that groups of norms do not divide.
    """

    block_out_channels: tuple[Count, ...]
    norm_groups: Count

    def __post_init__(self) -> None:
        super().__post_init__()
        widths, groups = self.block_out_channels, self.norm_groups
        if not widths or any(width % groups for width in widths):
            raise ValueError(
                f"block_out_channels must have a multiple of norm_groups for each level; "
                f"got block_out_channels={tuple(widths)}, norm_groups={groups}"
            )

    @property
    def downscale(self) -> int:
        """Side of the square of pixels that one latent stands for."""
        return 2 ** (len(self.block_out_channels) - 1)


class CoderShape(NamedTuple):
    """What an encoder or a decoder is made of.

    Attributes:
        widths: channels of each level, from full to lowest resolution; every level but the last
            halves height and width.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        groups: of every group norm; it divides all widths.
        mid_attention: attend between the two blocks in the middle.
        level_attention: attend after every residual block of the level of lowest resolution.
        param_dtype: of new parameters.
    """

    widths: tuple[int, ...]
    blocks: int
    groups: int = 32
    mid_attention: bool = True
    level_attention: bool = False
    param_dtype: jax.typing.DTypeLike = jnp.float32


class AttentionBlock(nnx.Module):
    """Group norm and one-head attention over all pixels, with a skip."""

    def __init__(self, width: int, shape: CoderShape, *, rngs: nnx.Rngs):
        param_dtype = shape.param_dtype
        self.norm = GroupNorm(width, groups=shape.groups, eps=1e-6, param_dtype=param_dtype)
        self.attn = SelfAttention(
            width, heads=1, head_dim=width, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])
        return x + self.attn(tokens).reshape(x.shape)


class ResidualBlock(nnx.Module):
    """Twice group norm, SiLU, 3x3 convolution; the skip is a 1x1 convolution if widths differ.

    Args:
        attends: whether an `AttentionBlock` follows.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        shape: CoderShape,
        *,
        attends: bool = False,
        rngs: nnx.Rngs,
    ):
        def norm(channels: int) -> GroupNorm:
            options = {"groups": shape.groups, "param_dtype": shape.param_dtype}
            return GroupNorm(channels, eps=1e-6, **options)

        def conv(inputs: int, size: int) -> Conv2d:
            options = {"kernel_size": size, "padding": size // 2, "param_dtype": shape.param_dtype}
            return Conv2d(inputs, out_channels, **options, rngs=rngs)

        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, 3)
        self.norm2 = norm(out_channels)
        self.conv2 = conv(out_channels, 3)
        self.shortcut = None if in_channels == out_channels else conv(in_channels, 1)
        self.attention = AttentionBlock(out_channels, shape, rngs=rngs) if attends else None

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B H W O"]:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = self.conv2(nnx.silu(self.norm2(h)))
        h = h + (x if self.shortcut is None else self.shortcut(x))
        return h if self.attention is None else self.attention(h)


class MidBlock(nnx.Module):
    """At the lowest resolution: residual block, attention (if any), residual block."""

    def __init__(self, shape: CoderShape, *, rngs: nnx.Rngs):
        width = shape.widths[-1]
        self.block1 = ResidualBlock(width, width, shape, rngs=rngs)
        self.attention = AttentionBlock(width, shape, rngs=rngs) if shape.mid_attention else None
        self.block2 = ResidualBlock(width, width, shape, rngs=rngs)

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
        shape: CoderShape,
        *,
        blocks: int,
        attends: bool,
        resample: nnx.Module | None,
        rngs: nnx.Rngs,
    ):
        inputs = [in_channels] + [out_channels] * (blocks - 1)
        options = {"attends": attends, "rngs": rngs}
        self.blocks = Stack(
            [ResidualBlock(channels, out_channels, shape, **options) for channels in inputs]
        )
        self.resample = resample

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Y X O"]:
        x = self.blocks(x)
        return x if self.resample is None else self.resample(x)


def _levels(
    widths: Sequence[int],
    shape: CoderShape,
    *,
    blocks: int,
    lowest: int,
    resample: Callable[[int], nnx.Module],
    rngs: nnx.Rngs,
) -> Stack:
    """Levels of these widths in order, with `resample(width)` behind every one but the last.

    Args:
        lowest: number of the level of lowest resolution.
    """
    levels = []
    for index, width in enumerate(widths):
        last = index == len(widths) - 1
        level = Level(
            widths[max(index - 1, 0)],
            width,
            shape,
            blocks=blocks,
            attends=shape.level_attention and index == lowest,
            resample=None if last else resample(width),
            rngs=rngs,
        )
        levels.append(level)
    return Stack(levels)


class Encoder(nnx.Module):
    """Images to what stands before the quant convolution."""

    def __init__(self, shape: CoderShape, *, inputs: int, outputs: int, rngs: nnx.Rngs):
        widths = shape.widths
        numerics = {"param_dtype": shape.param_dtype, "rngs": rngs}

        def halve(width: int) -> Conv2d:
            # Padded on the right and below only, as the published weights expect.
            return Conv2d(width, width, stride=2, padding=((0, 1), (0, 1)), **numerics)

        options = {"blocks": shape.blocks, "lowest": len(widths) - 1, "resample": halve}
        self.conv_in = Conv2d(inputs, widths[0], padding=1, **numerics)
        self.levels = _levels(widths, shape, **options, rngs=rngs)
        self.mid = MidBlock(shape, rngs=rngs)
        self.norm_out = GroupNorm(
            widths[-1], groups=shape.groups, eps=1e-6, param_dtype=shape.param_dtype
        )
        self.conv_out = Conv2d(widths[-1], outputs, padding=1, **numerics)

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B Y X M"]:
        x = self.mid(self.levels(self.conv_in(x)))
        return self.conv_out(nnx.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """What stands behind the post-quant convolution to images; `levels[0]` is the lowest level."""

    def __init__(self, shape: CoderShape, *, inputs: int, outputs: int, rngs: nnx.Rngs):
        widths = shape.widths[::-1]
        numerics = {"param_dtype": shape.param_dtype, "rngs": rngs}

        def double(width: int) -> Upsample:
            return Upsample(width, **numerics)

        options = {"blocks": shape.blocks + 1, "lowest": 0, "resample": double}
        self.conv_in = Conv2d(inputs, widths[0], padding=1, **numerics)
        self.mid = MidBlock(shape, rngs=rngs)
        self.levels = _levels(widths, shape, **options, rngs=rngs)
        self.norm_out = GroupNorm(
            widths[-1], groups=shape.groups, eps=1e-6, param_dtype=shape.param_dtype
        )
        self.conv_out = Conv2d(widths[-1], outputs, padding=1, **numerics)

    def __call__(self, z: Float[Array, "B Y X Z"]) -> Float[Array, "B H W O"]:
        x = self.levels(self.mid(self.conv_in(z)))
        return self.conv_out(nnx.silu(self.norm_out(x)))


class CodeAutoencoder(Model):
    """Base of autoencoders whose latents are codes: they encode images, and decode latents.

    Attributes:
        encoder, quant_conv: images to latents that are not yet codes.
        post_quant_conv, decoder: latents to images.
    """

    encoder: Encoder
    quant_conv: Conv2d
    post_quant_conv: Conv2d
    decoder: Decoder

    def layout(self, latents: Array | None, images: Array | None = None) -> Layout:
        """Token layout of the attention at the lowest resolution."""
        if images is None:
            _, rows, columns, _ = image_shape("latents", latents)
            return Layout(grid=(1, rows, columns))
        _, height, width, _ = image_shape("images", images)
        factor = self.config.downscale
        return Layout(grid=(1, height // factor, width // factor))

    def __call__(
        self, latents: Float[Array, "B Y X Z"] | None, images: Float[Array, "B H W I"] | None = None
    ) -> Float[Array, "B _ _ _"]:
        """Decode latents to images, or encode images to latents that are not yet codes.

        Exactly one of the two is given, and the other is None, which passes `jax.jit` as structure.
        Images have values in -1 ... 1. For tokens see `encode` and `latents_of` of the model's
        module.

        Returns:
            Images [B, H, W, out_channels] in `config.dtype`, or latents float32[B, Y, X, Z].

        Raises:
            ValueError: for another number of channels, or sizes that `downscale` does not divide.
        """
        config = self.config
        if images is None and latents is not None:
            check_latents(latents, config.latent_channels)
            return self.decoder(self.post_quant_conv(latents.astype(config.dtype)))
        if latents is None and images is not None:
            check_images(images, config.in_channels, config.downscale)
            made = self.quant_conv(self.encoder(images.astype(config.dtype)))
            return made.astype(jnp.float32)
        raise ValueError(
            "give either latents to decode or images to encode: forward(params, state, latents) "
            "or forward(params, state, None, images)"
        )


def codes_at(tokens: Int[Array, "B N"], codes: Float[Array, "V C"]) -> Float[Array, "B N C"]:
    """The codes of tokens, NaN for those below 0, which are none (`effjax.finite`)."""
    return jnp.where(tokens[..., None] < 0, jnp.nan, codes[tokens])


def nearest(vectors: Float[Array, "B N C"], codes: Float[Array, "V C"]) -> Int[Array, "B N"]:
    """The tokens whose codes are nearest to vectors; the first of several."""
    products = jnp.einsum("bnc,vc->bnv", vectors, codes, precision=jax.lax.Precision.HIGHEST)
    distances = jnp.sum(codes**2, axis=1) - 2 * products  # and |vector|^2, the same for all
    return jnp.argmin(distances, axis=-1).astype(jnp.int32)


def image_shape(what: str, x: Array | None) -> tuple[int, int, int, int]:
    """(batch, height, width, channels) of an array of images.

    Raises:
        ValueError: for what is none.
    """
    if x is None or x.ndim != 4:
        raise ValueError(
            f"{what} must be an array [batch, height, width, channels], got "
            f"{None if x is None else list(x.shape)}"
        )
    batch, height, width, channels = x.shape
    return batch, height, width, channels


def check_images(images: Array, channels: int, unit: int) -> None:
    """Check images that are to be encoded.

    Args:
        images: [B, H, W, C].
        channels: that they must have.
        unit: pixels of a latent's side.

    Raises:
        ValueError: for another number of channels, or sides that `unit` does not divide.
    """
    _, height, width, given = image_shape("images", images)
    if given != channels:
        raise ValueError(
            f"this autoencoder encodes images of {channels} channels (NHWC), got "
            f"{list(images.shape)}"
        )
    if height % unit or width % unit:
        raise ValueError(
            f"height and width must be multiples of {unit}, got {height} x {width}. Crop, pad or "
            f"resize the images."
        )


def check_latents(latents: Array, channels: int) -> None:
    """Raise ValueError for latents of another number of channels."""
    if image_shape("latents", latents)[3] != channels:
        raise ValueError(
            f"this autoencoder decodes latents of {channels} channels (NHWC), got "
            f"{list(latents.shape)}"
        )
