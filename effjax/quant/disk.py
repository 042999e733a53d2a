"""Values on disk: a stream of bits that any program can read, and the kernels' planes from it.

A row of quantized values is one little-endian stream of bits, whatever the machine: value n of b
bits, in two's complement, is bits b n ... b n + b - 1, and bit k of a row is bit k % 8 of its byte
k // 8. A row begins with a byte of its own. So eight quantized values are b bytes, and 8-bit values
are int8. Quantized values that are float8_e4m3fn stand as they are.

Words of 32 bits in little-endian order are the same stream, which is why the formats of other
libraries are read with these functions too (`converters.quantized`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from pallas_kernels.packing import packed_rows, plane_widths, values_per_row

Rows = Callable[
    [int, int], np.ndarray
]  # quantized values int8[end - begin, O] of rows begin ... end - 1


def pack_bits(fields: np.ndarray, bits: int) -> np.ndarray:
    """The low bits of uint8 or int8[..., N] as streams uint8[..., ceil(N bits / 8)]."""
    *lead, count = fields.shape
    octets = np.zeros((*lead, -(-count // 8) * 8), np.uint8)
    octets[..., :count] = fields.view(np.uint8) & (2**bits - 1)
    octets = octets.reshape(*lead, -1, 8)
    words = np.zeros(octets.shape[:-1], "<u8")
    for k in range(8):
        words |= octets[..., k].astype("<u8") << (bits * k)
    stream = words[..., None].view(np.uint8)[..., :bits].reshape(*lead, -1)
    return stream[..., : -(-count * bits // 8)]


def unpack_bits(stream: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first `count` fields uint8[..., count] of streams uint8[..., bytes]."""
    lead, groups = stream.shape[:-1], -(-count // 8)
    held = np.zeros((*lead, groups * bits), np.uint8)
    used = stream[..., : groups * bits]
    held[..., : used.shape[-1]] = used
    octets = np.zeros((*lead, groups, 8), np.uint8)
    octets[..., :bits] = held.reshape(*lead, groups, bits)
    words = octets.view("<u8")[..., 0]
    fields = [(words >> (bits * k) & (2**bits - 1)).astype(np.uint8) for k in range(8)]
    return np.stack(fields, axis=-1).reshape(*lead, -1)[..., :count]


def signed(fields: np.ndarray, bits: int) -> np.ndarray:
    """Fields uint8[...], read as two's complement: int8[...]."""
    return (fields << (8 - bits)).view(np.int8) >> (8 - bits)


def planes_of(rows: Rows, shape: tuple[int, int], bits: int) -> tuple[np.ndarray, ...]:
    """The planes that `pallas_kernels.packing.pack` makes of values [I, O], block by block."""
    inputs, outputs = shape
    counts = values_per_row(bits)
    dtype = np.int8 if bits == 8 else np.uint32
    planes = [np.zeros((packed_rows(inputs, bits) // n, outputs), dtype) for n in counts]
    for begin, end in _blocks(inputs, bits):
        qvalues = np.zeros((packed_rows(1, bits), outputs), np.int8)
        qvalues[: end - begin] = rows(begin, end)
        if bits == 8:
            planes[0][begin : begin + len(qvalues)] = qvalues
            continue
        low = 0
        for plane, width, n in zip(planes, plane_widths(bits), counts):
            fields = (qvalues.view(np.uint8) >> low & (2**width - 1)).reshape(-1, n, 8, outputs)
            words = plane[begin // n : (begin + len(qvalues)) // n].reshape(-1, 8, outputs)
            for slot in range(n):
                words |= fields[:, slot].astype(np.uint32) << (width * slot)
            low += width
    return tuple(planes)


def rows_of(planes: tuple[np.ndarray, ...], bits: int) -> Rows:
    """Rows of values from planes; each call begins and ends with whole blocks, or with the rows."""
    counts = values_per_row(bits)

    def rows(begin: int, end: int) -> np.ndarray:
        if bits == 8:
            return planes[0][begin:end]
        fields, low, stop = 0, 0, packed_rows(end, bits)
        for plane, width, n in zip(planes, plane_widths(bits), counts):
            words = plane[begin // n : stop // n].reshape(-1, 1, 8, plane.shape[1])
            slots = words >> (width * np.arange(n, dtype=np.uint32))[:, None, None]
            part = (slots & (2**width - 1)).astype(np.uint8).reshape(-1, plane.shape[1])
            fields = part << low | fields
            low += width
        return signed(np.asarray(fields), bits)[: end - begin]

    return rows


@dataclasses.dataclass(frozen=True)
class QValues:
    """The quantized values of one leaf on their way to the disk and back; no pytree.

    Attributes:
        value: `QTensor.qvalue`: quantized values int8[*E, I, O] (or float8) or planes; arrays or
            their shapes.
        shape: (*E, I, O).
        bits: of a quantized value.
    """

    value: Any
    shape: tuple[int, ...]
    bits: int

    @property
    def disk_shape(self) -> tuple[int, ...]:
        """[*E, I, bytes of a row], of `disk_dtype`."""
        return *self.shape[:-1], -(-self.shape[-1] * self.bits // 8)

    @property
    def disk_dtype(self) -> np.dtype:
        return self._dtype if self.bits == 8 else np.dtype(np.uint8)

    @property
    def _dtype(self) -> np.dtype:
        """Of quantized values that are not packed."""
        return np.dtype(np.int8 if isinstance(self.value, tuple) else self.value.dtype)

    @property
    def rows(self) -> Rows:
        """Rows of the value, which is on the host and of one matrix."""
        if isinstance(self.value, tuple):
            return rows_of(self.value, self.bits)
        return lambda begin, end: self.value[begin:end]

    def to_disk(self) -> np.ndarray:
        """The value, which is on the host, as it stands in the file."""
        stored = np.empty(self.disk_shape, self.disk_dtype)
        if self._leading:
            matrices = stored.reshape(-1, *self.disk_shape[-2:])
            for number, own in enumerate(self._matrices()):
                matrices[number] = own.to_disk()
            return stored
        for begin, end in _blocks(self.shape[0], self.bits):
            qvalues = self.rows(begin, end)
            stored[begin:end] = qvalues if self.bits == 8 else pack_bits(qvalues, self.bits)
        return stored

    def unpacked(self) -> np.ndarray:
        """The value, which is on the host and of one matrix, as int8[I, O] (or float8)."""
        return self._whole(self.rows)

    def from_disk(self, stored: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """What stands in the file as arrays of the value's form, on the host."""
        if self._leading:
            return self._stacked(stored.reshape(-1, *self.disk_shape[-2:]))

        def rows(begin: int, end: int) -> np.ndarray:
            if self.bits == 8:
                return stored[begin:end]
            return signed(unpack_bits(stored[begin:end], self.bits, self.shape[-1]), self.bits)

        return self.fill(rows)

    def fill(self, rows: Rows) -> np.ndarray | tuple[np.ndarray, ...]:
        """Quantized values of one matrix that `rows` gives, in the value's form, on the host."""
        if isinstance(self.value, tuple):
            inputs, outputs = self.shape
            return planes_of(rows, (inputs, outputs), self.bits)
        return self._whole(rows)

    @property
    def _leading(self) -> int:
        return len(self.shape) - 2

    def _matrices(self) -> Iterator[QValues]:
        """Every matrix of a stack by itself."""
        flat = jax.tree.map(lambda part: part.reshape(-1, *part.shape[self._leading :]), self.value)
        for number in range(math.prod(self.shape[:-2])):
            own = jax.tree.map(lambda part, number=number: part[number], flat)
            yield QValues(own, self.shape[-2:], self.bits)

    def _stacked(self, stored: np.ndarray) -> np.ndarray | tuple[np.ndarray, ...]:
        """What stands in the file of every matrix, as arrays with the leading axes."""
        made = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), self.value)
        one = jax.tree.map(
            lambda part: jax.ShapeDtypeStruct(part.shape[self._leading :], part.dtype), self.value
        )
        for number, own in enumerate(stored):
            place = np.unravel_index(number, self.shape[:-2])
            held = QValues(one, self.shape[-2:], self.bits).from_disk(own)
            for part, values in zip(jax.tree.leaves(made), jax.tree.leaves(held), strict=True):
                part[place] = values
        return made

    def _whole(self, rows: Rows) -> np.ndarray:
        qvalues = np.empty(self.shape, self._dtype)
        for begin, end in _blocks(self.shape[0], self.bits):
            qvalues[begin:end] = rows(begin, end)
        return qvalues


def _blocks(rows: int, bits: int) -> Iterator[tuple[int, int]]:
    step = packed_rows(1, bits)
    return ((begin, min(begin + step, rows)) for begin in range(0, rows, step))
