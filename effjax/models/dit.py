"""DiT: class-conditional diffusion transformer (Peebles & Xie, arXiv 2212.09748).

Parity target: diffusers' `DiTTransformer2DModel`. That layout stores one copy of the time and class
embedders in every block, all equal in trained checkpoints; here they stand once, at top level.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive, Share
from effjax.layers.attention import SelfAttention
from effjax.layers.embeddings import (
    ClassEmbedding,
    PatchEmbed,
    TimestepEmbedding,
    check_patches,
    sincos_2d,
    unpatchify,
)
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import LayerNorm, modulate
from effjax.layers.stack import Stack

_SIZES = {  # layers, heads, head dim (DiT, Table 1)
    "S": (12, 6, 64),
    "B": (12, 12, 64),
    "L": (24, 16, 64),
    "XL": (28, 16, 72),
}


@dataclasses.dataclass(frozen=True)
class DiTConfig(Checked):
    """Shape and numerics of a DiT.

    Attributes:
        sample_size: height and width of the (latent) image.
        patch_size: side of a patch; the sequence has (sample_size / patch_size)^2 tokens.
        in_channels: channels of the image.
        out_channels: channels of the output: twice `in_channels` if the variance is learned.
        num_layers, num_heads, head_dim: depth and hidden size; that is num_heads * head_dim.
        num_classes: labels are 0 ... num_classes - 1; num_classes itself is the null class.
        norm_eps: epsilon of the norm before the MLP (the other norms use 1e-6).
        time_shift: shift of the time sinusoid: 1 in diffusers, 0 in the original code.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    sample_size: Count = 32
    patch_size: Count = 2
    in_channels: Count = 4
    out_channels: Count = 8
    num_layers: Count = 28
    num_heads: Count = 16
    head_dim: Count = 72
    num_classes: Count = 1000
    norm_eps: Positive = 1e-5
    time_shift: Share = 1.0
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patches(self)

    @classmethod
    def preset(cls, name: str, **options: Any) -> DiTConfig:
        """Configuration by its name in the paper, such as "DiT-XL/2"."""
        size, _, patch = name.removeprefix("DiT-").partition("/")
        if size not in _SIZES or patch not in ("2", "4", "8"):
            raise ValueError(f"no preset {name!r}; there are DiT-S, -B, -L, -XL with /2, /4, /8")
        layers, heads, head_dim = _SIZES[size]
        shape = {"num_layers": layers, "num_heads": heads, "head_dim": head_dim}
        return cls(**{**shape, "patch_size": int(patch), **options})

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def grid(self) -> int:
        return self.sample_size // self.patch_size

    @property
    def tokens(self) -> int:
        return self.grid**2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Shape (height, width, channels) of what a sampler denoises."""
        return (self.sample_size, self.sample_size, self.in_channels)

    def null_condition(self, labels: Int[Array, " B"]) -> Int[Array, " B"]:
        """The unconditional input of classifier-free guidance: the null class."""
        return jnp.full_like(labels, self.num_classes)


class DiTBlock(nnx.Module):
    """Attention and MLP, each behind an adaptive norm and a gate (adaLN-Zero)."""

    folds = (
        Fold(QKV, "modulation", "adaln", 0),
        Fold(("mlp.fc1",), "modulation", "adaln", 3),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    )

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        hidden_size, param_dtype = config.hidden_size, config.param_dtype
        self.modulation = Linear(
            hidden_size,
            6 * hidden_size,
            role="modulation",
            param_dtype=param_dtype,
            init=nnx.initializers.zeros,
            rngs=rngs,
        )
        self.norm1 = LayerNorm(eps=1e-6)
        self.attn = SelfAttention(
            hidden_size,
            heads=config.num_heads,
            head_dim=config.head_dim,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.norm2 = LayerNorm(eps=config.norm_eps)
        self.mlp = MLP(hidden_size, 4 * hidden_size, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S C"]:
        shift1, scale1, gate1, shift2, scale2, gate2 = jnp.split(
            self.modulation(nnx.silu(c)), 6, axis=-1
        )
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def signal(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S C"]:
        """What the attention is called with: how much it changes tells how much outputs do."""
        shift, scale, *_ = jnp.split(self.modulation(nnx.silu(c)), 6, axis=-1)
        return modulate(self.norm1(x), shift, scale)


class FinalLayer(nnx.Module):
    """Adaptive norm and projection to patches."""

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        hidden_size, param_dtype = config.hidden_size, config.param_dtype
        zeros = nnx.initializers.zeros
        outputs = config.patch_size**2 * config.out_channels
        self.modulation = Linear(
            hidden_size,
            2 * hidden_size,
            role="modulation",
            param_dtype=param_dtype,
            init=zeros,
            rngs=rngs,
        )
        self.norm = LayerNorm(eps=1e-6)
        self.proj = Linear(
            hidden_size, outputs, role="head", param_dtype=param_dtype, init=zeros, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S P"]:
        shift, scale = jnp.split(self.modulation(nnx.silu(c)), 2, axis=-1)
        return self.proj(modulate(self.norm(x), shift, scale))


class DiT(Model):
    """The network: predicts noise or velocity from noisy images, times and class labels."""

    Config = DiTConfig

    def __init__(self, config: DiTConfig, *, rngs: nnx.Rngs):
        self.config = config
        numerics: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype}
        self.patch = PatchEmbed(
            config.in_channels,
            config.hidden_size,
            patch=config.patch_size,
            param_dtype=config.param_dtype,
            rngs=rngs,
        )
        self.time = TimestepEmbedding(
            config.hidden_size, shift=config.time_shift, **numerics, rngs=rngs
        )
        self.label = ClassEmbedding(config.num_classes, config.hidden_size, **numerics, rngs=rngs)
        self.blocks = Stack([DiTBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.final = FinalLayer(config, rngs=rngs)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        x = jax.ShapeDtypeStruct((2, *self.config.sample_shape), jnp.float32)
        t, labels = (jax.ShapeDtypeStruct((2,), dtype) for dtype in (jnp.float32, jnp.int32))
        return x, t, labels

    def layout(self, x: Array, *_: Array) -> Layout:
        rows, columns = (size // self.config.patch_size for size in x.shape[1:3])
        return Layout(grid=(1, rows, columns))

    def __call__(
        self, x: Float[Array, "B H W I"], t: Float[Array, " B"], labels: Int[Array, " B"]
    ) -> Float[Array, "B H W O"]:
        """Run the network.

        Args:
            x: image [B, sample_size, sample_size, in_channels].
            t: time in the units of the noise schedule, 0 ... 1000.
            labels: class of each image, `num_classes` for none.

        Returns:
            [B, sample_size, sample_size, out_channels] in `config.dtype`.

        Raises:
            ValueError: for another image size: DiT's positions are fixed.
        """
        config = self.config
        if tuple(x.shape[1:]) != config.sample_shape:
            raise ValueError(
                f"this DiT takes images {list(config.sample_shape)} (height, width, channels), got "
                f"{list(x.shape[1:])}. Use a checkpoint of that size, or another sample_size."
            )
        tokens = self.patch(x.astype(config.dtype))
        positions = sincos_2d(config.hidden_size, config.grid, config.grid)
        tokens = tokens + jnp.asarray(positions, config.dtype)
        c = self.time(t) + self.label(labels)
        tokens = self.final(self.blocks(tokens, c), c)
        return unpatchify(tokens, config.grid, config.grid, patch=config.patch_size)


MODEL = DiT
