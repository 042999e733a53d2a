"""Which keys a query sees, exactly, and which blocks of keys a kernel visits for that.

A *rule* is exact: it gives every query a few disjoint intervals of keys. A `BlockMask` is what a
kernel executes: for every block of queries the key blocks to visit, those that the rule cuts last.
It is built from a rule (`block_mask`), from a map of kept blocks (`from_map`), or from scores at
run time (`top_blocks`).

>>> mask = block_mask(Band(128), 1024, block=128)
>>> mask.index.shape, mask.density      # at most 3 of 8 blocks, 22 of 64 in all
((1, 1, 8, 3), 0.34375)

Letters: B batch and H heads (1 where all share one list), S queries, T keys, M blocks of queries,
N blocks of keys, W length of the longest list.
"""

from pallas_kernels.block_mask.mask import (
    BlockMask,
    block_mask,
    dense_mask,
    from_map,
    tile_map,
    top_blocks,
    with_rest,
)
from pallas_kernels.block_mask.rules import (
    EVERYTHING,
    Arrow,
    Band,
    Causal,
    Grouped,
    Levels,
    MultiDiagonal,
    Rule,
    SinkLocal,
    visible_pairs,
)
from pallas_kernels.block_mask.rules import Full as Full  # another name of Rule

__all__ = [
    "EVERYTHING",
    "Arrow",
    "Band",
    "BlockMask",
    "Causal",
    "Grouped",
    "Levels",
    "MultiDiagonal",
    "Rule",
    "SinkLocal",
    "block_mask",
    "dense_mask",
    "from_map",
    "tile_map",
    "top_blocks",
    "visible_pairs",
    "with_rest",
]
