"""The lists of a mask as steps: blocks of queries that visit equally many key blocks, in groups."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_mask import BlockMask


class Steps(NamedTuple):
    """Blocks of queries that visit equally many key blocks; a pytree over n steps.

    Attributes:
        line: int32[n] index into B * H; the first of several in B * K where heads share lists.
        block: int32[n] block of queries.
        blocks: int32[n, c] key blocks.
        skip: int32[n] entries of `blocks` before the listed ones.
        count: int32[n] listed entries.
    """

    line: Any
    block: Any
    blocks: Any
    skip: Any
    count: Any


class Group(NamedTuple):
    """Steps that one program runs.

    Attributes:
        steps: what they visit.
        cut: whether an element of their blocks may be masked.
        run: whether the blocks of each step are consecutive.
        lines: how many a step takes at once.
        whole: how many first blocks of each step the rule does not cut.
    """

    steps: Steps
    cut: bool
    run: bool = False
    lines: int = 1
    whole: int = 0


def shares_lists(mask: BlockMask) -> bool:
    """Whether every head of every row visits the same blocks, under the same rule."""
    return mask.index.shape[:2] == (1, 1) and len(mask.rule.parameters) == 1


def runs(mask: BlockMask) -> list[slice] | None:
    """The keys that each block of queries visits, if heads share lists of consecutive blocks."""
    if not mask.static or not shares_lists(mask) or not mask.count.all():
        return None
    lists = [index[:count] for index, count in zip(mask.index[0, 0], mask.count[0, 0])]
    if any(len(own) <= own.max() - own.min() for own in lists):
        return None
    edges = [(own.min() * mask.block_k, (own.max() + 1) * mask.block_k) for own in lists]
    return [slice(int(start), min(int(stop), mask.keys)) for start, stop in edges]


def in_groups(mask: BlockMask, batch: int, heads: int) -> list[Group]:
    """The steps of a mask, in groups of (nearly) equal length; steps without a block are left out.

    Static lists are as long as they are, rounded up to four lengths an octave so that few programs
    are compiled; lists that are made at run time have the widths of their blocks of queries.
    """
    shape = (batch, heads, mask.index.shape[2])
    xp = np if mask.static else jnp
    index = xp.broadcast_to(mask.index, (*shape, mask.index.shape[-1]))
    index = index.reshape(-1, index.shape[-1])
    count, full = (xp.broadcast_to(x, shape).reshape(-1) for x in (mask.count, mask.full))
    line, block = np.divmod(np.arange(len(index), dtype=np.int32), np.int32(shape[2]))
    steps = Steps(line, block, index, np.zeros_like(line), count)
    if not mask.static:
        if mask.widths is None:
            return [Group(steps, cut=True)]
        most = np.asarray(mask.widths)[block]
        places = [(length, np.flatnonzero(most == length)) for length in np.unique(most[most > 0])]
        parts = [(length, Steps(*(x[own] for x in steps))) for length, own in places]
        return [
            Group(part._replace(blocks=part.blocks[:, :length]), cut=True) for length, part in parts
        ]
    groups: list[Group] = []
    lengths = np.minimum(_rounded(count), index.shape[-1])
    for length in np.unique(lengths[count > 0]):
        own = lengths == length
        which = Steps(*(x[own] for x in steps))
        which = which._replace(blocks=which.blocks[:, :length])
        cut, whole = bool((full[own] < length).any()), int(full[own].min())
        groups.append(Group(which, cut=cut, whole=whole))
    return groups


def as_run(group: Group, blocks: int) -> Group:
    """The group with consecutive blocks, out of so many, where the listed ones are."""
    steps, length = group.steps, group.steps.blocks.shape[1]
    if not isinstance(steps.blocks, np.ndarray):
        return group
    listed = np.arange(length) < steps.count[:, None]
    first = np.where(listed, steps.blocks, blocks).min(1)
    last = np.where(listed, steps.blocks, -1).max(1)
    if (last - first >= steps.count).any():
        return group
    # A run that is rounded up may have to begin earlier, so as not to end beyond the last block.
    start = np.minimum(first, blocks - length).astype(np.int32)
    consecutive = start[:, None] + np.arange(length, dtype=np.int32)
    return group._replace(
        steps=steps._replace(blocks=consecutive, skip=first - start), run=True, whole=0
    )


def _rounded(count: Any) -> np.ndarray:
    step = 2 ** np.maximum(np.ceil(np.log2(np.maximum(count, 1))).astype(int) - 3, 0)
    return -(-count // step) * step
