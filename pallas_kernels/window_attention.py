"""Window attention in XLA: query i sees keys i - window ... i + window of a raster sequence.

Work is linear in the sequence: query blocks visit only the keys that their windows reach, so that
saved work is saved on every platform. Heads are [B, S, H, D].
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import dense_attention
from pallas_kernels.useful import useful


def window_mask(tokens: int, window: int) -> np.ndarray:
    """bool[tokens, tokens], True where |i - j| <= window: the specification."""
    index = np.arange(tokens)
    return np.abs(index[:, None] - index) <= window


def window_area(tokens: int, window: int) -> int:
    """Number of (query, key) pairs of the clipped window: (2W + 1) N - W (W + 1)."""
    window = min(window, tokens - 1)
    return (2 * window + 1) * tokens - window * (window + 1)


def default_block(tokens: int, window: int) -> int:
    """Query block size: small enough to skip work, large enough for few, well-filled products."""
    return min(tokens, max(16, window // 2, -(-tokens // 128)))


def visited_area(tokens: int, window: int, block: int | None = None) -> int:
    """Number of (query, key) pairs that `window_attention` computes, masked ones included."""
    if window >= tokens - 1:
        return tokens**2
    spans = _spans(tokens, window, block or default_block(tokens, window))
    return sum((stop - start) * (last - first) for start, stop, first, last in spans)


def window_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, block: int | None = None
) -> jax.Array:
    """Softmax attention over the window alone (not a masked product of a dense softmax).

    Args:
        q, k, v: float[B, S, H, D].
        window: half width W >= 0; the window holds 2W + 1 keys, clipped at the ends.
        block: queries per block; chosen from the shape if None.

    Returns:
        float[B, S, H, D] in v's dtype. With W >= S - 1 it is `dense_attention`.

    Raises:
        ValueError: for a negative window or a block below 1.
    """
    tokens = q.shape[1]
    if window < 0:
        raise ValueError(f"window must be at least 0 (a token sees itself), got {window}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if window >= tokens - 1:
        return dense_attention(q, k, v)
    block = block or default_block(tokens, window)
    run = partial(_blockwise, window=window, block=block)
    fraction = window_area(tokens, window), visited_area(tokens, window, block)
    return useful(run, *fraction)(q, k, v)


def _spans(tokens: int, window: int, block: int) -> list[tuple[int, int, int, int]]:
    """(first query, stop, first key, stop) of every query block."""
    starts = range(0, tokens, block)
    stops = [min(start + block, tokens) for start in starts]
    return [
        (start, stop, max(0, start - window), min(tokens, stop + window))
        for start, stop in zip(starts, stops)
    ]


def _blockwise(q: jax.Array, k: jax.Array, v: jax.Array, *, window: int, block: int) -> jax.Array:
    scale = jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    q, k, v = ((q * scale).transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3))

    def attend(spans: list[tuple[int, int, int, int]]) -> jax.Array:
        """Attention of query blocks whose windows have one shape: [B, H, blocks, rows, D]."""
        start, stop, first, last = spans[0]
        rows, columns = np.arange(start, stop), np.arange(first, last)
        mask = np.abs(rows[:, None] - columns) <= window
        q_blocks = jnp.stack([q[:, :, s[0] : s[1]] for s in spans], axis=2)
        k_blocks, v_blocks = (
            jnp.stack([x[:, :, s[2] : s[3]] for s in spans], axis=2) for x in (k, v)
        )
        logits = jnp.matmul(q_blocks, k_blocks.swapaxes(-1, -2), preferred_element_type=jnp.float32)
        logits = jnp.where(mask, logits, -jnp.inf)
        peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        product = jnp.matmul(weights.astype(v.dtype), v_blocks, preferred_element_type=jnp.float32)
        return (product / total).astype(v.dtype)

    # Blocks in the middle share one shape and one mask: a single batched product.
    pieces, group = [], []
    for span in _spans(q.shape[2], window, block):
        if group and _shape(span) != _shape(group[0]):
            pieces.append(attend(group))
            group = []
        group.append(span)
    pieces.append(attend(group))
    joined = [piece.reshape(*piece.shape[:2], -1, piece.shape[-1]) for piece in pieces]
    return jnp.concatenate(joined, axis=2).transpose(0, 2, 1, 3)


def _shape(span: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """Spans with equal rows, offset and columns have equal masks."""
    start, stop, first, last = span
    return stop - start, start - first, last - first
