"""The specification of block-sparse attention: all logits, masked, in float32."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_mask import BlockMask, dense_mask


def forward(mask: BlockMask, scale: float, q: Array, k: Array, v: Array, segments: Any) -> Any:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S] of heads [B, H, S, D]."""
    group = q.shape[1] // k.shape[1]
    q32, k32, v32 = (x.astype(jnp.float32) for x in (q, k, v))
    k32, v32 = (jnp.repeat(x, group, axis=1) for x in (k32, v32))
    logits = jnp.einsum("bhsd,bhtd->bhst", q32, k32, precision="highest") * scale
    seen = dense_mask(mask)
    if segments is not None:
        of_queries, of_keys = segments
        seen &= (of_queries[:, :, None] == of_keys[:, None])[:, None]
    lse = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), axis=-1)
    weights = jnp.where(
        seen, jnp.exp(logits - jnp.where(lse == -jnp.inf, 0.0, lse)[..., None]), 0.0
    )
    return jnp.einsum("bhst,bhte->bhse", weights, v32, precision="highest").astype(v.dtype), lse
