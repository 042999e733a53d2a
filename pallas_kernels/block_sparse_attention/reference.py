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
        weights = _quantized(mask, weights, arithmetic.levels, heads.v.dtype)
    out = jnp.einsum("bhst,bhte->bhse", weights, v, precision="highest")
    return out.astype(arithmetic.out), lse


def _quantized(mask: BlockMask, weights: Array, levels: int, dtype: jax.typing.DTypeLike) -> Array:
    """Quantized weights, in units of the largest weight of a query in a block of keys."""
    blocks = pad_axis(weights, 3, mask.block_k)
    blocks = blocks.reshape(*weights.shape[:3], -1, mask.block_k)
    largest = jnp.max(blocks, axis=-1, keepdims=True)
    qvalues = weight_qvalues(blocks / jnp.where(largest > 0, largest, 1.0), levels, dtype)
    quantized = qvalues.astype(jnp.float32) * (largest / levels)
    return quantized.reshape(*weights.shape[:3], -1)[..., : weights.shape[-1]]
