"""Block-sparse attention in XLA: every block of queries against its list of key blocks.

A step is one block of queries: it gathers its key blocks and is then two products. Steps are
batched as far as their logits stay in a processor's cache. Heads are [B, H, S, D] here; letters as
in `block_sparse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask import BlockMask
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads, precision
from pallas_kernels.block_sparse_attention.online_softmax import weight_codes
from pallas_kernels.tiling import pad_axis

# Blocks that a rule is cut into: gathering is cheap, so keys come in smaller ones than queries.
BLOCKS = {"smallest": 16, "largest": 256, "keys_in": 2}

# Logits that are computed at once: 1 MiB of float32.
LOGITS_AT_ONCE = 1 << 18


class Steps(NamedTuple):
    """Blocks of queries that visit equally many key blocks; a pytree over n steps.

    Attributes:
        place: int32[n] index into B * H * M.
        blocks: int32[n, c] key blocks, ascending.
        count: int32[n] valid entries of `blocks`.
    """

    place: Any
    blocks: Any
    count: Any


Group = tuple[Steps, bool]  # steps, and whether an element of their blocks may be masked


def forward(mask: BlockMask, arithmetic: Arithmetic, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S]."""
    tiles = _Tiles(mask, arithmetic.scale, heads)
    dtype, levels = heads.v.dtype, arithmetic.levels
    values = tiles.of_keys(heads.v)

    def step(which: Steps, cut: bool) -> tuple[jax.Array, jax.Array]:
        logits = tiles.logits(which, cut)
        peak = jnp.max(logits, axis=-1, keepdims=True)
        peak = jnp.where(peak == -jnp.inf, 0.0, peak) if cut else peak
        weights = jnp.exp(logits - peak)
        total = jnp.sum(weights, axis=-1, keepdims=True)
        own = tiles.gather(values, which)
        if levels is None:
            weights = weights.astype(dtype)
        else:
            # Products of codes are exact in float32, which is faster than int8 on a CPU.
            weights, own = _coded(mask, weights, levels, dtype), own.astype(jnp.float32)
        out = _product(weights, own)
        lse = (peak + jnp.log(total))[..., 0]
        return (out / jnp.where(total == 0, 1.0, total)).astype(arithmetic.out), lse

    groups = tiles.groups()
    parts = [_run(step, mask, *group) for group in groups]
    out = [part for part, _ in parts]
    out = tiles.rows(groups, out, heads.v.shape[-1:], jnp.dtype(arithmetic.out), fill=0.0)
    return out, tiles.rows(groups, [part for _, part in parts], (), jnp.float32, fill=-jnp.inf)


