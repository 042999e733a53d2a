"""Every token's key and value."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effjax.caches.attention import FEW, attend_chunk, decode, decode_together
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.quantization import FLOAT
from effjax.caches.slots import (
    Lengths,
    begin,
    ends,
    left_aligned,
    lengths_after,
    put_all,
    starts,
)
from effjax.caches.storage import Storage
from effjax.context import CacheLength
from effjax.layers.attention import Heads


class DenseCache(KVCache):
    """Every token's key and value, the token at position p in slot p.

    Args:
        bits: of keys and values, see `Storage`.
    """

    def __init__(
        self, inner: nnx.Module, *, bits: int = FLOAT, first: bool, cache_length: CacheLength
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.slots = cache_length.total
        self.tokens = Storage(bits, leading=self.core.leading)

    @property
    def joint_append(self) -> bool:
        return True

    @property
    def exact_chunked_prefill(self) -> bool:
        return not self.tokens.quantized

    def store(self, inputs: AttentionInputs) -> None:
        k, v = (left_aligned(x, inputs.positions) for x in (inputs.rotated_k, inputs.v))
        new = self.tokens.of(k, v)
        self.tokens.write(begin(self.tokens.read(new, self.slots), new))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, positions = inputs.rotated_q, inputs.positions
        new = self.tokens.of(inputs.rotated_k, inputs.v)
        past = self.tokens.read(new, self.slots)
        held = put_all(past, new, positions)
        self.tokens.write(held)
        if self.core.together:
            return decode_together(q, held, lengths_after(positions))
        if q.shape[1] <= FEW:
            return decode(q, held, ends(positions), leading=self.tokens.leading)
        own, old = (self.tokens.floats(each, q.dtype) for each in (new, past))
        return attend_chunk(q, *own, positions, *old, starts(positions))

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        slot = jnp.arange(self.slots)
        return jnp.where(slot < lengths[:, None], slot, -1)[:, None]
