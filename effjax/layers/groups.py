"""Images as groups of tokens: all tokens of a group are predicted in one call.

    diagonals(4, 4)                       0 | 1 4 | 2 5 8 | 3 6 9 12 | ...
    blocks((1, 4, 4), (1, 1, 4))          0 1 2 3 | 4 5 6 7 | ...

A sequence is a condition and then the tokens of an image, group after group. The condition is
causal. A token of the image sees the condition, the groups before its own, and all of its own. In
this order what a group sees is a prefix of the sequence, so that caches hold it in their first
slots; tokens are rotated to their places in the raster all the same.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np

from effjax.layers.attention import CausalCore
from effjax.layers.rotary import Rotary
from pallas_kernels.block_mask import Grouped, Rule


@dataclasses.dataclass(frozen=True)
class Groups:
    """The tokens of an image in the order in which they are made, static.

    Attributes:
        order: place in the raster, row by row, of each token.
        sizes: tokens of each group.
    """

    order: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """Number of the first token of each group, and of all tokens."""
        return (0, *itertools.accumulate(self.sizes))

    @property
    def widest(self) -> int:
        """Tokens of the largest group."""
        return max(self.sizes)

    @property
    def numbers(self) -> np.ndarray:
        """Number of the token at each place of the raster: the inverse of `order`."""
        return np.argsort(self.order)

    def numbers_of(self, group: int) -> np.ndarray:
        """Numbers of the tokens of a group, filled up with -1 to as many as the widest has."""
        start, size = self.starts[group], self.sizes[group]
        return np.pad(np.arange(start, start + size), (0, self.widest - size), constant_values=-1)

    def places(self, numbers: np.ndarray) -> np.ndarray:
        """Places in the raster of tokens by their numbers; -1 for -1."""
        return np.where(numbers < 0, -1, np.asarray(self.order)[numbers])


def diagonals(rows: int, columns: int) -> Groups:
    """Groups of equal distance row + column from the corner, each by rising rows (NAR)."""
    places = np.arange(rows * columns)
    distance = places // columns + places % columns
    order = np.argsort(distance, kind="stable")
    return Groups(tuple(order.tolist()), tuple(np.bincount(distance).tolist()))


def blocks(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Groups:
    """Equal blocks of a grid of frames, rows and columns, in raster order inside and out.

    Raises:
        ValueError: for a block whose sides do not divide the grid's.
    """
    if any(side % part for side, part in zip(grid, block, strict=True)):
        raise ValueError(
            f"a grid of {grid} frames, rows and columns is not made of equal blocks of {block}: "
            f"each side must divide the grid's, such as {(1, 1, grid[2])} for rows"
        )
    split = [part for pair in zip(grid, block) for part in (pair[0] // pair[1], pair[1])]
    order = np.arange(np.prod(grid)).reshape(split).transpose(0, 2, 4, 1, 3, 5).reshape(-1)
    size = int(np.prod(block))
    return Groups(tuple(order.tolist()), (size,) * (len(order) // size))


class GroupCore(CausalCore):
    """Attention of every token to its own group and all that is before it.

    Tokens of a call that follows others, through a cache, are of one group: all of them see each
    other.

    Args:
        rotary: turns queries and keys.
        condition: tokens before the first group.
        sizes: of the groups.
    """

    together = True

    def __init__(self, rotary: Rotary, *, condition: int, sizes: tuple[int, ...]):
        super().__init__(rotary)
        self.condition, self.sizes = condition, sizes

    @property
    def rule(self) -> Rule:
        return Grouped(self.condition, self.sizes)
