"""Products of sorted rows, each with the matrix of its group: the experts of a layer.

    y_m = x_m W_g    for the group g of row m;  0 for rows of no group

M rows (tokens, once for each of their experts, sorted by expert), K inputs, N outputs, G groups.
The first `group_sizes[0]` rows belong to group 0, the next ones to group 1, and so on; groups may
be empty, and rows behind the last group belong to none.

Platforms: `reference` and `xla` everywhere. The latter is a loop over blocks of rows on a CPU, and
XLA's grouped kernel (`jax.lax.ragged_dot`) elsewhere. Source: MegaBlocks, arXiv 2211.15841.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import reference, xla
from pallas_kernels.grouped_matmul.xla import by_groups
from pallas_kernels.implementation import Implementation, dispatch

__all__ = ["by_groups", "grouped_matmul"]


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Multiply rows by the matrices of their groups; half precision is summed in float32.

    Args:
        x: float[M, K], sorted by group.
        w: [G, K, N] of the same dtype.
        group_sizes: integers [G]; their sum must not exceed M, which is not checked.
        implementation: as in `pallas_kernels.implementation.dispatch`.

    Returns:
        [M, N] in x's dtype, differentiable in x and w.

    Raises:
        ValueError: for shapes or dtypes that disagree.
    """
    name = "grouped_matmul"
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[1] or x.dtype != w.dtype:
        raise ValueError(
            f"{name}: x is [M, K] and w [G, K, N] of the same dtype, got {x.dtype}{list(x.shape)} "
            f"and {w.dtype}{list(w.shape)}"
        )
    if group_sizes.shape != w.shape[:1] or not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(
            f"{name}: group_sizes are integers, one for each of {w.shape[0]} groups; got "
            f"{group_sizes.dtype}{list(group_sizes.shape)}"
        )
    programs = {"reference": reference.grouped_matmul, "xla": xla.grouped_matmul}

    @jax.custom_vjp
    def run(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        if not x.size or not w.size:
            return jnp.zeros((x.shape[0], w.shape[2]), x.dtype)
        return dispatch(name, implementation, programs, x, w, sizes, refusal=lambda kernel: None)

    def forward(*operands: jax.Array) -> tuple[jax.Array, tuple]:
        return run(*operands), operands

    def backward(operands: tuple, dy: jax.Array) -> tuple:
        x, w, sizes = operands
        return *xla.gradients(x, w, sizes, dy), np.zeros(sizes.shape, jax.dtypes.float0)

    run.defvjp(forward, backward)
    return run(x, w, group_sizes)
