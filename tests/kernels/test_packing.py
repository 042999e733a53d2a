"""Packed values: exact round trips, exact sizes, and the layout that the docstring promises."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.packing import (
    as_words,
    bits_per_weight,
    pack,
    packed_rows,
    plane_widths,
    unpack,
    unpack_tile,
    values_per_row,
)

BITS = (2, 3, 4, 5, 6, 7, 8)


def qvalues_of(bits, rows, columns=3, seed=0):
    """Random quantized values in which every quantized value occurs, if there are enough rows."""
    half = 2 ** (bits - 1)
    qvalues = np.random.default_rng(seed).integers(-half, half, (rows, columns))
    every = np.arange(-half, half)[:rows]
    qvalues[: len(every), 0] = every
    return jnp.asarray(qvalues, jnp.int8)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 100, 256, 300])
def test_round_trip_is_exact(bits, rows):
    qvalues = qvalues_of(bits, rows)
    planes = pack(qvalues, bits)
    chex.assert_trees_all_equal(unpack(planes, bits, rows), qvalues)
    whole = unpack(planes, bits)
    assert whole.dtype == jnp.int8
    assert whole.shape == (packed_rows(rows, bits), 3)
    assert not whole[rows:].any()


@pytest.mark.parametrize("bits", BITS)
def test_a_weight_takes_exactly_its_bits(bits):
    planes = pack(qvalues_of(bits, 512, 16), bits)
    assert 8 * sum(plane.nbytes for plane in planes) == bits * 512 * 16
    assert sum(plane_widths(bits)) == bits


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_layout(bits):
    """Eight rows of quantized values come from one slot of eight rows of words."""
    row, column = 300, 1
    qvalues = (
        jnp.zeros((512, 2), jnp.int8).at[row, column].set(-1)
    )  # all bits of one quantized value
    for plane, width in zip(pack(qvalues, bits), plane_widths(bits)):
        slots = 32 // width
        expected = np.zeros(plane.shape, np.uint32)
        word = row // (8 * slots) * 8 + row % 8
        expected[word, column] = (2**width - 1) << (width * (row // 8 % slots))
        np.testing.assert_array_equal(plane, expected)


@pytest.mark.parametrize("bits", BITS)
def test_tiles_unpack_alone(bits):
    qvalues = qvalues_of(bits, 768)
    tile = [
        plane[256 // count : 512 // count]
        for plane, count in zip(as_words(pack(qvalues, bits)), values_per_row(bits))
    ]
    chex.assert_trees_all_equal(unpack_tile(tile, bits).astype(jnp.int8), qvalues[256:512])


def test_packing_under_jit():
    qvalues = qvalues_of(3, 40)
    packed = jax.jit(pack, static_argnums=1)(qvalues, 3)
    chex.assert_trees_all_equal(packed, pack(qvalues, 3))


def test_logical_bits_of_a_language_model():
    """Qwen2-7B: 28 layers of 233,046,016 weights at W3 in groups of 128 are 2.600 GB."""
    bits = bits_per_weight(3, 128, zero_bits=8)
    assert bits == 3.1875
    assert 28 * 233_046_016 * bits / 8 == pytest.approx(2.600e9, rel=1e-4)
    assert bits_per_weight(4, 4096) == 4 + 16 / 4096


@pytest.mark.parametrize(
    ("qvalues", "bits", "message"),
    [
        (jnp.zeros((8, 2), jnp.int8), 1, "quantized values have .* bits, got bits=1"),
        (jnp.zeros((8, 2), jnp.int8), 9, "quantized values have .* bits, got bits=9"),
        (jnp.zeros((8, 2), jnp.int32), 4, "must be int8, got int32"),
        (jnp.zeros((8,), jnp.int8), 4, r"must be \[K, N\]"),
        (jnp.full((8, 2), 8, jnp.int8), 4, r"lie in -8 ... 7, got 8 ... 8; subtract 8"),
        (jnp.full((8, 2), -5, jnp.int8), 3, r"lie in -4 ... 3"),
    ],
)
def test_pack_errors(qvalues, bits, message):
    with pytest.raises(ValueError, match=message):
        pack(qvalues, bits)


def test_unpack_errors():
    planes = pack(qvalues_of(3, 256), 3)
    with pytest.raises(ValueError, match=r"4-bit values are packed as uint32\[K/8, N\]"):
        unpack(planes, 4)
    with pytest.raises(
        ValueError, match=r"K a multiple of 256; got uint32\[8, 3\], uint32\[16, 3\]"
    ):
        unpack(planes[::-1], 3)
    with pytest.raises(ValueError, match="there are 256 packed rows, cannot unpack 257"):
        unpack(planes, 3, 257)
    with pytest.raises(ValueError, match="8-bit values are packed as int8"):
        unpack(planes[:1], 8)
