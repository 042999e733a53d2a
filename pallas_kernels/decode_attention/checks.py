"""What decode attention's arguments must be, and the errors that say so."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array

MAX_QUERIES = 8


def check_queries(q: Array) -> None:
    """A few query tokens [B, S, H, D]."""
    if q.ndim != 4 or q.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"q must be [B, S, H, D] in float32, bfloat16 or float16; got {q.dtype}{q.shape}"
        )
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(
            f"decode attention takes 1 ... {MAX_QUERIES} query tokens, got S = {q.shape[1]}; for "
            f"more (prefill) use pallas_kernels.block_sparse_attention"
        )
    if q.shape[3] == 0:
        raise ValueError("the head dim must be at least 1, got 0")


def check_cache(q: Array, x: Array, name: str, shape: tuple[int | None, ...]) -> None:
    """An array of this shape (None: any size) in the dtype of the queries."""
    check_shape(x, name, shape)
    if x.dtype != q.dtype:
        raise ValueError(
            f"{name} must have q's dtype {q.dtype}, got {x.dtype}; convert one of them, or use "
            f"quantized_decode_attention for integers"
        )


def check_shape(x: Array, name: str, shape: tuple[int | None, ...], kind: str = "") -> None:
    """An array of this shape (None: any size), of floats or ints if asked for."""
    kinds = {"float": jnp.floating, "int": jnp.integer, "": jnp.generic}
    fits = len(x.shape) == len(shape) and all(
        wanted in (None, size) for wanted, size in zip(shape, x.shape)
    )
    if not fits or not jnp.issubdtype(x.dtype, kinds[kind]):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be {kind}[{wanted}], got {x.dtype}{x.shape}")


def check_scales(shape: tuple[int | None, ...], **scales: Array | None) -> None:
    """Scales and offsets of one shape, by their names, those that there are."""
    for name, scale in scales.items():
        if scale is not None:
            check_shape(scale, name, shape, "float")


def check_width(width: int, bits: int) -> None:
    """A head dim whose quantized values fill whole bytes."""
    if (width * bits) % 8:
        raise ValueError(f"two 4-bit values to the byte need an even head dim, got D = {width}")


def check_places(
    starts: Sequence[int], capacities: Sequence[int], tokens: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Starts and capacities of heads in a flat cache, as tuples of ints."""
    starts, capacities = tuple(map(int, starts)), tuple(map(int, capacities))
    stops = [start + capacity for start, capacity in zip(starts, capacities)]
    order = sorted(range(len(starts)), key=lambda h: starts[h])
    overlap = any(stops[a] > starts[b] for a, b in itertools.pairwise(order))
    if len(starts) != len(capacities) or not starts or min(capacities) < 1 or overlap:
        raise ValueError(
            f"head_start and head_capacity must give each key head a stretch of at least one slot "
            f"of its own; got {starts} and {capacities}"
        )
    if min(starts) < 0 or max(stops) > tokens:
        raise ValueError(
            f"heads must lie within the cache's {tokens} slots; they span {min(starts)} ... "
            f"{max(stops)}"
        )
    return starts, capacities


def qvalue_bits(qvalues: Array, name: str) -> int:
    """Bits of a quantized value, by the dtype of the array that holds them."""
    bits = {"int8": 8, "uint8": 4}.get(str(qvalues.dtype))
    if bits is None:
        raise ValueError(
            f"{name} must be int8 values, or uint8 with two 4-bit values each; got {qvalues.dtype}"
        )
    return bits
