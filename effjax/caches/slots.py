"""Arithmetic of positions and slots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from effjax.context import CacheLength, State

Lengths = Int[Array, " B"]
Places = Int[Array, "B S"]  # of tokens in their sequences; -1 is padding
Held = dict[str, Any]  # arrays [B, S, ...] of what slots hold of tokens, by name


def ends(positions: Places) -> Lengths:
    """Tokens of every sequence after a call, as if its row had no padding at the right.

    With r columns of padding at the right this is r more than there are: then the queries are the
    last tokens, as kernels take them, and those of padding see slots that mean nothing.
    """
    columns = positions.shape[1]
    reach = positions + jnp.arange(columns, 0, -1)
    return jnp.max(jnp.where(positions >= 0, reach, 0), axis=1)


def lengths_after(positions: Places) -> Lengths:
    """Tokens of every sequence after a call; 0 for a row of padding."""
    return jnp.max(positions, axis=1) + 1


def foresee(state: State, positions: Places, cache_length: CacheLength) -> Lengths:
    """Tokens that each sequence is to have, remembered: its prompt's and all that may follow.

    A state that is above 0 already was told otherwise, see `told`.
    """
    lengths = lengths_after(positions)
    known = state.read(lengths.shape, jnp.int32)
    state.write(jnp.where(known > 0, known, lengths + cache_length.new))
    return state.get_value()


def told(state: Mapping[str, Array], lengths: Lengths) -> dict[str, Array]:
    """An initial state whose caches know after how many tokens each row's sequence ends."""
    return {name: lengths if name.endswith(".foreseen") else value for name, value in state.items()}


def starts(positions: Places) -> Lengths:
    """Tokens of every sequence before a call: the lowest position of its row."""
    return jnp.min(jnp.where(positions >= 0, positions, _FAR), axis=1) % _FAR


_FAR = 1 << 30


def left_aligned(x: Float[Array, "B S ..."], positions: Places) -> Float[Array, "B S ..."]:
    """Rows moved so that the token at position p stands in column p; what follows means nothing."""
    return take(x, positions, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))


def take(
    x: Shaped[Array, "B S ..."], positions: Places, wanted: Int[Array, "B C"]
) -> Shaped[Array, "B C ..."]:
    """The tokens at these positions of sequences that begin in this call; zero for -1."""
    columns = wanted + jnp.argmax(positions >= 0, axis=1)[:, None]
    columns = jnp.clip(columns, 0, x.shape[1] - 1)
    ones = [1] * (x.ndim - 2)
    found = jnp.take_along_axis(x, columns.reshape(*columns.shape, *ones), axis=1)
    return jnp.where((wanted >= 0).reshape(*wanted.shape, *ones), found, 0)


def put(
    buffer: Shaped[Array, "B C ..."], new: Shaped[Array, "B S ..."], slots: Int[Array, "B S"]
) -> Shaped[Array, "B C ..."]:
    """Write tokens into slots; those for slot -1, or beyond the last, are dropped."""
    slots = jnp.where(slots < 0, buffer.shape[1], slots)
    rows = jnp.arange(buffer.shape[0])[:, None]
    return buffer.at[rows, slots].set(new, mode="drop")


def put_all(held: Held, new: Held, slots: Int[Array, "B S"]) -> Held:
    """`put`, for every array of what is held of tokens."""
    return {name: put(part, new[name], slots) for name, part in held.items()}


def begin(held: Held, new: Held) -> Held:
    """Write tokens into the first slots, for every array of what is held of tokens."""
    return {
        name: jax.lax.dynamic_update_slice_in_dim(part, new[name], 0, axis=1)
        for name, part in held.items()
    }


def ring_slot(
    positions: Int[Array, "B S"], sinks: int, ring: int | Int[Array, "B 1"]
) -> Int[Array, "B S"]:
    """Slot of the token at a position: its own among the sinks, then round and round."""
    return jnp.where(positions < sinks, positions, sinks + (positions - sinks) % ring)


def ring_positions(
    lengths: Lengths, sinks: int, ring: int | Lengths, *, slots: int
) -> Int[Array, "B C"]:
    """Position of the token in every slot after this many tokens; -1 for an empty slot.

    Args:
        ring: slots of the ring, of all rows or of each.
        slots: C; those beyond a row's ring stay empty.
    """
    ring = ring if isinstance(ring, int) else ring[:, None]
    slot, last = jnp.arange(slots), lengths[:, None] - 1
    latest = last - (last - slot) % ring  # the last token that went to the slot of the ring
    held = jnp.where(slot < sinks, jnp.where(slot <= last, slot, -1), latest)
    return jnp.where((slot >= sinks) & ((latest < sinks) | (slot >= sinks + ring)), -1, held)
