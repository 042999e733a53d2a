"""The specification of decode attention: whole caches, plain and in float32.

Letters as in `pallas_kernels.decode_attention`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode_attention.checks import qvalue_bits
from pallas_kernels.decode_attention.tiles import qvalue_planes


def dequantize(qvalues: Array, scale: Array, offset: Array | None = None) -> Array:
    """float32[B, T, K, D] of quantized values [B, T, K, D] and scales [B, G, K, D or 1]."""
    x = jnp.concatenate(qvalue_planes(qvalues, qvalue_bits(qvalues, "quantized values")), axis=-1)
    every = x.shape[1] // scale.shape[1]
    x = x * jnp.repeat(scale.astype(jnp.float32), every, axis=1)
    return x if offset is None else x + jnp.repeat(offset.astype(jnp.float32), every, axis=1)


def flat_dequantize(qvalues: Array, scale: Array, offset: Array | None = None) -> Array:
    """float32[B, N, D] of quantized values [B, N, D] and scales [B, N, 1]."""
    offset = None if offset is None else offset[:, :, None]
    return dequantize(qvalues[:, :, None], scale[:, :, None], offset)[:, :, 0]


def rebuild_keys(features: Array, basis: Array, positions: Array, frequencies: Array) -> Array:
    """float32[B, T, K, D] rotated keys of features [B, T, R] and a basis [R, K D]."""
    features, basis = features.astype(jnp.float32), basis.astype(jnp.float32)
    k = jnp.matmul(features, basis, precision="highest")
    k = k.reshape(*features.shape[:2], -1, 2 * frequencies.shape[0])
    angle = positions.astype(jnp.float32)[:, :, None, None] * frequencies.astype(jnp.float32)
    first, second = jnp.split(k, 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def reference(q: Array, k: Array, v: Array, lengths: Array, *, scale: float) -> tuple[Array, Array]:
    """Masked softmax over whole caches [B, T, K, D] in float32, lengths int32[B, K].

    Returns:
        Output [B, S, H, W] in q's dtype and log-sum-exp float32[B, S, H].
    """
    (batch, queries, heads, _), (tokens, key_heads) = q.shape, k.shape[1:3]
    grouped = q.reshape(batch, queries, key_heads, heads // key_heads, -1)
    q32, k32, v32 = (x.astype(jnp.float32) for x in (grouped, k, v))
    scores = jnp.einsum("bskgd,btkd->bkgst", q32, k32, precision="highest") * scale
    valid = jnp.arange(tokens) < lengths[:, :, None]  # [B, K, T]
    limits = lengths[:, :, None] - jnp.arange(queries - 1, -1, -1)  # [B, K, S]
    seen = (jnp.arange(tokens) < limits[..., None])[:, :, None]  # [B, K, 1, S, T]
    scores = jnp.where(seen, scores, -jnp.inf)
    log_sum_exp = jax.nn.logsumexp(scores, axis=-1)  # [B, K, G, S]
    peak = jnp.where(jnp.isfinite(log_sum_exp), log_sum_exp, 0.0)
    weights = jnp.exp(scores - peak[..., None])
    v32 = jnp.where(valid.transpose(0, 2, 1)[..., None], v32, 0.0)
    output = jnp.einsum("bkgst,btkd->bskgd", weights, v32, precision="highest")
    log_sum_exp = log_sum_exp.transpose(0, 3, 1, 2).reshape(batch, queries, heads)
    return output.reshape(batch, queries, heads, -1).astype(q.dtype), log_sum_exp


def flat_reference(
    q: Array,
    k: Array,
    v: Array,
    lengths: Array,
    *,
    starts: tuple[int, ...],
    capacities: tuple[int, ...],
    scale: float,
) -> tuple[Array, Array]:
    """`reference` for each head and its slots of flat caches [B, N, D]."""
    group = q.shape[2] // len(starts)
    results = []
    for h, (start, capacity) in enumerate(zip(starts, capacities)):
        own = slice(start, start + capacity)
        heads = q[:, :, h * group : (h + 1) * group]
        caches = k[:, own, None], v[:, own, None]
        results.append(reference(heads, *caches, lengths[:, h : h + 1], scale=scale))
    outputs, log_sum_exps = zip(*results)
    return jnp.concatenate(outputs, axis=2), jnp.concatenate(log_sum_exps, axis=2)
