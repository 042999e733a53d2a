"""The first tokens and the last ones."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effjax.caches.attention import attend_to_positions, decode
from effjax.caches.budgets import Sizes
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.quantization import FLOAT
from effjax.caches.slots import (
    Lengths,
    ends,
    foresee,
    lengths_after,
    put_all,
    ring_positions,
    ring_slot,
    starts,
    take,
)
from effjax.caches.storage import Storage
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
        bits: of keys and values, see `Storage`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        sinks: int,
        ring: int,
        own: Sizes | None = None,
        bits: int = FLOAT,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.sinks = min(sinks, cache_length.total)
        self.ring = max(1, min(ring, cache_length.total - self.sinks))
        self.tokens = Storage(bits)
        self.own = None if self.slots >= cache_length.total else own
        if self.own is not None:
            self.foreseen = State()

    @property
    def rollback(self) -> bool:
        return self.slots >= self.cache_length.total  # else older tokens are overwritten

    @property
    def joint_append(self) -> bool:
        return True

    @property
    def exact_chunked_prefill(self) -> bool:
        window = self.core.window
        whole = self.slots >= self.cache_length.total
        return not self.tokens.quantized and (whole or (window is not None and window <= self.ring))

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
        k, v = (take(x, inputs.positions, held) for x in (inputs.rotated_k, inputs.v))
        self.tokens.write(self.tokens.of(k, v))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, positions = inputs.rotated_q, inputs.positions
        before, ring = starts(positions), self.rings(q.shape[0])
        rings = ring if isinstance(ring, int) else ring[:, None]
        place = ring_slot(positions, self.sinks, rings)
        after = lengths_after(positions)[:, None]
        # Of several new tokens for one slot, only the last is written.
        place = jnp.where((place < self.sinks) | (positions >= after - rings), place, -1)
        new = self.tokens.of(inputs.rotated_k, inputs.v)
        past = self.tokens.read(new, self.slots)
        held = put_all(past, new, place)
        self.tokens.write(held)
        if q.shape[1] == 1:
            return decode(q, held, jnp.minimum(ends(positions), self.sinks + ring))
        old, own = (self.tokens.floats(each, q.dtype) for each in (past, new))
        k, v = (jnp.concatenate(parts, axis=1) for parts in zip(old, own, strict=True))
        return attend_to_positions(
            q,
            k,
            v,
            inputs.reach,
            jnp.concatenate([self.positions(before)[:, 0], positions], axis=1),
            sinks=self.sinks,
            local=rings,
        )

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        rings = self.rings(lengths.shape[0])
        return ring_positions(lengths, self.sinks, rings, slots=self.slots)[:, None]
