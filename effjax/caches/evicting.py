"""A fixed number of tokens: where there is no room, the one with the least score goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.caches.budgets import Sizes
from effjax.caches.inputs import AttentionInputs
from effjax.caches.pressed import Score, best
from effjax.caches.protocol import KVCache
from effjax.caches.quantization import FLOAT
from effjax.caches.slots import Held, Lengths, foresee, lengths_after
from effjax.caches.storage import Storage
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads

Weights = Float[Array, "B K G C"]  # how a token attends to every slot, by key head
SlotScores = Float[Array, "B K C"]
Observe = Callable[[SlotScores, Weights], SlotScores]


class EvictingCache(KVCache):
    """Slots of a sequence, prompt and new tokens together, head by head.

    A prompt is pressed to its slots. A new token takes an empty slot; where there is none, it
    overwrites the held token with the least score, the latest of equal ones. Then it attends to all
    slots, its own included, and changes their scores by that.

    Args:
        score: of a prompt's tokens.
        observe: (scores of slots, attention of the newest token to them) -> new scores.
        slots: C, of all rows.
        own: slots of a row, by the tokens that its sequence is to have; None for C.
        recent: how many of the last tokens that are held never go, by a row's slots.
        bits: of keys and values, see `Storage`. A new token attends to them as they are held, its
            own included.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        score: Score,
        observe: Observe,
        slots: int,
        recent: Sizes,
        own: Sizes | None = None,
        bits: int = FLOAT,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.score, self.observe, self.recent = score, observe, recent
        self.slots = slots
        self.own = own
        self.tokens = Storage(bits)
        self.scores = State()
        self.held = State(fill=-1.0)  # position of the token in every slot
        if own is not None:
            self.foreseen = State()

    @property
    def rollback(self) -> bool:
        return False

    @property
    def exact_chunked_prefill(self) -> bool:
        return False

    def store(self, inputs: AttentionInputs) -> None:
        batch, columns, heads, _ = inputs.k.shape
        positions = inputs.positions
        if self.own is not None:
            foresee(self.foreseen, positions, self.cache_length)
        self._read(inputs)
        room = self._room(batch)
        stays = (positions >= (lengths_after(positions) - self.recent(room))[:, None])[:, None]
        scores = self.score(inputs)
        wanted = jnp.where(stays, jnp.inf, scores)
        chosen = jnp.sort(best(wanted, positions >= 0, room, self.slots), axis=2)
        short = ((0, 0), (0, 0), (0, self.slots - chosen.shape[2]))
        chosen = jnp.pad(chosen, short, constant_values=columns)
        column = jnp.minimum(chosen, columns - 1)
        known = jnp.broadcast_to(positions[:, None], (batch, heads, columns))
        held = jnp.take_along_axis(known, column, axis=2)
        self.held.write(jnp.where(chosen < columns, held, -1))
        self.scores.write(jnp.take_along_axis(scores.astype(jnp.float32), column, axis=2))
        at = column.transpose(0, 2, 1)[..., None]
        k, v = (jnp.take_along_axis(x, at, axis=1) for x in (inputs.rotated_k, inputs.v))
        self.tokens.write(self.tokens.of(k, v))

    def append(self, inputs: AttentionInputs) -> Heads:
        state = self._read(inputs)
        room = self._room(inputs.k.shape[0])
        new = self.tokens.of(inputs.rotated_k, inputs.v)
        tokens = inputs.rotated_q, new, inputs.positions

        def step(state: Any, column: Any) -> tuple[Any, Array]:
            return self._one(state, room, *column)

        # One by one: a token may take the place of one that an earlier one has seen.
        columns = jax.tree.map(lambda part: part.swapaxes(0, 1), tokens)
        if inputs.q.shape[1] == 1:
            state, out = step(state, jax.tree.map(lambda part: part[0], columns))
            out = out[:, None]
        else:
            state, out = jax.lax.scan(step, state, columns)
            out = out.swapaxes(0, 1)
        for held, value in zip((self.tokens, self.held, self.scores), state, strict=True):
            held.write(value)
        return out

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """Of the tokens that are held now: which those were at another length is not known."""
        return self.held.get_value()

    def _one(
        self,
        state: tuple[Held, Array, Array],
        room: Lengths,
        q: Float[Array, "B H D"],
        new: Held,
        position: Int[Array, " B"],
    ) -> tuple[tuple[Held, Array, Array], Float[Array, "B H D"]]:
        """Write a token of every row, attend, and change the scores."""
        tokens, held, scores = state
        batch, heads, _ = scores.shape
        full = position >= room
        goes = (held >= 0) & (held < (position - self.recent(room))[:, None, None])
        goes = jnp.where(jnp.any(goes, axis=2, keepdims=True), goes, held >= 0)
        least = jnp.min(jnp.where(goes, scores, jnp.inf), axis=2, keepdims=True)
        latest = jnp.argmax(jnp.where(goes & (scores <= least), held, -1), axis=2)
        slot = jnp.where(full[:, None], latest, position[:, None])
        slot = jnp.where(position[:, None] >= 0, slot, self.slots)  # padding is dropped
        at = jnp.arange(batch)[:, None], jnp.arange(heads), slot
        held = held.at[at].set(position[:, None], mode="drop")
        scores = scores.at[at].set(0.0, mode="drop")
        rows = at[0], at[2], at[1]
        tokens = {n: part.at[rows].set(new[n], mode="drop") for n, part in tokens.items()}
        keys, values = self.tokens.floats(tokens, q.dtype)
        grouped = q.reshape(batch, heads, -1, q.shape[2])
        grouped *= jnp.asarray(q.shape[2] ** -0.5, q.dtype)
        logits = jnp.einsum("bkgd,bckd->bkgc", grouped, keys, preferred_element_type=jnp.float32)
        seen = (held >= 0)[:, :, None]
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0)
        mixed = jnp.einsum(
            "bkgc,bckd->bkgd", weights.astype(q.dtype), values, preferred_element_type=jnp.float32
        )
        observed = self.observe(scores, weights)
        scores = jnp.where(position[:, None, None] >= 0, observed, scores)
        return (tokens, held, scores), mixed.astype(q.dtype).reshape(q.shape)

    def _room(self, batch: int) -> Lengths:
        """Slots of every row."""
        if self.own is None:
            return jnp.full(batch, self.slots, jnp.int32)
        return self.own(self.foreseen.read((batch,), jnp.int32))

    def _read(self, inputs: AttentionInputs) -> tuple[Held, Array, Array]:
        batch, _, heads, _ = inputs.k.shape
        return (
            self.tokens.read(self.tokens.of(inputs.k, inputs.v), self.slots),
            self.held.read((batch, heads, self.slots), jnp.int32),
            self.scores.read((batch, heads, self.slots), jnp.float32),
        )
