"""KV caches: one protocol, and the two kinds that models need as they are.

A cache is a wrapper around an attention core (`CausalCore`). Call 0 is the prefill: the core
attends within the call, and the cache stores what it keeps. Every later call appends: the cache
stores the new tokens and attends to all that it holds. Where a token goes follows from its
position, row by row, so rows may have different lengths; tokens with position -1 are padding and
leave no trace.

Shapes are static: the forward's `CacheLength` says how long texts may become. How much is kept of a
    text
goes by its own length, as if it were alone; its row may have more slots, which stay empty. A kind
declares what it can:

    multi_token_append     append several tokens in one call (chunked prefill, speculative decoding)
    rollback               go back to a shorter text by appending at an earlier position
    exact_chunked_prefill  reading a prompt in chunks gives what reading it at once gives

B batch, S tokens of a call, H query heads, K key heads, D head dim, C slots.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from effjax.context import CacheLength, Context, State, is_static
from effjax.fields import Range
from effjax.layers.attention import CausalCore, Heads, KeyHeads, Positions
from effjax.targets import Wrapper, original, target_modules, wrap
from pallas_kernels.block_mask import EVERYTHING, Causal
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.merge import merge

Lengths = Int[Array, " B"]
Sizes = Callable[[Lengths], Lengths]  # a number of slots for every row, by its tokens

FEW = 8  # queries that a decode kernel takes


class KVCache(Wrapper, abc.ABC):
    """What every kind of cache is.

    Args:
        inner: the core.
        first: whether this call is the prefill.
        room: how long texts may become.
    """

    replaces_internals = True

    def __init__(self, inner: nnx.Module, *, first: bool, cache_length: CacheLength):
        super().__init__(inner)
        self.first = first
        self.cache_length = cache_length

    @property
    def multi_token_append(self) -> bool:
        """Whether several tokens may be appended in one call."""
        return True

    @property
    def rollback(self) -> bool:
        """Whether appending at an earlier position forgets what came after it."""
        return True

    @property
    def exact_chunked_prefill(self) -> bool:
        """Whether a prompt that is read in chunks gives what it gives when read at once."""
        return True

    @property
    def core(self) -> CausalCore:
        """The original core, for its rotation and its window."""
        core = original(self)
        assert isinstance(core, CausalCore)
        return core

    def __call__(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        if self.first:
            return self.prefill(q, k, v, x, positions)
        if q.shape[1] > 1 and not self.multi_token_append:
            raise ValueError(
                f"{type(self).__name__} appends one token in a call, not several: later tokens "
                f"would overwrite what earlier ones attend to. Append them one by one."
            )
        with jax.named_scope("attention"):
            return self.append(q, k, v, x, _known(positions, q))

    def prefill(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        """Attend within a text's first tokens, and store what is kept of them."""
        if q.shape[1] > self.cache_length.prompt:
            raise ValueError(
                f"a prompt of {q.shape[1]} tokens does not fit: there is room for "
                f"{self.cache_length.prompt}. Make more with forward.with_cache_length(prompt, "
                "new)."
            )
        self.store(q, k, v, x, _known(positions, q))
        return self.attend_prompt(q, k, v, x, positions)

    def attend_prompt(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> Heads:
        """Attention within a text's first tokens: as without a cache, unless a kind says else."""
        return self.inner(q, k, v, x, positions)

    @abc.abstractmethod
    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        """Store what is kept of a text's first tokens."""

    @abc.abstractmethod
    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        """Store tokens, and attend to all that is held."""

    @abc.abstractmethod
    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """Position of the token in every slot after this many tokens; -1 for an empty slot.

        G is 1 where all heads hold the same tokens.
        """

    def filled(self, lengths: Lengths) -> Float[Array, ""]:
        """Share of the slots that hold a token."""
        return jnp.mean((self.positions(lengths) >= 0).astype(jnp.float32))


def _known(positions: Positions | None, q: Heads) -> Positions:
    if positions is None:
        return jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return positions


Kind = tuple[type[KVCache], dict[str, Any]]  # and its options


@dataclasses.dataclass(frozen=True)
class Caches:
    """Patch: a cache at every attention core.

    Attributes:
        choose: (plan, core, room, layer) -> `Kind` for this core, layers counting from 0; a
            function of a module, so that equal patches are equal.
        plan: what it goes by.
    """

    choose: Callable[[Any, CausalCore, CacheLength, int], Kind]
    plan: Any = None
    caches: ClassVar[bool] = True

    def check(self, tokens: int) -> None:
        """Raise ValueError if the plan has nothing for a text that ends after so few tokens."""
        if hasattr(self.plan, "check_length"):
            self.plan.check_length(tokens)

    def __call__(self, module: nnx.Module, context: Context) -> None:
        found = target_modules(module, CausalCore)
        if not found:
            raise ValueError(f"{type(module).__name__} has no causal attention to cache")
        if context.cache_length is None:
            raise ValueError(
                "a cache must know how long texts may become: use "
                "forward.with_cache_length(prompt, new), "
                "or the functions of effjax.generate, which do"
            )
        first = is_static(context.step) and int(context.step) == 0
        for layer, target in enumerate(found):
            core = target.module
            assert isinstance(core, CausalCore)
            if core.window is not None and self.choose is not as_it_is:
                raise ValueError(
                    f"layer {layer} of this model sees the last {core.window} tokens only, and its "
                    f"own ring holds no more; other caches are for models whose layers see all"
                )
            kind, options = self.choose(self.plan, core, context.cache_length, layer)
            wrap(
                module, target.path, kind, first=first, cache_length=context.cache_length, **options
            )


def as_it_is(plan: None, core: CausalCore, cache_length: CacheLength, layer: int) -> Kind:
    """All that a core's queries see: every token, or those of its window."""
    if core.window is None:
        return DenseCache, {}
    return RingCache, {"sinks": 0, "ring": core.window}


class DenseCache(KVCache):
    """Every token's key and value, the token at position p in slot p."""

    def __init__(self, inner: nnx.Module, *, first: bool, cache_length: CacheLength):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.slots = cache_length.total
        self.k, self.v = State(), State()

    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        k_turned = self.core.rotary(k, positions)
        for state, new in ((self.k, k_turned), (self.v, v)):
            old = state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype)
            new = left_aligned(new, positions)
            state.write(jax.lax.dynamic_update_slice_in_dim(old, new, 0, axis=1))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q, k = self.core.rotary(q, positions), self.core.rotary(k, positions)
        held = []
        for state, new in ((self.k, k), (self.v, v)):
            old = state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype)
            held.append(old)
            state.write(put(old, new, positions))
        if q.shape[1] <= FEW:
            return _decode(q, self.k, self.v, ends(positions))
        return attend_chunk(q, k, v, positions, held[0], held[1], starts(positions))

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        slot = jnp.arange(self.slots)
        return jnp.where(slot < lengths[:, None], slot, -1)[:, None]


