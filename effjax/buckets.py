"""Sizes that shapes are rounded up to, so that few compiled programs serve all of them.

What is beyond the true size is padding, which changes no result. How much of it there is at most
and on average is said in docs/buckets.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

# None and "none" are exact shapes; else "powers of two", or the sizes themselves.
Buckets = str | Sequence[int] | None
POWERS = "powers of two"

SLACK = 0.1  # a batch that can be cut is padded if that adds no more rows than this share

Tree = TypeVar("Tree")


def sizes_of(buckets: Buckets) -> tuple[int, ...] | None:
    """Check buckets, and return the listed sizes in order.

    The result is () for powers of two and None for exact shapes.

    Raises:
        ValueError: for anything else.
    """
    if buckets is None or (isinstance(buckets, str) and buckets == "none"):
        return None
    if isinstance(buckets, str) and buckets == POWERS:
        return ()
    listed = buckets if isinstance(buckets, Sequence) and not isinstance(buckets, str) else ()
    whole = [isinstance(size, int | np.integer) and not isinstance(size, bool) for size in listed]
    if not whole or not all(whole) or min(listed) < 1:
        raise ValueError(
            f'buckets must be "{POWERS}", None or "none" for exact shapes, or sizes of at least 1, '
            f"such as [64, 256, 1024]; got {buckets!r}"
        )
    return tuple(sorted({int(size) for size in listed}))


def bucket(size: int, buckets: Buckets, *, least: int = 1) -> int:
    """Round a size up to its bucket. 0 stays 0.

    A size beyond the last one of a list is rounded up to a whole multiple of the last one.

    Args:
        size: the true size.
        buckets: "powers of two", a list of sizes, or None for exact shapes.
        least: the smallest power of two that is used.
    """
    sizes = sizes_of(buckets)
    if sizes is None or size == 0:
        return size
    if not sizes:
        return max(least, 1 << (size - 1).bit_length())
    return next((each for each in sizes if each >= size), -(-size // sizes[-1]) * sizes[-1])


def parts(size: int, buckets: Buckets) -> list[int]:
    """Choose the sizes of the parts that a batch is cut into, largest first.

    A row of padding costs more than a further call: five rows become four and one, not eight. The
    last part may have rows of padding, if they are few or if there is no smaller size.
    """
    sizes = sizes_of(buckets)
    if sizes is None:
        return [size]
    if not sizes:
        sizes = tuple(1 << power for power in range(size.bit_length() + 1))
    found = []
    while size > 0:
        above = next((each for each in sizes if each >= size), None)
        below = max((each for each in sizes if each <= size), default=None)
        if below is None or (above is not None and above <= (1 + SLACK) * size):
            below = above
        assert below is not None
        found.append(below)
        size -= below
    return found


def rows(tree: Tree, start: int, size: int) -> Tree:
    """Take the rows start ... start + size - 1 of a tree of arrays.

    Rows beyond the last one repeat it. The rows are taken on the host, because on a device each
    choice of rows would be a program.
    """

    def own(leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        return jnp.asarray(leaf[np.minimum(np.arange(start, start + size), len(leaf) - 1)])

    return jax.tree.map(own, tree)


def joined(arrays: Sequence[jax.Array], size: int) -> jax.Array:
    """Join the parts of a batch of `size` rows to one array, without padding."""
    if len(arrays) == 1 and len(arrays[0]) == size:
        return arrays[0]
    return jnp.asarray(np.concatenate([np.asarray(array) for array in arrays])[:size])


def cut(size: int, buckets: Buckets, *trees: Any) -> list[int]:
    """The `parts` of a batch of these arrays.

    A batch stays whole if one of its arrays is traced or spread over several devices.
    """
    leaves = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    if any(isinstance(leaf, Tracer) or len(leaf.sharding.device_set) > 1 for leaf in leaves):
        return [size]
    return parts(size, buckets)


def by_parts(function: Callable[..., Tree], buckets: Buckets, *arrays: Any) -> Tree:
    """Apply a function of (trees of) arrays [B, ...] to each row, in batches of a few sizes."""
    size = len(jax.tree.leaves(arrays)[0])
    sizes = cut(size, buckets, *arrays)
    if sizes == [size]:
        return function(*arrays)
    starts = itertools.accumulate(sizes, initial=0)
    made = [function(*rows(arrays, *each)) for each in zip(starts, sizes)]
    return jax.tree.map(lambda *parts: joined(parts, size), *made)
