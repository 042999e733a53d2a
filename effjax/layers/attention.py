"""Self-attention in parts that edits can replace alone: projections, core, merge."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.linear import Linear
from pallas_kernels.attention import dense_attention

Heads = Float[Array, "B S H D"]


class AttentionCore(nnx.Module):
    """softmax(q k^T / sqrt(D)) v over all keys, logits and softmax in float32."""

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        # The scope lets effjax.cost tell attention from the other products.
        with jax.named_scope("attention"):
            return dense_attention(q, k, v)


class Attention(nnx.Module):
    """Multi-head self-attention on tokens [B, S, C].

    `merge(core(*project(x)))`: a wrapper that opens the module uses these three parts.
    """

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
        self.core = AttentionCore()

    def project(self, x: Float[Array, "B S C"]) -> tuple[Heads, Heads, Heads]:
        """Queries, keys and values [B, S, H, D]."""
        shape = (*x.shape[:2], self.heads, self.head_dim)
        q, k, v = self.to_q(x), self.to_k(x), self.to_v(x)
        return q.reshape(shape), k.reshape(shape), v.reshape(shape)

    def merge(self, o: Heads) -> Float[Array, "B S C"]:
        """Join the heads and project out."""
        return self.to_out(o.reshape(*o.shape[:2], self.heads * self.head_dim))

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x)))
