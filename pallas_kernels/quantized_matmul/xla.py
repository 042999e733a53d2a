"""Quantized products in XLA, on every platform.

Shapes and formulas are those of `quantized_matmul`. Here and in the kernels, programs are functions
of two trees, what has a gradient and what has none, so that one wrapper serves them all:

    W8A8     (x_scale [M, 1], w_scale [1, N])               (x_qvalues, w_qvalues, w_zero, sums [M,
    1]) packed   (x or None, x_scale or None, scale [K/G, N])   (x_qvalues or None, planes, zero
    [K/G, N])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.float_matmul import few_rows
from pallas_kernels.implementation import has_sizes
from pallas_kernels.marks import declared
from pallas_kernels.on_mesh import on_several_devices
from pallas_kernels.packing import (
    Planes,
    as_words,
    check_planes,
    packed_rows,
    unpack_slot,
    unpack_tile,
    values_per_row,
)
from pallas_kernels.tiling import pad_axis


def int8_matmul(floats: Any, qvalues: Any, *, out_dtype: Any) -> jax.Array:
    """One integer product, and the zero points by the rows' sums."""
    (x_scale, w_scale), (x_qvalues, w_qvalues, w_zero, sums) = floats, qvalues
    product = few_rows(_qvalues)(x_qvalues, w_qvalues)
    if w_zero is not None:
        product += sums * w_zero
    return (product.astype(jnp.float32) * x_scale * w_scale).astype(out_dtype)


def packed_matmul(floats: Any, qvalues: Any, *, bits: int, out_dtype: Any) -> jax.Array:
    """A scan over tiles of K, of which one is unpacked at any time; on a CPU, one row is not.

    On several devices all of them are unpacked at once.
    """
    (x, x_scale, scale), (x_qvalues, planes, zero) = floats, qvalues
    x, scale, zero = whole_groups(x_qvalues if x is None else x, planes, scale, zero, bits=bits)
    operands = x, planes, scale, zero
    product = partial(_at_once if on_several_devices() else _by_tiles, bits=bits)
    if x.shape[0] == 1 and has_sizes(operands):
        one_row = declared(
            partial(_of_one_row, bits=bits),
            flops=2 * x.shape[1] * scale.shape[1],
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(operands)),
            elements=scale.shape[1],
        )
        total = jax.lax.platform_dependent(*operands, cpu=one_row, default=product)
    else:
        total = product(*operands)
    return (total if x_scale is None else total * x_scale).astype(out_dtype)


