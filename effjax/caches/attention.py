"""Attention to slots."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.caches.slots import Held, Lengths, Places
from effjax.layers.attention import Heads, KeyHeads, Outputs, Values
from pallas_kernels.block_mask import EVERYTHING, Causal
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import (
    decode_attention,
    latent_decode_attention,
    quantized_decode_attention,
)
from pallas_kernels.merge import merge, merge_rows

FEW = 8  # queries that a decode kernel takes

Part = tuple[Outputs, Float[Array, "B S H"]]  # attention to some of the keys, and its log-sum-exps


def decode(q: Heads, held: Held, lengths: Lengths, *, leading: int | None = None) -> Outputs:
    """A few new tokens attend to the first `lengths` slots, which hold themselves too.

    Args:
        leading: how many first channels of the keys are the values, if slots hold keys alone.
    """
    return decode_part(q, held, lengths, leading=leading)[0]


def decode_part(q: Heads, held: Held, lengths: Lengths, *, leading: int | None = None) -> Part:
    """`decode` and its log-sum-exps, to be merged with attention to other slots."""
    attend: Any = quantized_decode_attention if "k_scale" in held else decode_attention
    if leading is not None:
        attend = functools.partial(latent_decode_attention, values=leading)
    count, slots = q.shape[1], held["k"].shape[1]
    if count == 1:
        out, log_sum_exps = attend(q, lengths=lengths, return_lse=True, **held)
        return out, log_sum_exps
    # Queries of padding at the right may be those of slots that there are not. Kernels take the
    # last query as that of the last slot: queries move on by so many columns, and back.
    beyond = jnp.maximum(lengths - slots, 0)[:, None]
    moved = (jnp.arange(count) - beyond) % count
    turned = jnp.take_along_axis(q, moved[:, :, None, None], axis=1)
    out, log_sum_exps = attend(turned, lengths=lengths - beyond[:, 0], return_lse=True, **held)
    back = (jnp.arange(count) + beyond) % count
    out = jnp.take_along_axis(out, back[:, :, None, None], axis=1)
    return out, jnp.take_along_axis(log_sum_exps, back[:, :, None], axis=1)


def decode_together(q: Heads, held: Held, lengths: Lengths) -> Outputs:
    """New tokens attend to the first `lengths` slots, which hold them all: each sees the others."""
    return decode_together_part(q, held, lengths)[0]


def decode_together_part(q: Heads, held: Held, lengths: Lengths) -> Part:
    """`decode_together` and its log-sum-exps: tokens are folded into heads of one token."""
    batch, count, heads, width = q.shape
    groups = held["k"].shape[2]
    folded = q.reshape(batch, count, groups, -1, width).transpose(0, 2, 3, 1, 4)
    out, log_sum_exps = decode_part(folded.reshape(batch, 1, -1, width), held, lengths)
    out = out.reshape(batch, heads, count, -1).swapaxes(1, 2)
    return out, log_sum_exps.reshape(batch, heads, count).swapaxes(1, 2)


def attend_chunk(
    q: Heads,
    k: KeyHeads,
    v: Values,
    positions: Places,
    past_k: Float[Array, "B C K D"],
    past_v: Float[Array, "B C K W"],
    past: Lengths,
) -> Outputs:
    """Many new tokens attend to the first `past` slots and to each other.

    Two partial results, merged by their log-sum-exps.
    """
    return merge(*zip(*chunk_parts(q, k, v, positions, past_k, past_v, past), strict=True))[0]


def chunk_parts(
    q: Heads,
    k: KeyHeads,
    v: Values,
    positions: Places,
    past_k: Float[Array, "B C K D"],
    past_v: Float[Array, "B C K W"],
    past: Lengths,
) -> list[Part]:
    """The two partial results of `attend_chunk`."""
    valid = (positions >= 0).astype(jnp.int32)
    own = block_sparse_attention(q, k, v, Causal(), segments=(valid, valid), return_lse=True)
    filled = jnp.arange(past_k.shape[1]) < past[:, None]
    segments = jnp.zeros_like(positions), 1 - filled.astype(jnp.int32)
    old = block_sparse_attention(q, past_k, past_v, EVERYTHING, segments=segments, return_lse=True)
    return [own, old]


def attend_to_segments(
    q: Heads,
    k: Float[Array, "B N D"],
    v: Float[Array, "B N W"],
    head: Int[Array, "B N"],
    *,
    heads: int,
) -> Part:
    """Attention to slots that belong to one key head each; K is nobody's.

    Every slot takes its head's queries, one token's after the other's; a softmax over segments
    follows.
    """
    batch, queries, _, width = q.shape
    grouped = q.reshape(batch, queries, heads, -1, width) * jnp.asarray(width**-0.5, q.dtype)
    rows = (jnp.arange(batch)[:, None] * (heads + 1) + head).reshape(-1)
    values = v.reshape(batch * v.shape[1], 1, -1)

    def one(q: Float[Array, "B K G D"]) -> tuple[Array, Array]:
        at = jnp.arange(batch)[:, None], jnp.minimum(head, heads - 1)
        logits = jnp.einsum("bngd,bnd->bng", q[at], k, preferred_element_type=jnp.float32)
        logits = logits.reshape(-1, logits.shape[2])
        spread = jnp.broadcast_to(values, (*logits.shape, values.shape[2]))
        out, log_sum_exps = merge_rows(spread, logits, rows, count=batch * (heads + 1))
        parts = (
            x.reshape(batch, heads + 1, -1, *x.shape[2:])[:, :heads] for x in (out, log_sum_exps)
        )
        out, log_sum_exps = parts
        return out.astype(v.dtype).reshape(batch, -1, v.shape[2]), log_sum_exps.reshape(batch, -1)

    if queries == 1:
        out, log_sum_exps = one(grouped[:, 0])
        return out[:, None], log_sum_exps[:, None]
    out, log_sum_exps = jax.lax.map(one, grouped.swapaxes(0, 1))
    return out.swapaxes(0, 1), log_sum_exps.swapaxes(0, 1)


def attend_to_positions(
    q: Heads,
    k: Float[Array, "B T K D"],
    v: Values,
    q_positions: Places,
    k_positions: Int[Array, "B T"],
    *,
    sinks: int = 0,
    local: int | Int[Array, "B 1"] | None = None,
) -> Outputs:
    """Attention by the positions of queries and keys, in any order; -1 is nobody's key.

    A query sees keys up to its own position: the first `sinks` ones and the last `local` (of all
    rows or of each), or all.
    Logits of all pairs are made at once: for a chunk of queries and a ring of keys.
    """
    mine, theirs = q_positions[:, :, None], k_positions[:, None]
    seen = (theirs >= 0) & (theirs <= mine)
    if local is not None:
        local = local if isinstance(local, int) else local[:, None]
        seen &= (theirs < sinks) | (theirs > mine - local)
    batch, queries, heads, width = q.shape
    q = q.reshape(batch, queries, k.shape[2], -1, width) * jnp.asarray(width**-0.5, q.dtype)
    logits = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32)
    logits = jnp.where(seen[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkgst,btkd->bskgd", weights, v, preferred_element_type=jnp.float32)
    return out.astype(v.dtype).reshape(batch, queries, heads, -1)
