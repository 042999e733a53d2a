"""Products of few rows with packed weights on GPUs (Triton), as fast as the weights arrive.

A program takes some columns and a part of K, in steps of whole blocks: every word is loaded once.
The eight quantized values that stand in the same bits of a block's eight words are eight
consecutive rows of
K, so x is read in its own order. Sums stay apart for each of the eight until the end: until then
nothing passes between threads. Quantized values become float32 by standing in a mantissa: with the
    exponent of
2^23 above it, a field u at bit p is the number 2^23 + 2^p u, exactly; x is divided by 2^p. Products
and sums are float32's whatever x is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.packing import as_words, packed_rows, plane_widths, values_per_row
from pallas_kernels.quantized_matmul.xla import whole_groups
from pallas_kernels.tiling import pad_axis

FEW = 4  # rows up to which this is faster than tensor cores
_SPAN, _SPANS = 128, 2  # columns that the threads stand side by side in, and how often in a program
_WARPS = 8
_PROGRAMS = 1056  # eight for each multiprocessor of a large GPU
_AHEAD = True  # words are loaded a step before they are used; int8 values would fill all registers
_LEAST = 4  # steps that a program takes at least
_MANTISSA = 23
_EXPONENT = 127 + _MANTISSA << _MANTISSA


def packed_matmul(
    floats: Any, qvalues: Any, *, bits: int, out_dtype: Any, interpret: bool
) -> jax.Array:
    """One program for each tile of columns and part of K; their sums in float32 are added."""
    (x, x_scale, scale), (x_qvalues, planes, zero) = floats, qvalues
    x = x_qvalues if x is None else x
    m, n = x.shape[0], scale.shape[1]
    span, spans = _columns(m, n, bits)
    columns = span * spans
    x, scale, zero = whole_groups(x, planes, scale, zero, bits=bits)
    planes, scale, zero = jax.tree.map(lambda a: pad_axis(a, 1, columns), (planes, scale, zero))
    operands = x, as_words(planes), scale, zero
    inner = packed_rows(1, bits)
    steps, tiles = x.shape[1] // inner, scale.shape[1] // columns
    splits = max(1, min(steps // _LEAST, -(-_PROGRAMS // tiles)))
    each = -(-steps // splits)
    splits = -(-steps // each)
    out = jax.ShapeDtypeStruct((splits, m, tiles * columns), jnp.float32)
    sums = pl.pallas_call(
        partial(
            _kernel,
            bits=bits,
            spans=(span, spans),
            inner=inner,
            each=each,
            interpret=interpret,
        ),
        name=f"packed_matmul_{bits}bit_few_rows",
        grid=(tiles, splits),
        out_shape=out,
        compiler_params=plgpu.CompilerParams(num_warps=_WARPS, num_stages=1),
        cost_estimate=pl.CostEstimate(
            flops=2 * m * x.shape[1] * out.shape[2],
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, out))),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)
    total = jnp.sum(sums, axis=0)
    return (total if x_scale is None else total * x_scale)[:, :n].astype(out_dtype)


def _columns(m: int, n: int, bits: int) -> tuple[int, int]:
    """A program's columns: how many threads load 16 bytes each of, and how often."""
    sizes = [(_SPAN, _SPANS if m <= 2 else 1), (_SPAN, 1)]  # more rows: as few sums as two have
    if bits == 8:
        sizes = [(4 * _SPAN, 1), (2 * _SPAN, 1), (_SPAN, 1)]
    return next(((span, spans) for span, spans in sizes if n % (span * spans) == 0), (64, 1))