class RingCache(KVCache):
    """The first tokens ("sinks") and the last ones, which overwrite each other in turn.

    For models with a window (no sinks) it holds all that a query sees. For others it forgets
    (StreamingLLM, arXiv 2309.17453, with the tokens' own positions). Queries see the sinks and the
    last `ring` tokens, their own included.

    Args:
        sinks, ring: slots of each part.
        own: slots of both that a row uses, by the tokens that its text is to have; None for all.
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

    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        if self.own is not None:
            foresee(self.foreseen, positions, self.cache_length)
        held = self.positions(lengths_after(positions))[:, 0]
        k_turned = self.core.rotary(k, positions)
        for state, new in ((self.k, k_turned), (self.v, v)):
            state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype)
            state.write(take(new, positions, held))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q, k = self.core.rotary(q, positions), self.core.rotary(k, positions)
        before, ring = starts(positions), self.rings(q.shape[0])
        rings = ring if isinstance(ring, int) else ring[:, None]
        place = ring_slot(positions, self.sinks, rings)
        after = lengths_after(positions)[:, None]
        # Of several new tokens for one slot, only the last is written.
        place = jnp.where((place < self.sinks) | (positions >= after - rings), place, -1)
        old = []
        for state, new in ((self.k, k), (self.v, v)):
            old.append(state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype))
            state.write(put(old[-1], new, place))
        if q.shape[1] == 1:
            return _decode(q, self.k, self.v, jnp.minimum(ends(positions), self.sinks + ring))
        held = self.positions(before)[:, 0]
        return attend_to_positions(
            q,
            jnp.concatenate([old[0], k], axis=1),
            jnp.concatenate([old[1], v], axis=1),
            positions,
            jnp.concatenate([held, positions], axis=1),
            sinks=self.sinks,
            local=rings,
        )

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        rings = self.rings(lengths.shape[0])
        return ring_positions(lengths, self.sinks, rings, slots=self.slots)[:, None]


class EvictingCache(KVCache):
    """The tokens of a prompt that score highest, head by head, and all tokens that follow.

    They keep their positions and their order in time. Of equal scores the earlier token is kept.

    Args:
        keep: tokens of a prompt that each head keeps.
        own: of a row's own prompt, `keep` at most, by its tokens; None for `keep`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        keep: int,
        own: Sizes | None = None,
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        if keep < 1:
            raise ValueError(f"a cache must keep at least 1 token of a prompt, got {keep}")
        self.keep = min(keep, cache_length.prompt)
        self.own = own
        self.k, self.v = State(), State()
        self.held = State(fill=-1.0)  # positions of the kept tokens
        self.dropped = State()  # how many tokens of each text were not kept

    @property
    def exact_chunked_prefill(self) -> bool:
        return self.keep >= self.cache_length.prompt

    @property
    def slots(self) -> int:
        return self.keep + self.cache_length.new

    @abc.abstractmethod
    def scores(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Float[Array, "B K S"]:
        """How much each head needs each token of a prompt; what padding gets does not matter."""

    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        batch, columns, heads, _ = k.shape
        valid = (positions >= 0)[:, None]
        count = jnp.sum(valid[:, 0], axis=1, dtype=jnp.int32)
        keep = jnp.full_like(count, self.keep) if self.own is None else self.own(count)
        scores = jnp.where(valid, self.scores(q, k, v, x, positions), -jnp.inf)
        _, chosen = jax.lax.top_k(scores, min(self.keep, columns))
        places = jnp.broadcast_to(jnp.where(valid, jnp.arange(columns), columns), scores.shape)
        chosen = jnp.take_along_axis(places, chosen, axis=2)
        ranks = jnp.arange(chosen.shape[2])
        chosen = jnp.sort(jnp.where(ranks < keep[:, None, None], chosen, columns), axis=2)
        chosen = jnp.pad(
            chosen, ((0, 0), (0, 0), (0, self.keep - chosen.shape[2])), constant_values=columns
        )
        known = jnp.broadcast_to(positions[:, None], scores.shape)
        held = jnp.take_along_axis(known, jnp.minimum(chosen, columns - 1), axis=2)
        held = jnp.where(chosen < columns, held, -1)
        self._read(batch, heads)
        self.held.write(held)
        self.dropped.write(jnp.maximum(count - keep, 0))
        for state, new in ((self.k, self.core.rotary(k, positions)), (self.v, v)):
            old = state.read((batch, self.slots, *new.shape[2:]), new.dtype)
            places = jnp.minimum(chosen, columns - 1).transpose(0, 2, 1)[..., None]
            kept = jnp.take_along_axis(new, places, axis=1)
            state.write(jax.lax.dynamic_update_slice_in_dim(old, kept, 0, axis=1))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q, k = self.core.rotary(q, positions), self.core.rotary(k, positions)
        _, dropped = self._read(k.shape[0], k.shape[2])
        places = jnp.where(positions >= 0, positions - dropped[:, None], -1)
        past = []
        for state, new in ((self.k, k), (self.v, v)):
            past.append(state.read((new.shape[0], self.slots, *new.shape[2:]), new.dtype))
            state.write(put(past[-1], new, places))
        if q.shape[1] <= FEW:
            return _decode(q, self.k, self.v, ends(places))
        return attend_chunk(q, k, v, positions, past[0], past[1], starts(places))

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


Dropped = Annotated[float, Range(0, 1, below=True)]  # share of a text's tokens
HALF = 0.5  # is dropped where a plan says nothing else


def check_budget(plan: Any, **always: int) -> None:
    """What a plan's `capacity` and `ratio` must be; without either the ratio becomes a half.

    Args:
        always: fields that count tokens which are kept in any case.

    Raises:
        ValueError: if both are given, or the capacity holds no more than what is always kept.
    """
    capacity, ratio = plan.capacity, plan.ratio
    if capacity is not None and ratio is not None:
        raise ValueError(
            f"capacity={capacity} and ratio={ratio} cannot both be given: one is how many tokens "
            f"are kept, the other the share that is dropped. Leave one of them out (None)."
        )
    if capacity is None and ratio is None:
        object.__setattr__(plan, "ratio", HALF)
    for name, tokens in always.items():
        if capacity is not None and capacity <= tokens:
            raise ValueError(
                f"capacity={capacity} leaves no token beside {name}={tokens}, which are always "
                f"kept: take a capacity of at least {tokens + 1}, or a smaller {name}"
            )


def budgets(
    capacity: int | None, ratio: float | None, most: int, *, always: int = 0
) -> tuple[int, Sizes | None]:
    """How many tokens are kept of a text of `most` ones, and of every row by its own; None for all.

    The second one is None where rows need no size of their own: all of theirs fits in the first.
    """
    kept = budget(capacity, ratio, most, always=always)
    if capacity is not None or ratio is None or kept == most:
        return kept, None
    table = _shares(ratio, most, always)
    return kept, lambda tokens: jnp.asarray(table)[tokens]


@lru_cache(maxsize=64)
def _shares(ratio: float, most: int, always: int) -> np.ndarray:
    """What is kept of 0 ... `most` tokens: a table, since devices round otherwise than the host."""
    tokens = np.arange(most + 1, dtype=np.int32)
    kept = np.maximum((tokens * (1 - ratio)).astype(np.int32), always + 1)
    return np.minimum(kept, tokens)


def budget(capacity: int | None, ratio: float | None, tokens: int, *, always: int = 0) -> int:
    """How many of `tokens` are kept: `capacity` if given, else all but a share `ratio` of them.

    Args:
        always: tokens that are kept in any case (sinks, a window). Of texts too short to drop the
            share beside them, these and one more are kept.
    """
    if capacity is None:
        assert ratio is not None
        return int(_shares(ratio, tokens, always)[tokens])
    return min(capacity, tokens)


# --- arithmetic of positions and slots -----------------------------------------------------------


def ends(positions: Positions) -> Lengths:
    """Tokens of every text after a call, as if its row had no padding at the right.

    With r columns of padding at the right this is r more than there are: then the queries are the
    last tokens, as kernels take them, and those of padding see slots that mean nothing.
    """
    columns = positions.shape[1]
    reach = positions + jnp.arange(columns, 0, -1)
    return jnp.max(jnp.where(positions >= 0, reach, 0), axis=1)


def lengths_after(positions: Positions) -> Lengths:
    """Tokens of every text after a call; 0 for a row of padding."""
    return jnp.max(positions, axis=1) + 1


def foresee(state: State, positions: Positions, cache_length: CacheLength) -> Lengths:
    """Tokens that each text is to have, remembered: its prompt's and all that are new in the room.

    A state that is above 0 already was told otherwise, see `told`.
    """
    lengths = lengths_after(positions)
    known = state.read(lengths.shape, jnp.int32)
    state.write(jnp.where(known > 0, known, lengths + cache_length.new))
    return state.get_value()


def told(state: Mapping[str, Array], lengths: Lengths) -> dict[str, Array]:
    """An initial state whose caches know that texts end after so many tokens, each row its own."""
    return {name: lengths if name.endswith(".foreseen") else value for name, value in state.items()}


def starts(positions: Positions) -> Lengths:
    """Tokens of every text before a call: the lowest position of its row."""
    return jnp.min(jnp.where(positions >= 0, positions, _FAR), axis=1) % _FAR


_FAR = 1 << 30


def left_aligned(x: Float[Array, "B S ..."], positions: Positions) -> Float[Array, "B S ..."]:
    """Rows moved so that the token at position p stands in column p; what follows means nothing."""
    return take(x, positions, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))


