"""FLUX.1: a joint transformer of dual and single blocks with rotary positions.

Parity target: diffusers' `FluxTransformer2DModel`. Images are packed here: a token is a patch of
2 x 2 latents, channel by channel. The model that was distilled from guidance (dev) is told a scale;
the one of few steps (schnell) is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName
from effjax.layers.embeddings import TimestepEmbedding
from effjax.layers.joint import (
    DualBlock,
    FinalLayer,
    PooledEmbeddings,
    SingleBlock,
    axial_angles,
    sequence,
)
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.stack import Stack
from effjax.models.sd3 import check_prompt

STREAMS = ("text", "image")  # in the order of the sequence
PATCH = 2


@dataclasses.dataclass(frozen=True)
class FluxConfig(Checked):
    """Shape and numerics of a FLUX; the defaults are FLUX.1-dev.

    Attributes:
        sample_size: height and width of the latent image of 1024 pixels; the model takes others.
        in_channels: channels of a token, four times those of the latent image.
        num_layers: dual blocks.
        num_single_layers: single blocks, which follow.
        num_heads, head_dim: hidden size is num_heads * head_dim.
        caption_channels: width of the text encoder's tokens.
        pooled_channels: width of the pooled text.
        axes: channels of a head that are rotated by frame, row and column; their sum is head_dim.
        guidance_embeds: whether the model is told a guidance scale.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    sample_size: Count = 128
    in_channels: Count = 64
    num_layers: Count = 19
    num_single_layers: Count = 38
    num_heads: Count = 24
    head_dim: Count = 128
    caption_channels: Count = 4096
    pooled_channels: Count = 768
    axes: tuple[Count, ...] = (16, 56, 56)
    guidance_embeds: bool = True
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.in_channels % PATCH**2:
            raise ValueError(f"in_channels must be a multiple of 4, got {self.in_channels}")
        if len(self.axes) != 3 or sum(self.axes) != self.head_dim or any(a % 2 for a in self.axes):
            raise ValueError(
                f"axes must be three even numbers with the sum head_dim={self.head_dim}, got "
                f"{self.axes}"
            )

    @property
    def patch_size(self) -> int:
        return PATCH

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Image tokens at `sample_size`."""
        return (self.sample_size // PATCH) ** 2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of what a sampler denoises."""
        return (self.sample_size, self.sample_size, self.in_channels // PATCH**2)


class Flux(Model):
    """The network: predicts velocity from noisy images, times and prompt embeddings."""

    Config = FluxConfig
    counts: ClassVar[Mapping[str, str]] = {
        "num_layers": "blocks",
        "num_single_layers": "single_blocks",
    }

    def __init__(self, config: FluxConfig, *, rngs: nnx.Rngs):
        self.config = config
        size = config.hidden_size
        options: dict[str, Any] = {"param_dtype": config.param_dtype, "rngs": rngs}
        heads: dict[str, Any] = {"heads": config.num_heads, "head_dim": config.head_dim}
        self.embed = Linear(config.in_channels, size, role="embedding", **options)
        self.time = TimestepEmbedding(size, dtype=config.dtype, **options)
        self.guidance = (
            TimestepEmbedding(size, dtype=config.dtype, **options)
            if config.guidance_embeds
            else None
        )
        self.pooled = MLP(
            config.pooled_channels,
            size,
            outputs=size,
            activation="silu",
            roles=("embedding", "embedding"),
            **options,
        )
        self.caption = Linear(config.caption_channels, size, role="embedding", **options)
        dual = [
            DualBlock(size, streams=STREAMS, norm_eps=1e-6, rotated=True, **heads, **options)
            for _ in range(config.num_layers)
        ]
        self.blocks = Stack(dual, streams=STREAMS)
        single = [SingleBlock(size, **heads, **options) for _ in range(config.num_single_layers)]
        self.single_blocks = Stack(single)
        self.final = FinalLayer(size, config.in_channels, **options)

    def example_inputs(self) -> tuple[Any, ...]:
        config, tokens = self.config, 512
        shapes = ((2, tokens, config.caption_channels), (2, config.pooled_channels))
        given: list[Any] = [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((2, *config.sample_shape), (2,), *shapes)
        ]
        x, t, embeds, pooled = given
        return x, t, PooledEmbeddings(embeds, pooled, t if config.guidance_embeds else None)

    def layout(self, x: Array, t: Array, prompt: PooledEmbeddings, *_: Any) -> Layout:
        rows, columns = (side // PATCH for side in x.shape[1:3])
        return Layout(grid=(1, rows, columns), text=prompt[0].shape[1], text_first=True)

    def __call__(
        self, x: Float[Array, "B H W I"], t: Float[Array, " B"], prompt: PooledEmbeddings
    ) -> Float[Array, "B H W I"]:
        """Run the network.

        Args:
            x: image [B, height, width, in_channels / 4]; sides are even.
            t: time in the units of the noise schedule, 0 ... 1000.
            prompt: embeddings [B, T, caption_channels], pooled ones [B, pooled_channels], and the
                guidance scale [B] if the model has `guidance_embeds`.

        Returns:
            [B, height, width, in_channels / 4] in `config.dtype`.

        Raises:
            ValueError: for images or prompts that do not fit, a guidance scale that is missing, or
                one for a model that takes none.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        check_prompt(config, prompt)
        if x.shape[1] % PATCH or x.shape[2] % PATCH or x.shape[3] * PATCH**2 != config.in_channels:
            raise ValueError(
                f"this FLUX takes images of {config.in_channels // PATCH**2} channels with even "
                f"sides, got {list(x.shape)}"
            )
        if (prompt.guidance is None) == config.guidance_embeds:
            raise ValueError(
                "this FLUX is told a guidance scale: give PooledEmbeddings(..., guidance)"
                if config.guidance_embeds
                else "this FLUX takes no guidance scale: leave out guidance"
            )
        rows, columns = (side // PATCH for side in x.shape[1:3])
        c = self.time(_rounded(t / 1000, dtype)) + self.pooled(prompt.pooled.astype(dtype))
        if self.guidance is not None:
            assert prompt.guidance is not None
            c = c + self.guidance(_rounded(prompt.guidance, dtype))
        streams = {
            "image": self.embed(_pack(x.astype(dtype))),
            "text": self.caption(prompt.embeds.astype(dtype)),
        }
        text = prompt.embeds.shape[1]
        angles = tuple(map(jnp.asarray, _angles(config.axes, text, rows, columns)))
        streams = self.blocks(streams, c, *angles)
        tokens = self.single_blocks(sequence(streams, STREAMS), c, *angles)
        return _unpack(self.final(tokens[:, text:], c), rows, columns)


def _rounded(x: Float[Array, " B"], dtype: np.dtype) -> Float[Array, " B"]:
    """1000 x as the reference makes it: rounded to the model's dtype before and after.

    By name, since XLA leaves out casts to fewer bits and back: 701 would become 699.2, not 700.
    """
    kind = jnp.finfo(dtype)

    def cut(x: Float[Array, " B"]) -> Float[Array, " B"]:
        return jax.lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)

    return cut(cut(x.astype(jnp.float32)) * 1000)


def _angles(
    axes: tuple[int, ...], text: int, rows: int, columns: int
) -> tuple[np.ndarray, np.ndarray]:
    """Texts stand at (0, 0, 0), image tokens at (0, row, column)."""
    row, column = (part.reshape(-1) for part in np.indices((rows, columns)))
    image = np.stack([np.zeros_like(row), row, column], axis=1)
    return axial_angles(axes, np.concatenate([np.zeros((text, 3), image.dtype), image]))


def _pack(x: Float[Array, "B H W I"]) -> Float[Array, "B S P"]:
    """Images to tokens of layout (channel, row in patch, column in patch)."""
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, -1, PATCH**2 * channels)


def _unpack(tokens: Float[Array, "B S P"], rows: int, columns: int) -> Float[Array, "B H W I"]:
    """The inverse of `_pack`."""
    batch, _, size = tokens.shape
    x = tokens.reshape(batch, rows, columns, size // PATCH**2, PATCH, PATCH)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, rows * PATCH, columns * PATCH, -1)


MODEL = Flux
