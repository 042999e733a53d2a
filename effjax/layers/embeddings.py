"""Time, class, position and patch embeddings of diffusion transformers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.layers.linear import Linear, dot


def check_patches(config: Any) -> None:
    """Check the configuration of a transformer on patches of images.

    Args:
        config: with `sample_size`, `patch_size`, `in_channels`, `out_channels`, `num_heads` and
            `head_dim`.

    Raises:
        ValueError: for sides of no whole patches, output channels other than the input's or (with a
            learned variance) twice as many, and a hidden size that sin-cos positions do not divide.
    """
    if config.sample_size % config.patch_size:
        raise ValueError(
            f"sample_size must be a multiple of patch_size; "
            f"got sample_size={config.sample_size}, patch_size={config.patch_size}"
        )
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"out_channels must be in_channels ({config.in_channels}) or twice that (learned "
            f"variance); got {config.out_channels}"
        )
    if (config.num_heads * config.head_dim) % 4:
        raise ValueError(
            f"num_heads * head_dim must be a multiple of 4; got {config.num_heads} * "
            f"{config.head_dim}"
        )


def sinusoidal(
    t: Float[Array, " B"], channels: int, *, shift: float = 0.0, max_period: float = 10_000.0
) -> Float[Array, "B {channels}"]:
    """Sinusoidal embedding [cos(t f) | sin(t f)] in float32.

    f_i = exp(-ln(max_period) i / (channels / 2 - shift)); DiT in diffusers uses shift 1.
    """
    half = channels // 2
    frequencies = np.exp(-math.log(max_period) * np.arange(half) / (half - shift))
    angles = t.astype(jnp.float32)[:, None] * frequencies.astype(np.float32)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nnx.Module):
    """Sinusoid -> linear -> SiLU -> linear: times [B] to conditioning vectors [B, hidden_size]."""

    def __init__(
        self,
        hidden_size: int,
        *,
        channels: int = 256,
        shift: float = 0.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.shift = shift
        self.dtype = jnp.dtype(dtype)
        options: dict[str, Any] = {
            "role": "embedding",
            "param_dtype": param_dtype,
            "init": nnx.initializers.normal(0.02),
            "rngs": rngs,
        }
        self.fc1 = Linear(channels, hidden_size, **options)
        self.fc2 = Linear(hidden_size, hidden_size, **options)

    def __call__(self, t: Float[Array, " B"]) -> Float[Array, "B C"]:
        frequencies = sinusoidal(t, self.channels, shift=self.shift).astype(self.dtype)
        return self.fc2(nnx.silu(self.fc1(frequencies)))


class ClassEmbedding(nnx.Module):
    """A row of a table [classes + 1, hidden_size] per label; the last row is the null class."""

    def __init__(
        self,
        classes: int,
        hidden_size: int,
        *,
        dtype: jax.typing.DTypeLike = jnp.float32,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dtype = jnp.dtype(dtype)
        init = nnx.initializers.normal(0.02)
        self.embedding_table = nnx.Param(
            init(rngs.params(), (classes + 1, hidden_size), jnp.dtype(param_dtype))
        )

    def __call__(self, labels: Int[Array, " B"]) -> Float[Array, "B C"]:
        return self.embedding_table.get_value()[labels].astype(self.dtype)


def sincos_2d(
    hidden_size: int,
    rows: int,
    columns: int,
    *,
    base: int | None = None,
    interpolation: float = 1.0,
) -> np.ndarray:
    """Fixed 2-D sine-cosine position table, float32 [rows * columns, hidden_size], raster order.

    The first half of the channels encodes the column, the second half the row, each as
    [sin(p w) | cos(p w)] with w_k = 10000^(-k / (width / 4)).

    Args:
        base: grid size at which positions count in whole tokens; the grid itself if None.
        interpolation: divides positions (PixArt at 1024 pixels: 2).
    """
    if hidden_size % 4:
        raise ValueError(
            f"2-D sine-cosine positions need a width divisible by 4, got {hidden_size}"
        )
    frequencies = 10_000.0 ** -(np.arange(hidden_size // 4) / (hidden_size / 4))

    def encode(count: int) -> np.ndarray:
        positions = np.arange(count) / (count / (base or count)) / interpolation
        angles = positions[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)

    by_row = np.broadcast_to(encode(rows)[:, None], (rows, columns, hidden_size // 2))
    by_column = np.broadcast_to(encode(columns)[None], (rows, columns, hidden_size // 2))
    table = np.concatenate([by_column, by_row], axis=-1)
    return table.reshape(rows * columns, hidden_size).astype(np.float32)


class PatchEmbed(nnx.Module):
    """A convolution with stride equal to its kernel: [B, H, W, C] to tokens [B, S, C]."""

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        *,
        patch: int,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.patch = patch
        init = nnx.initializers.xavier_uniform(in_axis=(0, 1, 2), out_axis=3)
        shape = (patch, patch, in_channels, hidden_size)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((hidden_size,), param_dtype))

    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B S C"]:
        batch, height, width, channels = x.shape
        p = self.patch
        if height % p or width % p:
            raise ValueError(
                f"height and width must be multiples of the patch size {p}; got {height} x {width}"
            )
        x = x.reshape(batch, height // p, p, width // p, p, channels)
        x = x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, -1, p * p * channels)
        kernel = self.kernel.get_value()
        return dot(x, kernel.reshape(-1, kernel.shape[-1])) + self.bias.get_value().astype(x.dtype)


def unpatchify(
    tokens: Float[Array, "B S P"], rows: int, columns: int, *, patch: int
) -> Float[Array, "B H W O"]:
    """Put tokens of layout (row in patch, column in patch, channel) back into an image."""
    batch, _, size = tokens.shape
    channels = size // patch**2
    x = tokens.reshape(batch, rows, columns, patch, patch, channels).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, rows * patch, columns * patch, channels)