def take(
    x: Shaped[Array, "B S ..."], positions: Positions, wanted: Int[Array, "B C"]
) -> Shaped[Array, "B C ..."]:
    """The tokens at these positions of texts that begin in this call; zero for -1."""
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


# --- attention to slots ---------------------------------------------------------------------------


def _decode(q: Heads, k: State, v: State, lengths: Lengths) -> Heads:
    out = decode_attention(q, k.get_value(), v.get_value(), lengths)
    assert isinstance(out, jax.Array)
    return out


def attend_chunk(
    q: Heads,
    k: KeyHeads,
    v: KeyHeads,
    positions: Positions,
    past_k: Float[Array, "B C K D"],
    past_v: Float[Array, "B C K D"],
    past: Lengths,
) -> Heads:
    """Many new tokens attend to the first `past` slots and to each other.

    Two partial results, merged by their log-sum-exps.
    """
    valid = (positions >= 0).astype(jnp.int32)
    own = block_sparse_attention(q, k, v, Causal(), segments=(valid, valid), return_lse=True)
    filled = jnp.arange(past_k.shape[1]) < past[:, None]
    segments = jnp.zeros_like(positions), 1 - filled.astype(jnp.int32)
    old = block_sparse_attention(q, past_k, past_v, EVERYTHING, segments=segments, return_lse=True)
    return merge(*zip(own, old, strict=True))[0]


def attend_to_positions(
    q: Heads,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K D"],
    q_positions: Positions,
    k_positions: Int[Array, "B T"],
    *,
    sinks: int = 0,
    local: int | Int[Array, "B 1"] | None = None,
) -> Heads:
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