def _coded(
    mask: BlockMask, weights: jax.Array, levels: int, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """Weights [block_q, c * block_k] as codes, in units of a query's largest one in each block."""
    blocks = weights.reshape(weights.shape[0], -1, mask.block_k)
    largest = jnp.max(blocks, axis=-1, keepdims=True)
    codes = weight_codes(blocks / jnp.where(largest > 0, largest, 1.0), levels, dtype)
    return (codes.astype(jnp.float32) * (largest / levels)).reshape(weights.shape)


def backward(
    mask: BlockMask,
    arithmetic: Arithmetic,
    heads: Heads,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of q, k and v, from the saved log-sum-exp, over the same blocks.

    With P = exp(logits - lse): dV = P^T dO and dS = P (dO V^T - rowsum(dO O) + d lse).
    """
    q, k, v = heads[:3]
    tiles = _Tiles(mask, arithmetic.scale, heads)
    values = tiles.of_keys(v)
    through = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1) - d_lse
    d_out, through, lse = (tiles.of_queries(x) for x in (d_out, through, lse))

    def step(which: Steps, cut: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums = lse[which.place][:, None]
        logits = tiles.logits(which, cut) - jnp.where(sums == -jnp.inf, 0.0, sums)
        weights = jnp.exp(logits)
        of_out = d_out[which.place]
        d_values = _product(weights.astype(of_out.dtype).T, of_out)
        d_weights = _product(of_out, tiles.gather(values, which).T)
        d_logits = (weights * (d_weights - through[which.place][:, None])).astype(q.dtype)
        keys = tiles.gather(tiles.k, which)
        return _product(d_logits, keys), _product(d_logits.T, tiles.q[which.place]), d_values

    groups = tiles.groups()
    parts = [_run(step, mask, *group) for group in groups]
    d_q = tiles.rows(groups, [part for part, _, _ in parts], q.shape[-1:], jnp.float32, fill=0.0)
    d_k = tiles.scatter(groups, [part for _, part, _ in parts], k)
    d_v = tiles.scatter(groups, [part for _, _, part in parts], v)
    d_q, d_k = d_q * arithmetic.scale, d_k * arithmetic.scale
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


class _Tiles:
    """q and k in blocks, and what a step needs of them."""

    def __init__(self, mask: BlockMask, scale: float, heads: Heads):
        q, k = heads.q, heads.k
        self.mask = mask
        self.batch, self.heads, self.queries = q.shape[:3]
        self.key_heads = k.shape[1]
        self.blocks = -(-self.queries // mask.block_q)
        self.scale = scale
        self.q = self.of_queries(q)
        self.k = self.of_keys(k)
        self.cut, self.by_row = heads.cut, heads.by_row
        self.segments = self.scales = None
        if heads.segments is not None:
            of_queries, of_keys = heads.segments
            self.segments = (
                pad_axis(of_queries, 1, mask.block_q),
                pad_axis(of_keys, 1, mask.block_k),
            )
        if heads.scales is not None:
            of_queries, of_keys = heads.scales
            self.scales = self.of_queries(of_queries), self.of_keys(of_keys[..., None])

    def groups(self) -> list[Group]:
        """The steps in groups, and whether an element of their blocks may be masked."""
        groups = _groups(self.mask, self.batch, self.heads)
        return [(which, cut or self.cut) for which, cut in groups]

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[B, H, S, ...] as [B H M, block_q, ...]."""
        x = pad_axis(x, 2, self.mask.block_q)
        return x.reshape(-1, self.mask.block_q, *x.shape[3:])

    def of_keys(self, x: jax.Array) -> jax.Array:
        """[B, K, T, width] as [B K, N, block_k, width]."""
        x = pad_axis(x, 2, self.mask.block_k)
        return x.reshape(self.batch * self.key_heads, -1, self.mask.block_k, x.shape[-1])

    def rows(
        self,
        groups: list[Group],
        parts: list[jax.Array],
        width: tuple[int, ...],
        dtype: jax.typing.DTypeLike,
        *,
        fill: float,
    ) -> jax.Array:
        """Results [n, block_q, *width] of the groups as [B, H, S, *width]; `fill` elsewhere."""
        lines = self.batch * self.heads
        whole = jnp.full((lines * self.blocks, self.mask.block_q, *width), fill, dtype)
        for (which, _), part in zip(groups, parts):
            everything = len(which.place) == len(whole)
            whole = part if everything else whole.at[which.place].set(part, unique_indices=True)
        return whole.reshape(self.batch, self.heads, -1, *width)[:, :, : self.queries]

    def head(self, place: Any) -> tuple[Any, Any, Any]:
        """Batch row, query head and block of queries of a step."""
        line, block = place // self.blocks, place % self.blocks
        return line // self.heads, line % self.heads, block

    def line(self, place: Any) -> Any:
        """Index into B * K of a step's keys."""
        batch, head, _ = self.head(place)
        return batch * self.key_heads + head // (self.heads // self.key_heads)

    def gather(self, tiles: jax.Array, which: Steps) -> jax.Array:
        """The key blocks of one step: [c * block_k, width]."""
        found = tiles.at[self.line(which.place), which.blocks].get(mode="promise_in_bounds")
        return found.reshape(-1, tiles.shape[-1])

    def scatter(self, groups: list[Group], parts: list[jax.Array], like: jax.Array):
        """Sum contributions [n, c * block_k, width] of steps to their keys [B, K, T, width]."""
        whole = jnp.zeros_like(self.of_keys(like), jnp.float32)
        for (which, _), part in zip(groups, parts):
            lines = self.line(which.place)[:, None]
            tiles = part.reshape(*which.blocks.shape, *whole.shape[2:])
            whole = whole.at[lines, which.blocks].add(tiles, mode="promise_in_bounds")
        whole = whole.reshape(*like.shape[:2], -1, like.shape[-1])
        return whole[:, :, : like.shape[2]]

    def logits(self, which: Steps, cut: bool) -> jax.Array:
        """float32[block_q, c * block_k] of one step, -inf where nothing is seen."""
        q, k = self.q[which.place], self.gather(self.k, which)
        if self.scales is not None:  # products of codes are exact in float32
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        logits = _product(q, k.T)
        if self.scales is None:
            logits *= self.scale
        else:
            of_queries, of_keys = self.scales
            logits *= of_queries[which.place][:, None] * self.gather(of_keys, which)[:, 0]
        return jnp.where(self.visible(which), logits, -jnp.inf) if cut else logits

    def visible(self, which: Steps) -> jax.Array:
        mask = self.mask
        batch, head, block = self.head(which.place)
        row = block * mask.block_q + jnp.arange(mask.block_q)[:, None]
        column = which.blocks[:, None] * mask.block_k + jnp.arange(mask.block_k)
        column = column.reshape(1, -1)
        table = mask.rule.parameters
        parameters = jnp.asarray(table)[head] if len(table) > 1 else table[0]
        if self.by_row is not None:
            parameters = self.by_row[batch, head]
        listed = jnp.arange(which.blocks.shape[0]) < which.count
        seen = mask.rule.visible(row, column, mask.keys, *parameters)
        seen &= jnp.repeat(listed, mask.block_k)
        if self.segments is not None:
            of_queries, of_keys = self.segments
            seen &= of_queries[batch, row] == of_keys[batch, column]
        return seen


def _product(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def _run(step: Callable[..., Any], mask: BlockMask, which: Steps, cut: bool) -> Any:
    """All steps of a group, as many at once as fit."""
    logits = mask.block_q * mask.block_k * which.blocks.shape[1]
    at_once = max(1, LOGITS_AT_ONCE // logits)
    return jax.lax.map(partial(step, cut=cut), which, batch_size=at_once)


def _groups(mask: BlockMask, batch: int, heads: int) -> list[Group]:
    """The steps of a mask, in groups of (nearly) equal length; steps without a block are left out.

    Static lists are as long as they are, rounded up to four lengths an octave so that few programs
    are compiled; lists that are made at run time all have their full width.
    """
    shape = (batch, heads, mask.index.shape[2])
    xp = np if mask.static else jnp
    index = xp.broadcast_to(mask.index, (*shape, mask.index.shape[-1]))
    index = index.reshape(-1, index.shape[-1])
    count, full = (xp.broadcast_to(x, shape).reshape(-1) for x in (mask.count, mask.full))
    place = xp.arange(len(index), dtype=np.int32)
    if not mask.static:
        return [(Steps(place, index, count), True)]
    groups: list[Group] = []
    lengths = np.minimum(_rounded(count), index.shape[-1])
    for length in np.unique(lengths[count > 0]):
        own = lengths == length
        cut = bool((full[own] < length).any())
        groups.append((Steps(place[own], index[own, :length], count[own]), cut))
    return groups


def _rounded(count: Any) -> np.ndarray:
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(count, 1))).astype(int) - 3, 0)
    return -(-count // step) * step


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands, masked and repeated blocks included."""
    blocks = sum(which.blocks.size for which, _ in _groups(mask, *heads.q.shape[:2]))
    width = heads.q.shape[-1] + heads.v.shape[-1]
    return 2 * blocks * mask.block_q * mask.block_k * width