def _kernel(x, words, scale, zero, out, *, bits, spans, inner, each, interpret):
    fused, merged = _PLAINLY if interpret else _IN_ONE
    (m, k), counts = x.shape, values_per_row(bits)
    group_size = k // scale.shape[0]
    share = min(group_size, inner)  # rows of a step in the same group
    span, split = spans[0], pl.program_id(1)
    columns = [pl.program_id(0) * (span * spans[1]) + span * number for number in range(spans[1])]
    columns = [pl.ds(first, span) for first in columns]
    # Plus zero, which the compiler does not know: it keeps this in a register, and the masks in
    # its instructions, which hold one constant each.
    exponent = _EXPONENT + (pl.program_id(0) >> 30)
    nothing = jnp.zeros((8, span), jnp.float32)
    start, ahead = split * each, _AHEAD and bits < 8
    stop = jnp.minimum((split + 1) * each, k // inner)

    def load(index: jax.Array) -> list:
        return [_tiles(words, counts, index, inner, here) for here in columns]

    def step(index: jax.Array, carry: tuple) -> tuple:
        totals = [[*of_row] for of_row in carry[0]]
        later = load(jnp.minimum(index + 1, stop - 1)) if ahead else None
        tiles = [_signs(own, bits) for own in (carry[1] if ahead else load(index))]
        for first in range(0, inner, share):
            sums = [[nothing] * len(columns) for _ in range(m)]
            inputs = [nothing] * m
            for eight in range(first // 8, (first + share) // 8):
                places = [(eight // count, eight % count) for count in counts]
                found = [_code(own, places, bits, exponent, merged) for own in tiles]
                for row in range(m):
                    own = x[row, pl.ds(index * inner + 8 * eight, 8)].astype(jnp.float32)
                    own = jnp.broadcast_to(own[:, None], (8, span))
                    if zero is not None:
                        inputs[row] += own
                    own *= 2.0 ** -found[0][1]
                    for number, (qvalue, _) in enumerate(found):
                        sums[row][number] = fused(own, qvalue, sums[row][number])
            # Eight times the same row: each thread reads what it multiplies by.
            group = jnp.full((8,), (index * inner + first) // group_size)
            for number, here in enumerate(columns):
                factor = scale[group, here].astype(jnp.float32)
                offset = None if zero is None else zero[group, here].astype(jnp.float32)
                for row in range(m):
                    part = sums[row][number]
                    if offset is not None:
                        part = fused(inputs[row], offset, part)
                    totals[row][number] = fused(part, factor, totals[row][number])
        return totals, later

    carry = [[nothing] * len(columns)] * m, load(start) if ahead else None
    totals, _ = jax.lax.fori_loop(start, stop, step, carry)
    for row, of_row in enumerate(totals):
        for here, total in zip(columns, of_row, strict=True):
            out[split, row, here] = jnp.sum(total, axis=0)


def _tiles(words, counts, index, inner, columns):
    """A step's words of each plane, one tile for each block."""
    tiles = []
    for plane, count in zip(words, counts, strict=True):
        blocks = inner // (8 * count)
        starts = [8 * (index * blocks + block) for block in range(blocks)]
        tiles.append([plane[pl.ds(start, 8), columns] for start in starts])
    return tiles


def _signs(tiles, bits):
    """The words with sign bits turned over: quantized values plus half of their range."""
    if bits == 8:
        return tiles
    width = plane_widths(bits)[-1]
    signs = sum(1 << last for last in range(width - 1, 32, width))
    signs -= signs >> 31 << 32  # as an int32
    return [*tiles[:-1], [tile ^ signs for tile in tiles[-1]]]


def _code(tiles, places, bits, exponent, merged) -> tuple[jax.Array, int]:
    """Values as float32, times a power of two: the tiles and slots of each plane that hold them."""
    if bits == 8:
        qvalue = tiles[0][places[0][0]].astype(jnp.int32) + (exponent + 2 ** (_MANTISSA - 1))
        number = jax.lax.bitcast_convert_type(qvalue, jnp.float32)
        return number - 1.5 * 2**_MANTISSA, 0
    place, field, low = 0, exponent, 0
    for own, (block, slot), width in zip(tiles, places, plane_widths(bits), strict=True):
        word, at = own[block], slot * width
        if not low:  # the lowest bits stay where they are, or one shift serves all later slots
            over = -(-(_MANTISSA + 1 - bits) // width) * width
            place = at if at < over else at - over + width
        right = at - place - low
        if right:
            word = jax.lax.shift_right_logical(word, right) if right > 0 else word << -right
        field = merged(field, word, 2**width - 1 << place + low)
        low += width
    number = jax.lax.bitcast_convert_type(field, jnp.float32)
    return number - float(2**_MANTISSA + 2 ** (place + bits - 1)), place


def _fused(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
    return _instruction("fma.rn.f32 $0, $1, $2, $3;", "f", a, b, c)


def _merged(field: jax.Array, word: jax.Array, mask: int) -> jax.Array:
    field = jnp.broadcast_to(field, word.shape)
    return _instruction(f"lop3.b32 $0, $1, {mask:#x}, $2, 0xEA;", "r", word, field)


def _instruction(text: str, kind: str, *operands: jax.Array) -> jax.Array:
    """What the compiler does not join by itself: products with sums, masks with what they fill."""
    [out] = plgpu.elementwise_inline_asm(
        text,
        args=operands,
        constraints=",".join([f"={kind}"] + [kind] * len(operands)),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(operands[0].shape, operands[0].dtype)],
    )
    return out


_IN_ONE = _fused, _merged
_PLAINLY = (lambda a, b, c: a * b + c), (lambda field, word, mask: field | word & mask)
