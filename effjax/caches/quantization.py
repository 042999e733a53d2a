"""Values of what a cache holds: integers of 8 or 4 bits, each with a scale and an offset."""

from __future__ import annotations

from typing import Annotated

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from effjax.fields import OneOf
from effjax.quant import FLOAT
from pallas_kernels.decode_attention import pack_int4

Bits = Annotated[int, OneOf(4, 8, FLOAT)]


def to_qvalues(x: Float[Array, "..."], bits: int, *, axis: int) -> tuple[Array, Array, Array]:
    """Values int8, scales and offsets float32, one along an axis: x = qvalue scale + offset."""
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    scale = jnp.maximum((high - low) / (2**bits - 1), 1e-8)
    half = 2 ** (bits - 1)
    qvalues = jnp.clip(jnp.round((x - low) / scale), 0, 2**bits - 1) - half
    return qvalues.astype(jnp.int8), scale, low + half * scale


def from_qvalues(
    qvalues: Integer[Array, "... E"],
    scale: Float[Array, "... 1"],
    offset: Float[Array, "... 1"],
    bits: int,
) -> Float[Array, "... D"]:
    """float32 of packed values with a scale and an offset for their last axis."""
    return unpack(qvalues, bits).astype(jnp.float32) * scale + offset


def pack(qvalues: Integer[Array, "... D"], bits: int) -> Integer[Array, "... E"]:
    """Two 4-bit values in a byte, see `pallas_kernels.decode_attention.pack_int4`."""
    return pack_int4(qvalues) if bits == 4 else qvalues


def unpack(qvalues: Integer[Array, "... E"], bits: int) -> Integer[Array, "... D"]:
    """The inverse of `pack`."""
    if bits != 4:
        return qvalues
    planes = (qvalues << 4).astype(jnp.int8), qvalues.astype(jnp.int8)  # the sign bit on top
    return jnp.concatenate([plane >> 4 for plane in planes], axis=-1)
