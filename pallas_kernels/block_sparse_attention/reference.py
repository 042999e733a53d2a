"""The specification of block-sparse attention: all logits, masked, in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_mask import BlockMask, dense_mask
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.online_softmax import weight_qvalues
from pallas_kernels.tiling import pad_axis


def forward(mask: BlockMask, arithmetic: Arithmetic, heads: Heads) -> tuple[Array, Array]:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S] of heads [B, H, S, D]."""
    group = heads.q.shape[1] // heads.k.shape[1]
    q, k, v = (x.astype(jnp.float32) for x in heads[:3])
    k, v = (jnp.repeat(x, group, axis=1) for x in (k, v))
    logits = jnp.einsum("bhsd,bhtd->bhst", q, k, precision="highest") * arithmetic.scale
    if heads.scales is not None:
        of_queries, of_keys = heads.scales
        logits *= of_queries[..., None] * jnp.repeat(of_keys, group, axis=1)[:, :, None]
    seen = dense_mask(mask)
    if heads.by_row is not None:
        row, column = jnp.arange(mask.queries)[:, None], jnp.arange(mask.keys)
        parameters = jnp.moveaxis(heads.by_row, 2, 0)[..., None, None]
        seen &= mask.rule.visible(row, column, mask.keys, *parameters)
    if heads.segments is not None:
        of_queries, of_keys = heads.segments
        seen &= (of_queries[:, :, None] == of_keys[:, None])[:, None]
    logits = jnp.where(seen, logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    finite = jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]
    weights = jnp.exp(logits - finite)
    if arithmetic.levels is not None:
        weights = _quantized(mask, weights, logits, finite, arithmetic, heads.v.dtype)
    out = jnp.einsum("bhst,bhte->bhse", weights, v, precision="highest")
    return out.astype(arithmetic.out), lse


def _quantized(
    mask: BlockMask,
    weights: Array,
    logits: Array,
    peak: Array,
    arithmetic: Arithmetic,
    dtype: jax.typing.DTypeLike,
) -> Array:
    """Quantized weights exp(logits - peak), in the units of the arithmetic.

    But for "query", units are of the softmax so far: exp(logits - largest one of the query in this
    block and the ones before it).
    """
    levels = arithmetic.levels
    assert levels is not None
    shape = (*weights.shape[:3], -1, mask.block_k)
    blocks = pad_axis(weights, 3, mask.block_k).reshape(shape)
    factor = jnp.float32(1.0)
    if arithmetic.unit != "query":
        logits = jnp.pad(
            logits, [(0, 0)] * 3 + [(0, -logits.shape[3] % mask.block_k)], constant_values=-jnp.inf
        )
        logits = logits.reshape(shape)
        so_far = jax.lax.cummax(jnp.max(logits, axis=-1, keepdims=True), axis=3)
        so_far = jnp.maximum(so_far, jnp.finfo(jnp.float32).min)
        blocks, factor = jnp.exp(logits - so_far), jnp.exp(so_far - peak[..., None])
    largest = jnp.max(blocks, axis=-1, keepdims=True)
    if arithmetic.unit == "tile":
        tiles = pad_axis(largest, 2, mask.block_q)
        tiles = tiles.reshape(*largest.shape[:2], -1, mask.block_q, *largest.shape[3:])
        tiles = jnp.repeat(jnp.max(tiles, axis=3), mask.block_q, axis=2)
        largest = tiles[:, :, : weights.shape[2]]
    elif arithmetic.unit == "one":
        largest = jnp.ones_like(largest)
    qvalues = weight_qvalues(blocks / jnp.where(largest > 0, largest, 1.0), levels, dtype)
    quantized = qvalues.astype(jnp.float32) * (largest * factor / levels)
    return quantized.reshape(*weights.shape[:3], -1)[..., : weights.shape[-1]]
