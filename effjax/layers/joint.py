"""Blocks in which image and text attend to each other: two streams, or one of both (MM-DiT).

A dual block has layers of its own for each stream and one attention for all tokens (arXiv
2403.03206). A single block has the tokens of both streams in one sequence, and runs its
feed-forward layer beside its attention (FLUX; arXiv 2302.05442).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.attention import Heads, JointAttention, KeyHeads, SelfAttention
from effjax.layers.chunks import TokenParts
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP, gelu_tanh
from effjax.layers.norms import LayerNorm, modulate

Streams = Mapping[str, Float[Array, "B _ C"]]
Angles = Float[Array, "S R"]  # cosines or sines of the rotations of S tokens, R = D / 2


class PooledEmbeddings(NamedTuple):
    """What text encoders make of prompts for joint transformers.

    Attributes:
        embeds: one vector for each token.
        pooled: one vector for each prompt.
        guidance: the scale that a distilled model is told, None for models that take none.
    """

    embeds: Float[Array, "B T E"]
    pooled: Float[Array, "B P"]
    guidance: Float[Array, " B"] | None = None


jax.export.register_namedtuple_serialization(
    PooledEmbeddings, serialized_name="effjax.PooledEmbeddings"
)


def axial_angles(
    axes: Sequence[int], positions: np.ndarray, *, theta: float = 10_000.0
) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines of rotary positions with several axes, float32 [S, R].

    Args:
        axes: channels of a head that each axis turns; their sum is D = 2 R.
        positions: [S, axes].
        theta: base of the frequencies theta^(-2 i / channels).
    """
    parts = []
    for axis, channels in enumerate(axes):
        frequencies = theta ** (-np.arange(0, channels, 2, dtype=np.float64) / channels)
        parts.append(positions[:, axis : axis + 1].astype(np.float64) * frequencies)
    angles = np.concatenate(parts, axis=1)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate_pairs(x: Heads, cos: Angles, sin: Angles) -> Heads:
    """Turn adjacent channels (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin), in float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = cos[None, :, None], sin[None, :, None]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


class RotatedJointAttention(JointAttention):
    """Joint attention whose tokens are rotated by the angles that it is called with."""

    def rotate(self, q: Heads, k: KeyHeads, *positions: Array) -> tuple[Heads, KeyHeads]:
        return rotate_pairs(q, *positions), rotate_pairs(k, *positions)


class SingleAttention(SelfAttention):
    """Attention of a sequence that holds all streams, rotated."""

    kind = "joint"

    def rotate(self, q: Heads, k: KeyHeads, *positions: Array) -> tuple[Heads, KeyHeads]:
        return rotate_pairs(q, *positions), rotate_pairs(k, *positions)


class StreamLayers(nnx.Module):
    """What one stream of a dual block has for itself: modulation, norm and feed-forward layer.

    Args:
        parts: shifts, scales and gates that the modulation makes; 2 for a stream that ends in the
            attention and has no more layers. Its modulation has another name, as checkpoints have
            its scale first.
    """

    def __init__(
        self, size: int, *, parts: int = 6, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.parts = parts
        modulation = Linear(size, parts * size, role="modulation", **options)
        setattr(self, "last_modulation" if parts == 2 else "modulation", modulation)
        self.norm = LayerNorm(eps=1e-6)
        self.mlp = None if parts == 2 else MLP(size, 4 * size, **options)

    def modulated(self, c: Float[Array, "B C"]) -> list[Float[Array, "B C"]]:
        """Shifts, scales and gates of a condition."""
        modulation = getattr(self, "last_modulation" if self.parts == 2 else "modulation")
        return jnp.split(modulation(nnx.silu(c)), self.parts, axis=-1)


def _folds(stream: str, parts: int) -> tuple[Fold, ...]:
    """Where factors fold in a stream."""

    def qkv(attention: str) -> tuple[str, ...]:
        return tuple(f"{attention}.to_{part}" for part in "qkv")

    source, own = f"{stream}.modulation", f"attn.{stream}"
    if parts == 2:
        return (Fold(qkv(own), f"{stream}.last_modulation", "adaln", 0, parts),)
    second = (
        Fold(qkv("attn2"), source, "adaln", 6, parts),
        Fold(("attn2.to_out",), "attn2.to_v", "linear"),
    )
    return (
        Fold(qkv(own), source, "adaln", 0, parts),
        Fold((f"{stream}.mlp.fc1",), source, "adaln", 3, parts),
        Fold((f"{own}.to_out",), f"{own}.to_v", "linear"),
        *(second if parts == 9 else ()),
    )


class DualBlock(nnx.Module):
    """A block of two streams, image and text.

    Args:
        streams: their order in the sequence that they attend as.
        norm_eps: of the RMS norms of queries' and keys' heads; None for no norms.
        rotated: whether the attention is called with angles.
        text_ends: whether the text ends in this block's attention and comes out as it went in.
        dual: whether the image has a second attention, to itself (SD3.5-medium).
    """

    def __init__(
        self,
        size: int,
        *,
        heads: int,
        head_dim: int,
        streams: tuple[str, str] = ("image", "text"),
        norm_eps: float | None = None,
        rotated: bool = False,
        text_ends: bool = False,
        dual: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        attention: dict[str, Any] = {"heads": heads, "head_dim": head_dim, "norm_eps": norm_eps}
        self.image = StreamLayers(size, parts=9 if dual else 6, **options)
        self.text = StreamLayers(size, parts=2 if text_ends else 6, **options)
        self.folds = (*_folds("image", self.image.parts), *_folds("text", self.text.parts))
        kind = RotatedJointAttention if rotated else JointAttention
        silent = ("text",) if text_ends else ()
        self.attn = kind(size, streams=streams, silent=silent, **attention, **options)
        self.attn2 = SelfAttention(size, **attention, **options) if dual else None

    def __call__(self, x: Streams, c: Float[Array, "B C"], *angles: Angles) -> dict[str, Array]:
        image, text = self.image.modulated(c), self.text.modulated(c)
        normed = self.image.norm(x["image"])
        context = modulate(self.text.norm(x["text"]), *text[:2])
        attended = self.attn({"image": modulate(normed, *image[:2]), "text": context}, *angles)
        out = x["image"] + image[2][:, None] * attended["image"]
        if self.attn2 is not None:
            shift, scale, gate = image[6:]
            out = out + gate[:, None] * self.attn2(modulate(normed, shift, scale))
        found = {"image": _feed_forward(self.image, out, image), "text": x["text"]}
        if self.text.mlp is not None:
            context = x["text"] + text[2][:, None] * attended["text"]
            found["text"] = _feed_forward(self.text, context, text)
        return found

    def signal(self, x: Streams, c: Float[Array, "B C"], *angles: Angles) -> Float[Array, "B N C"]:
        """What the attention is called with for the image: its change tells that of outputs."""
        return modulate(self.image.norm(x["image"]), *self.image.modulated(c)[:2])


def _feed_forward(
    layers: StreamLayers, x: Float[Array, "B S C"], parts: Sequence[Float[Array, "B C"]]
) -> Float[Array, "B S C"]:
    shift, scale, gate = parts[3:6]
    assert layers.mlp is not None
    return x + gate[:, None] * layers.mlp(modulate(layers.norm(x), shift, scale))


class SingleBlock(TokenParts):
    """A block of one sequence whose attention and feed-forward layer read the same tokens.

    The output layer of both is kept in its two parts, `attn.to_out` (without a bias) and `down`:
    y = attn + down(gelu(up(h))), where diffusers has one matrix on their concatenation.
    """

    folds = (
        Fold((*QKV, "up"), "modulation", "adaln", 0, 3),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    )

    def __init__(
        self,
        size: int,
        *,
        heads: int,
        head_dim: int,
        norm_eps: float | None = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.modulation = Linear(size, 3 * size, role="modulation", **options)
        self.norm = LayerNorm(eps=1e-6)
        self.attn = SingleAttention(
            size, heads=heads, head_dim=head_dim, norm_eps=norm_eps, out_bias=False, **options
        )
        self.up = Linear(size, 4 * size, role="up", **options)
        self.down = Linear(4 * size, size, role="down", **options)

    def __call__(
        self, x: Float[Array, "B S C"], c: Float[Array, "B C"], *angles: Angles
    ) -> Float[Array, "B S C"]:
        shift, scale, gate = jnp.split(self.modulation(nnx.silu(c)), 3, axis=-1)
        h = modulate(self.norm(x), shift, scale)
        beside = self.by_tokens(self._feed_forward, h, self.up, self.down)
        return x + gate[:, None] * (self.attn(h, *angles) + beside)

    def _feed_forward(self, h: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.down(gelu_tanh(self.up(h).astype(jnp.float32)).astype(h.dtype))


class FinalLayer(nnx.Module):
    """Adaptive norm and projection to patches."""

    def __init__(
        self, size: int, outputs: int, *, param_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.modulation = Linear(size, 2 * size, role="modulation", **options)
        self.norm = LayerNorm(eps=1e-6)
        self.proj = Linear(size, outputs, role="head", **options)

    def __call__(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S P"]:
        shift, scale = jnp.split(self.modulation(nnx.silu(c)), 2, axis=-1)
        return self.proj(modulate(self.norm(x), shift, scale))


def sequence(streams: Mapping[str, Array], order: Sequence[str]) -> Array:
    """Tokens of streams as one sequence [B, S, C]."""
    return jnp.concatenate([streams[name] for name in order], axis=1)
