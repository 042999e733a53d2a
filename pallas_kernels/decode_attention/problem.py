"""From the arguments of an operation to what its programs run: what all operations share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.decode_attention.gpu import gpu_refusal, pallas_gpu
from pallas_kernels.decode_attention.tiles import Operands, Problem, Side
from pallas_kernels.decode_attention.tpu import pallas_tpu, tpu_refusal
from pallas_kernels.decode_attention.xla import xla
from pallas_kernels.implementation import Implementation, dispatch

Result = Array | tuple[Array, Array]
Specification = Callable[[Array, float], tuple[Array, Array]]  # of lengths and the scale


class Options(NamedTuple):
    """Keyword arguments that all operations take, see `decode_attention`."""

    scale: float | None
    return_lse: bool
    tile: int | None
    splits: int | None
    implementation: Implementation | None
    interpret: bool


class Part(NamedTuple):
    """Keys or values of a cache: how a tile of them is made, and of which arrays."""

    side: Side
    operands: tuple[Array, ...]


def attend(
    operation: str,
    q: Array,
    keys: Part,
    values: Part,
    lengths: Array,
    options: Options,
    specification: Specification,
    *,
    heads: int,
    tokens: int,
    places: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> Result:
    """Check what is left to check, and run an operation.

    Args:
        operation: its name.
        q: float[B, S, H, D].
        keys, values: of its cache.
        lengths: int[B] or [B, K] as it was given.
        options: as they were given.
        specification: outputs and log-sum-exps by the formula, of lengths [B, K] and the scale.
        heads, tokens: K and T of the cache.
        places: starts and capacities of the heads in a flat cache.
    """
    problem = _problem(q, heads, keys.side, values.side, tokens, options, places)
    lengths = _lengths(lengths, q, problem)
    operands = Operands(_queries(q, problem), lengths, keys.operands, values.operands)
    refusals = {"pallas_tpu": tpu_refusal, "pallas_gpu": gpu_refusal}
    interpret = options.interpret
    output, log_sum_exp = dispatch(
        operation,
        options.implementation,
        {
            "reference": lambda _: specification(lengths, problem.scale),
            "xla": partial(_finished, xla, problem),
            "pallas_tpu": partial(_finished, pallas_tpu, problem, interpret=interpret),
            "pallas_gpu": partial(_finished, pallas_gpu, problem, interpret=interpret),
        },
        operands,
        refusal=lambda kernel: refusals[kernel](problem, operands),
        interpret=interpret,
    )
    return (output, log_sum_exp) if options.return_lse else output


def along(*scales: Array | None) -> list[Array]:
    """Scales of tokens [B, T, K, 1] as float32[B, K, 1, T], [B, N, 1] as [B, 1, N]; not None."""
    return [jnp.moveaxis(scale, 1, -1).astype(jnp.float32) for scale in scales if scale is not None]


def _problem(
    q: Array,
    heads: int,
    keys: Side,
    values: Side,
    tokens: int,
    options: Options,
    places: tuple[tuple[int, ...], tuple[int, ...]] | None,
) -> Problem:
    if heads == 0 or q.shape[2] % heads:
        raise ValueError(
            f"the query heads must be a multiple of the key heads; got H = {q.shape[2]} and "
            f"K = {heads}"
        )
    if tokens == 0:
        raise ValueError("the cache has no tokens; give it at least one, with lengths 0")
    for name in ("tile", "splits"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, or None to leave it open; got {value}")
    starts, capacities = places or ((0,) * heads, (tokens,) * heads)
    return Problem(
        heads=heads,
        group=q.shape[2] // heads,
        queries=q.shape[1],
        keys=keys,
        values=values,
        tokens=tokens,
        starts=starts,
        capacities=capacities,
        scale=float(q.shape[3] ** -0.5 if options.scale is None else options.scale),
        tile=options.tile,
        splits=options.splits,
    )


def _queries(q: Array, problem: Problem) -> tuple[Array, ...]:
    """[B, S, H, D] as [B, K, S G, D], by plane of the keys' channels."""
    batch, queries, _, width = q.shape
    q = q.reshape(batch, queries, problem.heads, problem.group, width).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, problem.heads, problem.rows, width)
    return tuple(jnp.split(q, len(problem.keys.widths), axis=-1))


def _lengths(lengths: Array, q: Array, problem: Problem) -> Array:
    """int32[B, K], within each head's capacity."""
    allowed = (q.shape[0],), (q.shape[0], problem.heads)
    if lengths.shape not in allowed or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be integers of shape {allowed[0]} (one for each row) or {allowed[1]} "
            f"(one for each row and key head); got {lengths.dtype}{lengths.shape}"
        )
    lengths = lengths.astype(jnp.int32)
    if lengths.ndim == 1:
        lengths = jnp.broadcast_to(lengths[:, None], allowed[1])
    return jnp.clip(lengths, 0, jnp.asarray(problem.capacities, jnp.int32))


# Jitted so that a program is traced once and not in every layer: most of what tracing takes.
@partial(jax.jit, static_argnums=(0, 1), static_argnames="interpret")
def _finished(
    program: Callable, problem: Problem, operands: Operands, **options: bool
) -> tuple[Array, Array]:
    """Outputs [B, S, H, W] and log-sum-exps [B, S, H] of a program, by query and head."""
    planes, log_sum_exps = program(problem, operands, **options)
    batch, heads, dtype = *operands.lengths.shape, operands.queries[0].dtype
    output = jnp.concatenate(planes, axis=-1).astype(dtype)
    shape = batch, heads, problem.queries, problem.group
    output = output.reshape(*shape, -1).transpose(0, 2, 1, 3, 4)
    log_sum_exps = log_sum_exps.reshape(shape).transpose(0, 2, 1, 3)
    output = output.reshape(batch, problem.queries, -1, output.shape[-1])
    return output, log_sum_exps.reshape(output.shape[:3])
