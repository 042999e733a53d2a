"""Attention on integers: int8 q k^T, and probabilities times values in int8, float8 or floats.

    k' = k - mean_t(k)                    smoothing: adds the same number to all logits of a query
    q = s_q q_int,  k' = s_k k_int        s = max |x| / n over one or several tokens, n = 127
    logits = (q_int . k_int) s_q s_k scale
    p_int = round(n p / p_max)            p_max: the largest weight of a query, or of a block of
                                          queries, in a block of keys
    out = sum_blocks p_max / n (p_int v_int) s_v / sum p,      s_v = max |v| / n of a channel

The kernels are those of `block_sparse_attention`. Blocks of keys are those of the mask, so that all
implementations compute the same numbers; with a rule each takes blocks of its own, and results with
quantized probabilities differ by their rounding.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.block_mask import EVERYTHING, BlockMask, Rule
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.operation import (
    Problem,
    Segments,
    attend,
    check,
    heads_first,
    logit_scale,
    split_mask,
)
from pallas_kernels.implementation import Implementation
from pallas_kernels.tiling import pad_axis

# Quantized values of values and the largest quantized value of a probability beside them.
VALUES = {"int8": 127, "int4": 7, "float8": 448}
UNITS = ("query", "tile", "one")


def quantized_attention(
    q: Array,
    k: Array,
    v: Array,
    mask: BlockMask | Rule = EVERYTHING,
    *,
    bits: int = 8,
    values: str | None = None,
    tokens: tuple[int, int] = (1, 1),
    unit: str = "query",
    smooth: bool = True,
    scale: float | None = None,
    segments: Segments | None = None,
    return_lse: bool = False,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Any:
    """Attend from every query to the keys that a mask lets it see, with quantized products.

    The operands are floats, and this function quantizes them. Gradients are those of attention
    without quantization (straight through).

    Args:
        q: [B, S, H, D], float32, bfloat16 or float16.
        k, v: [B, T, K, D] and [B, T, K, E] in q's dtype.
        mask: lists of blocks, or a rule, for which each implementation chooses its own blocks.
        bits: number of bits of the quantized queries and keys: 8, or 4. 4 bits are kept in int8:
            they have the accuracy of 4 bits, but not their speed.
        values: how probabilities and values are quantized: "int8", "int4" (kept in int8) or
            "float8" (e4m3). None leaves them in v's dtype. GPUs have float8 from compute capability
            8.9 on.
        tokens: how many consecutive queries, and keys, share a scale: (128, 64) in SageAttention,
            (32, 64) in PAROAttention, one by default.
        unit: what quantized probabilities are counted in: "query" takes the largest weight of each
            query in a block of keys. "tile" takes that of a whole block of queries (PAROAttention),
            and "one" none at all (SageAttention2, PAROAttention's kernel); with both, weights are
            those of the softmax over the blocks visited so far, so results depend on their order:
            that of the keys, but where a rule cuts blocks.
        smooth: subtract the mean of the keys over tokens first. This is exact in real arithmetic,
            and keys with a common offset need it.
        scale: factor on the logits; D^-1/2 if None.
        segments: as in `block_sparse_attention`.
        return_lse: return (output, log-sum-exp float32[B, S, H]). The log-sum-exp is that of the
            keys as they are given.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        [B, S, H, E] in v's dtype.

    Raises:
        ValueError: for shapes, dtypes, options or a mask that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.

    Source: SageAttention, arXiv 2410.02367, 2411.10958; PAROAttention, arXiv 2506.16054.
    """
    check(q, k, v, segments)
    if bits not in (8, 4):
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    if values is not None and values not in VALUES:
        raise ValueError(f"values must be None or one of {sorted(VALUES)}, got {values!r}")
    if unit not in UNITS:
        raise ValueError(f"unit must be one of {UNITS}, got {unit!r}")
    if len(tokens) != 2 or min(tokens) < 1:
        raise ValueError(f"tokens must be two numbers of at least 1, got {tokens}")
    known, made = split_mask(mask, q, k)
    problem = Problem(
        operation="quantized_attention",
        mask=known,
        # Coded values get their scales, and v's dtype, behind the kernel.
        arithmetic=Arithmetic(
            logit_scale(scale, q),
            "float32" if values else v.dtype.name,
            VALUES[values] if values else None,
            unit,
        ),
        implementation=implementation,
        interpret=interpret,
    )
    qvalues = _Quantized(bits, values, (tokens[0], tokens[1]), smooth)
    out, lse = _differentiable(problem, qvalues, q, k, v, (segments, made))
    return (out, lse) if return_lse else out


class _Quantized(NamedTuple):
    """The options of `quantized_attention` that say how operands are quantized; static."""

    bits: int
    values: str | None
    tokens: tuple[int, int]
    smooth: bool


@partial(jax.jit, static_argnums=(0, 1))
def _forward(
    problem: Problem, qvalues: _Quantized, q: Array, k: Array, v: Array, integers: Any
) -> tuple[Array, Array]:
    segments, made = integers
    dtype = v.dtype
    q, k, v = heads_first(q, k, v)
    group = q.shape[1] // k.shape[1]
    shift = None
    if qvalues.smooth:
        mean = jnp.mean(k.astype(jnp.float32), axis=2, keepdims=True)
        k = k.astype(jnp.float32) - mean
        shift = jnp.einsum(
            "bhsd,bhd->bhs",
            q.astype(jnp.float32),
            jnp.repeat(mean[:, :, 0], group, axis=1),
            precision="highest",
        )
    most = 2 ** (qvalues.bits - 1) - 1
    q_qvalues, q_scale = quantize_tokens(q, most, qvalues.tokens[0])
    k_qvalues, k_scale = quantize_tokens(k, most, qvalues.tokens[1])
    v_qvalues, v_scale = quantize_channels(v, qvalues.values)
    # The factor on the logits goes into the queries' scales.
    scales = q_scale * problem.arithmetic.scale, k_scale
    inner = problem._replace(arithmetic=problem.arithmetic._replace(scale=1.0))
    out, lse = attend(inner, Heads(q_qvalues, k_qvalues, v_qvalues, segments, scales), made)
    if v_scale is not None:
        out = (out * jnp.repeat(v_scale, group, axis=1)).astype(dtype)
    if shift is not None:
        lse = lse + shift * problem.arithmetic.scale
    return out.swapaxes(1, 2), lse.swapaxes(1, 2)


def quantize_tokens(x: Array, most: int, tokens: int) -> tuple[Array, Array]:
    """Quantized values int8[B, H, S, D] and scales float32[B, H, S] of heads, by groups of tokens.

    scale = max |x| / most, qvalue = round(x / scale), halves away from zero.
    """
    x = x.astype(jnp.float32)
    largest = pad_axis(jnp.max(jnp.abs(x), axis=-1), 2, tokens)
    largest = jnp.max(largest.reshape(*x.shape[:2], -1, tokens), axis=-1)
    scale = jnp.repeat(largest, tokens, axis=2)[:, :, : x.shape[2]] / most
    return _qvalues(x, scale[..., None]), scale


def quantize_channels(v: Array, values: str | None) -> tuple[Array, Array | None]:
    """Quantized values of values [B, K, T, E] and scales float32[B, K, 1, E] of their channels."""
    if values is None:
        return v, None
    v = v.astype(jnp.float32)
    scale = jnp.max(jnp.abs(v), axis=2, keepdims=True) / VALUES[values]
    if values == "float8":
        return (v / jnp.where(scale > 0, scale, 1.0)).astype(jnp.float8_e4m3fn), scale
    return _qvalues(v, scale), scale


def _qvalues(x: Array, scale: Array) -> Array:
    x = x / jnp.where(scale > 0, scale, 1.0)
    return (jnp.sign(x) * jnp.floor(jnp.abs(x) + 0.5)).astype(jnp.int8)


def _forward_and_save(
    problem: Problem, qvalues: _Quantized, q: Array, k: Array, v: Array, integers: Any
) -> Any:
    return _forward(problem, qvalues, q, k, v, integers), (q, k, v, integers)


def _backward(problem: Problem, qvalues: _Quantized, saved: Any, gradients: Any) -> Any:
    q, k, v, (segments, made) = saved
    mask = problem.mask if made is None else made
    assert mask is not None
    exact = partial(
        block_sparse_attention,
        mask=mask,
        scale=problem.arithmetic.scale,
        segments=segments,
        return_lse=True,
        implementation="xla",
    )
    return *jax.vjp(exact, q, k, v)[1](gradients), None


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0, 1))
_differentiable.defvjp(_forward_and_save, _backward)
