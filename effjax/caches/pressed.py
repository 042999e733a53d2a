"""The tokens of a prompt that score highest, and all tokens that follow.

A press is a *score* (how much each head needs each token), a *budget* (how many tokens a row
keeps) and a *choice* of the tokens that are kept for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.caches.attention import FEW, attend_chunk, decode, decode_together
from effjax.caches.budgets import Sizes
from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.quantization import FLOAT
from effjax.caches.slots import Lengths, begin, ends, lengths_after, put_all, starts
from effjax.caches.storage import Storage
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads

Scores = Float[Array, "B K S"]  # how much each head needs each token of a prompt
Columns = Int[Array, "B K C"]  # of the tokens that each head keeps, in any order; S is none
Score = Callable[[AttentionInputs], Scores]
Choice = Callable[[AttentionInputs, Lengths, int], Columns]


@dataclasses.dataclass(frozen=True)
class Highest:
    """Keep the tokens that score highest, head by head; of equal scores the earlier ones.

    Attributes:
        score: what padding gets does not matter.
    """

    score: Score

    def __call__(self, inputs: AttentionInputs, keep: Lengths, slots: int) -> Columns:
        return best(self.score(inputs), inputs.positions >= 0, keep, slots)


def best(scores: Scores, valid: Array, keep: Lengths, slots: int) -> Columns:
    """Columns of the `keep` highest scores of every row, at most `slots`."""
    columns = scores.shape[2]
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    _, chosen = jax.lax.top_k(scores, min(slots, columns))
    taken = jnp.minimum(keep, jnp.sum(valid, axis=1, dtype=jnp.int32))
    return jnp.where(jnp.arange(chosen.shape[2]) < taken[:, None, None], chosen, columns)


class PressedCache(KVCache):
    """The tokens of a prompt that a choice keeps, head by head, and all tokens that follow.

    They keep their positions and their order in time.

    Args:
        choose: which columns of a prompt each head keeps, of so many for each row, and at most as
            many as there are slots.
        keep: slots of a prompt.
        own: of a row's own prompt, `keep` at most, by its tokens; None for `keep`.
        bits: of keys and values, see `Storage`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        choose: Choice,
        keep: int,
        own: Sizes | None = None,
        bits: int = FLOAT,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        if keep < 1:
            raise ValueError(f"a cache must keep at least 1 token of a prompt, got {keep}")
        self.choose = choose
        self.keep = min(keep, cache_length.prompt)
        self.own = own
        self.tokens = Storage(bits)
        self.held = State(fill=-1.0)  # positions of the kept tokens
        self.dropped = State()  # how many tokens of each sequence were not kept

    @property
    def joint_append(self) -> bool:
        return True

    @property
    def exact_chunked_prefill(self) -> bool:
        return False

    @property
    def slots(self) -> int:
        return self.keep + self.cache_length.new

    def store(self, inputs: AttentionInputs) -> None:
        batch, columns, heads, _ = inputs.k.shape
        positions = inputs.positions
        count = jnp.sum(positions >= 0, axis=1, dtype=jnp.int32)
        keep = jnp.full_like(count, self.keep) if self.own is None else self.own(count)
        chosen = jnp.sort(self.choose(inputs, keep, self.keep), axis=2)
        short = ((0, 0), (0, 0), (0, self.keep - chosen.shape[2]))
        chosen = jnp.pad(chosen, short, constant_values=columns)
        known = jnp.broadcast_to(positions[:, None], (batch, heads, columns))
        held = jnp.take_along_axis(known, jnp.minimum(chosen, columns - 1), axis=2)
        held = jnp.where(chosen < columns, held, -1)
        self._read(batch, heads)
        self.held.write(held)
        self.dropped.write(count - jnp.sum(held[:, 0] >= 0, axis=1, dtype=jnp.int32))
        places = jnp.minimum(chosen, columns - 1).transpose(0, 2, 1)[..., None]
        k, v = (jnp.take_along_axis(x, places, axis=1) for x in (inputs.rotated_k, inputs.v))
        kept = self.tokens.of(k, v)
        self.tokens.write(begin(self.tokens.read(kept, self.slots), kept))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, k, positions = inputs.rotated_q, inputs.rotated_k, inputs.positions
        _, dropped = self._read(k.shape[0], k.shape[2])
        places = jnp.where(positions >= 0, positions - dropped[:, None], -1)
        new = self.tokens.of(k, inputs.v)
        past = self.tokens.read(new, self.slots)
        held = put_all(past, new, places)
        self.tokens.write(held)
        if self.core.together:
            return decode_together(q, held, lengths_after(places))
        if q.shape[1] <= FEW:
            return decode(q, held, ends(places))
        own, old = (self.tokens.floats(each, q.dtype) for each in (new, past))
        return attend_chunk(q, *own, positions, *old, starts(places))

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        held, dropped = self._read(lengths.shape[0], None)
        slot = jnp.arange(self.slots)
        after = slot + dropped[:, None]
        after = jnp.where(after < lengths[:, None], after, -1)[:, None]
        kept = jnp.pad(held, ((0, 0), (0, 0), (0, self.cache_length.new)), constant_values=-1)
        count = jnp.sum(held >= 0, axis=2, keepdims=True)
        return jnp.where(slot < count, kept, after)

    def _read(self, batch: int, heads: int | None) -> tuple[Array, Array]:
        heads = self.held.get_value().shape[1] if heads is None else heads
        held = self.held.read((batch, heads, self.keep), jnp.int32)
        return held, self.dropped.read((batch,), jnp.int32)
