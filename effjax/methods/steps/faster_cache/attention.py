"""Attention that continues its last change, on the rows of the branch "cond"."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from effjax.context import PyTree, StateTree, Step, is_static
from effjax.guidance import current_guidance
from effjax.methods.steps.by_module import CachedAttention


class LastTwo(nnx.Module):
    """The last two outputs of an attention, predicted ones included.

    y = last + weight (last - before)

    Args:
        of: the attention.
        weight: in each call.
    """

    def __init__(self, of: nnx.Module, weight: tuple[float, ...]):
        self.last, self.before = StateTree.of(of), StateTree.of(of)
        self.weight = weight

    def renew(self, new: PyTree, step: Step) -> None:
        """Take in an output that was computed; of several branches the rows of "cond"."""
        guidance = current_guidance()
        self._take_in(new if guidance is None else guidance.branch("cond", new), step)

    def predict(self, like: PyTree, step: Step) -> PyTree:
        """The output at this step, which counts as the last one from now on."""
        weight = self.weight[int(step)] if is_static(step) else jnp.asarray(self.weight)[step]

        def one(last: Array, before: Array) -> Array:
            wide = last.astype(jnp.float32)
            return (wide + weight * (wide - before.astype(jnp.float32))).astype(last.dtype)

        new = jax.tree.map(one, self.last.read(like), self.before.read(like))
        self._take_in(new, step)
        return new

    def _take_in(self, new: PyTree, step: Step) -> None:
        first = step == 0  # there is no change yet
        last = self.last.read(new)
        self.before.write(jax.tree.map(lambda n, o: jnp.where(first, n, o), new, last))
        self.last.write(new)


class ConditionalAttention(CachedAttention):
    """Attention that is predicted in calls of the branch "cond" alone, and else computes."""

    def __call__(self, x: PyTree, *others: PyTree) -> PyTree:
        guidance = current_guidance()
        if guidance is not None and len(guidance.branches) > 1:
            out = self.inner(x, *others)
            self.memory.renew(out, self.step)
            return out
        return super().__call__(x, *others)
