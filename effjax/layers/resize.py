"""Changing the size of a raster: matrices that equal PyTorch's `interpolate`.

Each mode is linear and acts on rows and columns apart, so that a change of size is two small
matrices: y = R x C^T. They are made on the host, in float64, for sizes that are known while
tracing. Pixels are half a unit from the edges (`align_corners=False`), and nothing is filtered
before it is made smaller (`antialias=False`).

    bilinear  two neighbors, by their distance
    bicubic   four neighbors, by the cubic kernel with a = -0.75; beyond the edge the edge's pixel.
              `jax.image.resize` has a = -0.5, and other weights at the edges
    area      the mean of all pixels that a new one touches (adaptive average pooling): bins overlap
              where sizes do not divide
"""

from __future__ import annotations

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Mode = Literal["bilinear", "bicubic", "area"]

_A = -0.75  # of the cubic kernel


@functools.lru_cache(maxsize=256)
def matrix(inputs: int, outputs: int, mode: Mode) -> np.ndarray:
    """The matrix float32[outputs, inputs] that changes the size of one axis.

    Raises:
        ValueError: for sizes below 1, and for another mode.
    """
    if min(inputs, outputs) < 1:
        raise ValueError(f"sizes must be at least 1, got {inputs} and {outputs}")
    if mode not in _ROWS:
        raise ValueError(f"mode must be one of {', '.join(_ROWS)}; got {mode!r}")
    if inputs == outputs:
        return np.eye(inputs, dtype=np.float32)
    found = np.zeros((outputs, inputs))
    for row in range(outputs):
        for column, weight in _ROWS[mode](row, inputs, outputs):
            found[row, min(max(column, 0), inputs - 1)] += weight
    found = found.astype(np.float32)
    found.setflags(write=False)  # it is kept
    return found


def resize(
    x: Float[Array, "B H W C"], height: int, width: int, mode: Mode
) -> Float[Array, "B Y X C"]:
    """Change the size of images. Sums are float32, the result has the images' dtype."""
    if x.shape[1:3] == (height, width):
        return x
    rows, columns = (
        jnp.asarray(matrix(old, new, mode)) for old, new in zip(x.shape[1:3], (height, width))
    )
    options = {"precision": jax.lax.Precision.HIGHEST, "preferred_element_type": jnp.float32}
    y = jnp.einsum("yh,bhwc->bywc", rows, x.astype(jnp.float32), **options)
    return jnp.einsum("xw,bywc->byxc", columns, y, **options).astype(x.dtype)


Weights = list[tuple[int, float]]  # columns, which may lie beyond the edge, and their weights


def _bilinear(row: int, inputs: int, outputs: int) -> Weights:
    at = max((row + 0.5) * inputs / outputs - 0.5, 0.0)
    first = math.floor(at)
    return [(first, 1 - (at - first)), (first + 1, at - first)]


def _bicubic(row: int, inputs: int, outputs: int) -> Weights:
    at = (row + 0.5) * inputs / outputs - 0.5
    first = math.floor(at)
    return [(first + n, _cubic(abs(at - first - n))) for n in (-1, 0, 1, 2)]


def _cubic(distance: float) -> float:
    if distance <= 1:
        return ((_A + 2) * distance - (_A + 3)) * distance**2 + 1
    return ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A


def _area(row: int, inputs: int, outputs: int) -> Weights:
    start, stop = row * inputs // outputs, -(-(row + 1) * inputs // outputs)
    return [(column, 1 / (stop - start)) for column in range(start, stop)]


_ROWS = {"bilinear": _bilinear, "bicubic": _bicubic, "area": _area}
