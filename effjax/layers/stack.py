"""A list of blocks that is itself a callable module, so that a step cache can wrap all of it."""

from __future__ import annotations

from flax import nnx

from effjax.context import PyTree


class Stack(nnx.List):
    """Apply blocks in order: `x = block(x, *conditioning)`; layers may differ from each other."""

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        for block in self:
            x = block(x, *conditioning)
        return x
