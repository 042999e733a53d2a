"""Every token's key and value."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effjax.caches.attention import FEW, attend_chunk, decode
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.slots import Lengths, ends, left_aligned, put, starts
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads


class DenseCache(KVCache):
    """Every token's key and value, the token at position p in slot p."""

    def __init__(self, inner: nnx.Module, *, first: bool, cache_length: CacheLength):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.slots = cache_length.total
        self.k, self.v = State(), State()

    def store(self, inputs: AttentionInputs) -> None:
        for state, new in ((self.k, inputs.rotated_k), (self.v, inputs.v)):
            old = state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype)
            new = left_aligned(new, inputs.positions)
            state.write(jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=1))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, k, v, positions = inputs.rotated_q, inputs.rotated_k, inputs.v, inputs.positions
        held = []
        for state, new in ((self.k, k), (self.v, v)):
            held.append(state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype))
            state.write(put(held[-1], new, positions))
        if q.shape[1] <= FEW:
            return decode(q, self.k, self.v, ends(positions))
        return attend_chunk(q, k, v, positions, held[0], held[1], starts(positions))

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        slot = jnp.arange(self.slots)
        return jnp.where(slot < lengths[:, None], slot, -1)[:, None]
