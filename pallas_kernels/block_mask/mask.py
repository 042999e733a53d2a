"""Block masks: the blocks of keys that a kernel visits, from rules, maps and scores."""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask.rules import EVERYTHING, Rule, Spans, at_least


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("index", "count", "full"),
    meta_fields=(
        *("queries", "keys", "block_q", "block_k", "rule", "seen", "rest"),
        *("by_row", "widths", "listed"),
    ),
)
@dataclasses.dataclass(frozen=True, eq=False)
class BlockMask:
    """Lists of key blocks to visit, and the rule inside of them; a pytree.

    Attributes:
        index: int32[B, H, M, W] key blocks, those without masked elements first; entries beyond
            `count` repeat the last one, so that a pipelined kernel fetches nothing for them.
        count: int32[B, H, M] entries to visit; 0 gives zeros.
        full: int32[B, H, M] how many of them, at the front, the rule does not cut.
        queries, keys: lengths S and T.
        block_q, block_k: tokens in a block; the last block may be incomplete.
        rule: what is visible inside of the blocks.
        seen: (query, key) pairs that the lists and the rule let be seen, over all lists; None for
            lists that are made at run time, of which it is not known.
        rest: whether the lists go on, beyond `count`, with all blocks in which nothing is seen: for
            kernels that attend to everything and to what is seen in one pass.
        by_row: whether `full` is of the parameters that rows and heads are given beside the mask
            (`block_sparse_attention(by_row=...)`), and not of the rule's own.
        widths: of lists that are made at run time, the most entries of each block of queries; None
            for W.
        listed: of lists that are made at run time, how many entries they will have together; None
            if that is not known.
    """

    index: Any
    count: Any
    full: Any
    queries: int
    keys: int
    block_q: int
    block_k: int
    rule: Rule
    seen: int | None
    rest: bool = False
    by_row: bool = False
    widths: tuple[int, ...] | None = None
    listed: int | None = None

    @property
    def static(self) -> bool:
        """True if the lists are known while tracing."""
        return isinstance(self.index, np.ndarray)

    @property
    def visited(self) -> int:
        """Blocks in all lists; of lists made at run time as many as are known, or can be."""
        if self.static:
            return int(self.count.sum())
        if self.listed is not None:
            return self.listed
        *lists, rows, longest = self.index.shape
        return int(np.prod(lists)) * (sum(self.widths) if self.widths else rows * longest)

    @property
    def density(self) -> float:
        """Visited blocks as a share of all."""
        *lists, _ = self.index.shape
        return self.visited / (int(np.prod(lists)) * -(-self.keys // self.block_k))

    def flops(self, batch: int, heads: int, *, head_dim: int, value_dim: int | None = None) -> int:
        """FLOPs of QK^T and PV over the visited blocks."""
        shared = batch * heads // (self.index.shape[0] * self.index.shape[1])
        pairs = self.visited * shared * self.block_q * self.block_k
        return 2 * pairs * (head_dim + (value_dim or head_dim))

    def check(self, batch: int, queries: int, heads: int, keys: int) -> None:
        """Raise ValueError unless the mask fits arrays of these sizes."""
        lists = self.index.shape[:2]
        self.rule.check(batch, queries, heads, keys)
        if (self.queries, self.keys) != (queries, keys):
            raise ValueError(
                f"the mask was made for {self.queries} queries and {self.keys} keys, got {queries} "
                f"and {keys}. Make one for these lengths."
            )
        if lists[0] not in (1, batch) or lists[1] not in (1, heads):
            raise ValueError(
                f"the mask has lists for batch {lists[0]} and {lists[1]} heads; the arrays have "
                f"batch {batch} and {heads} heads. Each must agree or be 1."
            )


def block_mask(
    rule: Rule,
    queries: int,
    keys: int | None = None,
    *,
    block: int | tuple[int, int] = 128,
) -> BlockMask:
    """The blocks in which a rule lets anything be seen.

    Args:
        rule: what every query sees.
        queries: number of queries S.
        keys: number of keys T; S if None.
        block: tokens in a block, of queries and keys or (of queries, of keys).

    Raises:
        ValueError: for a length or block below 1.
    """
    return _from_rule(rule, *_sizes(queries, keys, block), rest=False)


def with_rest(rule: Rule, queries: int, keys: int, *, block: int | tuple[int, int]) -> BlockMask:
    """`block_mask` whose lists go on with the blocks in which nothing is seen."""
    return _from_rule(rule, *_sizes(queries, keys, block), rest=True)


@lru_cache(maxsize=256)
def _from_rule(
    rule: Rule, queries: int, keys: int, block_q: int, block_k: int, *, rest: bool
) -> BlockMask:
    pairs, whole = _pairs(rule, queries, keys, block_q, block_k)
    lists = _lists(np, whole[None], (pairs > 0)[None], rest=rest)
    return BlockMask(*lists, queries, keys, block_q, block_k, rule, int(pairs.sum()), rest)


def from_map(
    keep: Any,
    queries: int,
    keys: int | None = None,
    *,
    block: int | tuple[int, int] = 128,
    rule: Rule = EVERYTHING,
    width: int | tuple[int, ...] | None = None,
    listed: int | None = None,
) -> BlockMask:
    """The blocks of a map, as far as a rule lets anything be seen in them.

    Args:
        keep: bool[M, N], [H, M, N] or [B, H, M, N]; a numpy array gives static lists, a JAX array
            lists that are made at run time.
        queries, keys, block: as for `block_mask`.
        rule: what is visible inside of the blocks.
        width: length of the lists; the longest static list if None. Required at run time, where
            blocks beyond it are dropped, those that the rule cuts first. At run time it may be one
            number for each block of queries: XLA's program does the work of these.
        listed: at run time, the number of blocks in all lists together, if it is known: for costs.

    Raises:
        ValueError: for a map of another shape, static lists longer than `width`, or widths for
            other blocks.
    """
    queries, keys, block_q, block_k = _sizes(queries, keys, block)
    xp = np if isinstance(keep, np.ndarray) else jnp
    keep = _of_blocks(keep, queries, keys, block_q, block_k).astype(bool)
    if xp is jnp and width is None:
        raise ValueError(
            "lists that are made at run time need a static width: the most blocks of a row"
        )
    widths = None
    if isinstance(width, tuple):
        if xp is np or len(width) != keep.shape[2] or not 1 <= max(width) <= keep.shape[3]:
            raise ValueError(
                f"widths are for lists that are made at run time, one of 0 ... {keep.shape[3]} for "
                f"each of {keep.shape[2]} blocks of queries; got {len(width)} for a "
                f"{type(keep).__name__}"
            )
        widths, width = width, max(width)
    pairs, whole = _pairs(rule, queries, keys, block_q, block_k)
    index, count, full = _lists(xp, keep & whole, keep & (pairs > 0), width)
    if widths is not None:
        most = np.asarray(widths, np.int32)
        count, full = jnp.minimum(count, most), jnp.minimum(full, most)
    seen = int((keep * pairs).sum()) if xp is np else None
    if xp is jnp and listed is not None:
        seen = min(listed * block_q * block_k, int(np.prod(keep.shape[:2])) * queries * keys)
    sizes = (queries, keys, block_q, block_k)
    return BlockMask(index, count, full, *sizes, rule, seen, widths=widths, listed=listed)


def top_blocks(
    scores: jax.Array,
    count: int,
    queries: int,
    keys: int | None = None,
    *,
    block: int | tuple[int, int] = 128,
    rule: Rule = EVERYTHING,
) -> BlockMask:
    """The `count` visible blocks of highest score in each row, chosen at run time.

    Args:
        scores: float[B, H, M, N], or with leading dimensions left out as in `from_map`.
        count: blocks to keep in each row, 1 ... N.
        queries, keys, block, rule: as for `from_map`; blocks that the rule empties never count.

    Raises:
        ValueError: for scores of another shape, or a count that a row does not have.
    """
    queries, keys, block_q, block_k = _sizes(queries, keys, block)
    scores = _of_blocks(scores, queries, keys, block_q, block_k)
    if not 1 <= count <= scores.shape[-1]:
        raise ValueError(f"count must be 1 ... {scores.shape[-1]} blocks of a row, got {count}")
    pairs, _ = _pairs(rule, queries, keys, block_q, block_k)
    possible = jnp.asarray(pairs > 0)
    _, best = jax.lax.top_k(jnp.where(possible, scores, -jnp.inf), count)
    keep = jax.nn.one_hot(best, scores.shape[-1], dtype=bool).any(-2)
    return from_map(keep, queries, keys, block=block, rule=rule, width=count)


def tile_map(grid: tuple[int, ...], tile: tuple[int, ...], reach: tuple[int, ...]) -> np.ndarray:
    """Neighborhoods of tiles, for tokens that stand in the order of tiles: bool[M, M].

    A tile of queries sees the tiles that lie at most `reach` tiles away along every axis; near an
    edge the neighborhood is moved inwards, so that every tile sees equally many.

    Args:
        grid: tokens along every axis, such as (frames, rows, columns).
        tile: tokens of a tile along every axis; their product is the block.
        reach: neighboring tiles to each side along every axis.

    Raises:
        ValueError: if the tiles do not divide the grid, or for a size or reach that is too small.
    """
    at_least(1, grid=grid, tile=tile)
    if not len(grid) == len(tile) == len(reach) or any(g % t for g, t in zip(grid, tile)):
        raise ValueError(
            f"grid, tile and reach must have one entry for each axis and tiles must divide the "
            f"grid; got {grid}, {tile}, {reach}. Pad the grid, or choose a tile that divides it."
        )
    at_least(0, reach=reach)
    keep = np.ones((1, 1), bool)
    for size, side, far in zip(grid, tile, reach):
        tiles = size // side
        width = min(2 * far + 1, tiles)
        place = np.arange(tiles)
        first = np.clip(place - far, 0, tiles - width)[:, None]
        near = (first <= place) & (place < first + width)
        keep = np.kron(keep, near).astype(bool)
    return keep


def dense_mask(mask: BlockMask) -> Any:
    """What a mask lets be seen as bool[B, H, S, T]: the specification, for short sequences."""
    xp = np if mask.static else jnp
    row, column = xp.arange(mask.queries)[:, None], xp.arange(mask.keys)
    rule = xp.stack(
        [mask.rule.visible(row, column, mask.keys, *each) for each in mask.rule.parameters]
    )
    listed = xp.arange(mask.index.shape[-1]) < mask.count[..., None]
    blocks = xp.arange(-(-mask.keys // mask.block_k))
    keep = ((mask.index[..., None] == blocks) & listed[..., None]).any(-2)  # [B, H, M, N]
    keep = xp.repeat(xp.repeat(keep, mask.block_q, 2), mask.block_k, 3)
    return keep[:, :, : mask.queries, : mask.keys] & rule


@lru_cache(maxsize=64)
def _pairs(
    rule: Rule, queries: int, keys: int, block_q: int, block_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Visible pairs in every block, int64[H, M, N], and whether nothing in it must be masked.

    A last block of keys that is incomplete must be: its padding is.
    """
    table, which = np.unique(rule.parameters, axis=0, return_inverse=True)
    row = np.arange(queries)
    edges = np.arange(-(-keys // block_k)) * block_k
    seen = []
    for parameters in table:
        spans = rule.spans(row, keys, *parameters)
        # By blocks of queries: all at once would take gigabytes for long sequences.
        firsts = range(0, queries, block_q)
        rows = [slice(first, first + block_q) for first in firsts]
        seen.append(np.stack([_overlaps(spans, own, edges, block_k) for own in rows]))
    rows = np.minimum(block_q, queries - np.arange(0, queries, block_q))
    pairs = np.stack(seen)[which.reshape(-1)]
    return pairs, pairs == rows[:, None] * block_k


def _overlaps(spans: Spans, rows: slice, edges: np.ndarray, block_k: int) -> np.ndarray:
    """Pairs of these queries and of the keys of each block that they see, int64[N]."""
    total = np.zeros(len(edges), np.int64)
    for start, stop in spans:
        first = np.maximum(start[rows, None], edges)
        inside = np.minimum(stop[rows, None], edges + block_k) - first
        total += np.maximum(inside, 0).sum(0)
    return total


def _lists(
    xp: Any, whole: Any, kept: Any, width: int | None = None, *, rest: bool = False
) -> tuple[Any, Any, Any]:
    """index, count and full of `BlockMask` from maps [B, H, M, N] of blocks."""
    full, count = (xp.sum(kind, -1).astype(np.int32) for kind in (whole, kept))
    if width is None:
        width = max(int(count.max()), 1)
    elif xp is np and count.max() > width:
        raise ValueError(f"a row keeps {int(count.max())} blocks, more than the width {width}")
    full, count = xp.minimum(full, width), xp.minimum(count, width)
    order = xp.argsort(xp.where(whole, 0, xp.where(kept, 1, 2)), -1, stable=True)
    if rest:
        return order.astype(np.int32), count, full
    slot = xp.minimum(xp.arange(width), xp.maximum(count - 1, 0)[..., None])
    return xp.take_along_axis(order, slot, -1).astype(np.int32), count, full


def _sizes(
    queries: int, keys: int | None, block: int | tuple[int, int]
) -> tuple[int, int, int, int]:
    """Queries, keys, and the tokens in their blocks."""
    block_q, block_k = (block, block) if isinstance(block, int) else block
    keys = queries if keys is None else keys
    at_least(1, queries=queries, keys=keys, block_q=block_q, block_k=block_k)
    return queries, keys, block_q, block_k


def _of_blocks(x: Any, queries: int, keys: int, block_q: int, block_k: int) -> Any:
    """[B, H, M, N] of one number for each block, with leading dimensions left out."""
    blocks = (-(-queries // block_q), -(-keys // block_k))
    if x.ndim not in (2, 3, 4) or x.shape[-2:] != blocks:
        raise ValueError(
            f"a map of {queries} x {keys} tokens in blocks of {block_q} x {block_k} ends with the "
            f"dimensions {list(blocks)}; got {list(x.shape)}"
        )
    return x.reshape((1,) * (4 - x.ndim) + x.shape)
