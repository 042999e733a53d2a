"""VQ model: images as one map of codes (VQGAN, Esser et al., arXiv 2012.09841).

The tokenizer of LlamaGen (VQ-16, VQ-8). An encoder makes latents, each of which is rounded to the
nearest code of a codebook; a decoder makes images of codes. With `unit_codes` latents and codes
have unit length, so that the nearest code is the one of the smallest angle.

Parity target: the code that LlamaGen's checkpoints were released with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import PyTree
from effjax.fields import Count, FloatName
from effjax.layers.autoencoder import (
    CodeAutoencoder,
    CoderConfig,
    CoderShape,
    Decoder,
    Encoder,
    codes_at,
    nearest,
)
from effjax.layers.convolution import Conv2d


@dataclasses.dataclass(frozen=True)
class VQModelConfig(CoderConfig):
    """Shape and numerics of a VQ model; the defaults are LlamaGen's VQ-16.

    Attributes:
        in_channels, out_channels: channels of the images that go in and come out.
        latent_channels: channels of a code.
        encoder_channels: channels that the encoder makes and the decoder takes.
        vocab_size: codes in the codebook.
        block_out_channels: width of each level, from full to lowest resolution; every level but the
            last halves height and width.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        norm_groups: groups of every group norm; it divides all widths.
        level_attention: the level of lowest resolution attends after every block.
        unit_codes: latents and codes have unit length.
        dtype: dtype of encoder and decoder; latents and codes are float32.
        param_dtype: dtype of new parameters.
    """

    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 8
    encoder_channels: Count = 256
    vocab_size: Count = 16384
    block_out_channels: tuple[Count, ...] = (128, 128, 256, 256, 512)
    layers_per_block: Count = 2
    norm_groups: Count = 32
    level_attention: bool = True
    unit_codes: bool = True
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"


class Quantizer(nnx.Module):
    """The codebook: latents to tokens and back, in float32."""

    def __init__(self, config: VQModelConfig, *, rngs: nnx.Rngs):
        self.unit = config.unit_codes
        shape, dtype = (config.vocab_size, config.latent_channels), jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(config.latent_channels**-0.5)
        self.codebook = nnx.Param(init(rngs.params(), shape, dtype))

    def codes(self) -> Float[Array, "V C"]:
        """The codebook as it is used, float32."""
        codes = self.codebook.get_value().astype(jnp.float32)
        return _normalized(codes) if self.unit else codes

    def vectors(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        """The codes of tokens, NaN for those below 0."""
        return codes_at(tokens, self.codes())

    def encode(self, latents: Float[Array, "B Y X C"]) -> Int[Array, "B N"]:
        """The tokens of latents, row by row."""
        return self.nearest(latents.reshape(latents.shape[0], -1, latents.shape[-1]))

    def scaled(self, latents: Float[Array, "... C"]) -> Float[Array, "... C"]:
        """Latents as they are compared with codes: of unit length if those are, float32."""
        latents = latents.astype(jnp.float32)
        return _normalized(latents) if self.unit else latents

    def nearest(self, vectors: Float[Array, "B N C"]) -> Int[Array, "B N"]:
        """The tokens whose codes are nearest to vectors; the first of several."""
        return nearest(self.scaled(vectors), self.codes())


def _normalized(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class VQModel(CodeAutoencoder):
    """The network: encodes images to latents, and decodes latents that are codes."""

    Config = VQModelConfig
    counts = {  # noqa: RUF012
        "block_out_channels": "encoder.levels",
        "layers_per_block": "encoder.levels.0.blocks",
    }

    def __init__(self, config: VQModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        latents, between = config.latent_channels, config.encoder_channels
        shape = CoderShape(
            widths=config.block_out_channels,
            blocks=config.layers_per_block,
            groups=config.norm_groups,
            level_attention=config.level_attention,
            param_dtype=config.param_dtype,
        )
        pointwise: dict[str, Any] = {
            "kernel_size": 1,
            "param_dtype": config.param_dtype,
            "rngs": rngs,
        }
        self.encoder = Encoder(shape, inputs=config.in_channels, outputs=between, rngs=rngs)
        self.decoder = Decoder(shape, inputs=between, outputs=config.out_channels, rngs=rngs)
        self.quant_conv = Conv2d(between, latents, **pointwise)
        self.post_quant_conv = Conv2d(latents, between, **pointwise)
        self.quantizer = Quantizer(config, rngs=rngs)


def quantizer_of(forward: Any, params: PyTree) -> Quantizer:
    """The codebook of a VQ model's forward, with its parameters; also while tracing."""
    return forward.module(params).quantizer


def encode(forward: Any, params: PyTree, images: Float[Array, "B H W I"]) -> Int[Array, "B N"]:
    """Encode images to tokens, row by row.

    Args:
        forward: a VQ model's forward, with or without patches that keep no state.
        images: values in -1 ... 1.
    """
    latents, _ = forward(params, {}, None, images)
    return quantizer_of(forward, params).encode(latents)


def encode_latents(
    forward: Any, params: PyTree, images: Float[Array, "B H W I"]
) -> Float[Array, "B Y X Z"]:
    """Encode images to latents that are not rounded to codes; arguments are those of `encode`."""
    latents, _ = forward(params, {}, None, images)
    return quantizer_of(forward, params).scaled(latents)


def latents_of(
    forward: Any, params: PyTree, tokens: Int[Array, "B N"], grid: tuple[int, int]
) -> Float[Array, "B Y X Z"]:
    """The latents that tokens stand for, a map of `grid` rows and columns."""
    vectors = quantizer_of(forward, params).vectors(tokens)
    return vectors.reshape(len(tokens), *grid, vectors.shape[-1])


def decode(
    forward: Any, params: PyTree, latents: Float[Array, "B Y X Z"]
) -> Float[Array, "B H W O"]:
    """Decode latents to images in about -1 ... 1."""
    return forward(params, {}, latents)[0]


MODEL = VQModel
