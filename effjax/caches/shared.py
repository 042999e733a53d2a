"""Slots that heads share: each head of a layer has as many as its tokens are worth.

The kept tokens of all heads stand on one axis, head after head, in time order; where a head's
stretch begins is data. What follows a prompt is dense, beside it. A new token attends to its head's
stretch by a softmax over segments, and to the dense part by a decode kernel; both are merged by
their log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.caches.attention import FEW, attend_to_segments, chunk_parts, decode_part
from effjax.caches.budgets import Sizes
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.quantization import FLOAT
from effjax.caches.slots import Held, Lengths, ends, put_all, starts
from effjax.caches.storage import Storage
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads
from pallas_kernels.merge import merge

# Of all heads' scores [B, K, S], where padding is -inf: places head * S + column of the tokens that
# are kept, by the tokens that a row keeps for each head on average; K * S for none.
SharedChoice = Callable[[Float[Array, "B K S"], Lengths, int], Int[Array, "B N"]]


class SharedCache(KVCache):
    """The tokens of a prompt that all heads of a layer keep together, and all that follow.

    Args:
        score: of a prompt's tokens.
        choose: the tokens that are kept, of all heads.
        keep: slots of a prompt for each head, on average.
        own: of a row's own prompt, `keep` at most, by its tokens; None for `keep`.
        bits: of keys and values, see `Storage`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        score: Callable[[AttentionInputs], Float[Array, "B K S"]],
        choose: SharedChoice,
        keep: int,
        own: Sizes | None = None,
        bits: int = FLOAT,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.score, self.choose = score, choose
        self.keep = min(keep, cache_length.prompt)
        self.own = own
        self.flat, self.tokens = Storage(bits), Storage(bits)  # of the prompt; those that follow
        self.held = State(fill=-1.0)  # position of the token in every slot
        self.counts = State()  # slots of each head
        self.prompt = State()  # tokens of each prompt

    @property
    def exact_chunked_prefill(self) -> bool:
        return False

    def store(self, inputs: AttentionInputs) -> None:
        batch, columns, heads, _ = inputs.k.shape
        positions = inputs.positions
        valid = positions >= 0
        lengths = jnp.sum(valid, axis=1, dtype=jnp.int32)
        keep = jnp.full_like(lengths, self.keep) if self.own is None else self.own(lengths)
        self._read(inputs)
        scores = jnp.where(valid[:, None], self.score(inputs), -jnp.inf)
        chosen = jnp.sort(self.choose(scores, jnp.minimum(keep, lengths), self.keep), axis=1)
        kept = chosen < heads * columns
        head = jnp.where(kept, chosen // columns, heads)
        self.counts.write(
            jnp.sum(head[:, None] == jnp.arange(heads)[:, None], axis=2, dtype=jnp.int32)
        )
        self.prompt.write(lengths)
        column = jnp.where(kept, chosen % columns, 0)
        self.held.write(jnp.where(kept, jnp.take_along_axis(positions, column, axis=1), -1))
        at = jnp.arange(batch)[:, None], column, jnp.minimum(head, heads - 1)
        self.flat.write(self.flat.of(inputs.rotated_k[at], inputs.v[at]))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, positions = inputs.rotated_q, inputs.positions
        flat, past = self._read(inputs)
        places = jnp.where(positions >= 0, positions - self.prompt.get_value()[:, None], -1)
        new = self.tokens.of(inputs.rotated_k, inputs.v)
        held = put_all(past, new, places)
        self.tokens.write(held)
        if q.shape[1] <= FEW:
            later = [decode_part(q, held, ends(places))]
        else:
            own, old = (self.tokens.floats(each, q.dtype) for each in (new, past))
            later = chunk_parts(q, *own, positions, *old, starts(places))
        heads = inputs.k.shape[2]
        k, v = self.flat.floats(flat, q.dtype)
        earlier = attend_to_segments(q, k, v, self._heads(heads), heads=heads)
        return merge(*zip(earlier, *later, strict=True))[0]

    def _heads(self, heads: int) -> Int[Array, "B N"]:
        """Key head of every slot; K for an empty one."""
        last = jnp.cumsum(self.counts.get_value(), axis=1)
        slots = jnp.arange(self.held.get_value().shape[1])
        return jnp.sum(slots >= last[:, :, None], axis=1, dtype=jnp.int32)

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """By head: the slots of others, and empty ones, have -1."""
        held, prompt = self.held.get_value(), self.prompt.get_value()
        heads = self.counts.get_value().shape[1]
        mine = self._heads(heads)[:, None] == jnp.arange(heads)[:, None]
        later = prompt[:, None] + jnp.arange(self.cache_length.new)
        later = jnp.where(later < lengths[:, None], later, -1)[:, None]
        later = jnp.broadcast_to(later, (len(lengths), heads, self.cache_length.new))
        return jnp.concatenate([jnp.where(mine, held[:, None], -1), later], axis=2)

    def filled(self, lengths: Lengths) -> Float[Array, ""]:
        heads = self.counts.get_value().shape[1]
        slots = len(lengths) * heads * (self.keep + self.cache_length.new)
        return jnp.sum(self.positions(lengths) >= 0).astype(jnp.float32) / slots

    def _read(self, inputs: AttentionInputs) -> tuple[Held, Held]:
        """The tokens of the prompt, and those that follow."""
        batch, _, heads, _ = inputs.k.shape
        shared = heads * self.keep
        self.held.read((batch, shared), jnp.int32)
        self.counts.read((batch, heads), jnp.int32)
        self.prompt.read((batch,), jnp.int32)
        flat = self.flat.read(self.flat.of(inputs.k[:, 0], inputs.v[:, 0]), shared)
        tokens = self.tokens.of(inputs.k, inputs.v)
        return flat, self.tokens.read(tokens, max(self.cache_length.new, 1))
