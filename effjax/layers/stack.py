"""A list of blocks that is itself a target module, so that a step cache can wrap all of it."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx

from effjax.context import PyTree
from effjax.layers.scan import Scan, run_blocks


class Stack(nnx.List):
    """Apply blocks in order: `x = block(x, *conditioning)`; layers may differ from each other.

    Attributes:
        streams: names of the streams that flow through, if `x` is a dictionary of tokens.
        scans: False if the model calls the blocks itself, because it reads what each of them gives:
            such a stack is never scanned.
        scan: how runs of equal blocks are scanned; None to trace every block.
    """

    def __init__(
        self, blocks: Iterable[nnx.Module], *, streams: tuple[str, ...] = (), scans: bool = True
    ):
        super().__init__(blocks)
        self.streams, self.scans = streams, scans
        self.scan: Scan | None = None

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        return self.between(0, len(self), x, *conditioning)

    def between(self, start: int, stop: int, x: PyTree, *conditioning: PyTree) -> PyTree:
        """Apply the blocks start ... stop - 1, for wrappers that leave out or repeat some."""
        blocks = list(self)[start:stop]
        if self.scan is not None:
            return run_blocks(self.scan, blocks, start, x, conditioning)
        for block in blocks:
            x = block(x, *conditioning)
        return x
