"""Grouped products in XLA's own terms: blocks of rows in a loop on a CPU, `ragged_dot` elsewhere.

XLA's `ragged_dot` is a grouped kernel on a TPU. On a CPU it multiplies all rows by all matrices
(jaxlib 0.10 to 0.12). There a loop takes blocks of consecutive rows of one group:

    for each group, for each block of at most B of its rows:  y[block] = x[block] W[group]

A block reads B rows whatever is left of its group. What it writes beyond is overwritten by the
blocks of the next groups, which follow: rows are neither padded nor gathered. As many blocks run as
there are, ceil(rows / B) for each group: an empty group costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.float_matmul import matmul, matmul_transposed
from pallas_kernels.implementation import has_sizes
from pallas_kernels.marks import declared
from pallas_kernels.tiling import pad_axis

LARGEST = 128  # rows of a block

PyTree = Any


class Blocks(NamedTuple):
    """Blocks of rows, each of one group.

    Attributes:
        group, start: of every block, int32[blocks]; the first `used` ones count.
        used: how many there are, int32[].
        rows: of a block; static.
        ends: the row after the last one of every group, int32[G].
    """

    group: jax.Array
    start: jax.Array
    used: jax.Array
    rows: int
    ends: jax.Array

    @classmethod
    def of(cls, group_sizes: jax.Array, rows: int) -> Blocks:
        """The blocks of so many sorted rows."""
        groups = group_sizes.shape[0]
        size = block_rows(rows, groups)
        sizes = group_sizes.astype(jnp.int32)
        counts = -(-sizes // size)
        last, ends = jnp.cumsum(counts), jnp.cumsum(sizes)
        number = jnp.arange(rows // size + min(groups, rows), dtype=jnp.int32)
        group = jnp.searchsorted(last, number, side="right").astype(jnp.int32)
        group = jnp.minimum(group, groups - 1)
        start = (ends - sizes)[group] + (number - (last - counts)[group]) * size
        return cls(group, start, last[-1], size, ends)


def block_rows(rows: int, groups: int) -> int:
    """Rows of a block: about as many as a group has on average, a power of two."""
    mean = max(rows // groups, 1)
    return min(1 << (mean - 1).bit_length(), LARGEST)


def grouped_matmul(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """x [M, K], w [G, K, N] -> [M, N]."""

    def in_blocks(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        return by_groups(matmul, x, w, sizes, w.shape[2])

    if not has_sizes((x, w)):
        return _ragged(x, w, group_sizes)
    out = x.shape[0] * w.shape[2]
    moved = (x.size + min(x.shape[0], w.shape[0]) * w[0].size + out) * x.dtype.itemsize
    counted = declared(
        in_blocks, flops=2 * out * w.shape[1], bytes_accessed=moved, elements=max(out, 1)
    )
    return jax.lax.platform_dependent(x, w, group_sizes, cpu=counted, default=_ragged)


def _ragged(x: jax.Array, w: jax.Array, group_sizes: jax.Array) -> jax.Array:
    out = jax.lax.ragged_dot(
        x, w, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32
    )
    return _rows_of_groups(out, group_sizes).astype(x.dtype)


def _rows_of_groups(out: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Zeros in rows of no group; what a kernel leaves there is not defined."""
    within = jnp.arange(out.shape[0]) < jnp.sum(group_sizes)
    return jnp.where(within[:, None], out, 0)


def by_groups(
    product: Callable[[jax.Array, PyTree], jax.Array],
    x: jax.Array,
    w: PyTree,
    group_sizes: jax.Array,
    columns: int,
) -> jax.Array:
    """Rows of every group times its own matrix by any product, in a loop over blocks of rows.

    Args:
        product: (rows [B, K], the matrix of a group) -> [B, columns] in the rows' dtype.
        x: [M, K], sorted by group.
        w: tree of arrays with a leading axis of groups.
        group_sizes: int[G].
        columns: outputs of the product.

    Returns:
        [M, columns], zeros in rows of no group.
    """
    rows = x.shape[0]
    blocks = Blocks.of(group_sizes, rows)
    padded = pad_axis(x, 0, rows + blocks.rows)

    def step(number: jax.Array, out: jax.Array) -> jax.Array:
        start, own = blocks.start[number], blocks.group[number]
        some = jax.lax.dynamic_slice_in_dim(padded, start, blocks.rows)
        matrix = jax.tree.map(lambda leaf: leaf[own], w)
        return jax.lax.dynamic_update_slice_in_dim(out, product(some, matrix), start, 0)

    blank = jnp.zeros((rows + blocks.rows, columns), x.dtype)
    out = jax.lax.fori_loop(0, blocks.used, step, blank)[:rows]
    return _rows_of_groups(out, group_sizes)


def gradients(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of x and w."""
    if not has_sizes((x, w)):
        return _ragged_gradients(x, w, group_sizes, dy)
    return jax.lax.platform_dependent(
        x, w, group_sizes, dy, cpu=_gradients_in_blocks, default=_ragged_gradients
    )


def _ragged_gradients(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return jax.vjp(lambda x, w: _ragged(x, w, group_sizes), x, w)[1](dy)


def _gradients_in_blocks(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dx = by_groups(matmul_transposed, dy, w, group_sizes, w.shape[1])
    rows = x.shape[0]
    blocks = Blocks.of(group_sizes, rows)
    x, dy = (pad_axis(each, 0, rows + blocks.rows) for each in (x, dy))

    def step(number: jax.Array, dw: jax.Array) -> jax.Array:
        start, own = blocks.start[number], blocks.group[number]
        some, given = (jax.lax.dynamic_slice_in_dim(each, start, blocks.rows) for each in (x, dy))
        within = start + jnp.arange(blocks.rows) < blocks.ends[own]
        some = jnp.where(within[:, None], some, 0)
        return dw.at[own].add(jnp.dot(some.T, given, preferred_element_type=jnp.float32))

    dw = jax.lax.fori_loop(0, blocks.used, step, jnp.zeros(w.shape, jnp.float32))
    return dx, dw.astype(w.dtype)
