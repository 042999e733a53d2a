"""A Taylor series in steps of tokens that are computed now and then (TaylorSeer, arXiv 2503.06923).

    F_0 = y,   F_(j+1) = (F_j - F_j of the computed call before) / steps between the two
    y(t steps later) = sum_j F_j t^j / j!

Order 0 holds the tokens as they were. A difference is known from the second computed call on. When
rows of the batch were computed is known row by row, as a call may compute some of them only.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import PyTree, State, StateTree, Step


class Series(nnx.Module):
    """Remembers `order + 1` arrays like the tokens that come out of a module, in their dtype.

    Args:
        of: the module.
        order: of the series.
    """

    def __init__(self, of: nnx.Module, order: int):
        self.terms = nnx.List([StateTree.of(of) for _ in range(order + 1)])
        self.last, self.count = State(), State()

    @property
    def order(self) -> int:
        return len(self.terms) - 1

    def renew(self, new: PyTree, step: Step) -> None:
        """Take in tokens that were computed at this step."""
        if not self.order:
            self.terms[0].read(new)
            self.terms[0].write(new)
            return
        rows = jax.tree.leaves(new)[0].shape[:1]
        count = self.count.read(rows, jnp.int32)
        apart = jnp.maximum(step - self.last.read(rows, jnp.int32), 1).astype(jnp.float32)
        for order, term in enumerate(self.terms):
            before = term.read(new)
            term.write(new)
            known = count > order  # so many were computed before
            new = jax.tree.map(
                lambda n, b, known=known: jnp.where(
                    _beside(known, n), _over(n - b, apart), 0
                ).astype(n.dtype),
                new,
                before,
            )
        self.count.write(count + 1)
        self.last.write(jnp.full(rows, step, jnp.int32))

    def predict(self, like: PyTree, step: Step) -> PyTree:
        """What the tokens are at this step; `like` has their shapes and dtypes."""
        if not self.order:
            return self.terms[0].read(like)
        rows = jax.tree.leaves(like)[0].shape[:1]
        t = (step - self.last.read(rows, jnp.int32)).astype(jnp.float32)
        factors = [t**order / math.factorial(order) for order in range(self.order + 1)]
        held = [term.read(like) for term in self.terms]

        def one(*terms: Array) -> Array:
            wide = sum(
                _beside(factor, term) * term.astype(jnp.float32)
                for factor, term in zip(factors, terms, strict=True)
            )
            return jnp.asarray(wide).astype(terms[0].dtype)

        return jax.tree.map(one, *held)


def _over(x: Float[Array, "B ..."], apart: Float[Array, " B"]) -> Float[Array, "B ..."]:
    return x.astype(jnp.float32) / _beside(apart, x)


def _beside(by_row: Array, x: Float[Array, "B ..."]) -> Array:
    """Numbers [B] with the axes of an array, to go with its rows."""
    return by_row.reshape(-1, *[1] * (x.ndim - 1))
