"""PixArt: text-to-image diffusion transformer (PixArt-Sigma, arXiv 2403.04692).

A DiT whose blocks share one time projection and read a caption by cross-attention. Parity target:
diffusers' `PixArtTransformer2DModel`, without the size conditions of PixArt-alpha at 1024 pixels.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, NamedTuple

import jax.export
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive, Range
from effjax.layers.attention import CrossAttention, SelfAttention
from effjax.layers.embeddings import (
    PatchEmbed,
    TimestepEmbedding,
    check_patches,
    sincos_2d,
    unpatchify,
)
from effjax.layers.folding import Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import LayerNorm, modulate
from effjax.layers.stack import Stack


class PromptEmbeddings(NamedTuple):
    """The output of a text encoder for prompts: the condition of a text-to-image model.

    Attributes:
        embeds: the encoder's output, one vector per token.
        mask: True for tokens of the prompt, False for padding.
    """

    embeds: Float[Array, "B T E"]
    mask: Bool[Array, "B T"]


jax.export.register_namedtuple_serialization(
    PromptEmbeddings, serialized_name="effjax.PromptEmbeddings"
)


@dataclasses.dataclass(frozen=True)
class PixArtConfig(Checked):
    """Shape and numerics of a PixArt; the defaults are PixArt-Sigma-XL/2 at 1024 pixels.

    Attributes:
        sample_size: height and width of the latent image that positions are made for.
        patch_size: side of a patch.
        in_channels: channels of the latent image.
        out_channels: channels of the output: twice `in_channels` if the variance is learned.
        num_layers, num_heads, head_dim: depth and hidden size; that is num_heads * head_dim.
        caption_channels: width of the text encoder.
        interpolation: divides positions: 1 up to 512 pixels, 2 at 1024, 4 at 2048.
        norm_eps: epsilon of the blocks' norms.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    sample_size: Count = 128
    patch_size: Count = 2
    in_channels: Count = 4
    out_channels: Count = 8
    num_layers: Count = 28
    num_heads: Count = 16
    head_dim: Count = 72
    caption_channels: Count = 4096
    interpolation: Annotated[float, Range(0, 1024, above=True)] = 2.0
    norm_eps: Positive = 1e-6
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self)

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


