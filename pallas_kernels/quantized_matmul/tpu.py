"""Quantized products on TPUs (Mosaic): a grid over M, N and K, K innermost.

The kernel is the same for one token and for thousands: with few rows there is one tile of M, and
the grid streams the weights past it. Edges of M and N that fill no tile are clipped by the copies
in and out of VMEM (what stands beyond them reaches no valid output), so weights are never padded
there; K is whole for packed weights and padded to 128 for int8 ones.

Formulas and operands are those of `quantized_matmul` and `quantized_matmul_xla`.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.packing import as_words, values_per_row
from pallas_kernels.quantized_matmul.xla import tile_product, tile_rows, whole_groups
from pallas_kernels.tiling import pad_axis

# Largest tiles: with two buffers each, operands and accumulator stay below 12 MiB of VMEM.
_ROWS, _COLUMNS, _INNER = 512, 512, 2048
_UNROLLED = 64  # rows up to which a loop over tiles is short enough to be written out
_SEMANTICS = pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"))


def int8_matmul(floats: Any, qvalues: Any, *, out_dtype: Any, interpret: bool) -> jax.Array:
    """Tiles of int8 into an int32 accumulator; scales and zero points after the last one."""
    (x_scale, w_scale), (x_qvalues, w_qvalues, w_zero, sums) = floats, qvalues
    m, n = x_qvalues.shape[0], w_qvalues.shape[1]
    x_qvalues, w_qvalues = pad_axis(x_qvalues, 1, 128), pad_axis(w_qvalues, 0, 128)
    k = x_qvalues.shape[1]
    x_qvalues, x_scale, sums = _whole_rows((x_qvalues, x_scale, sums), m)
    rows, columns = _tile(x_qvalues.shape[0], _ROWS), _tile(n, _COLUMNS)
    inner = max(size for size in range(128, _INNER + 1, 128) if k % size == 0)
    grid = pl.cdiv(x_qvalues.shape[0], rows), pl.cdiv(n, columns), k // inner
    by_row = pl.BlockSpec((rows, 1), lambda i, j, step: (i, 0))
    by_column = pl.BlockSpec((1, columns), lambda i, j, step: (0, j))
    operands = x_qvalues, w_qvalues, x_scale, w_scale, sums, w_zero
    specs = (
        pl.BlockSpec((rows, inner), lambda i, j, step: (i, step)),
        pl.BlockSpec((inner, columns), lambda i, j, step: (step, j)),
        by_row,
        by_column,
        *((by_row, by_column) if w_zero is not None else (None, None)),
    )
    return _call(
        _int8_kernel,
        "int8_matmul",
        operands,
        specs,
        grid,
        (rows, columns, inner),
        accumulator=jnp.int32,
        shape=(x_qvalues.shape[0], n),
        out_dtype=out_dtype,
        interpret=interpret,
    )[:m]


def packed_matmul(
    floats: Any, qvalues: Any, *, bits: int, out_dtype: Any, interpret: bool
) -> jax.Array:
    """Tiles of words, unpacked in VMEM, into a float32 accumulator."""
    (x, x_scale, scale), (x_qvalues, planes, zero) = floats, qvalues
    x = x_qvalues if x is None else x
    m, n = x.shape[0], scale.shape[1]
    x, scale, zero = whole_groups(x, planes, scale, zero, bits=bits)
    k, groups = x.shape[1], scale.shape[0]
    tile = tile_rows(k, groups, bits)
    inner = max(size for size in range(tile, max(tile, _INNER // 2) + 1, tile) if k % size == 0)
    # Scales by step of the grid, tile of the step, group of the tile: a kernel can index leading
    # axes by what it counts, and a block may have any size on an axis that it holds all of.
    tiles = inner // tile if groups > 1 else 1
    here = max(1, tile * groups // k)
    scale, zero = jax.tree.map(lambda a: a.reshape(-1, tiles, here, n), (scale, zero))
    x, x_scale = _whole_rows((x, x_scale), m)
    rows, columns = _tile(x.shape[0], _ROWS), _tile(n, _COLUMNS)
    grid = pl.cdiv(x.shape[0], rows), pl.cdiv(n, columns), k // inner
    by_group = pl.BlockSpec(
        (None, tiles, here, columns), lambda i, j, step: (step if groups > 1 else 0, 0, 0, j)
    )
    specs = (
        pl.BlockSpec((rows, inner), lambda i, j, step: (i, step)),
        tuple(
            pl.BlockSpec((inner // count, columns), lambda i, j, step: (step, j))
            for count in values_per_row(bits)
        ),
        by_group,
        by_group if zero is not None else None,
        pl.BlockSpec((rows, 1), lambda i, j, step: (i, 0)) if x_scale is not None else None,
    )
    return _call(
        partial(_packed_kernel, bits=bits, tile=tile),
        f"packed_matmul_{bits}bit",
        (x, as_words(planes), scale, zero, x_scale),
        specs,
        grid,
        (rows, columns, inner),
        accumulator=jnp.float32,
        shape=(x.shape[0], n),
        out_dtype=out_dtype,
        interpret=interpret,
    )[:m]


def _int8_kernel(x, w, x_scale, w_scale, sums, zero, out, total):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    total[...] += jnp.matmul(x[...], w[...], preferred_element_type=jnp.int32)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        product = total[...]
        if zero is not None:
            product += sums[...] * zero[...]
        scaled = product.astype(jnp.float32) * x_scale[...] * w_scale[...]
        out[...] = scaled.astype(out.dtype)


def _packed_kernel(x, words, scale, zero, x_scale, out, total, *, bits, tile):
    step = pl.program_id(2)

    @pl.when(step == 0)
    def _():
        total[...] = jnp.zeros_like(total)

    # A few groups at a time: the whole of a block, unpacked to 32 bits, would fill VMEM.
    steps = x.shape[1] // tile

    def unpacked(index: jax.Array, _: None) -> None:
        def part(ref: Any, axis: int) -> Any:
            size = ref.shape[axis] // steps
            return pl.ds(pl.multiple_of(index * size, size), size)

        group = index if scale.shape[0] > 1 else 0
        total[...] += tile_product(
            x[:, part(x, 1)],
            tuple(ref[part(ref, 0)] for ref in words),
            scale[group],
            None if zero is None else zero[group],
            bits=bits,
        )

    jax.lax.fori_loop(0, steps, unpacked, None, unroll=x.shape[0] <= _UNROLLED)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        product = total[...] if x_scale is None else total[...] * x_scale[...]
        out[...] = product.astype(out.dtype)


def _call(kernel, name, operands, specs, grid, tile, *, accumulator, shape, out_dtype, interpret):
    rows, columns, inner = tile
    out = jax.ShapeDtypeStruct(shape, out_dtype)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        in_specs=specs,
        out_specs=pl.BlockSpec((rows, columns), lambda i, j, step: (i, j)),
        out_shape=out,
        scratch_shapes=[pltpu.VMEM((rows, columns), accumulator)],
        compiler_params=_SEMANTICS,
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(grid) * rows * columns * inner,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, out))),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)


def _whole_rows(arrays: tuple, rows: int) -> tuple:
    """Pad a few rows to the smallest tile, 32 rows of int8; many are clipped at their edge."""
    if rows >= _ROWS:
        return arrays
    return jax.tree.map(lambda a: pad_axis(a, 0, 32), arrays)


def _tile(size: int, most: int) -> int:
    """The axis itself if it is short, else the tile with least work and traffic.

    The work grows with the padded size, and the traffic as one over the tile.
    """
    if size <= most:
        return size
    return min(range(128, most + 1, 128), key=lambda t: pl.cdiv(size, t) * t * (1 + 64 / t))
