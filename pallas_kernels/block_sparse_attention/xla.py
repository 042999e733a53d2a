"""Block-sparse attention in XLA: every block of queries against its list of key blocks.

A step is two products. Where all heads share their lists, it is one block of queries of several
heads, and their keys are one slice if the list is a run of blocks; else steps gather their key
blocks and are batched. As many logits are made at once as stay in a processor's cache. Heads are
[B, H, S, D] here; letters as in `block_sparse_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask import EVERYTHING, BlockMask, block_mask
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads, precision
from pallas_kernels.block_sparse_attention.online_softmax import weight_qvalues
from pallas_kernels.block_sparse_attention.steps import (
    Group,
    Steps,
    as_run,
    in_groups,
    runs,
    shares_lists,
)
from pallas_kernels.tiling import pad_axis

# Logits that are computed at once: 1 MiB of float32.
LOGITS_AT_ONCE = 1 << 18


def blocks(width: int) -> dict[str, Any]:
    """What a rule is cut into, see `choose_block`, for heads `width` wide."""
    # Keys come in smaller blocks than queries, so that fewer are cut.
    return {"smallest": 16, "largest": 256, "keys_in": 2, "worthwhile": 64, "by_band": True}


Kind = tuple[tuple[int, ...], Any, float]  # an array of results: width, dtype, value without keys


def forward(mask: BlockMask, arithmetic: Arithmetic, heads: Heads) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, E] and log-sum-exp float32[B, H, S]."""
    tiles = (_SharedTiles if shares_lists(mask) else _Tiles)(mask, arithmetic.scale, heads)
    values = tiles.of_keys(heads.v)

    def step(which: Steps, group: Group) -> tuple[jax.Array, jax.Array]:
        own = tiles.keys(values, which, group)
        quantized = None
        if arithmetic.levels is not None:
            rows = which.block * mask.block_q + jnp.arange(mask.block_q) < mask.queries
            quantized = partial(_quantized, mask, arithmetic, heads.v.dtype, rows)
            # Products of quantized values are exact in float32, and faster on a CPU.
            own = own.astype(jnp.float32)
        return attend(
            tiles.logits(which, group), own, arithmetic.out, cut=group.cut, quantized=quantized
        )

    out: Kind = (heads.v.shape[-1:], jnp.dtype(arithmetic.out), 0.0)
    made, lse = tiles.rows(step, (out, ((), jnp.float32, -jnp.inf)))
    return made, lse


def forward_with_rest(
    mask: BlockMask, arithmetic: Arithmetic, heads: Heads
) -> tuple[jax.Array, jax.Array]:
    """Output [B, H, S, E] with every key seen, and with those of a mask that has `runs`.

    For short sequences: a step is all queries of several heads. Logits are made once, and what a
    block of queries sees is a slice of them.
    """
    queries, keys = mask.queries, mask.keys
    tiles = _SharedTiles(block_mask(EVERYTHING, queries, keys, block=(queries, keys)), 1.0, heads)
    values = tiles.of_keys(heads.v)
    parts = []
    for first, run in zip(range(0, queries, mask.block_q), runs(mask) or ()):
        rows = slice(first, min(first + mask.block_q, queries))
        row, column = np.arange(rows.start, rows.stop), np.arange(run.start, run.stop)
        seen = mask.rule.visible(row[:, None], column, keys, *mask.rule.parameters[0])
        parts.append((rows, run, seen))

    def step(which: Steps, group: Group) -> tuple[jax.Array, jax.Array]:
        q = tiles.own(tiles.q, which, group)
        k, v = (tiles.keys(x, which, group) for x in (tiles.k, values))
        logits = scores(q * jnp.asarray(arithmetic.scale, q.dtype), k)
        whole, _ = attend(logits, v, arithmetic.out)
        logits = logits.reshape(len(q), -1, queries, keys)
        shown = []
        for rows, run, seen in parts:
            own = hide(logits[:, :, rows, run], seen)
            shown.append(attend(own, v[:, None, run], arithmetic.out, cut=True)[0])
        return whole, jnp.concatenate(shown, axis=2).reshape(whole.shape)

    kind: Kind = (heads.v.shape[-1:], jnp.dtype(arithmetic.out), 0.0)
    whole, shown = tiles.rows(step, (kind, kind))
    return whole, shown


