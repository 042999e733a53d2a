"""Products of float rows with a matrix, summed in float32, in the forms that a CPU is fast at.

On a CPU, XLA gives a product to its library of kernels in some forms only, by layout and number of
rows; else it copies bfloat16 matrices to float32, or multiplies element by element. The library
(of jaxlib 0.10 to 0.12) takes

    few rows of bfloat16 or int8     with rows of zeros, `ROWS` in all
    bfloat16 and a transposed matrix as matrix times transposed rows, with columns of zeros, so that
                                     the transposition of the rows is not folded into the product
    few rows of float32, transposed  with rows of zeros, four in all

On other platforms products stay as they are written.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from pallas_kernels.implementation import has_sizes
from pallas_kernels.marks import declared
from pallas_kernels.tiling import pad_axis

ROWS = 8  # fewer rows of bfloat16 or int8 are padded to these

Product = Callable[[jax.Array, jax.Array], jax.Array]

_HALVES = (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16))


def matmul(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] times w [K, N], in their common dtype.

    Half precision is summed in float32 and rounded once; its gradients are products in half
    precision.
    """
    return _halves(x, w) if x.dtype in _HALVES else jnp.dot(x, w)


def few_rows(product: Product) -> Product:
    """A product [..., K] x [K, N] -> [..., N] whose few rows get rows of zeros on a CPU."""

    def padded(x: jax.Array, w: jax.Array) -> jax.Array:
        rows = x.reshape(-1, x.shape[-1])
        out = product(pad_axis(rows, 0, ROWS), w)[: rows.shape[0]]
        return out.reshape(*x.shape[:-1], w.shape[1])

    def choose(x: jax.Array, w: jax.Array) -> jax.Array:
        if not has_sizes((x, w)) or not 0 < math.prod(x.shape[:-1]) < ROWS or not w.size:
            return product(x, w)
        return jax.lax.platform_dependent(x, w, cpu=_counted(padded, x, w), default=product)

    return choose


@jax.custom_jvp
def matmul_transposed(x: jax.Array, w: jax.Array) -> jax.Array:
    """x [..., K] times the transpose of w [N, K], in their common dtype; as `matmul` else."""

    def plain(x: jax.Array, w: jax.Array) -> jax.Array:
        return _rounded_once(x, w.T) if x.dtype in _HALVES else jnp.dot(x, w.T)

    if not has_sizes((x, w)) or not x.size or not w.size:
        return plain(x, w)
    on_cpu = _counted(_transposed_on_cpu, x, w)
    return jax.lax.platform_dependent(x, w, cpu=on_cpu, default=plain)


@matmul_transposed.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w), (dx, dw) = primals, tangents
    return matmul_transposed(x, w), jnp.dot(dx, w.T) + jnp.dot(x, dw.T)


def _transposed_on_cpu(x: jax.Array, w: jax.Array) -> jax.Array:
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if x.dtype in _HALVES:
        columns = pad_axis(rows.T, 1, ROWS * (count // ROWS + 1))
        out = _rounded_once(w, columns).T
    else:
        out = jnp.dot(pad_axis(rows, 0, max(count, 4)), w.T)
    return out[:count].reshape(*x.shape[:-1], w.shape[0])


# A sum in float32 has gradients that are products of mixed dtypes, for which matrices are copied.
@jax.custom_jvp
def _halves(x: jax.Array, w: jax.Array) -> jax.Array:
    return few_rows(_rounded_once)(x, w)


@_halves.defjvp
def _(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    (x, w), (dx, dw) = primals, tangents
    return _halves(x, w), jnp.dot(dx, w) + jnp.dot(x, dw)


def _rounded_once(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def _counted(function: Product, x: jax.Array, w: jax.Array) -> Product:
    """A form of a product that counts as the product itself, without its padding."""
    out = jax.eval_shape(function, x, w)
    return declared(
        function,
        flops=2 * out.size * x.shape[-1],
        bytes_accessed=sum(each.size * each.dtype.itemsize for each in (x, w, out)),
        elements=out.size,
    )
