"""VQVAE with residual quantization over scales: images as maps of codes, coarse to fine.

The tokenizer of VAR (Tian et al., arXiv 2404.02905). An encoder makes latents f [B, s, s, C]. They
are the sum of K maps, of p_1 x p_1, ..., p_K x p_K codes (p_K = s): each map is what is left of f,
averaged to its size, rounded to the nearest codes, enlarged again and refined by a convolution.

    rest = f;  f_hat = 0
    for i in 1 ... K:
        codes_i = nearest(area(rest, p_i))
        h = phi_i(bicubic(codebook[codes_i], s))          phi(h) = (1 - r) h + r conv(h)
        f_hat += h;  rest -= h

Scales share a few convolutions: scale i takes the one whose place in 0 ... 1 is nearest to
(i - 1) / (K - 1). Which sizes there are (`patch_nums`) is no property of the weights: the functions
take it. An image of `downscale` * p_K pixels has sum p_i^2 tokens, scale by scale, row by row.

Parity target: the code that the checkpoints of VAR were released with.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import PyTree
from effjax.fields import Count, FloatName, Share
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
from effjax.layers.resize import resize
from effjax.layers.scales import Sides, token_starts, whole_scales


@dataclasses.dataclass(frozen=True)
class VQVAEConfig(CoderConfig):
    """Shape and numerics of a VQVAE; the defaults are those of VAR's.

    Attributes:
        in_channels, out_channels: channels of the images that go in and come out.
        latent_channels: channels of a code.
        vocab_size: codes in the codebook.
        block_out_channels: width of each level, from full to lowest resolution; every level but the
            last halves height and width, and the last one attends.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        norm_groups: groups of every group norm; it divides all widths.
        num_refinements: convolutions phi that the scales share.
        refinement: r, the share of an enlarged map that its convolution replaces.
        dtype: dtype of encoder and decoder; latents and codes are float32.
        param_dtype: dtype of new parameters.
    """

    in_channels: Count = 3
    out_channels: Count = 3
    latent_channels: Count = 32
    vocab_size: Count = 4096
    block_out_channels: tuple[Count, ...] = (160, 160, 320, 320, 640)
    layers_per_block: Count = 2
    norm_groups: Count = 32
    num_refinements: Count = 4
    refinement: Share = 0.5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"


def refinement_of(scale: int, scales: int, refinements: int) -> int:
    """Number of the convolution that refines a scale: the one whose place is nearest.

    Places of n convolutions are spread evenly over 0 ... 1, from 1/3 of a part (of four) or half of
    one (of other numbers) away from its ends. Of two that are equally near, rounding decides.
    """
    edge = (1 / 3 if refinements == 4 else 1 / 2) / refinements
    places = np.linspace(edge, 1 - edge, refinements)
    return int(np.argmin(np.abs(places - scale / max(scales - 1, 1))))


class MultiScaleQuantizer(nnx.Module):
    """Codebook and convolutions of a VQVAE: maps of codes to latents and back, in float32."""

    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs):
        channels, dtype = config.latent_channels, jnp.dtype(config.param_dtype)
        self.refinement = config.refinement
        init = nnx.initializers.normal(channels**-0.5)
        self.codebook = nnx.Param(init(rngs.params(), (config.vocab_size, channels), dtype))
        self.phi = nnx.List(
            [
                Conv2d(channels, channels, padding=1, param_dtype=dtype, rngs=rngs)
                for _ in range(config.num_refinements)
            ]
        )

    def codes(self) -> Float[Array, "V C"]:
        """The codebook, float32."""
        return self.codebook.get_value().astype(jnp.float32)

    def vectors(self, tokens: Int[Array, "B N"]) -> Float[Array, "B N C"]:
        """The codes of tokens, NaN for those below 0."""
        return codes_at(tokens, self.codes())

    def nearest(self, vectors: Float[Array, "B N C"]) -> Int[Array, "B N"]:
        """The tokens whose codes are nearest to vectors; the first of several."""
        return nearest(vectors, self.codes())

    def enlarged(
        self, vectors: Float[Array, "B N C"], scale: int, patch_nums: Sides
    ) -> Float[Array, "B S S C"]:
        """What a map of vectors adds to the latents."""
        side, last = patch_nums[scale], patch_nums[-1]
        small = vectors.reshape(vectors.shape[0], side, side, -1)
        h = resize(small, last, last, "bicubic")
        phi = self.phi[refinement_of(scale, len(patch_nums), len(self.phi))]
        return (1 - self.refinement) * h + self.refinement * phi(h)

    def encode(self, latents: Float[Array, "B S S C"], patch_nums: Sides) -> Int[Array, "B L"]:
        """The tokens of latents, those of all scales in order.

        Raises:
            ValueError: for latents whose side is not that of the last scale.
        """
        token_starts(patch_nums)
        if latents.shape[1:3] != (patch_nums[-1],) * 2:
            raise ValueError(
                f"the last of patch_nums {patch_nums} is the side of the latents, which are "
                f"{list(latents.shape)}: encode images of another size, or give other patch_nums"
            )
        rest, found = latents.astype(jnp.float32), []
        for scale, side in enumerate(patch_nums):
            found.append(self.nearest(averaged(rest, side)))
            rest = rest - self.enlarged(self.vectors(found[-1]), scale, patch_nums)
        return jnp.concatenate(found, axis=1)

    def partial_sums(
        self, tokens: Int[Array, "B L"], patch_nums: Sides
    ) -> list[Float[Array, "B S S C"]]:
        """The latents after each scale; the last are those of all tokens.

        Tokens may be those of the first scales alone.

        Raises:
            ValueError: for a number of tokens that whole scales do not have.
        """
        return self.sums_of_vectors(self.vectors(tokens), patch_nums)

    def sums_of_vectors(
        self, vectors: Float[Array, "B L C"], patch_nums: Sides
    ) -> list[Float[Array, "B S S C"]]:
        """The same of vectors, which may lie between codes."""
        starts, found = token_starts(patch_nums), [jnp.zeros((), jnp.float32)]
        for scale in range(whole_scales(patch_nums, vectors.shape[1])):
            own = vectors[:, starts[scale] : starts[scale + 1]]
            found.append(found[-1] + self.enlarged(own, scale, patch_nums))
        return found[1:]


def averaged(latents: Float[Array, "B S S C"], side: int) -> Float[Array, "B N C"]:
    """Latents as a map of side x side vectors, row by row."""
    small = resize(latents, side, side, "area")
    return small.reshape(small.shape[0], side**2, -1)


class VQVAE(CodeAutoencoder):
    """The network: encodes images to latents, and decodes latents that are sums of codes."""

    Config = VQVAEConfig
    counts = {  # noqa: RUF012
        "block_out_channels": "encoder.levels",
        "layers_per_block": "encoder.levels.0.blocks",
        "num_refinements": "quantizer.phi",
    }

    def __init__(self, config: VQVAEConfig, *, rngs: nnx.Rngs):
        def conv() -> Conv2d:
            options = {"padding": 1, "param_dtype": config.param_dtype}
            return Conv2d(latents, latents, **options, rngs=rngs)

        self.config = config
        latents = config.latent_channels
        shape = CoderShape(
            widths=config.block_out_channels,
            blocks=config.layers_per_block,
            groups=config.norm_groups,
            level_attention=True,
            param_dtype=config.param_dtype,
        )
        self.encoder = Encoder(shape, inputs=config.in_channels, outputs=latents, rngs=rngs)
        self.decoder = Decoder(shape, inputs=latents, outputs=config.out_channels, rngs=rngs)
        self.quant_conv = conv()
        self.post_quant_conv = conv()
        self.quantizer = MultiScaleQuantizer(config, rngs=rngs)


def quantizer_of(forward: Any, params: PyTree) -> MultiScaleQuantizer:
    """The quantizer of a VQVAE's forward, with its parameters; also while tracing."""
    return forward.module(params).quantizer


def encode(
    forward: Any, params: PyTree, images: Float[Array, "B H W I"], patch_nums: Sides
) -> Int[Array, "B L"]:
    """Encode images to tokens, those of all scales in order.

    Args:
        forward: a VQVAE's forward, with or without patches that keep no state.
        images: values in -1 ... 1, `downscale` * patch_nums[-1] pixels high and wide.
        patch_nums: sides of the maps of codes.
    """
    latents, _ = forward(params, {}, None, images)
    return quantizer_of(forward, params).encode(latents, patch_nums)


def latents_of(
    forward: Any, params: PyTree, tokens: Int[Array, "B L"], patch_nums: Sides
) -> Float[Array, "B S S C"]:
    """The latents that tokens stand for; of the first scales alone too."""
    return quantizer_of(forward, params).partial_sums(tokens, patch_nums)[-1]


def decode(
    forward: Any, params: PyTree, latents: Float[Array, "B S S C"]
) -> Float[Array, "B H W O"]:
    """Decode latents to images in about -1 ... 1."""
    return forward(params, {}, latents)[0]


MODEL = VQVAE
