"""Multi-head latent attention (MLA): keys and values of all heads are made of one short vector.

    c = norm((x W_a)[:R]),  r = (x W_a)[R:]          a token's latent, and a key of all heads
    k_h = [c W_k,h | rotary(r)],   v_h = c W_v,h     of every head h
    q_h = [n_h | rotary(s_h)]

A cache holds c and rotary(r) alone. Within a call, keys and values are expanded as above. Against a
cache, queries meet latents (the *absorbed* form), with equal results:

    q_h . k_h = (n_h W_k,h^T) . c + rotary(s_h) . rotary(r)        o_h = (sum_t p_t c_t) W_v,h

So to a cache this is attention of many heads of queries to one head of R + D channels.

Source: DeepSeek-V2, arXiv 2405.04434, section 2.1.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.attention import (
    AnyKeys,
    Attention,
    CausalCore,
    CoreHeads,
    CoreKeys,
    Positions,
    Turns,
    places,
)
from effjax.layers.linear import Linear
from effjax.layers.norms import RMSNorm
from effjax.layers.rotary import Rotary
from effjax.quant import QTensor
from effjax.targets import original


class LatentCore(CausalCore):
    """Causal attention of heads to latents.

    Queries are [B, S, H, N + D], keys [B, S, 1, R + D] and values [B, S, 1, R], before any
    rotation.

    Args:
        rotary: turns the last D channels.
        heads: H.
        rank: R, channels of a latent.
        plain: N, channels of a head that are not rotated.
        values: channels of a head's values.
        scale: of the scores.
    """

    def __init__(
        self,
        rotary: Rotary,
        *,
        heads: int,
        rank: int,
        plain: int,
        values: int,
        scale: float,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(rotary)
        self.heads, self.rank, self.plain, self.values = heads, rank, plain, values
        self.leading = rank
        self.scale = scale
        outputs = heads * (plain + values)
        options: dict[str, Any] = {"bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.kv_b = Linear(rank, outputs, role="qkv", **options)

    def within(
        self, q: CoreHeads, k: CoreKeys, v: CoreKeys, angles: Turns
    ) -> tuple[CoreHeads, AnyKeys, AnyKeys]:
        """Keys and values of every head, expanded."""
        own, shared = jnp.split(k, [self.rank], axis=-1)
        made = self.kv_b(own[:, :, 0]).reshape(*k.shape[:2], self.heads, -1)
        k, v = jnp.split(made, [self.plain], axis=-1)
        turned = self.rotary(shared, angles)
        turned = jnp.broadcast_to(turned, (*k.shape[:3], turned.shape[-1]))
        plain, rotated = jnp.split(q, [self.plain], axis=-1)
        q = jnp.concatenate([plain, self.rotary(rotated, angles)], axis=-1)
        return self._scaled(q), jnp.concatenate([k, turned], axis=-1), v

    def queries(self, q: CoreHeads, angles: Turns) -> CoreHeads:
        """Queries of latents and of the shared key, [B, S, H, R + D]."""
        plain, rotated = jnp.split(q, [self.plain], axis=-1)
        of_keys, _ = self._matrices(q.dtype)
        latent = jnp.einsum("bshn,rhn->bshr", plain, of_keys)
        return self._scaled(jnp.concatenate([latent, self.rotary(rotated, angles)], axis=-1))

    def keys(self, k: CoreKeys, angles: Turns) -> CoreKeys:
        own, shared = jnp.split(k, [self.rank], axis=-1)
        return jnp.concatenate([own, self.rotary(shared, angles)], axis=-1)

    def finish(self, o: Float[Array, "B S H R"]) -> CoreHeads:
        """Values of every head, of a mean of latents."""
        return jnp.einsum("bshr,rhv->bshv", o, self._matrices(o.dtype)[1])

    def _scaled(self, q: CoreHeads) -> CoreHeads:
        """Attention divides by the root of a head's channels: that, and the scale, go to q."""
        return q * jnp.asarray(self.scale * q.shape[-1] ** 0.5, q.dtype)

    def _matrices(self, dtype: Any) -> list[Array]:
        """W_k [R, H, N] and W_v [R, H, V]."""
        layer = original(self.kv_b)
        assert isinstance(layer, Linear)
        kernel = layer.kernel.get_value()
        whole = kernel.restore() if isinstance(kernel, QTensor) else kernel
        return jnp.split(whole.astype(dtype).reshape(self.rank, self.heads, -1), [self.plain], -1)


class LatentAttention(Attention, nnx.Module):
    """Self-attention of a decoder through latents.

    Args:
        q_rank: channels that queries are made of, None for all of a token's.
        core: options of `LatentCore`.
        bias: of the layers that read tokens, and of the last one.
    """

    kind = "causal"

    def __init__(
        self,
        hidden_size: int,
        *,
        rotary: Rotary,
        heads: int,
        rank: int,
        plain: int,
        values: int,
        q_rank: int | None,
        scale: float,
        bias: bool = False,
        norm_eps: float = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        turned = 2 * len(rotary.frequencies)
        self.heads, self.kv_heads, self.head_dim, self.rank = heads, 1, rank + turned, rank
        options: dict[str, Any] = {"role": "qkv", "param_dtype": param_dtype, "rngs": rngs}
        outputs = heads * (plain + turned)
        if q_rank is None:
            self.to_q = Linear(hidden_size, outputs, bias=False, **options)
        else:
            self.q_a = Linear(hidden_size, q_rank, bias=bias, **options)
            self.q_norm = RMSNorm(q_rank, eps=norm_eps, param_dtype=param_dtype)
            self.q_b = Linear(q_rank, outputs, bias=False, **options)
        self.q_rank = q_rank
        self.kv_a = Linear(hidden_size, rank + turned, bias=bias, **options)
        self.kv_norm = RMSNorm(rank, eps=norm_eps, param_dtype=param_dtype)
        sizes = {"heads": heads, "rank": rank, "plain": plain, "values": values, "scale": scale}
        self.core = LatentCore(rotary, **sizes, param_dtype=param_dtype, rngs=rngs)
        out = {**options, "role": "out"}
        self.to_out = Linear(heads * values, hidden_size, bias=bias, **out)

    def project(
        self, x: Float[Array, "B S C"], *others: Any
    ) -> tuple[CoreHeads, CoreKeys, CoreKeys]:
        q = self.to_q(x) if self.q_rank is None else self.q_b(self.q_norm(self.q_a(x)))
        own, shared = jnp.split(self.kv_a(x), [self.rank], axis=-1)
        own = self.kv_norm(own)
        k = jnp.concatenate([own, shared], axis=-1)
        return q.reshape(*q.shape[:2], self.heads, -1), k[:, :, None], own[:, :, None]

    def rotate(self, q: CoreHeads, k: CoreKeys, *positions: Array) -> tuple[CoreHeads, CoreKeys]:
        core = original(self.core)
        assert isinstance(core, LatentCore)
        _, angles = places(positions[0])
        return core.queries(q, angles), core.keys(k, angles)

    def merge(self, o: CoreHeads, like: Any = None) -> Float[Array, "B S C"]:
        return self.to_out(o.reshape(*o.shape[:2], -1))

    def __call__(
        self, x: Float[Array, "B S C"], positions: Positions | None
    ) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x), x, positions))
