"""Quantised products in XLA, on every platform.

Shapes and formulas are those of `quantized_matmul`. Here and in the kernels, programs are functions
of two trees, what has a gradient and what has none, so that one wrapper serves them all:

    W8A8     (x_scale [M, 1], w_scale [1, N])               (x_codes, w_codes, w_zero, sums [M, 1])
    packed   (x or None, x_scale or None, scale [K/G, N])   (x_codes or None, planes, zero [K/G, N])
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.packing import Planes, as_words, check_planes, packed_rows, unpack_tile
from pallas_kernels.tiling import pad_axis


def int8_matmul(floats: Any, codes: Any, *, out_dtype: Any) -> jax.Array:
    """One integer product, and the zero points by the rows' sums."""
    (x_scale, w_scale), (x_codes, w_codes, w_zero, sums) = floats, codes
    product = jnp.matmul(x_codes, w_codes, preferred_element_type=jnp.int32)
    if w_zero is not None:
        product += sums * w_zero
    return (product.astype(jnp.float32) * x_scale * w_scale).astype(out_dtype)


def packed_matmul(floats: Any, codes: Any, *, bits: int, out_dtype: Any) -> jax.Array:
    """A scan over tiles of K; what is unpacked at any time is one tile."""
    (x, x_scale, scale), (x_codes, planes, zero) = floats, codes
    x, scale, zero = whole_groups(x_codes if x is None else x, planes, scale, zero, bits=bits)
    tile = tile_rows(x.shape[1], scale.shape[0], bits)
    steps = x.shape[1] // tile
    split = partial(jax.tree.map, lambda a: a.reshape(steps, -1, a.shape[1]))
    if scale.shape[0] == 1:  # one group: every tile has the same scales
        scale, zero = jax.tree.map(lambda a: jnp.tile(a, (steps, 1)), (scale, zero))
    tiles = x.reshape(-1, steps, tile).swapaxes(0, 1), *split((as_words(planes), scale, zero))

    @jax.checkpoint  # a gradient unpacks again instead of keeping every tile
    def step(total: jax.Array, tiles: Any) -> tuple[jax.Array, None]:
        return total + tile_product(*tiles, bits=bits), None

    total = jnp.zeros((x.shape[0], scale.shape[1]), jnp.float32)
    total, _ = jax.lax.scan(step, total, tiles)
    return (total if x_scale is None else total * x_scale).astype(out_dtype)


def whole_groups(
    x: jax.Array, planes: Planes, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Pad x and the groups to the planes' K' rows; padding adds nothing, as x is zero there."""
    rows, groups = check_planes(planes, bits), scale.shape[0]
    if groups > 1:
        groups = rows // (x.shape[1] // groups)
        scale, zero = jax.tree.map(lambda a: pad_axis(a, 0, groups), (scale, zero))
    return pad_axis(x, 1, rows), scale, zero


def tile_rows(rows: int, groups: int, bits: int, most: int = 512) -> int:
    """Rows of K to unpack at a time: whole blocks and groups, at most `most` where that is free."""
    block = packed_rows(1, bits)
    if groups > 1:
        return max(block, rows // groups)
    return max(tile for tile in range(block, max(most, block) + 1, block) if rows % tile == 0)


def tile_product(
    x: jax.Array,
    words: Planes,
    scale: jax.Array,
    zero: jax.Array | None,
    *,
    bits: int,
) -> jax.Array:
    """What one tile of K adds to the result, in float32; the inner part of `xla` and TPU programs.

    Args:
        x: [M, T] float or int8.
        words: the tile's planes, int32[T / p, N].
        scale, zero: [groups of the tile, N].
        bits: of the codes.
    """
    codes = unpack_tile(words, bits).astype(x.dtype)
    size = x.shape[1] // scale.shape[0]
    total = jnp.zeros((x.shape[0], scale.shape[1]), jnp.float32)
    scale = scale.astype(jnp.float32)
    for group in range(scale.shape[0]):
        part = slice(group * size, (group + 1) * size)
        here = slice(group, group + 1)
        product = dot(x[:, part], codes[part])
        if zero is not None:
            sums = jnp.sum(x[:, part].astype(jnp.float32), axis=1, keepdims=True)
            product += sums * zero[here].astype(jnp.float32)
        total += product * scale[here]
    return total


def dot(x: jax.Array, codes: jax.Array) -> jax.Array:
    """A product as float32, summed in int32 for int8 operands and in float32 for float ones."""
    accumulator = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jnp.matmul(x, codes, precision=precision, preferred_element_type=accumulator)
    return product.astype(jnp.float32)
