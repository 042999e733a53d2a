"""Sequences that were read into a cache, to be continued: prefill and extend."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.buckets import POWERS, Buckets, bucket, sizes_of
from effjax.caches.attention import FEW
from effjax.caches.slots import told
from effjax.cost import state_bytes
from effjax.executables import Program
from effjax.forward import Forward, Params, StateDict
from effjax.generate.arguments import Prompts, check_count, rows_of
from effjax.generate.installed import (
    CacheBytes,
    cached,
    caches,
    check_shortest,
    empty_state,
    filled,
    total_bytes,
)
from effjax.layers.attention import Positions, places

LEAST = 64  # tokens of the smallest bucket: fewer cost nearly as much, and are other programs
ADVICE = (
    'Compute with a wider range, compute_dtype="float32" or "bfloat16"; if that does not help, '
    "the weights are damaged, or a method's plan does not fit them."
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "lengths", "logits", "occurred", "end", "shift"),
    meta_fields=("forward",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class PrefixCache:
    """Sequences that were read once, and that you can continue any number of times.

    `prefill` makes it. It is a value: `generate` and `extend` do not change it. Rows beyond the
    sequences are padding.

    Attributes:
        forward: the forward, with a cache of a known length.
        state: contents of the cache.
        lengths: int32[B], number of tokens of each sequence; 0 for a row of padding.
        logits: [B, V], logits of the token that follows.
        occurred: bool[B, V], which tokens each sequence contains.
        end: how long the sequences may become, as it was asked for.
        shift: int32[B], number that is added to the place of a token that follows, to rotate it;
            None for 0.
    """

    forward: Forward
    state: StateDict
    lengths: Int[Array, " B"]
    logits: Float[Array, "B V"]
    occurred: Bool[Array, "B V"]
    end: Int[Array, ""]
    shift: Int[Array, " B"] | None = None

    @property
    def sequences(self) -> int:
        """How many there are."""
        return int(np.count_nonzero(self.lengths))

    def __repr__(self) -> str:
        held = state_bytes(self.state)
        return f"PrefixCache({self.forward}, {self.sequences} sequences, {held:,} bytes of cache)"


def prefill(
    forward: Forward,
    params: Params,
    prompts: Prompts | None = None,
    *,
    new: int,
    inputs_embeds: Any = None,
    positions: Any = None,
    chunk: int | None = None,
    buckets: Buckets = POWERS,
) -> PrefixCache:
    """Read prompts into a cache.

    Use it when several generations continue the same prompts. `generate` reads prompts itself.

    Args:
        forward: a language model. One without a cache gets a dense cache.
        params: its parameters.
        prompts: token ids, rows of any lengths. Beside `inputs_embeds` only a repetition penalty
            uses them.
        new: how many tokens may follow, including those that `extend` adds.
        inputs_embeds: rows [S, hidden_size] of any lengths, in place of the embeddings of tokens.
        positions: int[R, S] for each row, the numbers that its tokens are rotated to: one row of
            positions, or one for each of the model's `rope_sections` (M-RoPE). None for 0, 1, 2,
            ... Tokens that follow continue from the highest position.
        chunk: read in pieces of so many tokens, for prompts whose activations do not fit; None
            reads all at once.
        buckets: sizes that the numbers of tokens of prompts, and of those that may follow, are
            rounded up to, so that other lengths run the same programs. "powers of two" from 64 on,
            a list, or None for exact shapes. Unless it is None, the number of rows is rounded up to
            a power of two. No result depends on it.

    Returns:
        The prompts in a cache, ready to be continued.

    Raises:
        ValueError: for empty prompts, unknown tokens, prompts longer than the model's sequences,
            rows that do not fit together, or chunks that this kind of cache cannot read.
    """
    rows = rows_of(forward, prompts, inputs_embeds, positions)
    check_count("new", new, least=0)
    limit, longest = forward.config.max_length, rows.columns
    if longest + new > limit:
        raise ValueError(
            f"{longest} tokens and {new} new ones are beyond the {limit} that the model was "
            f"made for; shorten the prompt, or ask for fewer"
        )
    if chunk is not None:
        check_count("chunk", chunk)
    forward = cached(forward)
    check_shortest(forward, int(rows.lengths.min()) + new)
    end = np.int32(longest + new)
    sized = with_room(forward, longest, new, buckets)
    assert sized.cache_length is not None
    columns = sized.cache_length.prompt
    if chunk is not None and chunk < longest:
        _check_chunks(forward.with_cache_length(longest, int(end) - longest), params)
        columns = longest if sizes_of(buckets) is None else -(-longest // chunk) * chunk
    batch = bucket(len(rows.lengths), POWERS if sizes_of(buckets) is not None else None)
    rows = rows.wider(batch, columns)
    forward = sized
    first, *others = rows.split(chunk or columns)
    ends = np.where(rows.lengths > 0, rows.lengths + (end - longest), 0).astype(np.int32)
    prefix = _read_first(forward, params, *first[:2], ends, end, *first[2:])
    for piece in others:
        prefix = _read_on(params, prefix, *piece)
    return prefix


def with_room(forward: Forward, longest: int, new: int, buckets: Buckets) -> Forward:
    """A forward with caches for prompts of so many tokens and so many new ones, rounded up."""
    limit = forward.config.max_length
    prompt, new = (min(bucket(size, buckets, least=LEAST), limit) for size in (longest, new))
    return cached(forward).with_cache_length(prompt, new, limit)


def _check_chunks(forward: Forward, params: Params) -> None:
    """Raise ValueError if a cache of this room must see a prompt at once."""
    inexact = {
        type(cache).__name__
        for cache in caches(forward, params).values()
        if not (cache.exact_chunked_prefill and cache.multi_token_append)
    }
    if inexact:
        raise ValueError(
            f"{', '.join(sorted(inexact))} must see a prompt at once: read in chunks it would "
            f"keep something else. Leave out chunk, or use another kind of cache."
        )


def extend(
    params: Params,
    prefix: PrefixCache,
    prompts: Prompts | None = None,
    *,
    inputs_embeds: Any = None,
    positions: Any = None,
    buckets: Buckets = POWERS,
) -> PrefixCache:
    """Append tokens to the sequences of a prefix cache, such as a question to a context.

    Args:
        params: parameters of the model.
        prefix: the prefix cache; it is not changed.
        prompts: token ids, a row for every sequence.
        inputs_embeds, positions: see `prefill`. Without positions the appended tokens continue from
            the highest one.
        buckets: sizes for several tokens: "powers of two" from 8 on, a list, or None, see
            `prefill`.

    Returns:
        A prefix cache with the longer sequences.

    Raises:
        ValueError: if the tokens do not fit the cache's length, or if this kind of cache appends
            only single tokens.
    """
    rows = rows_of(prefix.forward, prompts, inputs_embeds, positions)
    if len(rows.lengths) != prefix.sequences:
        raise ValueError(
            f"the prefix cache has {prefix.sequences} sequences, got {len(rows.lengths)} "
            f"continuations"
        )
    columns = rows.columns
    check_room(prefix, columns)
    if columns > 1:  # one is a program of its own, and all that some caches take
        columns = bucket(columns, buckets, least=FEW)
    before = np.asarray(prefix.lengths)
    rows = rows.wider(len(before), columns)
    if prefix.shift is not None and rows.angles is None:
        angles = (before + np.asarray(prefix.shift))[:, None, None] + np.arange(columns)
        rows = rows._replace(angles=angles.astype(np.int32))
    ((tokens, positions, *embeds),) = rows.split(columns, before[:, None])
    return _read_more(params, prefix, tokens, positions, *embeds)


def cache_bytes(params: Params, prefix: PrefixCache) -> CacheBytes:
    """Count the bytes that the caches of a prefix cache take, and those that its sequences use."""
    shares = filled(prefix.forward, params, prefix.state, prefix.lengths)
    return total_bytes(prefix.state, shares)


def check_room(prefix: PrefixCache, new: int) -> None:
    """Raise ValueError if a prefix cache's longest sequence has no room for so many tokens."""
    longest, end = int(np.max(prefix.lengths)), int(prefix.end)
    if longest + new > end:
        raise ValueError(
            f"the prefix cache has {longest} tokens and room for {end}; {new} more do not fit. "
            f"Give prefill a larger `new`."
        )


