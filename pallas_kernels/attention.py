"""Dense attention: softmax(q k^T / sqrt(D)) v over all keys.

Letters: B batch, S queries, T keys, H query heads, K key heads (query head h reads key head
h // (H / K)), D head width, E value width. Logits, softmax and sums are float32; the products run
in the inputs' dtype.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels.block_mask import EVERYTHING
from pallas_kernels.block_sparse_attention import block_sparse_attention, xla
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.operation import (
    KERNELS,
    Problem,
    check,
    heads_first,
    logit_scale,
    refusal,
)
from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.on_mesh import Cut
from pallas_kernels.tiling import pad_axis

# Above this many logits per head, "xla" takes a block of queries at a time.
WHOLE = 1 << 18


def dense_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Attend from every query to every key.

    The reference and the kernels are those of `block_sparse_attention`, with all blocks in the
    lists.

    Args:
        q: float[B, S, H, D].
        k: float[B, T, K, D].
        v: float[B, T, K, E].
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        [B, S, H, E] in v's dtype.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    check(q, k, v)
    problem = Problem(
        operation="dense_attention",
        mask=EVERYTHING,
        arithmetic=Arithmetic(logit_scale(None, q), v.dtype.name),
        implementation=implementation,
        interpret=interpret,
    )
    listed = partial(block_sparse_attention, mask=EVERYTHING, interpret=interpret)
    return dispatch(
        problem.operation,
        implementation,
        {
            "reference": partial(
                block_sparse_attention, mask=EVERYTHING, implementation="reference"
            ),
            "xla": dense_in_xla,
        }
        | {name: partial(listed, implementation=name) for name in KERNELS},
        *(q, k, v),
        refusal=partial(refusal, problem, Heads(*heads_first(q, k, v)), None),
        cut=Cut(("b.h.",) * 3, "b.h."),
        interpret=interpret,
    )


def dense_in_xla(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The program without kernels, for operands that fit."""
    (batch, queries, heads, width), keys = q.shape, k.shape[1]
    scaled = q * jnp.asarray(width**-0.5, q.dtype)
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (scaled, k, v))
    q = q.reshape(batch, k.shape[1], -1, width)  # query heads of one key head are more queries
    if queries * keys <= WHOLE:
        out = _attend(q, k, v)
    else:
        # The largest power of two of queries whose logits fit.
        rows = min(max(1 << (8 * WHOLE // keys).bit_length() - 1, 64), 512)
        out = _by_rows(q, k, v, rows)
    return out.reshape(batch, heads, queries, -1).transpose(0, 2, 1, 3)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Whole attention of (scaled) queries [..., S, D]."""
    return xla.attend(xla.scores(q, k), v, v.dtype.name)[0]


def _by_rows(q: jax.Array, k: jax.Array, v: jax.Array, rows: int) -> jax.Array:
    """`_attend` on [B, K, S, D], one key head and one block of queries after the other."""
    batch, heads, length, _ = q.shape
    tiles = pad_axis(q, 2, rows).reshape(batch * heads, -1, rows, q.shape[-1])
    k, v = (x.reshape(batch * heads, *x.shape[2:]) for x in (k, v))
    # Recomputed in the backward pass, which would else keep all weights.
    attend = jax.checkpoint(_attend)

    def of_head(operands: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        tiles, k, v = operands
        return jax.lax.map(lambda q: attend(q, k, v), tiles)

    out = jax.lax.map(of_head, (tiles, k, v))
    return out.reshape(batch, heads, -1, v.shape[-1])[:, :, :length]
