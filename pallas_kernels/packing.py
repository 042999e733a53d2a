"""Values of 2 to 8 bits, truly packed along K and laid out so that kernels unpack whole tiles.

A value of b bits is a signed integer, -2^(b-1) ... 2^(b-1) - 1, stored in two's complement. Its
bits
are cut into *planes*, low bits first, each 4, 2 or 1 bits wide: 4 = 4, 3 = 2 + 1, 6 = 4 + 2. So an
odd number of bits costs exactly that many. Values of 8 bits stay int8.

A plane of w bits holds p = 32 / w quantized values in each uint32 word. Its words come in blocks of
eight rows that hold 8 p rows of quantized values:

    value of row 8 s + r of a block  =  bits w s ... w (s + 1) - 1 of the block's word row r

for r = 0 ... 7 and s = 0 ... p - 1. One shift and one mask of the eight word rows thus give eight
consecutive rows of quantized values. On a TPU eight rows of 32 bits are one tile of sublanes:
    unpacking moves
nothing between sublanes or lanes. K is padded with zero values to whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from pallas_kernels.tiling import pad_axis, round_up

# Widths of a quantized value's planes, low bits first.
_WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}

Planes = tuple[jax.Array, ...]


def plane_widths(bits: int) -> tuple[int, ...]:
    """Bits of each plane of a quantized value, low bits first.

    Raises:
        ValueError: for bits outside of 2 ... 8.
    """
    if bits not in _WIDTHS:
        raise ValueError(f"quantized values have {sorted(_WIDTHS)} bits, got bits={bits!r}")
    return _WIDTHS[bits]


def values_per_row(bits: int) -> tuple[int, ...]:
    """How many rows of quantized values lie in one row of each plane's words; 1 for int8."""
    return tuple(1 if width == 8 else 32 // width for width in plane_widths(bits))


def packed_rows(rows: int, bits: int) -> int:
    """K after padding to whole blocks: a multiple of 128, of 256 where a plane is one bit wide."""
    return round_up(rows, max(128, 8 * max(values_per_row(bits))))


def bits_per_weight(
    bits: int, group_size: int, *, scale_bits: int = 16, zero_bits: int = 0
) -> float:
    """Logical bits that a weight takes with its share of its group's scale and zero point.

    >>> bits_per_weight(3, 128, zero_bits=8)
    3.1875
    """
    return sum(plane_widths(bits)) + (scale_bits + zero_bits) / group_size


def pack(qvalues: jax.Array, bits: int) -> Planes:
    """Pack quantized values along their first axis; the module's docstring gives the layout.

    Args:
        qvalues: int8[K, N], each -2^(bits-1) ... 2^(bits-1) - 1.
        bits: 2 ... 8.

    Returns:
        One uint32[K' / p, N] for each plane, low bits first; int8[K', N] alone for 8 bits. K' is
        `packed_rows(K, bits)`.

    Raises:
        ValueError: for bits outside of 2 ... 8, another shape or dtype, or quantized values that do
            not fit (checked outside of `jit`; inside, their high bits are lost).
    """
    widths = plane_widths(bits)
    if qvalues.dtype != jnp.int8:
        raise ValueError(f"quantized values must be int8, got {qvalues.dtype}")
    if qvalues.ndim != 2:
        raise ValueError(
            f"quantized values must be [K, N], got shape {qvalues.shape}; use jax.vmap for more"
        )
    half = 2 ** (bits - 1)
    if not isinstance(qvalues, Tracer) and qvalues.size:
        least, most = int(qvalues.min()), int(qvalues.max())
        if least < -half or most >= half:
            raise ValueError(
                f"{bits}-bit values lie in {-half} ... {half - 1}, got {least} ... "
                f"{most}; "
                f"subtract {half} from unsigned values and add it to their zero points"
            )
    qvalues = pad_axis(qvalues, 0, packed_rows(1, bits))
    if bits == 8:
        return (qvalues,)
    planes, low = [], 0
    for width in widths:
        slots = 32 // width
        field = (qvalues.astype(jnp.uint32) >> low) & (2**width - 1)
        field = field.reshape(-1, slots, 8, qvalues.shape[1])
        shifts = width * jnp.arange(slots, dtype=jnp.uint32)[:, None, None]
        words = jnp.sum(field << shifts, axis=1, dtype=jnp.uint32)  # disjoint bits: a bitwise or
        planes.append(words.reshape(-1, qvalues.shape[1]))
        low += width
    return tuple(planes)


def unpack(planes: Planes, bits: int, rows: int | None = None) -> jax.Array:
    """Values int8[K, N] of `pack`'s planes: the first `rows` of them, or all with the padding.

    Raises:
        ValueError: for planes that no `pack` with these bits returns, or too few rows.
    """
    packed = check_planes(planes, bits)
    if rows is not None and not 0 <= rows <= packed:
        raise ValueError(f"there are {packed} packed rows, cannot unpack {rows}")
    return unpack_tile(as_words(planes), bits)[:rows].astype(jnp.int8)


def check_planes(planes: Planes, bits: int) -> int:
    """Number of packed rows K' if the planes are such as `pack` returns.

    Raises:
        ValueError: for another number of planes, other shapes or dtypes.
    """
    counts = values_per_row(bits)
    dtype = jnp.dtype(jnp.int8 if bits == 8 else jnp.uint32)
    given = [f"{plane.dtype}{list(plane.shape)}" for plane in planes]
    rows = [plane.shape[0] * count for plane, count in zip(planes, counts) if plane.ndim == 2]
    fits = (
        len(planes) == len(counts) == len(rows)
        and all(plane.dtype == dtype for plane in planes)
        and all(plane.shape[1] == planes[0].shape[1] for plane in planes)
        and all(count == packed_rows(count, bits) for count in rows)
        and len(set(rows)) == 1
    )
    if not fits:
        parts = [f"{dtype}[{'K' if count == 1 else f'K/{count}'}, N]" for count in counts]
        raise ValueError(
            f"{bits}-bit values are packed as {', '.join(parts)} with K a multiple "
            "of "
            f"{packed_rows(1, bits)}; got {', '.join(given)}. Use pack(qvalues, {bits})."
        )
    return rows[0]


def as_words(planes: Sequence[jax.Array]) -> Planes:
    """Planes as kernels read them: words as int32, so that a shift can extend the sign; free."""
    return tuple(
        plane if plane.dtype == jnp.int8 else jax.lax.bitcast_convert_type(plane, jnp.int32)
        for plane in planes
    )


def unpack_tile(words: Sequence[jax.Array], bits: int) -> jax.Array:
    """Quantized values of a tile of whole blocks of every plane, for use in kernels too.

    Args:
        words: int32[rows / p, N] for each plane, or one int8[rows, N].
        bits: 2 ... 8.

    Returns:
        int32[rows, N], int8 for 8 bits.
    """
    if bits == 8:
        return words[0]
    shifts = []
    for plane, width in zip(words, plane_widths(bits), strict=True):
        shape = plane.shape[0] // 8, 32 // width, 8, plane.shape[1]
        shifts.append(width * jax.lax.broadcasted_iota(jnp.int32, shape, 1))
    blocks = [plane.reshape(-1, 1, 8, plane.shape[1]) for plane in words]
    return _joined([*zip(blocks, shifts, strict=True)], bits, lambda a: a.reshape(-1, a.shape[-1]))


def unpack_slot(words: Sequence[tuple[jax.Array, int]], bits: int) -> jax.Array:
    """One value of every element, from a word of each plane.

    Args:
        words: int32[...] of each plane and the slot in it, or one int8[...] with slot 0.
        bits: 2 ... 8.

    Returns:
        int32[...], int8 for 8 bits.
    """
    if bits == 8:
        return words[0][0]
    widths = plane_widths(bits)
    shifted = [(word, width * slot) for (word, slot), width in zip(words, widths, strict=True)]
    return _joined(shifted, bits, lambda a: a)


def _joined(words: Sequence[tuple[jax.Array, Any]], bits: int, form: Any) -> jax.Array:
    """Values from words and how far each is shifted; `form` gives the planes' bits equal shapes."""
    qvalues, low = None, 0
    for (word, shift), width in zip(words, plane_widths(bits), strict=True):
        if low + width == bits:  # the highest bits carry the sign
            field = (word << (32 - width - shift)) >> (32 - width)
        else:
            field = (word >> shift) & (2**width - 1)
        field = form(field)
        qvalues = field if qvalues is None else qvalues | (field << low)
        low += width
    assert qvalues is not None
    return qvalues
