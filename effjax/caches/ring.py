"""The first tokens and the last ones."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effjax.caches.attention import attend_to_positions, decode
from effjax.caches.budgets import Sizes
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.slots import (
    Lengths,
    ends,
    foresee,
    lengths_after,
    put,
    ring_positions,
    ring_slot,
    starts,
    take,
)
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads


class RingCache(KVCache):
    """The first tokens ("sinks") and the last ones, which overwrite each other in turn.

    For models with a window (no sinks) it holds all that a query sees. For others it forgets
    (StreamingLLM, arXiv 2309.17453, with the tokens' own positions). Queries see the sinks and the
    last `ring` tokens, their own included.

    Args:
        sinks, ring: slots of each part.
        own: slots of both that a row uses, by the tokens that its sequence is to have; None for
            all.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        sinks: int,
        ring: int,
        own: Sizes | None = None,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.sinks = min(sinks, cache_length.total)
        self.ring = max(1, min(ring, cache_length.total - self.sinks))
        self.k, self.v = State(), State()
        self.own = None if self.slots >= cache_length.total else own
        if self.own is not None:
            self.foreseen = State()

    @property
    def rollback(self) -> bool:
        return self.slots >= self.cache_length.total  # else older tokens are overwritten

    @property
    def exact_chunked_prefill(self) -> bool:
        window = self.core.window
        return self.slots >= self.cache_length.total or (window is not None and window <= self.ring)

    @property
    def slots(self) -> int:
        return self.sinks + self.ring

    def rings(self, batch: int) -> int | Lengths:
        """Slots of the ring, of every row where they differ."""
        if self.own is None:
            return self.ring
        slots = self.own(self.foreseen.read((batch,), jnp.int32))
        return jnp.maximum(slots - self.sinks, 1)

    def store(self, inputs: AttentionInputs) -> None:
        if self.own is not None:
            foresee(self.foreseen, inputs.positions, self.cache_length)
        held = self.positions(lengths_after(inputs.positions))[:, 0]
        for state, new in ((self.k, inputs.rotated_k), (self.v, inputs.v)):
            state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype)
            state.write(take(new, inputs.positions, held))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, k, positions = inputs.rotated_q, inputs.rotated_k, inputs.positions
        before, ring = starts(positions), self.rings(q.shape[0])
        rings = ring if isinstance(ring, int) else ring[:, None]
        place = ring_slot(positions, self.sinks, rings)
        after = lengths_after(positions)[:, None]
        # Of several new tokens for one slot, only the last is written.
        place = jnp.where((place < self.sinks) | (positions >= after - rings), place, -1)
        old = []
        for state, new in ((self.k, k), (self.v, inputs.v)):
            old.append(state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype))
            state.write(put(old[-1], new, place))
        if q.shape[1] == 1:
            return decode(q, self.k, self.v, jnp.minimum(ends(positions), self.sinks + ring))
        held = self.positions(before)[:, 0]
        return attend_to_positions(
            q,
            jnp.concatenate([old[0], k], axis=1),
            jnp.concatenate([old[1], inputs.v], axis=1),
            positions,
            jnp.concatenate([held, positions], axis=1),
            sinks=self.sinks,
            local=rings,
        )

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        rings = self.rings(lengths.shape[0])
        return ring_positions(lengths, self.sinks, rings, slots=self.slots)[:, None]
