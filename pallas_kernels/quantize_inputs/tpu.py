"""TPUs (Mosaic): a grid over samples and tiles of tokens; rows never leave VMEM half done.

A rotation H_a (x) H_b is applied to the transposed tile [a b, tokens]: the product with H_b is of b
neighboring sublanes, for the matrix unit; that with H_a adds whole tiles of b rows. The factors
are joined into two such matrices. Rows beyond an uneven edge are quantized too, and clipped.
"""

from __future__ import annotations

import math
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.quantize_inputs.reference import Factors, Modulation, Results, quantize_rows
from pallas_kernels.tiling import pad_axis, round_up

_TOKENS = 128  # of a tile: the lanes of a transposed one
_VMEM = 64 * 2**20  # the least that a chip has, of those we compile for
_BYTES = (
    24  # of a channel of a token: two buffers of x and quantized values, and float32 on the way
)


def refusal(width: int, orders: tuple[int, ...]) -> str | None:
    """Why the kernel cannot run rows of this width with factors of these orders, or None."""
    widest = _VMEM // (_BYTES * _TOKENS)
    if width > widest:
        return f"tiles of {_TOKENS} rows fit VMEM up to {widest} channels, got {width}; use 'xla'"
    if orders and width % 128:
        return f"rotated rows must have a multiple of 128 channels, got {width}; use 'xla'"
    if orders and not _splits(orders):
        return f"the last orders' product must be a multiple of 8, got orders {orders}; use 'xla'"
    return None


def quantize_inputs(
    x: jax.Array,
    modulation: Modulation,
    multiplier: jax.Array | None,
    factors: Factors,
    *,
    bits: int,
    interpret: bool,
) -> Results:
    """One kernel; operands and results are those of the reference."""
    batch, tokens, width = x.shape
    rows = _TOKENS if factors else min(_TOKENS, round_up(tokens, 32))
    if tokens < rows:
        x = pad_axis(x, 1, rows)
    outer, inner = split(factors)
    by_token = partial(pl.BlockSpec, index_map=lambda b, t: (b, t, 0))
    by_sample = pl.BlockSpec((None, 1, width), lambda b, t: (b, 0, 0))
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    operands = (
        x,
        None if modulation is None else tuple(part[:, None] for part in modulation),
        None if multiplier is None else multiplier[None],
        outer,
        None if inner is None else inner.T,
    )
    specs = (
        by_token((None, rows, width)),
        None if modulation is None else (by_sample, by_sample),
        None if multiplier is None else whole,
        None if outer is None else pl.BlockSpec(memory_space=pltpu.SMEM),
        None if inner is None else whole,
    )
    shape = x.shape[:2]
    out = (
        jax.ShapeDtypeStruct((*shape, width), jnp.int8),
        jax.ShapeDtypeStruct((*shape, 1), jnp.float32),
        jax.ShapeDtypeStruct((*shape, 1), jnp.int32),
    )
    turned = pltpu.VMEM((width, rows), jnp.float32)
    grid = batch, pl.cdiv(shape[1], rows)
    products = sum(0 if m is None else m.shape[0] for m in (outer, inner))
    found = pl.pallas_call(
        partial(_kernel, bits=bits),
        name=f"quantize_inputs_{bits}bit",
        grid=grid,
        in_specs=specs,
        out_specs=tuple(by_token((None, rows, part.shape[2])) for part in out),
        out_shape=out,
        scratch_shapes=[
            turned if inner is not None else None,
            turned if outer is not None else None,
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"),
            vmem_limit_bytes=max(16 * 2**20, _BYTES * _TOKENS * width),
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * math.prod(grid) * rows * width * products,
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, out))),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)
    return tuple(part[:, :tokens] for part in found)


def _kernel(x, modulation, multiplier, outer, inner, qvalues, scales, sums, turned, mixed, *, bits):
    y = x[...].astype(jnp.float32)
    if modulation is not None:
        shift, scale = (part[...].astype(jnp.float32) for part in modulation)
        y = y * (1 + scale) + shift
    if multiplier is not None:
        y *= multiplier[...]
    if inner is not None:
        turned[...] = y.T
        _rotate(outer, inner, turned, mixed)
        y = (turned if outer is None else mixed)[...].T
    qvalues[...], scales[...], sums[...] = quantize_rows(y, bits)


def _rotate(outer: Any, inner: Any, turned: Any, mixed: Any) -> None:
    """Multiply the columns of `turned` [a b, tokens], by H_a into `mixed`.

    Args:
        outer, inner: H_a (or None) and H_b transposed.
        turned, mixed: where results stand: `mixed` if there is H_a, else `turned`.
    """
    size = inner.shape[0]
    parts = turned.shape[0] // size

    def part(index: Any) -> Any:
        return pl.ds(pl.multiple_of(index * size, 8), size)

    def within(index: jax.Array, _: None) -> None:
        product = jnp.matmul(inner[...], turned[part(index)], precision="highest")
        turned[part(index)] = product

    jax.lax.fori_loop(0, parts, within, None)
    if outer is None:
        return
    order = outer.shape[0]

    def across(index: jax.Array, _: None) -> None:
        first = jax.lax.div(index, order) * order

        def add(row: jax.Array, total: jax.Array) -> jax.Array:
            return total + outer[row, index - first] * turned[part(first + row)]

        zeros = jnp.zeros((size, turned.shape[1]), jnp.float32)
        mixed[part(index)] = jax.lax.fori_loop(0, order, add, zeros)

    jax.lax.fori_loop(0, parts, across, None)


def split(factors: Factors) -> tuple[jax.Array | None, jax.Array | None]:
    """The factors joined into H_a (None if there is none) and H_b, where least work is left.

    An element of a product with H_a takes the vector unit about as long as eight of one with H_b
    take the matrix unit, which pads b to 128.
    """
    if not factors:
        return None, None
    orders = tuple(factor.shape[0] for factor in factors)
    at = min(
        _splits(orders),
        key=lambda k: 8 * math.prod(orders[:k]) * (k > 0) + round_up(math.prod(orders[k:]), 128),
    )
    return reduce(jnp.kron, factors[:at]) if at else None, reduce(jnp.kron, factors[at:])


def _splits(orders: tuple[int, ...]) -> list[int]:
    """How many factors may come before those of H_b, whose order is a multiple of 8."""
    return [at for at in range(len(orders)) if math.prod(orders[at:]) % 8 == 0]
