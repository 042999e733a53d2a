"""A tiny language model whose feed-forward layers are experts: stacks of matrices, and a router."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax import testing
from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName
from effjax.forward import abstract
from effjax.generate import Reading
from effjax.layers.attention import CausalAttention
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear
from effjax.layers.norms import RMSNorm
from effjax.layers.rotary import Rotary
from effjax.layers.stack import Stack


@dataclasses.dataclass(frozen=True)
class MoEConfig(Checked):
    vocab_size: Count = 50
    hidden_size: Count = 32
    intermediate_size: Count = 64
    num_experts: Count = 4
    num_layers: Count = 2
    num_heads: Count = 4
    head_dim: Count = 8
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"


class Experts(nnx.Module):
    """sum_e p_e down_e(silu(gate_e(x)) up_e(x)): every expert sees every token, p is a softmax."""

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.experts = config.num_experts
        size, inside = config.hidden_size, config.intermediate_size
        options: dict[str, Any] = {"bias": False, "param_dtype": config.param_dtype, "rngs": rngs}
        self.router = Linear(size, self.experts, role="router", **options)
        self.gate = Linear(size, inside, role="up", stack=self.experts, **options)
        self.up = Linear(size, inside, role="up", stack=self.experts, **options)
        self.down = Linear(inside, size, role="down", stack=self.experts, **options)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        scores = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1).astype(x.dtype)
        every = jnp.broadcast_to(x, (self.experts, *x.shape))
        inside = nnx.silu(self.gate(every)) * self.up(every)
        return jnp.einsum("ebsc,bse->bsc", self.down(inside), scores)


class MoEBlock(nnx.Module):
    folds = (
        Fold(QKV, "norm1", "norm"),
        Fold(("moe.gate", "moe.up", "moe.router"), "norm2", "norm"),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
        Fold(("moe.down",), "moe.up", "linear"),
    )

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        self.norm1 = RMSNorm(size, eps=1e-5, param_dtype=dtype)
        self.attn = CausalAttention(
            size,
            heads=config.num_heads,
            head_dim=config.head_dim,
            rotary=Rotary(config.head_dim, theta=10_000.0),
            bias=False,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = RMSNorm(size, eps=1e-5, param_dtype=dtype)
        self.moe = Experts(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B S C"], positions: Int[Array, "B S"] | None
    ) -> Float[Array, "B S C"]:
        x = x + self.attn(self.norm1(x), positions)
        return x + self.moe(self.norm2(x))


class MoE(Model):
    Config = MoEConfig

    def __init__(self, config: MoEConfig, *, rngs: nnx.Rngs):
        self.config = config
        size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Param(init(rngs.params(), (config.vocab_size, size), dtype))
        self.blocks = Stack([MoEBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(size, eps=1e-5, param_dtype=dtype)
        self.lm_head = Linear(
            size, config.vocab_size, role="head", bias=False, param_dtype=dtype, rngs=rngs
        )

    def layout(self, tokens: Array, *_: Any) -> Layout:
        return Layout(grid=(0, 0, 0), text=tokens.shape[1])

    def valid_tokens(self, tokens: Array, positions: Array | None = None, *_: Any) -> Array | None:
        return None if positions is None else positions >= 0

    def __call__(
        self, tokens: Int[Array, "B S"], positions: Int[Array, "B S"] | None = None
    ) -> Float[Array, "B S V"]:
        x = self.embed_tokens.get_value()[tokens].astype(self.config.dtype)
        return self.lm_head(self.norm(self.blocks(x, positions)))


def tiny_moe(*, batch: int = 2, **options: Any) -> testing.Subject:
    """Four experts in each of two layers, and random texts of 20 tokens to read."""
    config = MoEConfig(**options)
    forward, shapes = abstract(MoE, config)
    texts = np.random.default_rng(3).integers(0, config.vocab_size, (batch, 20)).astype(np.int32)
    params = testing.random_params(shapes)
    return testing.Subject(forward, params, Reading(prompt=12, new=8), jnp.asarray(texts))
