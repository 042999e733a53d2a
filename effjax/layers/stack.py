"""A list of blocks that is itself a target module, so that a step cache can wrap all of it."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx

from effjax.context import PyTree
from effjax.layers.chunks import by_samples
from effjax.layers.scan import Scan, run_blocks


class Stack(nnx.List):
    """Apply blocks in order: `x = block(x, *conditioning)`; layers may differ from each other.

    Attributes:
        streams: names of the streams that flow through, if `x` is a dictionary of tokens.
        scans: False if the model calls the blocks itself, because it reads what each of them gives:
            such a stack is never scanned.
        scan: how runs of equal blocks are scanned; None to trace every block.
        samples: how many samples run through blocks together, at most; None for all.
    """

    def __init__(
        self, blocks: Iterable[nnx.Module], *, streams: tuple[str, ...] = (), scans: bool = True
    ):
        super().__init__(blocks)
        self.streams, self.scans = streams, scans
        self.scan: Scan | None = None
        self.samples: int | None = None

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        return self.between(0, len(self), x, *conditioning)

    def between(self, start: int, stop: int, x: PyTree, *conditioning: PyTree) -> PyTree:
        """Apply the blocks start ... stop - 1, for wrappers that leave out or repeat some."""
        if self.samples is None:
            return self._whole(start, stop, x, *conditioning)

        def apply(stack: Stack, x: PyTree, *conditioning: PyTree) -> PyTree:
            return stack._whole(start, stop, x, *conditioning)

        return by_samples(apply, self, self.samples, x, *conditioning)

    def _whole(self, start: int, stop: int, x: PyTree, *conditioning: PyTree) -> PyTree:
        """Apply blocks to all samples."""
        blocks = list(self)[start:stop]
        if self.scan is not None:
            return run_blocks(self.scan, blocks, start, x, conditioning)
        for block in blocks:
            x = block(x, *conditioning)
        return x
