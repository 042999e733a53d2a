"""How many tokens are kept of a sequence."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Annotated, Any

import jax.numpy as jnp
import numpy as np

from effjax.caches.slots import Lengths
from effjax.fields import Range

Sizes = Callable[[Lengths], Lengths]  # a number of slots for every row, by its tokens

Dropped = Annotated[float, Range(0, 1, below=True)]  # share of a sequence's tokens
HALF = 0.5  # is dropped where a plan says nothing else


def check_budget(plan: Any, **always: int) -> None:
    """What a plan's `capacity` and `ratio` must be; without either the ratio becomes a half.

    Args:
        always: fields that count tokens which are kept in any case.

    Raises:
        ValueError: if both are given, or the capacity holds no more than what is always kept.
    """
    capacity, ratio = plan.capacity, plan.ratio
    if capacity is not None and ratio is not None:
        raise ValueError(
            f"capacity={capacity} and ratio={ratio} cannot both be given: one is how many tokens "
            f"are kept, the other the share that is dropped. Leave one of them out (None)."
        )
    if capacity is None and ratio is None:
        object.__setattr__(plan, "ratio", HALF)
    for name, tokens in always.items():
        if capacity is not None and capacity <= tokens:
            raise ValueError(
                f"capacity={capacity} leaves no token beside {name}={tokens}, which are always "
                f"kept: take a capacity of at least {tokens + 1}, or a smaller {name}"
            )


def budgets(
    capacity: int | None, ratio: float | None, most: int, *, always: int = 0
) -> tuple[int, Sizes | None]:
    """How many tokens are kept of the longest sequence, and of every row by its own length.

    Args:
        capacity, ratio: tokens that are kept; or, without it, the share that is dropped.
        most: tokens of the longest sequence.
        always: tokens that are kept in any case (sinks, a window). Of sequences too short to drop
            the share beside them, these and one more are kept.

    Returns:
        Slots, and a function that gives those of a row; None where a row may use all of them.
    """
    if capacity is not None or ratio is None:
        return min(capacity or most, most), None
    return by_length(shares(ratio, most, always))


@dataclasses.dataclass(frozen=True)
class ByLength:
    """Slots of rows by their tokens, from a table by length 0, 1, 2, ..."""

    table: tuple[int, ...]

    def __call__(self, tokens: Lengths) -> Lengths:
        return jnp.asarray(self.table, jnp.int32)[tokens]


def by_length(table: np.ndarray) -> tuple[int, Sizes | None]:
    """Slots for rows of any length, and those of each, from a table by length 0, 1, 2, ...

    A table, since devices round otherwise than the host.
    """
    slots = int(table.max())
    if (table == np.arange(len(table))).all():
        return slots, None
    return slots, ByLength(tuple(table.tolist()))


@lru_cache(maxsize=64)
def shares(ratio: float, most: int, always: int = 0) -> np.ndarray:
    """What is kept of 0 ... `most` tokens if a share of them is dropped."""
    tokens = np.arange(most + 1, dtype=np.int32)
    kept = np.maximum((tokens * (1 - ratio)).astype(np.int32), always + 1)
    return np.minimum(kept, tokens)
