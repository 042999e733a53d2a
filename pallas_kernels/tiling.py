"""Padding to whole tiles."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def round_up(size: int, multiple: int) -> int:
    """The smallest multiple that is at least `size`."""
    return -(-size // multiple) * multiple


def pad_axis(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """Pad the end of an axis with zeros to a multiple; the array itself if it is one already."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis % x.ndim] = (0, missing)
    return jnp.pad(x, widths)