class PixArtBlock(nnx.Module):
    """Self-attention, cross-attention and MLP.

    adaLN-single: shifts, scales and gates are a table added to a shared time vector.
    Cross-attention reads un-normalized tokens and has no gate.
    """

    # adaLN-single adds a vector that all blocks share: nothing folds into it.
    folds = (
        Fold(("attn.to_out",), "attn.to_v", "linear"),
        Fold(("cross.to_out",), "cross.to_v", "linear"),
    )

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        heads: dict[str, Any] = {"heads": config.num_heads, "head_dim": config.head_dim}
        init = nnx.initializers.normal(hidden_size**-0.5)
        self.scale_shift_table = nnx.Param(init(rngs.params(), (6, hidden_size), dtype))
        self.norm1 = LayerNorm(eps=config.norm_eps)
        self.attn = SelfAttention(hidden_size, **heads, param_dtype=dtype, rngs=rngs)
        self.cross = CrossAttention(hidden_size, **heads, param_dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(eps=config.norm_eps)
        self.mlp = MLP(hidden_size, 4 * hidden_size, param_dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B S C"],
        time: Float[Array, "B 6 C"],
        prompt: PromptEmbeddings,
    ) -> Float[Array, "B S C"]:
        table = self.scale_shift_table.get_value().astype(x.dtype)
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.moveaxis(table + time, 1, 0)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        x = x + self.cross(x, *prompt)
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def signal(
        self, x: Float[Array, "B S C"], time: Float[Array, "B 6 C"], *_: Any
    ) -> Float[Array, "B S C"]:
        """What the attention is called with: how much it changes tells how much outputs do."""
        table = self.scale_shift_table.get_value().astype(x.dtype)
        shift, scale = jnp.moveaxis(table + time, 1, 0)[:2]
        return modulate(self.norm1(x), shift, scale)


class SharedTime(nnx.Module):
    """Time to the vector that the last norm reads [B, C], and to the blocks' six [B, 6, C]."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        hidden_size, param_dtype = config.hidden_size, config.param_dtype
        self.embed = TimestepEmbedding(
            hidden_size, dtype=config.dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.proj = Linear(
            hidden_size,
            6 * hidden_size,
            role="modulation",
            param_dtype=param_dtype,
            init=nnx.initializers.normal(0.02),
            rngs=rngs,
        )

    def __call__(self, t: Float[Array, " B"]) -> tuple[Float[Array, "B C"], Float[Array, "B 6 C"]]:
        embedded = self.embed(t)
        return embedded, self.proj(nnx.silu(embedded)).reshape(embedded.shape[0], 6, -1)


class FinalLayer(nnx.Module):
    """Adaptive norm and projection to patches."""

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init, zeros = nnx.initializers.normal(hidden_size**-0.5), nnx.initializers.zeros
        outputs = config.patch_size**2 * config.out_channels
        self.scale_shift_table = nnx.Param(init(rngs.params(), (2, hidden_size), dtype))
        self.norm = LayerNorm(eps=1e-6)
        self.proj = Linear(
            hidden_size, outputs, role="head", param_dtype=dtype, init=zeros, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B S C"], time: Float[Array, "B C"]
    ) -> Float[Array, "B S P"]:
        shift, scale = jnp.moveaxis(
            self.scale_shift_table.get_value().astype(x.dtype) + time[:, None], 1, 0
        )
        return self.proj(modulate(self.norm(x), shift, scale))


class PixArt(Model):
    """The network: predicts noise or velocity from noisy images, times and prompt embeddings."""

    Config = PixArtConfig

    def __init__(self, config: PixArtConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.patch = PatchEmbed(
            config.in_channels,
            config.hidden_size,
            patch=config.patch_size,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.time = SharedTime(config, rngs=rngs)
        self.caption_projection = MLP(
            config.caption_channels,
            config.hidden_size,
            outputs=config.hidden_size,
            roles=("embedding", "embedding"),
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.blocks = Stack([PixArtBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final = FinalLayer(config, rngs=rngs)

    def example_inputs(self) -> tuple[Any, ...]:
        config, tokens = self.config, 120
        x = jax.ShapeDtypeStruct((2, *config.sample_shape), jnp.float32)
        prompt: tuple[Any, Any] = (
            jax.ShapeDtypeStruct((2, tokens, config.caption_channels), jnp.float32),
            jax.ShapeDtypeStruct((2, tokens), bool),
        )
        return x, jax.ShapeDtypeStruct((2,), jnp.float32), PromptEmbeddings(*prompt)

    def layout(self, x: Array, *_: Any) -> Layout:
        rows, columns = (size // self.config.patch_size for size in x.shape[1:3])
        return Layout(grid=(1, rows, columns))

    def __call__(
        self, x: Float[Array, "B H W I"], t: Float[Array, " B"], prompt: PromptEmbeddings
    ) -> Float[Array, "B H W O"]:
        """Run the network.

        Args:
            x: image [B, height, width, in_channels]; sides may differ from `sample_size` and from
                each other, and must be multiples of `patch_size`.
            t: time in the units of the noise schedule, 0 ... 1000.
            prompt: embeddings [B, T, caption_channels] and mask of a text encoder.

        Returns:
            [B, height, width, out_channels] in `config.dtype`.

        Raises:
            ValueError: for images or captions that do not fit.
        """
        config = self.config
        if x.shape[-1] != config.in_channels:
            raise ValueError(
                f"this PixArt takes images of {config.in_channels} channels, got {list(x.shape)}"
            )
        if prompt.embeds.shape[-1] != config.caption_channels:
            raise ValueError(
                f"this PixArt reads captions of {config.caption_channels} channels, got "
                f"{list(prompt.embeds.shape)}: is this another text encoder's output?"
            )
        rows, columns = (size // config.patch_size for size in x.shape[1:3])
        tokens = self.patch(x.astype(config.dtype))
        positions = sincos_2d(
            config.hidden_size,
            rows,
            columns,
            base=config.sample_size // config.patch_size,
            interpolation=config.interpolation,
        )
        tokens = tokens + jnp.asarray(positions, config.dtype)
        embedded, time = self.time(t)
        states = self.caption_projection(prompt.embeds.astype(config.dtype))
        tokens = self.blocks(tokens, time, PromptEmbeddings(states, prompt.mask))
        return unpatchify(self.final(tokens, embedded), rows, columns, patch=config.patch_size)


MODEL = PixArt
