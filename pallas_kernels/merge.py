"""Merging attention over parts of the keys: softmax over a union, from the parts' log-sum-exps.

Over a set P of keys, attention gives o_P = sum_{t in P} e^{s_t} v_t / e^{L_P} with the log-sum-exp
L_P = log sum_{t in P} e^{s_t}. Over the union of disjoint sets, L = log sum_P e^{L_P} and
o = sum_P e^{L_P - L} o_P.
The merge is associative and commutative, so that parts may come from anywhere: splits of a long
cache, a compressed and an exact part of it, devices that hold different keys.

An empty part has L = -inf and o = 0. The merge of empty parts is empty again; no NaN arises.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array


def merge(
    outputs: Sequence[Array] | Array, log_sum_exps: Sequence[Array] | Array
) -> tuple[Array, Array]:
    """Merge partial attention results over disjoint sets of keys.

    Args:
        outputs: the parts' normalized outputs, float[..., D] each: a sequence, or one array with
            the parts along its first axis.
        log_sum_exps: the parts' log-sum-exps of the scaled scores (natural logarithm), float[...]
            each; -inf for a part without keys, whose output must then be finite and is ignored.

    Returns:
        Output [..., D] in the parts' dtype and log-sum-exp float32[...]; a row that is empty in
        every part gives zeros and -inf.

    Raises:
        ValueError: without parts, or if outputs and log-sum-exps differ in number or shape.

    Source: LeanAttention, arXiv 2405.10480; FlashDecoding.
    """
    if len(outputs) == 0 or len(outputs) != len(log_sum_exps):
        raise ValueError(
            f"merge needs one log-sum-exp for each output and at least one part; got "
            f"{len(outputs)} outputs and {len(log_sum_exps)} log-sum-exps"
        )
    output, weight = jnp.stack(list(outputs)), jnp.stack(list(log_sum_exps)).astype(jnp.float32)
    if output.shape[:-1] != weight.shape:
        raise ValueError(
            f"the log-sum-exps must have the outputs' shape without its last axis, "
            f"{output.shape[1:-1]}; got {weight.shape[1:]}"
        )
    peak = _finite(jnp.max(weight, axis=0))
    weight = jnp.exp(weight - peak)
    total = jnp.sum(weight, axis=0)
    merged = jnp.sum(weight[..., None] * output.astype(jnp.float32), axis=0)
    merged = merged / _nonzero(total)[..., None]
    return merged.astype(output.dtype), _log_sum(peak, total)


def merge_rows(
    outputs: Array, log_sum_exps: Array, rows: Array, *, count: int
) -> tuple[Array, Array]:
    """Merge parts that belong to different rows: part i is added to row `rows[i]` of `count` rows.

    Args:
        outputs, log_sum_exps: the parts, float[P, ..., D] and float[P, ...], as in `merge`.
        rows: int32[P], 0 ... count - 1.
        count: number of rows R.

    Returns:
        float32[R, ..., D] and float32[R, ...]; a row without parts gives zeros and -inf.
    """
    weight = log_sum_exps.astype(jnp.float32)
    peak = _finite(jax.ops.segment_max(weight, rows, num_segments=count))
    weight = jnp.exp(weight - peak[rows])
    total = jax.ops.segment_sum(weight, rows, num_segments=count)
    merged = jax.ops.segment_sum(
        weight[..., None] * outputs.astype(jnp.float32), rows, num_segments=count
    )
    return merged / _nonzero(total)[..., None], _log_sum(peak, total)


def _finite(peak: Array) -> Array:
    """A maximum to subtract: 0 where all parts are empty, so that -inf - (-inf) never occurs."""
    return jnp.where(jnp.isfinite(peak), peak, 0.0)


def _log_sum(peak: Array, total: Array) -> Array:
    return jnp.where(total > 0, peak + jnp.log(_nonzero(total)), -jnp.inf)


def _nonzero(total: Array) -> Array:
    return jnp.where(total > 0, total, 1.0)
