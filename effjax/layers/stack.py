"""A list of blocks that is itself a target module, so that a step cache can wrap all of it."""

from __future__ import annotations

from collections.abc import Iterable

from flax import nnx

from effjax.context import PyTree


class Stack(nnx.List):
    """Apply blocks in order: `x = block(x, *conditioning)`; layers may differ from each other.

    Attributes:
        streams: names of the streams that flow through, if `x` is a dictionary of tokens.
    """

    def __init__(self, blocks: Iterable[nnx.Module], *, streams: tuple[str, ...] = ()):
        super().__init__(blocks)
        self.streams = streams

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        for block in self:
            x = block(x, *conditioning)
        return x