def check_maker(prefix: PrefixCache, forward: Forward) -> None:
    """Raise ValueError if another model, or another kind of cache, has read a prefix."""
    if not isinstance(prefix, PrefixCache):
        raise ValueError(f"a prefix cache is what prefill gives, got {type(prefix).__name__}")
    own = cached(forward)
    for what in ("model", "config", "patches"):
        read_by, asked = getattr(prefix.forward, what), getattr(own, what)
        if read_by != asked:
            raise ValueError(
                "the prefix cache was read by another model or into another kind of cache: its "
                f"{what} "
                f"is {read_by}, this model's is {asked}. Read the sequence with this model."
            )


# --- programs -------------------------------------------------------------------------------------


def read(
    step: int,
    params: Params,
    prefix: PrefixCache,
    tokens: Array | None,
    positions: Positions,
    embeds: Array | None = None,
) -> PrefixCache:
    """Read one piece of the sequences; a row that ends in it leaves its logits.

    Args:
        step: 0 for the first piece, 1 for others.
        params, prefix: what is continued.
        tokens: their ids, None where they are not known.
        positions: see `Llama`.
        embeds: what the model is given in place of tokens.
    """
    place, angles = places(positions)
    valid, last = place >= 0, jnp.argmax(place, axis=1)
    ended = jnp.any(valid, axis=1)
    inputs: tuple = (tokens, positions, last[:, None])
    if embeds is not None:
        inputs = (None, positions, last[:, None], None, embeds)
    logits, state = prefix.forward(params, prefix.state, *inputs, step=step)
    occurred, shift = prefix.occurred, prefix.shift
    if tokens is not None:
        rows = jnp.arange(tokens.shape[0])[:, None]
        where = jnp.where(valid, tokens, occurred.shape[1])
        occurred = occurred.at[rows, where].set(True, mode="drop")
    lengths = prefix.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32)
    if angles.ndim == 3:
        before = jnp.zeros_like(lengths) if shift is None else shift
        highest = jnp.max(jnp.where(valid[:, None], angles, -1), axis=(1, 2)) + 1
        shift = jnp.where(ended, jnp.maximum(highest, prefix.lengths + before) - lengths, before)
    return dataclasses.replace(
        prefix,
        state=state,
        lengths=lengths,
        logits=jnp.where(ended[:, None], logits[:, 0], prefix.logits),
        occurred=occurred,
        shift=shift,
    )


@Program
def _read_first(
    forward: Forward,
    params: Params,
    tokens: Int[Array, "B S"] | None,
    positions: Positions,
    ends: Int[Array, " B"],
    end: Int[Array, ""],
    embeds: Float[Array, "B S C"] | None = None,
) -> PrefixCache:
    """Read the first piece; sequences are to end after `ends` tokens, never later than `end`."""
    batch, vocabulary = positions.shape[0], forward.config.vocab_size
    prefix = PrefixCache(
        forward,
        told(empty_state(forward, params, batch), ends),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, vocabulary), forward.config.dtype),
        jnp.zeros((batch, vocabulary), bool),
        end,
    )
    return read(0, params, prefix, tokens, positions, embeds)


# A prefix cache that is being read is donated; one that is extended is kept, others may extend it
# too.
_read_on = Program(partial(read, 1), name="_read_on", donate_argnums=(1,))
_read_more = Program(partial(read, 1), name="_read_more")
