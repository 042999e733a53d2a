"""A tiny joint transformer: image and text tokens in two streams that attend to all of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax import testing
from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName
from effjax.forward import abstract
from effjax.guidance import Guidance
from effjax.layers.attention import JointAttention
from effjax.layers.embeddings import PatchEmbed, TimestepEmbedding, sincos_2d, unpatchify
from effjax.layers.folding import Fold
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import LayerNorm, modulate
from effjax.layers.stack import Stack
from effjax.models.pixart import PromptEmbeddings
from effjax.samplers import FlowMatchEuler, Sampler

STREAMS = ("image", "text")
Streams = Mapping[str, Float[Array, "B _ C"]]


@dataclasses.dataclass(frozen=True)
class JointConfig(Checked):
    sample_size: Count = 16
    patch_size: Count = 2
    in_channels: Count = 4
    out_channels: Count = 4
    num_layers: Count = 2
    num_heads: Count = 2
    head_dim: Count = 8
    caption_channels: Count = 12
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    @property
    def hidden_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def tokens(self) -> int:
        return (self.sample_size // self.patch_size) ** 2

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        return (self.sample_size, self.sample_size, self.in_channels)


class JointBlock(nnx.Module):
    folds = tuple(
        fold
        for name in STREAMS
        for fold in (
            Fold(
                tuple(f"attn.{name}.to_{part}" for part in "qkv"),
                f"modulation_{name}",
                "adaln",
                0,
            ),
            Fold((f"mlp_{name}.fc1",), f"modulation_{name}", "adaln", 3),
        )
    )

    def __init__(self, config: JointConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, config.param_dtype
        for name in STREAMS:
            modulation = Linear(size, 6 * size, role="modulation", param_dtype=dtype, rngs=rngs)
            setattr(self, f"modulation_{name}", modulation)
            mlp = MLP(size, 4 * size, param_dtype=dtype, rngs=rngs)
            setattr(self, f"mlp_{name}", mlp)
        self.norm = LayerNorm(eps=1e-6)
        self.attn = JointAttention(
            size,
            streams=STREAMS,
            heads=config.num_heads,
            head_dim=config.head_dim,
            norm_eps=1e-6,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Streams, c: Float[Array, "B C"]) -> dict[str, Array]:
        parts = {
            name: jnp.split(getattr(self, f"modulation_{name}")(nnx.silu(c)), 6, axis=-1)
            for name in STREAMS
        }
        attended = self.attn({n: modulate(self.norm(x[n]), *parts[n][:2]) for n in STREAMS})
        found = {}
        for name in STREAMS:
            _, _, gate1, shift2, scale2, gate2 = parts[name]
            y = x[name] + gate1[:, None] * attended[name]
            mlp = getattr(self, f"mlp_{name}")
            found[name] = y + gate2[:, None] * mlp(modulate(self.norm(y), shift2, scale2))
        return found


class Joint(Model):
    Config = JointConfig

    def __init__(self, config: JointConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, dtype = config.hidden_size, config.param_dtype
        self.patch = PatchEmbed(
            config.in_channels, size, patch=config.patch_size, param_dtype=dtype, rngs=rngs
        )
        self.time = TimestepEmbedding(size, dtype=config.dtype, param_dtype=dtype, rngs=rngs)
        self.caption_projection = Linear(
            config.caption_channels, size, role="embedding", param_dtype=dtype, rngs=rngs
        )
        blocks = [JointBlock(config, rngs=rngs) for _ in range(config.num_layers)]
        self.blocks = Stack(blocks, streams=STREAMS)
        outputs = config.patch_size**2 * config.out_channels
        self.norm = LayerNorm(eps=1e-6)
        self.proj = Linear(size, outputs, role="head", param_dtype=dtype, rngs=rngs)

    def layout(self, x: Array, t: Array, prompt: PromptEmbeddings, *_: Any) -> Layout:
        rows, columns = (side // self.config.patch_size for side in x.shape[1:3])
        return Layout(grid=(1, rows, columns), text=prompt[0].shape[1])

    def __call__(
        self, x: Float[Array, "B H W I"], t: Float[Array, " B"], prompt: PromptEmbeddings
    ) -> Float[Array, "B H W O"]:
        config = self.config
        rows, columns = (side // config.patch_size for side in x.shape[1:3])
        positions = jnp.asarray(sincos_2d(config.hidden_size, rows, columns), config.dtype)
        tokens = {
            "image": self.patch(x.astype(config.dtype)) + positions,
            "text": self.caption_projection(prompt[0].astype(config.dtype)),
        }
        image = self.norm(self.blocks(tokens, self.time(t))["image"])
        return unpatchify(self.proj(image), rows, columns, patch=config.patch_size)


def tiny_joint(*, steps: int = 4, batch: int = 2, **options: Any) -> testing.Subject:
    """The joint transformer on 16 x 16 images (64 tokens) and texts of five tokens."""
    config = JointConfig(**options)
    forward, shapes = abstract(Joint, config)
    order = Guidance(("uncond", "cond"))
    sampler = Sampler(FlowMatchEuler(steps=steps), guidance=2.0, arrangement=order)
    embeds = np.random.default_rng(2).standard_normal((2, batch, 5, config.caption_channels))
    cond, uncond = (
        PromptEmbeddings(jnp.asarray(each, jnp.float32), jnp.ones((batch, 5), bool))
        for each in embeds
    )
    return testing.Subject(forward, testing.random_params(shapes), sampler, cond, uncond)
