"""Attention in parts that patches can replace alone: projections, core, merge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.layers.linear import Linear
from effjax.layers.norms import RMSNorm
from effjax.layers.rotary import Rotary
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Causal, Rule, SinkLocal
from pallas_kernels.block_sparse_attention import block_sparse_attention

Heads = Float[Array, "B S H D"]
KeyHeads = Float[Array, "B S K D"]
Positions = Int[Array, "B S"]


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
        out = jnp.einsum("bhst,bthd->bshd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(v.dtype)


class Projections(nnx.Module):
    """The four projections of a multi-head attention: tokens to queries, keys, values and back.

    Args:
        kv_heads: heads of keys and values, `heads` if None; query head h reads head
            h // (heads / kv_heads) of them.
        bias, out_bias: of the first three projections, and of the last; None is as `bias`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.head_dim = head_dim

        def linear(inputs: int, outputs: int, bias: bool = bias) -> Linear:
            return Linear(inputs, outputs, bias=bias, param_dtype=param_dtype, rngs=rngs)

        self.to_q = linear(hidden_size, heads * head_dim)
        self.to_k = linear(hidden_size, self.kv_heads * head_dim)
        self.to_v = linear(hidden_size, self.kv_heads * head_dim)
        self.to_out = linear(heads * head_dim, hidden_size, bias if out_bias is None else out_bias)

    def split(self, x: Float[Array, "B S I"]) -> Float[Array, "B S K D"]:
        """Part the heads."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def merge(self, o: Heads) -> Float[Array, "B S C"]:
        """Join the heads and project out."""
        return self.to_out(o.reshape(*o.shape[:2], -1))


class Attention(Projections):
    """Multi-head self-attention on tokens [B, S, C].

    `merge(core(*project(x)))`: a wrapper that opens the module uses these three parts.
    """

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, **options)
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

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, **options)
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


class CausalCore(nnx.Module):
    """Rotary attention of every token to itself and the tokens before it.

    The place of a KV cache: a cache wraps it, gets all that it gets, and remembers keys and values
    between calls. Keys come in before their rotation, and with the tokens they are made of, because
    some caches keep those.

    Args:
        rotary: turns queries and keys.
        window: how many of the last tokens a query sees, its own included; None for all.
    """

    def __init__(self, rotary: Rotary, *, window: int | None = None):
        self.rotary = rotary
        self.window = window

    @property
    def rule(self) -> Rule:
        """What a query sees, as kernels read it."""
        return Causal() if self.window is None else SinkLocal(sinks=0, local=self.window)

    def __call__(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        """Attend within the call.

        Args:
            q, k, v: heads before their rotation.
            x: the tokens they were projected from; not used here.
            positions: of the tokens, rising along a row; -1 is padding, which nobody attends to and
                whose output means nothing. None for 0, 1, 2, ... in every row, without padding.
        """
        segments = None
        if positions is None:
            turns = jnp.arange(q.shape[1])[None]
        else:
            turns, valid = positions, (positions >= 0).astype(jnp.int32)
            segments = valid, valid
        with jax.named_scope("attention"):
            q, k = self.rotary(q, turns), self.rotary(k, turns)
            return block_sparse_attention(q, k, v, self.rule, segments=segments)


class CausalAttention(Projections):
    """Self-attention of a decoder: rotary positions, grouped keys, optionally normalized heads.

    Args:
        rotary, window: see `CausalCore`.
        norm_eps: of the RMS norms of queries' and keys' heads (Qwen3); None for no norms.
        options: of `Projections`.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        rotary: Rotary,
        window: int | None = None,
        norm_eps: float | None = None,
        **options: Any,
    ):
        super().__init__(hidden_size, **options)
        self.q_norm, self.k_norm = (
            None
            if norm_eps is None
            else RMSNorm(self.head_dim, eps=norm_eps, param_dtype=options["param_dtype"])
            for _ in range(2)
        )
        self.core = CausalCore(rotary, window=window)

    def project(self, x: Float[Array, "B S C"]) -> tuple[Heads, KeyHeads, KeyHeads]:
        """Queries, keys and values before their rotation."""
        q, k, v = (self.split(to(x)) for to in (self.to_q, self.to_k, self.to_v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def __call__(
        self, x: Float[Array, "B S C"], positions: Positions | None
    ) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x), x, positions))
