"""Quantized products on GPUs (Triton): a program for each tile of M and N, a loop over K within.

Packed words are read once for every quantized value that they hold, by the row that holds it: the
    repeats come
from the first-level cache, and each quantized value then stands where the product wants it after
one shift and
mask. With few rows too few programs would ask for memory: K is then split over several, whose
results in float32 are added afterwards. A product of very few rows has a kernel of its own, in
`gpu_rows`; for very many of floats, and for float32, weights are unpacked once, and XLA multiplies.

Tiles have powers of two. x is padded to whole tiles; so are K and N of weights that fill none
(a copy: let N be a multiple of 64, and K of 128). Formulas and operands are those of
`quantized_matmul` and `quantized_matmul_xla`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.packing import as_words, plane_widths, unpack_tile
from pallas_kernels.quantized_matmul import gpu_rows
from pallas_kernels.quantized_matmul.xla import dot, whole_groups
from pallas_kernels.tiling import pad_axis

_INNER = 128  # rows of K in a step, at most
_STAGES = 3
_SHARED = 163 << 10  # bytes of shared memory of a program on an A100; an H100 has more
_PROGRAMS = 512  # enough to keep the memory of a large GPU busy
_MANY = 128  # rows for which transposing a matrix of int8 pays
_TURNED = 128, 128, 128  # rows, columns and inner of their tiles: two programs share a processor
_MANY_FLOATS = 512  # rows for which unpacking a whole matrix of bits pays
_BOTH_MINOR = (((1,), (1,)), ((), ()))


def int8_matmul(floats: Any, qvalues: Any, *, out_dtype: Any, interpret: bool) -> jax.Array:
    """Tiles of int8 into an int32 accumulator; scales and zero points after the loop.

    With many rows w is transposed first: tensor cores multiply integers at their full rate where
    both operands have K as their minor axis.
    """
    (x_scale, w_scale), (x_qvalues, w_qvalues, w_zero, sums) = floats, qvalues
    m, n = x_qvalues.shape[0], w_qvalues.shape[1]
    turned = m >= _MANY
    rows, columns, inner = tile = _TURNED if turned else (*_tiles(m, n), _INNER)
    x_qvalues, w_qvalues = pad_axis(x_qvalues, 1, inner), pad_axis(w_qvalues, 0, inner)
    x_qvalues, x_scale, sums = _padded((x_qvalues, x_scale, sums), 0, rows)
    w_qvalues, w_scale, w_zero = _padded((w_qvalues, w_scale, w_zero), 1, columns)
    out = _call(
        partial(_int8_kernel, tile=tile, turned=turned),
        "int8_matmul",
        (x_qvalues, w_qvalues.T if turned else w_qvalues, x_scale, w_scale, sums, w_zero),
        (rows, columns, x_qvalues.shape[1]),
        shape=(x_qvalues.shape[0], w_qvalues.shape[1]),
        out_dtype=out_dtype,
        interpret=interpret,
    )
    return out[:m, :n]


def packed_matmul(
    floats: Any, qvalues: Any, *, bits: int, out_dtype: Any, interpret: bool
) -> jax.Array:
    """Tiles of words, unpacked in registers, into a float32 accumulator."""
    (x, x_scale, scale), (x_qvalues, planes, zero) = floats, qvalues
    x = x_qvalues if x is None else x
    m, n = x.shape[0], scale.shape[1]
    if m <= gpu_rows.FEW:
        return gpu_rows.packed_matmul(
            floats, qvalues, bits=bits, out_dtype=out_dtype, interpret=interpret
        )
    x, scale, zero = whole_groups(x, planes, scale, zero, bits=bits)
    many = (
        m >= _MANY_FLOATS and x.dtype != jnp.int8
    )  # products of quantized values stay integer ones
    if many or x.dtype == jnp.float32:  # which tensor cores do not multiply
        return _by_floats(x, planes, scale, zero, bits=bits).astype(out_dtype)
    rows, columns = _tiles(m, n)
    x, x_scale = _padded((x, x_scale), 0, rows)
    planes, scale, zero = _padded((planes, scale, zero), 1, columns)
    k, groups = x.shape[1], scale.shape[0]
    group_size = k // groups
    inner = _inner(rows, columns, group_size, planes, x.dtype)
    tiles = x.shape[0] // rows * (scale.shape[1] // columns)
    splits = _splits(k // inner, tiles) if m <= rows else 1
    out = _call(
        partial(
            _packed_kernel,
            bits=bits,
            tile=(rows, columns, inner),
            steps=k // inner // splits,
            steps_per_group=group_size // inner,
        ),
        f"packed_matmul_{bits}bit",
        (x, as_words(planes), scale, zero, x_scale if splits == 1 else None),
        (rows, columns, k // splits),
        shape=(splits, x.shape[0], scale.shape[1]),
        out_dtype=out_dtype if splits == 1 else jnp.float32,
        interpret=interpret,
    )
    if splits == 1:
        return out[0, :m, :n]
    out = jnp.sum(out, axis=0)
    return (out if x_scale is None else out * x_scale)[:m, :n].astype(out_dtype)


def _by_floats(
    x: jax.Array, planes: Any, scale: jax.Array, zero: jax.Array | None, *, bits: int
) -> jax.Array:
    """What every quantized value stands for, rounded to x's dtype, and one product of XLA's."""
    qvalues = unpack_tile(as_words(planes), bits).astype(jnp.float32)
    qvalues = qvalues.reshape(scale.shape[0], -1, scale.shape[1])
    if zero is not None:
        qvalues += zero[:, None].astype(jnp.float32)
    weights = (qvalues * scale[:, None].astype(jnp.float32)).astype(x.dtype)
    return dot(x, weights.reshape(x.shape[1], -1))


def _int8_kernel(x, w, x_scale, w_scale, sums, zero, out, *, tile, turned):
    rows, columns, inner = tile
    here = pl.ds(pl.program_id(0) * rows, rows), pl.ds(pl.program_id(1) * columns, columns)

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        part = pl.ds(index * inner, inner)
        axes = _BOTH_MINOR if turned else (((1,), (0,)), ((), ()))
        own = w[here[1], part] if turned else w[part, here[1]]
        return total + jax.lax.dot_general(
            x[here[0], part], own, axes, preferred_element_type=jnp.int32
        )

    total = jnp.zeros((rows, columns), jnp.int32)
    total = jax.lax.fori_loop(0, x.shape[1] // inner, step, total)
    if zero is not None:
        total += sums[here[0], :] * zero[:, here[1]]
    scaled = total.astype(jnp.float32) * x_scale[here[0], :] * w_scale[:, here[1]]
    out[here] = scaled.astype(out.dtype)


def _packed_kernel(x, words, scale, zero, x_scale, out, *, bits, tile, steps, steps_per_group):
    rows, columns, inner = tile
    split = pl.program_id(2)
    here = pl.ds(pl.program_id(0) * rows, rows), pl.ds(pl.program_id(1) * columns, columns)

    def step(index: jax.Array, total: jax.Array) -> jax.Array:
        index += split * steps
        group = pl.ds(index // steps_per_group, 1)
        x_part = x[here[0], pl.ds(index * inner, inner)]
        qvalues = _unpack(words, bits, index * inner + jnp.arange(inner), here[1])
        product = dot(x_part, qvalues.astype(x.dtype))
        if zero is not None:
            sums = jnp.sum(x_part.astype(jnp.float32), axis=1, keepdims=True)
            product += sums * zero[group, here[1]].astype(jnp.float32)
        return total + product * scale[group, here[1]].astype(jnp.float32)

    total = jax.lax.fori_loop(0, steps, step, jnp.zeros((rows, columns), jnp.float32))
    if x_scale is not None:
        total *= x_scale[here[0], :]
    out[split, *here] = total.astype(out.dtype)


def _unpack(words: Any, bits: int, row: jax.Array, columns: Any) -> jax.Array:
    """Values [rows, columns] out of the planes' words, wherever the rows stand in their blocks."""
    if bits == 8:
        return words[0][row, columns]
    qvalues, low = jnp.zeros((), jnp.int32), 0
    for plane, width in zip(words, plane_widths(bits)):
        slots = 32 // width
        block = row >> (8 * slots).bit_length() - 1  # powers of two throughout
        word = plane[block * 8 + (row & 7), columns]
        shift = (width * (row >> 3 & slots - 1))[:, None]
        if low + width == bits:  # the highest bits carry the sign
            field = (word << (32 - width - shift)) >> (32 - width)
        else:
            field = (word >> shift) & (2**width - 1)
        qvalues = qvalues | (field << low)
        low += width
    return qvalues


