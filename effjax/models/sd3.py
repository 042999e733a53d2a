"""Stable Diffusion 3 and 3.5: joint transformers of two streams (MM-DiT, arXiv 2403.03206).

Parity target: diffusers' `SD3Transformer2DModel`. The medium model of version 3.5 gives the image a
second attention in its first blocks, and both models of 3.5 normalize queries and keys.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Natural
from effjax.layers.embeddings import PatchEmbed, TimestepEmbedding, check_patches, unpatchify
from effjax.layers.joint import DualBlock, FinalLayer, PooledEmbeddings
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.stack import Stack

STREAMS = ("image", "text")


@dataclasses.dataclass(frozen=True)
class SD3Config(Checked):
    """Shape and numerics of an SD3; the defaults are SD3-medium.

    Attributes:
        sample_size: height and width of the latent image that the model was made for.
        patch_size: side of a patch.
        in_channels, out_channels: of the latent image and of the output.
        num_layers, num_heads, head_dim: depth and hidden size; that is num_heads * head_dim.
        caption_channels: width of the text encoders' tokens.
        pooled_channels: width of the pooled text.
        max_grid: side of the table of positions in patches; images take its middle.
        qk_norm: RMS norms of the heads of queries and keys.
        dual_layers: numbers of the blocks with a second attention of the image.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    sample_size: Count = 128
    patch_size: Count = 2
    in_channels: Count = 16
    out_channels: Count = 16
    num_layers: Count = 24
    num_heads: Count = 24
    head_dim: Count = 64
    caption_channels: Count = 4096
    pooled_channels: Count = 2048
    max_grid: Count = 192
    qk_norm: bool = False
    dual_layers: tuple[Natural, ...] = ()
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self)
        if any(layer >= self.num_layers for layer in self.dual_layers):
            raise ValueError(
                f"dual_layers must be numbers below num_layers={self.num_layers}, got "
                f"{self.dual_layers}"
            )

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        """Image tokens at `sample_size`."""
        return (self.sample_size // self.patch_size) ** 2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of what a sampler denoises."""
        return (self.sample_size, self.sample_size, self.in_channels)


class SD3(Model):
    """The network: predicts velocity from noisy images, times and prompt embeddings."""

    Config = SD3Config

    def __init__(self, config: SD3Config, *, rngs: nnx.Rngs):
        self.config = config
        size, dtype = config.hidden_size, config.param_dtype
        options: dict[str, Any] = {"param_dtype": dtype, "rngs": rngs}
        self.patch = PatchEmbed(config.in_channels, size, patch=config.patch_size, **options)
        init = nnx.initializers.normal(0.02)
        table = (config.max_grid**2, size)
        self.positions = nnx.Param(init(rngs.params(), table, jnp.dtype(dtype)))
        self.time = TimestepEmbedding(size, dtype=config.dtype, **options)
        self.pooled = MLP(
            config.pooled_channels,
            size,
            outputs=size,
            activation="silu",
            roles=("embedding", "embedding"),
            **options,
        )
        self.caption = Linear(config.caption_channels, size, role="embedding", **options)
        last = config.num_layers - 1
        blocks = [
            DualBlock(
                size,
                heads=config.num_heads,
                head_dim=config.head_dim,
                streams=STREAMS,
                norm_eps=1e-6 if config.qk_norm else None,
                text_ends=layer == last,
                dual=layer in config.dual_layers,
                **options,
            )
            for layer in range(config.num_layers)
        ]
        self.blocks = Stack(blocks, streams=STREAMS)
        self.final = FinalLayer(size, config.patch_size**2 * config.out_channels, **options)

    def example_inputs(self) -> tuple[Any, ...]:
        config, tokens = self.config, 333  # 77 of CLIP and 256 of T5
        shapes = ((2, tokens, config.caption_channels), (2, config.pooled_channels))
        given: list[Any] = [
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in ((2, *config.sample_shape), (2,), *shapes)
        ]
        x, t, embeds, pooled = given
        return x, t, PooledEmbeddings(embeds, pooled)

    def layout(self, x: Array, t: Array, prompt: PooledEmbeddings, *_: Any) -> Layout:
        rows, columns = (side // self.config.patch_size for side in x.shape[1:3])
        return Layout(grid=(1, rows, columns), text=prompt[0].shape[1])

    def __call__(
        self, x: Float[Array, "B H W I"], t: Float[Array, " B"], prompt: PooledEmbeddings
    ) -> Float[Array, "B H W O"]:
        """Run the network.

        Args:
            x: image [B, height, width, in_channels]; sides may differ from each other, must be
                multiples of `patch_size` and have at most `max_grid` patches.
            t: time in the units of the noise schedule, 0 ... 1000.
            prompt: embeddings [B, T, caption_channels] and pooled ones [B, pooled_channels]; all
                tokens count.

        Returns:
            [B, height, width, out_channels] in `config.dtype`.

        Raises:
            ValueError: for images or prompts that do not fit.
        """
        config = self.config
        check_prompt(config, prompt)
        rows, columns = (side // config.patch_size for side in x.shape[1:3])
        if x.shape[-1] != config.in_channels or max(rows, columns) > config.max_grid:
            raise ValueError(
                f"this SD3 takes images of {config.in_channels} channels and at most "
                f"{config.max_grid} patches of {config.patch_size} on a side, got {list(x.shape)}"
            )
        tokens = self.patch(x.astype(config.dtype)) + self._positions(rows, columns)
        c = self.time(t) + self.pooled(prompt.pooled.astype(config.dtype))
        streams = {"image": tokens, "text": self.caption(prompt.embeds.astype(config.dtype))}
        image = self.blocks(streams, c)["image"]
        return unpatchify(self.final(image, c), rows, columns, patch=config.patch_size)

    def _positions(self, rows: int, columns: int) -> Float[Array, "S C"]:
        """The middle of the table."""
        side = self.config.max_grid
        table = self.positions.get_value().reshape(side, side, -1)
        top, left = (side - rows) // 2, (side - columns) // 2
        middle = table[top : top + rows, left : left + columns]
        return middle.reshape(rows * columns, -1).astype(self.config.dtype)


def check_prompt(config: Any, prompt: PooledEmbeddings) -> None:
    """Check that embeddings are those of a model's text encoders.

    Raises:
        ValueError: for other widths.
    """
    given = prompt.embeds.shape[-1], prompt.pooled.shape[-1]
    if given != (config.caption_channels, config.pooled_channels):
        raise ValueError(
            f"this model takes embeddings of {config.caption_channels} channels and pooled ones of "
            f"{config.pooled_channels}, got {given[0]} and {given[1]}"
        )


MODEL = SD3
