"""Attention in parts that edits can replace alone: projections, core, merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.layers.linear import Linear
from pallas_kernels.attention import dense_attention

Heads = Float[Array, "B S H D"]


class AttentionCore(nnx.Module):
    """softmax(q k^T / sqrt(D)) v over all keys, logits and softmax in float32."""

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        # The scope lets effjax.cost tell attention from the other products.
        with jax.named_scope("attention"):
            return dense_attention(q, k, v)


class BiasedAttentionCore(nnx.Module):
    """softmax(scale q k^T + bias) v for short sequences, logits and softmax in float32.

    Args:
        scale: of the logits, 1 / sqrt(D) if None.
    """

    def __init__(self, *, scale: float | None = None):
        self.scale = scale

    def __call__(
        self,
        q: Heads,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        bias: Float[Array, "#B #H #S T"],
    ) -> Heads:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scaled = q * jnp.asarray(scale, q.dtype)
        logits = jnp.einsum("bshd,bthd->bhst", scaled, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
        return jnp.einsum("bhst,bthd->bshd", weights, v)


class Projections(nnx.Module):
    """The four projections of a multi-head attention: tokens to queries, keys, values and back."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_dim: int,
        bias: bool = True,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.head_dim = head_dim
        inner = heads * head_dim

        def linear(inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=bias, param_dtype=param_dtype, rngs=rngs)

        self.to_q = linear(width, inner)
        self.to_k = linear(width, inner)
        self.to_v = linear(width, inner)
        self.to_out = linear(inner, width)

    def split(self, x: Float[Array, "B S I"]) -> Heads:
        """Part the heads."""
        return x.reshape(*x.shape[:2], self.heads, self.head_dim)

    def merge(self, o: Heads) -> Float[Array, "B S C"]:
        """Join the heads and project out."""
        return self.to_out(o.reshape(*o.shape[:2], self.heads * self.head_dim))


class Attention(Projections):
    """Multi-head self-attention on tokens [B, S, C].

    `merge(core(*project(x)))`: a wrapper that opens the module uses these three parts.
    """

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **options)
        self.core = AttentionCore()

    def project(self, x: Float[Array, "B S C"]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values [B, S, H, D]."""
        return self.split(self.to_q(x)), self.split(self.to_k(x)), self.split(self.to_v(x))

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x)))


class CrossAttention(Projections):
    """Multi-head attention of tokens [B, S, C] to a text [B, T, C] with a mask [B, T].

    Padding takes part with -10000 added to its logits, as in diffusers: a text without any token
    is attended to evenly.
    """

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **options)
        self.core = BiasedAttentionCore()

    def __call__(
        self,
        x: Float[Array, "B S C"],
        text: Float[Array, "B T C"],
        mask: Bool[Array, "B T"],
    ) -> Float[Array, "B S C"]:
        q, k, v = (self.split(y) for y in (self.to_q(x), self.to_k(text), self.to_v(text)))
        bias = jnp.where(mask, 0.0, -10_000.0)[:, None, None]
        # Not "attention": cost reports of self-attention leave it out.
        with jax.named_scope("cross_attention"):
            return self.merge(self.core(q, k, v, bias))