def _call(kernel, name, operands, tile, *, shape, out_dtype, interpret):
    rows, columns, inner = tile
    *splits, m, n = shape
    grid = m // rows, n // columns, *splits
    out = jax.ShapeDtypeStruct(shape, out_dtype)
    large = rows * columns >= 64 * 64
    programs = grid[0] * grid[1] * (splits[0] if splits else 1)
    return pl.pallas_call(
        kernel,
        name=name,
        grid=grid,
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=8 if large else 4, num_stages=_STAGES),
        cost_estimate=pl.CostEstimate(
            flops=2 * programs * rows * columns * inner,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, out))),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)


def _padded(arrays: Any, axis: int, multiple: int) -> Any:
    return jax.tree.map(lambda a: pad_axis(a, axis, multiple), arrays)


def _tiles(m: int, n: int) -> tuple[int, int]:
    """Rows and columns of a program: at least 16 rows, as the tensor cores want."""
    rows = min(128, max(16, pl.next_power_of_2(m)))
    return rows, 64 if rows <= 32 or n <= 64 or n % 128 else 128


def _inner(rows: int, columns: int, group_size: int, planes: Any, dtype: Any) -> int:
    """Rows of K in a step, of one group, whose operands fit shared memory.

    A stage holds x, and of every plane a word for each quantized value; the quantized values as x's
    dtype come once.
    """
    inner, words = min(_INNER, group_size), planes[0].dtype.itemsize
    of_x, of_words = dtype.itemsize * rows, words * len(planes) * columns
    while inner > 32 and inner * (_STAGES * (of_x + of_words) + dtype.itemsize * columns) > _SHARED:
        inner //= 2
    return inner


def _splits(steps: int, tiles: int) -> int:
    """Into how many parts to split K, each of at least four steps."""
    splits = 1
    while tiles * splits < _PROGRAMS and steps % (2 * splits) == 0 and steps // splits >= 8:
        splits *= 2
    return splits