def _by_tiles(
    x: jax.Array, planes: Planes, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> jax.Array:
    tile = tile_rows(x.shape[1], scale.shape[0], bits)
    steps = x.shape[1] // tile
    split = partial(jax.tree.map, lambda a: a.reshape(steps, -1, a.shape[1]))
    if scale.shape[0] == 1:  # one group: every tile has the same scales
        scale, zero = jax.tree.map(lambda a: jnp.tile(a, (steps, 1)), (scale, zero))
    tiles = x.reshape(-1, steps, tile).swapaxes(0, 1), *split((as_words(planes), scale, zero))

    @jax.checkpoint  # a gradient unpacks again instead of keeping every tile
    def step(total: jax.Array, tiles: Any) -> tuple[jax.Array, None]:
        return total + tile_product(*tiles, bits=bits, sums=_sums_apart), None

    total = jnp.zeros((x.shape[0], scale.shape[1]), jnp.float32)
    return jax.lax.scan(step, total, tiles)[0]


def _at_once(
    x: jax.Array, planes: Planes, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> jax.Array:
    """The whole matrix as floats, for several devices: tiles of a K that is cut would travel."""
    qvalues = unpack_tile(as_words(planes), bits).astype(jnp.float32)
    w = qvalues.reshape(scale.shape[0], -1, scale.shape[1])
    if zero is not None:
        w += zero[:, None].astype(jnp.float32)
    dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else jnp.float32
    w = (w * scale[:, None].astype(jnp.float32)).astype(dtype)
    return dot(x.astype(dtype), w.reshape(qvalues.shape))


def _of_one_row(
    x: jax.Array, planes: Planes, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> jax.Array:
    """Multiply and add values as float32 as soon as they are unpacked; no tile is ever held.

    A step takes one row of words of every span of K, which has sums of its own, so that what is
    unpacked goes from registers to sums. Shares of groups within a span have their own sums too.
    """
    (groups, columns), rows, counts = scale.shape, x.shape[1], values_per_row(bits)
    most = max(counts)
    block = 8 * most  # quantized values of eight rows of the widest words
    span = tile_rows(rows, groups, bits) if groups == 1 else max(block, rows // groups)
    shares = max(1, span // (rows // groups))
    x = x.astype(jnp.float32).reshape(-1, span // block, most, 8)
    spans = x.shape[0]
    # [spans, blocks, words of a plane in the place of one of the widest, 8, N]
    blocks = [
        plane.reshape(spans, span // block, most // count, 8, columns)
        for plane, count in zip(planes, counts, strict=True)
    ]
    unrolled = max(1, 16 // most)

    @jax.checkpoint  # a gradient unpacks again
    def step(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        sums_ = list(sums)
        for row in (number * unrolled + each for each in range(unrolled)):
            place = row // 8, row % 8

            def take(array: jax.Array, place: tuple = place) -> jax.Array:
                of_block = jax.lax.dynamic_index_in_dim(array, place[0], 1, keepdims=False)
                return jax.lax.dynamic_index_in_dim(of_block, place[1], 2, keepdims=False)

            own, inputs = as_words([take(plane) for plane in blocks]), take(x)
            for slot in range(most):
                parts = [
                    (word[:, slot // count], slot % count)
                    for word, count in zip(own, counts, strict=True)
                ]
                qvalue = unpack_slot(parts, bits).astype(jnp.float32)
                sums_[slot * shares // most] += qvalue * inputs[:, slot, None]
        return tuple(sums_)

    sums = (jnp.zeros((spans, columns), jnp.float32),) * shares
    sums = jax.lax.fori_loop(0, span // most // unrolled, step, sums)
    total = jnp.stack(sums, axis=1).reshape(groups, -1, columns).sum(axis=1)
    if zero is not None:
        inputs = jnp.sum(x.reshape(groups, -1), axis=1, keepdims=True)
        total += inputs * zero.astype(jnp.float32)
    return jnp.sum(total * scale.astype(jnp.float32), axis=0, keepdims=True)


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
    sums: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """What one tile of K adds to the result, in float32; the inner part of `xla` and TPU programs.

    Args:
        x: [M, T] float or int8.
        words: the tile's planes, int32[T / p, N].
        scale, zero: [groups of the tile, N].
        bits: of the quantized values.
        sums: of rows of floats [M, G], as [M, 1]; None for plain ones.
    """
    sums = sums or _sums
    qvalues = unpack_tile(words, bits).astype(x.dtype)
    size = x.shape[1] // scale.shape[0]
    total = jnp.zeros((x.shape[0], scale.shape[1]), jnp.float32)
    scale = scale.astype(jnp.float32)
    for group in range(scale.shape[0]):
        part = slice(group * size, (group + 1) * size)
        here = slice(group, group + 1)
        product = dot(x[:, part], qvalues[part])
        if zero is not None:
            product += sums(x[:, part].astype(jnp.float32)) * zero[here].astype(jnp.float32)
        total += product * scale[here]
    return total


def _sums(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=1, keepdims=True)


def _sums_apart(x: jax.Array) -> jax.Array:
    """Sums of rows that are not fused: XLA's CPU of jax 0.10 makes one library call of a sum and a
    product of the same inputs, and for some shapes that one corrupts memory.
    """
    return _sums(jax.lax.optimization_barrier(x))


def _qvalues(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.matmul(x, w, preferred_element_type=jnp.int32)


def dot(x: jax.Array, qvalues: jax.Array) -> jax.Array:
    """A product as float32, summed in int32 for int8 operands and in float32 for float ones."""
    accumulator = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    product = jnp.matmul(x, qvalues, precision=precision, preferred_element_type=accumulator)
    return product.astype(jnp.float32)