def attend(
    logits: jax.Array,
    values: jax.Array,
    out: str,
    *,
    cut: bool = False,
    quantized: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Softmax of logits [..., rows, keys] times values [..., keys, E], and the log-sum-exp.

    Exponentials are normalized after the product, as flash attention does: one pass less over them.

    Args:
        logits: float32, -inf where nothing is seen.
        values: of these keys.
        out: name of the output's dtype.
        cut: whether a row may see nothing.
        quantized: makes quantized values of (weights, logits, largest logit); None for weights in
            the values' dtype.
    """
    peak = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    # Bounds, not selections: XLA fuses them with the products on a CPU. The peak itself counts 1.
    peak = jnp.maximum(peak, jnp.finfo(jnp.float32).min) if cut else peak
    weights = jnp.exp(logits - peak)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    lse = (peak + jnp.log(total))[..., 0]
    total = jnp.maximum(total, 1.0) if cut else total
    if quantized is None:
        weights = weights.astype(values.dtype)
    else:
        weights = quantized(weights, logits, peak)
    return (product(weights, values) / total).astype(out), lse


def attend_to_parts(parts: Sequence[tuple[jax.Array, jax.Array]], out: str) -> jax.Array:
    """Softmax of the logits of several parts of the keys, times their values.

    Args:
        parts: logits [..., rows, keys] and values [..., keys, E], as in `attend`; a row must see
            something in one of them.
        out: name of the output's dtype.
    """
    peaks = [jnp.max(logits, axis=-1, keepdims=True) for logits, _ in parts]
    peak = jax.lax.stop_gradient(reduce(jnp.maximum, peaks))
    weights = [jnp.exp(logits - peak) for logits, _ in parts]
    total = reduce(jnp.add, [jnp.sum(each, axis=-1, keepdims=True) for each in weights])
    made = [product(each.astype(v.dtype), v) for each, (_, v) in zip(weights, parts, strict=True)]
    return (reduce(jnp.add, made) / total).astype(out)


def hide(logits: jax.Array, seen: Any) -> jax.Array:
    """Logits, -inf where `seen`, which broadcasts, is False."""
    if seen.ndim < logits.ndim:
        return jnp.minimum(logits, jnp.where(seen, jnp.inf, -jnp.inf))
    return jnp.where(seen, logits, -jnp.inf)


def _quantized(
    mask: BlockMask,
    arithmetic: Arithmetic,
    dtype: jax.typing.DTypeLike,
    exists: jax.Array,
    weights: jax.Array,
    logits: jax.Array,
    peak: jax.Array,
) -> jax.Array:
    """Weights [..., rows, c * block_k] as values, in the units of the arithmetic.

    Args:
        exists: bool[block_q], which queries of the block there are.
        weights, logits, peak: weights are exp(logits - peak).
    """
    levels = arithmetic.levels
    assert levels is not None
    shape = (*weights.shape[:-1], -1, mask.block_k)
    blocks, factor = weights.reshape(shape), jnp.float32(1.0)
    if arithmetic.unit != "query":  # of the softmax so far, as kernels make it
        by_block = logits.reshape(shape)
        so_far = jnp.max(by_block, axis=-1, keepdims=True)
        so_far = jax.lax.cummax(so_far, axis=so_far.ndim - 2)
        so_far = jnp.maximum(so_far, jnp.finfo(jnp.float32).min)
        blocks, factor = jnp.exp(by_block - so_far), jnp.exp(so_far - peak[..., None])
    largest = jnp.max(blocks, axis=-1, keepdims=True)
    if arithmetic.unit == "tile":  # rows are those of one block of queries, of several heads
        tiles = largest.reshape(*shape[:-3], -1, mask.block_q, *largest.shape[-2:])
        tiles = jnp.max(jnp.where(exists[:, None, None], tiles, 0.0), axis=-3, keepdims=True)
        tiles = jnp.broadcast_to(tiles, (*tiles.shape[:-3], mask.block_q, *tiles.shape[-2:]))
        largest = tiles.reshape(largest.shape)
    elif arithmetic.unit == "one":
        largest = jnp.ones_like(largest)
    qvalues = weight_qvalues(blocks / jnp.where(largest > 0, largest, 1.0), levels, dtype)
    return (qvalues.astype(jnp.float32) * (largest * factor / levels)).reshape(weights.shape)


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

    def step(which: Steps, group: Group) -> tuple[jax.Array, jax.Array, jax.Array]:
        sums = tiles.own(lse, which, group)[:, None]
        logits = tiles.logits(which, group) - jnp.where(sums == -jnp.inf, 0.0, sums)
        weights = jnp.exp(logits)
        of_out = tiles.own(d_out, which, group)
        of_logits = tiles.own(through, which, group)[:, None]
        d_values = product(weights.astype(of_out.dtype).T, of_out)
        d_weights = product(of_out, tiles.keys(values, which, group).T)
        d_logits = (weights * (d_weights - of_logits)).astype(q.dtype)
        own, keys = tiles.own(tiles.q, which, group), tiles.keys(tiles.k, which, group)
        return product(d_logits, keys), product(d_logits.T, own), d_values

    groups = tiles.groups()
    parts = [tiles.run(step, group) for group in groups]
    d_q = tiles.placed(groups, [part for part, _, _ in parts], (q.shape[-1:], jnp.float32, 0.0))
    d_k = tiles.scatter(groups, [part for _, part, _ in parts], k)
    d_v = tiles.scatter(groups, [part for _, _, part in parts], v)
    d_q, d_k = d_q * arithmetic.scale, d_k * arithmetic.scale
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype)


class _Tiles:
    """q and k in blocks, and what a step needs of them, where each head has its own lists."""

    repeats = 1  # how often a step has its block of queries, each time of another head

    def __init__(self, mask: BlockMask, scale: float, heads: Heads):
        q, k = heads.q, heads.k
        self.mask = mask
        self.batch, self.heads, self.queries = q.shape[:3]
        self.key_heads = k.shape[1]
        self.together = self.heads // self.key_heads
        self.blocks = -(-self.queries // mask.block_q)
        self.scale, self.cut = scale, heads.cut
        self.q = self.of_queries(q)
        self.k = self.of_keys(k)
        self.segments = self.scales = self.by_row = None
        if heads.segments is not None:
            of_queries, of_keys = (x[:, None] for x in heads.segments)
            shape = (self.batch, self.heads, self.queries)
            of_queries = self.of_queries(jnp.broadcast_to(of_queries, shape))
            shape = (self.batch, self.key_heads, mask.keys)
            of_keys = self.of_keys(jnp.broadcast_to(of_keys, shape)[..., None])
            self.segments = of_queries, of_keys
        if heads.scales is not None:
            of_queries, of_keys = heads.scales
            self.scales = self.of_queries(of_queries), self.of_keys(of_keys[..., None])
        if heads.by_row is not None:
            by_row = heads.by_row[:, :, None]
            shape = (*by_row.shape[:2], self.queries, by_row.shape[-1])
            self.by_row = self.of_queries(jnp.broadcast_to(by_row, shape))

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[B, H, S, ...] as [B H M, block_q, ...]."""
        x = pad_axis(x, 2, self.mask.block_q)
        return x.reshape(-1, self.mask.block_q, *x.shape[3:])

    def of_keys(self, x: jax.Array) -> jax.Array:
        """[B, K, T, width] as [B K N, block_k, width]."""
        x = pad_axis(x, 2, self.mask.block_k)
        return x.reshape(-1, self.mask.block_k, x.shape[-1])

    def groups(self) -> list[Group]:
        """The steps in groups, each head's own."""
        groups = in_groups(self.mask, self.batch, self.heads)
        return [self._cut(group) for group in groups]

    def _cut(self, group: Group) -> Group:
        """With what is masked beside the rule."""
        return group._replace(cut=True, whole=0) if self.cut else group

    def rows(self, step: Callable[..., Any], kinds: Sequence[Kind]) -> tuple[jax.Array, ...]:
        """What `step` makes of every query: arrays [B, H, S, *width]."""
        groups = self.groups()
        made = [self.run(step, group) for group in groups]
        parts = [[part[i] for part in made] for i in range(len(kinds))]
        return tuple(self.placed(groups, each, kind) for each, kind in zip(parts, kinds))

    def run(self, step: Callable[..., Any], group: Group) -> Any:
        """All steps of a group, as many at once as fit."""
        logits = self.mask.block_q * self.mask.block_k * group.steps.blocks.shape[1]
        at_once = max(1, LOGITS_AT_ONCE // logits)
        return jax.lax.map(partial(step, group=group), group.steps, batch_size=at_once)

    def placed(self, groups: list[Group], parts: list[jax.Array], kind: Kind) -> jax.Array:
        """Results [n, block_q, *width] of the groups as [B, H, S, *width]."""
        width, dtype, fill = kind
        lines = self.batch * self.heads
        whole = jnp.full((lines * self.blocks, self.mask.block_q, *width), fill, dtype)
        for group, part in zip(groups, parts):
            place = group.steps.line * self.blocks + group.steps.block
            everything = len(place) == len(whole)
            whole = part if everything else whole.at[place].set(part, unique_indices=True)
        return whole.reshape(self.batch, self.heads, -1, *width)[:, :, : self.queries]

    def scatter(self, groups: list[Group], parts: list[jax.Array], like: jax.Array) -> jax.Array:
        """Sum contributions [n, c * block_k, width] of steps to their keys [B, K, T, width]."""
        whole = jnp.zeros_like(self.of_keys(like), jnp.float32)
        for group, part in zip(groups, parts):
            places = self.key_places(group.steps.line[:, None], group.steps.blocks)
            tiles = part.reshape(*places.shape, *whole.shape[1:])
            whole = whole.at[places].add(tiles, mode="promise_in_bounds")
        whole = whole.reshape(*like.shape[:2], -1, like.shape[-1])
        return whole[:, :, : like.shape[2]]

    def key_places(self, line: Any, blocks: Any) -> Any:
        """Where `of_keys` has the key blocks of a head."""
        return line // self.together * -(-self.mask.keys // self.mask.block_k) + blocks

    def own(self, x: jax.Array, which: Steps, group: Group) -> jax.Array:
        """What belongs to the queries of a step: [block_q, ...]."""
        return _take(x, which.line * self.blocks + which.block)

    def keys(self, x: jax.Array, which: Steps, group: Group) -> jax.Array:
        """What belongs to the keys of a step: [c * block_k, width]."""
        return _take(x, self.key_places(which.line, which.blocks)).reshape(-1, x.shape[-1])

    def parameters(self, which: Steps) -> Any:
        """The rule's numbers for a step."""
        table = self.mask.rule.parameters
        return jnp.asarray(table)[which.line % self.heads] if len(table) > 1 else table[0]

    def logits(self, which: Steps, group: Group) -> jax.Array:
        """float32[..., rows, c * block_k] of one step, -inf where nothing is seen."""
        q, k = self.own(self.q, which, group), self.keys(self.k, which, group)
        if self.scales is not None:  # products of quantized values are exact in float32
            q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        logits = scores(q, k)
        if self.scales is None:
            logits *= self.scale
        else:
            of_queries, of_keys = self.scales
            logits *= self.own(of_queries, which, group)[..., None]
            logits *= self.keys(of_keys, which, group).swapaxes(-1, -2)
        if not group.cut:
            return logits
        whole = group.whole * self.mask.block_k
        parts = logits[..., :whole], hide(logits[..., whole:], self.visible(which, group))
        return jnp.concatenate(parts, axis=-1) if whole else parts[1]

    def visible(self, which: Steps, group: Group) -> jax.Array:
        """bool[..., rows, keys]: what the queries of a step see of its blocks from `whole` on."""
        mask, blocks = self.mask, which.blocks[group.whole :]
        row = which.block * mask.block_q + jnp.arange(mask.block_q)
        row = jnp.tile(row, self.repeats)[:, None]
        column = blocks[:, None] * mask.block_k + jnp.arange(mask.block_k)
        parameters = self.parameters(which)
        if self.by_row is not None:
            parameters = jnp.moveaxis(self.own(self.by_row, which, group)[..., None, :], -1, 0)
        entry = jnp.arange(group.whole, len(which.blocks)) - which.skip
        listed = (entry >= 0) & (entry < which.count)
        seen = mask.rule.visible(row, column.reshape(-1), mask.keys, *parameters)
        seen &= jnp.repeat(listed, mask.block_k)
        if self.segments is not None:
            of_queries, of_keys = self.segments
            own = self.own(of_queries, which, group)[..., None]
            seen &= own == self.keys(of_keys, which, group).swapaxes(-1, -2)
        return seen


class _SharedTiles(_Tiles):
    """The same where all heads share their lists: a step is a block of queries of several lines.

    A line is a key head of one row of the batch. The G query heads that read it are more queries: a
    step has G * block_q rows for each line.
    """

    @property
    def repeats(self) -> int:
        return self.together

    def of_queries(self, x: jax.Array) -> jax.Array:
        """[B, H, S, ...] as [B K, M, rows, ...]."""
        x = pad_axis(x, 2, self.mask.block_q)
        shape = (-1, self.together, self.blocks, self.mask.block_q, *x.shape[3:])
        return (
            x.reshape(shape)
            .swapaxes(1, 2)
            .reshape(-1, self.blocks, self.together * self.mask.block_q, *x.shape[3:])
        )

    def of_keys(self, x: jax.Array) -> jax.Array:
        """[B, K, T, width] as [B K, N, block_k, width]."""
        x = pad_axis(x, 2, self.mask.block_k)
        return x.reshape(self.batch * self.key_heads, -1, self.mask.block_k, x.shape[-1])

    def groups(self) -> list[Group]:
        """The steps in groups: all blocks of queries of some lines, then of the next."""
        total = self.batch * self.key_heads
        xp = np if self.mask.static else jnp
        groups = []
        for group in in_groups(self.mask, 1, 1):
            group = as_run(group, -(-self.mask.keys // self.mask.block_k))
            visited = self.mask.block_k * group.steps.blocks.shape[1]
            most = max(1, LOGITS_AT_ONCE // (self.together * self.mask.block_q * visited))
            lines = max(n for n in range(1, min(most, total) + 1) if total % n == 0)
            firsts = np.arange(0, total, lines, dtype=np.int32)
            steps = Steps(*(xp.concatenate([x] * len(firsts)) for x in group.steps))
            steps = steps._replace(line=firsts.repeat(len(group.steps.line)))
            groups.append(self._cut(group._replace(steps=steps, lines=lines)))
        return groups

    def rows(self, step: Callable[..., Any], kinds: Sequence[Kind]) -> tuple[jax.Array, ...]:
        """What `step` makes of every query, written where it belongs: [B, H, S, *width]."""

        def write(whole: tuple[jax.Array, ...], which: Steps, group: Group) -> Any:
            def put(x: jax.Array, made: jax.Array) -> jax.Array:
                starts = (which.line, which.block, *[0] * (x.ndim - 2))
                return jax.lax.dynamic_update_slice(x, made[:, None], starts)

            return tuple(map(put, whole, step(which, group))), None

        shape = self.q.shape[:3]
        whole = tuple(jnp.full((*shape, *width), fill, dtype) for width, dtype, fill in kinds)
        for group in self.groups():
            whole, _ = jax.lax.scan(partial(write, group=group), whole, group.steps)
        return tuple(map(self.of_heads, whole))

    def of_heads(self, x: jax.Array) -> jax.Array:
        """[B K, M, rows, ...] as [B, H, S, ...]."""
        x = x.reshape(-1, self.blocks, self.together, self.mask.block_q, *x.shape[3:])
        x = x.swapaxes(1, 2).reshape(self.batch, self.heads, -1, *x.shape[4:])
        return x[:, :, : self.queries]

    def own(self, x: jax.Array, which: Steps, group: Group) -> jax.Array:
        """What belongs to the queries of a step: [lines, rows, ...]."""
        starts = (which.line, which.block, *[0] * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, starts, (group.lines, 1, *x.shape[2:]))[:, 0]

    def keys(self, x: jax.Array, which: Steps, group: Group) -> jax.Array:
        """What belongs to the keys of a step: [lines, c * block_k, width]."""
        if group.run:
            sizes = (group.lines, len(which.blocks), *x.shape[2:])
            found = jax.lax.dynamic_slice(x, (which.line, which.blocks[0], 0, 0), sizes)
        else:
            lines = which.line + jnp.arange(group.lines, dtype=jnp.int32)
            found = x.at[lines[:, None], which.blocks].get(mode="promise_in_bounds")
        return found.reshape(group.lines, -1, x.shape[-1])


def _take(x: jax.Array, places: Any) -> jax.Array:
    """Blocks of [n, ...], each copied as one row: several times as fast on a CPU."""
    found = x.reshape(len(x), -1).at[places].get(mode="promise_in_bounds")
    return found.reshape(*found.shape[:-1], *x.shape[1:])


def scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q k^T [..., rows, keys], with sums in float32.

    Not a product with a transpose, which XLA may make first: bfloat16 took 1.5 times as long.
    """
    lines = tuple(range(q.ndim - 2))
    numbers = ((q.ndim - 1,), (q.ndim - 1,)), (lines, lines)
    exact = precision(q.dtype)
    return jax.lax.dot_general(q, k, numbers, precision=exact, preferred_element_type=jnp.float32)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """x y with sums in float32."""
    return jnp.matmul(x, y, precision=precision(x.dtype), preferred_element_type=jnp.float32)


def flops(mask: BlockMask, heads: Heads) -> int:
    """FLOPs of `forward` on these operands, masked and repeated blocks included."""
    blocks = sum(group.steps.blocks.size for group in in_groups(mask, *heads.q.shape[:2]))
    width = heads.q.shape[-1] + heads.v.shape[-1]
    return 2 * blocks * mask.block_q * mask.block_k * width


def flops_with_rest(mask: BlockMask, heads: Heads) -> tuple[int, int]:
    """FLOPs of `forward_with_rest`, the useful ones and all."""
    (batch, count, queries, width), values = heads.q.shape, heads.v.shape[-1]
    whole = queries * mask.keys * (width + values)
    firsts = range(0, queries, mask.block_q)
    visited = sum(
        min(mask.block_q, queries - first) * (run.stop - run.start)
        for first, run in zip(firsts, runs(mask) or ())
    )
    useful, executed = whole + (mask.seen or 0) * values, whole + visited * values
    return 2 * batch * count * useful, 2 * batch * count * executed
