"""Small matrices whose Kronecker product is a rotation, joined to sizes that suit a program."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import jax.numpy as jnp
import numpy as np

Cost = Callable[[tuple[int, ...]], int]


def join(factors: Sequence[Any], cost: Cost) -> tuple[Any, ...]:
    """Factors with neighbors multiplied where a program then costs least.

    Args:
        factors: square matrices, in numpy or JAX.
        cost: of a program with factors of these orders.
    """
    cuts = _cut(tuple(factor.shape[0] for factor in factors), cost)
    runs = (factors[start:stop] for start, stop in cuts)
    return tuple(
        reduce(np.kron if isinstance(run[0], np.ndarray) else jnp.kron, run) for run in runs
    )


def joined_orders(orders: tuple[int, ...], cost: Cost) -> tuple[int, ...]:
    """The orders of what `join` makes of factors of these orders."""
    return tuple(math.prod(orders[start:stop]) for start, stop in _cut(orders, cost))


def _cut(orders: tuple[int, ...], cost: Cost) -> list[tuple[int, int]]:
    """Where runs of neighbors start and stop, for the least cost."""
    count = len(orders)
    if not count:
        return []
    ways = (
        list(itertools.pairwise((0, *inner, count)))
        for size in range(count)
        for inner in itertools.combinations(range(1, count), size)
    )
    return min(ways, key=lambda way: cost(tuple(math.prod(orders[a:b]) for a, b in way)))
