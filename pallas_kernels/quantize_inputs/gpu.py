"""Values on GPUs (Triton): a program for each row, which it holds as [blocks, n_1 ... n_k].

Each axis is padded with zeros to a power of two, those of factors to 16 at least, as products want.
The factors' products follow each other, each along its own axis.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.quantize_inputs.factors import join, joined_orders
from pallas_kernels.quantize_inputs.reference import Factors, Modulation, Results
from pallas_kernels.tiling import pad_axis

_ELEMENTS = 16384  # of a padded row, in the registers of 256 threads
_LARGEST = 128  # order of a factor that shared memory holds


def refusal(width: int, orders: tuple[int, ...]) -> str | None:
    """Why the kernel cannot run rows of this width with factors of these orders, or None."""
    orders = joined_orders(orders, partial(_cost, width))
    if max((1, *orders)) > _LARGEST:
        return f"factors of orders up to {_LARGEST} fit shared memory, got {orders}; use 'xla'"
    padded = math.prod(_padded(width, orders))
    if padded > _ELEMENTS:
        return (
            f"a row of {width} channels is {padded} with each axis padded, and registers hold "
            f"{_ELEMENTS}; use 'xla'"
        )
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
    factors = join(factors, partial(_cost, width))
    orders = tuple(factor.shape[0] for factor in factors)
    padded = _padded(width, orders)
    small = tuple(
        pad_axis(pad_axis(factor, 0, size), 1, size) for factor, size in zip(factors, padded[1:])
    )
    operands = x, modulation, multiplier, small
    out = (
        jax.ShapeDtypeStruct(x.shape, jnp.int8),
        jax.ShapeDtypeStruct((batch, tokens, 1), jnp.float32),
        jax.ShapeDtypeStruct((batch, tokens, 1), jnp.int32),
    )
    return pl.pallas_call(
        partial(_kernel, bits=bits, orders=orders, padded=padded),
        name=f"quantize_inputs_{bits}bit",
        grid=(tokens, batch),  # a GPU's first axis is the long one
        out_shape=out,
        compiler_params=plgpu.CompilerParams(
            num_warps=8 if math.prod(padded) > 4096 else 4, num_stages=1
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * batch * tokens * math.prod(padded) * sum(padded[1:]),
            bytes_accessed=sum(a.size * a.dtype.itemsize for a in jax.tree.leaves((operands, out))),
            transcendentals=0,
        ),
        interpret=interpret,
    )(*operands)


def _kernel(x, modulation, multiplier, factors, qvalues, scales, sums, *, bits, orders, padded):
    token, sample = pl.program_id(0), pl.program_id(1)
    sizes = x.shape[-1] // math.prod(orders), *orders
    channel, valid = jnp.zeros(padded, jnp.int32), jnp.full(padded, True)
    for axis, size in enumerate(sizes):
        place = jnp.arange(padded[axis]).reshape(
            [-1 if k == axis else 1 for k in range(len(sizes))]
        )
        channel = channel * size + place
        valid &= place < size

    def load(ref: Any, *row: Any) -> jax.Array:
        return plgpu.load(ref.at[*row, channel], mask=valid, other=0).astype(jnp.float32)

    y = load(x, sample, token)
    if modulation is not None:
        shift, scale = (load(part, sample) for part in modulation)
        y = y * (1 + scale) + shift
    if multiplier is not None:
        y *= load(multiplier)
    for axis, factor in enumerate(factors, start=1):
        y = jnp.moveaxis(y, axis, -1)
        shape = y.shape
        y = jnp.matmul(y.reshape(-1, shape[-1]), factor[...], precision="highest").reshape(shape)
        y = jnp.moveaxis(y, -1, axis)
    most = 2 ** (bits - 1) - 1
    scale = jnp.max(jnp.abs(y)) / most
    scale = jnp.where(scale > 0, scale, 1.0)
    q = jnp.clip(_round(y / scale), -most - 1, most).astype(jnp.int32)
    plgpu.store(qvalues.at[sample, token, channel], q.astype(jnp.int8), mask=valid)
    scales[sample, token, 0] = scale
    sums[sample, token, 0] = jnp.sum(q)


def _round(y: jax.Array) -> jax.Array:
    """Half to even, which Triton has no operation for."""
    low = jnp.floor(y)
    odd = low != 2 * jnp.floor(low / 2)
    return low + ((y - low > 0.5) | (odd & (y - low == 0.5))).astype(jnp.float32)


def _cost(width: int, orders: tuple[int, ...]) -> int:
    """Multiply-adds of a padded row; what shared memory does not hold costs most."""
    padded = _padded(width, orders)
    return math.prod(padded) * sum(padded[1:]) * (1 if max(orders) <= _LARGEST else 10**6)


def _padded(width: int, orders: tuple[int, ...]) -> tuple[int, ...]:
    """Sides of a row's block: of what the factors leave, then of each factor."""
    blocks = pl.next_power_of_2(width // math.prod(orders))
    return (
        max(16, blocks) if len(orders) == 1 else blocks,  # so that products have 16 rows
        *(max(16, pl.next_power_of_2(order)) for order in orders),
    )
