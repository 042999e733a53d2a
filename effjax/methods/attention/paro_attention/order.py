"""Orders of image tokens, and the copies that put heads into them and back.

Tokens of a model stand frame by frame and row by row: (F, H, W), W fastest. An order is another
nesting of these axes. Its number is the place in `ORDERS`:

    0  FHW    1  FWH    2  HWF    3  HFW    4  WHF    5  WFH        slowest axis first

Text tokens stay where they are, before or after the image.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

ORDERS = ((0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1))
INVERSES = tuple(tuple(order.index(axis) for axis in range(3)) for order in ORDERS)

Grid = tuple[int, int, int]


def candidates(grid: Grid) -> tuple[int, ...]:
    """Numbers of the orders that differ on a grid: six of a video, two of an image."""
    found: dict[tuple[int, ...], int] = {}
    for number, order in enumerate(ORDERS):
        found.setdefault(tuple(axis for axis in order if grid[axis] > 1), number)
    return tuple(found.values())


def permute(
    x: Array, orders: tuple[int, ...], grid: Grid, *, text: int = 0, text_first: bool = False
) -> Array:
    """Put the image tokens of each head into the head's order.

    Heads of one order are moved together, by a transpose.

    Args:
        x: [B, S, H, D] with tokens frame by frame and row by row.
        orders: number of the order of each head.
        grid: frames, rows and columns.
        text: text tokens in the sequence, S = F H W + text.
        text_first: whether they stand before the image.

    Raises:
        ValueError: for another number of tokens or heads, or an order that there is not.
    """
    return _moved(x, orders, grid, text, text_first, back=False)


def unpermute(
    x: Array, orders: tuple[int, ...], grid: Grid, *, text: int = 0, text_first: bool = False
) -> Array:
    """The inverse of `permute`."""
    return _moved(x, orders, grid, text, text_first, back=True)


def _moved(
    x: Array, orders: tuple[int, ...], grid: Grid, text: int, text_first: bool, *, back: bool
) -> Array:
    _check(x, orders, grid, text)
    kinds = sorted(set(orders))
    if kinds == [0]:
        return x
    start = text if text_first else 0
    stop = start + math.prod(grid)
    image = x[:, start:stop]
    if len(kinds) == 1:
        image = _transposed(image, kinds[0], grid, back)
    else:
        places = np.argsort(orders, kind="stable")
        parts = [np.flatnonzero(np.asarray(orders) == kind) for kind in kinds]
        moved = [_transposed(image[:, :, own], kind, grid, back) for kind, own in zip(kinds, parts)]
        image = jnp.concatenate(moved, axis=2)[:, :, np.argsort(places)]
    return jnp.concatenate([x[:, :start], image, x[:, stop:]], axis=1) if text else image


def _transposed(x: Array, number: int, grid: Grid, back: bool) -> Array:
    """Tokens [B, F H W, H, D] from the raster into an order, or back."""
    order = ORDERS[number]
    nested = tuple(grid[axis] for axis in order) if back else grid
    axes = (0, *(1 + axis for axis in (INVERSES[number] if back else order)), 4, 5)
    moved = x.reshape(x.shape[0], *nested, *x.shape[2:]).transpose(axes)
    return jax.lax.reshape(moved, x.shape)


def _check(x: Array, orders: tuple[int, ...], grid: Grid, text: int) -> None:
    if x.ndim != 4 or x.shape[1] != math.prod(grid) + text or x.shape[2] != len(orders):
        raise ValueError(
            f"heads must be [batch, {math.prod(grid)} tokens of the grid {grid} and {text} of "
            f"text, {len(orders)} heads, width]; got {list(x.shape)}"
        )
    if unknown := sorted(set(orders) - set(range(len(ORDERS)))):
        raise ValueError(f"orders are numbered 0 ... {len(ORDERS) - 1}, got {unknown}")
