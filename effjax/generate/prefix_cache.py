"""Texts that were read into a cache, to be continued: prefill and extend."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.buckets import POWERS, Buckets, bucket, sizes_of
from effjax.cost import state_bytes
from effjax.executables import Program
from effjax.forward import Forward, Params, StateDict
from effjax.layers.kv_cache import FEW, Caches, KVCache, as_it_is, told
from effjax.targets import canonical

INT32_MAX = 2**31 - 1
LEAST = 64  # tokens of the smallest bucket: fewer cost nearly as much, and are other programs
ADVICE = (
    'Compute with a wider range, compute_dtype="float32" or "bfloat16"; if that does not help, '
    "the weights are damaged, or a method's plan does not fit them."
)

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "lengths", "logits", "occurred", "end"),
    meta_fields=("forward",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class PrefixCache:
    """Texts that were read once, to be continued any number of times.

    It is a value: `generate` and `extend` leave it as it is. Rows beyond the texts are padding.

    Attributes:
        forward: with a cache and its room.
        state: what the cache holds.
        lengths: int32[B] tokens of each text; 0 for a row of padding.
        logits: [B, V] of the token that follows.
        occurred: which tokens each text holds.
        end: how long the texts may become, as it was asked for.
    """

    forward: Forward
    state: StateDict
    lengths: Int[Array, " B"]
    logits: Float[Array, "B V"]
    occurred: Bool[Array, "B V"]
    end: Int[Array, ""]

    @property
    def texts(self) -> int:
        """How many there are."""
        return int(np.count_nonzero(self.lengths))

    def __repr__(self) -> str:
        held = state_bytes(self.state)
        return f"PrefixCache({self.forward}, {self.texts} texts, {held:,} bytes of cache)"


def prefill(
    forward: Forward,
    params: Params,
    prompts: Prompts,
    *,
    new: int,
    chunk: int | None = None,
    buckets: Buckets = POWERS,
) -> PrefixCache:
    """Read prompts into a cache.

    Args:
        forward: a language model; one without a cache gets a dense one.
        params: its parameters.
        prompts: token ids, rows of any lengths.
        new: how many tokens may follow, those that `extend` adds included.
        chunk: read in pieces of so many tokens, for prompts whose activations do not fit; all at
            once if None.
        buckets: sizes that the tokens of prompts, and those that may follow, are rounded up to, so
            that other lengths run the same programs: "powers of two" from 64 on, a list, or None
            for exact shapes. With either, rows go up to powers of two. No result depends on it.

    Raises:
        ValueError: for empty prompts, unknown tokens, prompts longer than the model's texts, or
            chunks that this kind of cache cannot read.
    """
    tokens, lengths = padded(prompts)
    check_tokens(forward, tokens)
    check_count("new", new, least=0)
    limit, longest = forward.config.max_length, int(lengths.max())
    if longest + new > limit:
        raise ValueError(
            f"{longest} tokens and {new} new ones are beyond the {limit} that the model was "
            f"made for; shorten the prompt, or ask for fewer"
        )
    if chunk is not None:
        check_count("chunk", chunk)
    forward = cached(forward)
    check_shortest(forward, int(lengths.min()) + new)
    end = np.int32(longest + new)
    prompt, new = (min(bucket(size, buckets, least=LEAST), limit) for size in (longest, new))
    columns = prompt
    if chunk is not None and chunk < longest:
        _check_chunks(forward.with_cache_length(longest, int(end) - longest), params)
        columns = longest if sizes_of(buckets) is None else -(-longest // chunk) * chunk
    batch = bucket(len(tokens), POWERS if sizes_of(buckets) is not None else None)
    tokens, lengths = wider(tokens, batch, columns), wider(lengths, batch)
    forward = forward.with_cache_length(prompt, new, limit)
    first, *others = split(tokens, lengths, chunk or columns)
    ends = np.where(lengths > 0, lengths + (end - longest), 0).astype(np.int32)
    prefix = _read_first(forward, params, *first, ends, end)
    for piece in others:
        prefix = _read_on(params, prefix, *piece)
    return prefix


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
    params: Params, prefix: PrefixCache, prompts: Prompts, *, buckets: Buckets = POWERS
) -> PrefixCache:
    """Append tokens to the texts of a prefix cache, such as a question to a context.

    Args:
        params: of the model.
        prefix cache: it stays as it is.
        prompts: token ids, a row for every text.
        buckets: of several tokens: "powers of two" from 8 on, a list, or None, see `prefill`.

    Raises:
        ValueError: if there is no room, or the kind of cache appends tokens singly only.
    """
    tokens, lengths = padded(prompts)
    check_tokens(prefix.forward, tokens)
    if len(tokens) != prefix.texts:
        raise ValueError(
            f"the prefix cache has {prefix.texts} texts, got {len(tokens)} continuations"
        )
    check_room(prefix, int(lengths.max()))
    columns = tokens.shape[1]
    if columns > 1:  # one is a program of its own, and all that some caches take
        columns = bucket(columns, buckets, least=FEW)
    before = np.asarray(prefix.lengths)
    tokens, lengths = wider(tokens, len(before), columns), wider(lengths, len(before))
    (piece,) = split(tokens, lengths, columns)
    positions = np.where(piece[1] >= 0, before[:, None] + piece[1], -1)
    return _read_more(params, prefix, piece[0], positions)


# --- arguments ------------------------------------------------------------------------------------


def padded(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Rows as int32[B, S], padded with zeros at the right, and their lengths int32[B].

    Raises:
        ValueError: without rows, or with an empty one.
    """
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(
            "prompts are rows of one or more token ids, [[5, 9, 2], [7, 7]]; got "
            f"{[list(row.shape) for row in rows]}"
        )
    for row in rows:
        if row.dtype.kind not in "iu" or not 0 <= row.min() <= row.max() <= INT32_MAX:
            raise ValueError(f"token ids are whole numbers from 0 on, of 32 bits; got {row}")
    lengths = np.asarray([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: row.size] = row
    return tokens, lengths


def wider(array: np.ndarray, *shape: int) -> np.ndarray:
    """An array with zeros at its ends, up to a shape."""
    return np.pad(array, [(0, size - own) for own, size in zip(array.shape, shape, strict=True)])


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError for what is no whole number of 32 bits, or is below the least one."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= INT32_MAX:
        raise ValueError(f"{name} must be a whole number of tokens, at least {least}; got {value}")


def check_tokens(forward: Forward, tokens: np.ndarray) -> None:
    """Raise ValueError for ids that the model does not know."""
    known = forward.config.vocab_size
    wrong = tokens[(tokens < 0) | (tokens >= known)]
    if wrong.size:
        raise ValueError(
            f"the model knows tokens 0 ... {known - 1}, got {wrong.flat[0]}. Is this another "
            f"model's tokenizer?"
        )


def check_room(prefix: PrefixCache, new: int) -> None:
    """Raise ValueError if a prefix cache's longest text has no room for so many tokens."""
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
                f"is {read_by}, this model's is {asked}. Read the text with this model."
            )


def check_shortest(forward: Forward, tokens: int) -> None:
    """Raise ValueError if a cache has nothing for a batch's shortest text, of so many tokens."""
    for patch in forward.patches:
        if isinstance(patch, Caches):
            patch.check(tokens)


def has_cache(forward: Forward) -> bool:
    """Whether a patch of the forward puts caches into it."""
    return any(getattr(patch, "caches", False) for patch in forward.patches)


def cached(forward: Forward) -> Forward:
    """The forward, with a dense cache if it has none."""
    return forward if has_cache(forward) else forward.patch(Caches(as_it_is))


def caches(forward: Forward, params: Params) -> dict[str, KVCache]:
    """The caches of a forward by target module, without what they hold."""
    found: dict[str, KVCache] = {}

    def look(params: Params) -> None:
        token = jnp.zeros((1, 1), jnp.int32)
        for path, node in nnx.iter_graph(forward.patched(params, (token,))):
            if isinstance(node, KVCache):
                found[canonical(path)] = node

    jax.eval_shape(look, params)
    return found


class CacheBytes(NamedTuple):
    """Bytes of caches.

    Attributes:
        allocated: what the arrays take.
        useful: the part of slots that hold a token.
    """

    allocated: int
    useful: int


def cache_bytes(params: Params, prefix: PrefixCache) -> CacheBytes:
    """What the caches of a prefix cache take, and how much of that its texts use."""
    shares = _filled(prefix.forward, params, prefix.state, prefix.lengths)
    return _bytes(prefix.state, shares)


def text_bytes(forward: Forward, params: Params, tokens: int) -> CacheBytes:
    """What the caches of one prompt of so many tokens take, and how much of that it uses."""
    forward = cached(forward).with_cache_length(tokens, 0)
    text = jnp.zeros((1, tokens), jnp.int32)
    positions = jnp.arange(tokens)[None]

    @jax.jit  # of the model only what a cache chooses its tokens by is computed
    def shares(params: Params) -> dict[str, Array]:
        state = forward.init(params, text[:, :1], positions[:, :1])
        _, state = forward(params, state, text, positions, step=0)
        return _filled(forward, params, state, jnp.full(1, tokens))

    state = jax.eval_shape(partial(empty_state, forward, batch=1), params)
    return _bytes(state, shares(params))


@partial(jax.jit, static_argnums=0)
def _filled(forward: Forward, params: Params, state: StateDict, lengths: Array) -> dict[str, Array]:
    """Share of each cache's slots that hold a token, by target module."""
    token = jnp.zeros((lengths.shape[0], 1), jnp.int32)
    module = forward.loaded(params, state, token, step=1)
    found = ((canonical(path), node) for path, node in nnx.iter_graph(module))
    return {path: node.filled(lengths) for path, node in found if isinstance(node, KVCache)}


def _bytes(state: Mapping[str, Any], shares: Mapping[str, Array]) -> CacheBytes:
    allocated, useful = 0, 0.0
    for path, share in shares.items():
        own = sum(
            leaf.size * leaf.dtype.itemsize
            for name, leaf in state.items()
            if name.startswith(f"{path}.")
        )
        allocated, useful = allocated + own, useful + own * float(share)
    return CacheBytes(allocated, round(useful))


def split(tokens: np.ndarray, lengths: np.ndarray, chunk: int) -> list[tuple[Any, Any]]:
    """Prompts in pieces of columns, with the positions of each piece."""
    pieces = []
    for start in range(0, tokens.shape[1], chunk):
        columns = np.arange(start, min(start + chunk, tokens.shape[1]))
        positions = np.where(columns < lengths[:, None], columns, -1).astype(np.int32)
        pieces.append((tokens[:, columns], positions))
    return pieces


# --- programs -------------------------------------------------------------------------------------


# Jitted because shaping a state traces the whole model.
@partial(jax.jit, static_argnums=2)
def empty_state(forward: Forward, params: Params, batch: int) -> StateDict:
    """What the caches of a forward hold before anything was read."""
    token = jnp.zeros((batch, 1), jnp.int32)
    return forward.init(params, token, token)


def read(
    step: int, params: Params, prefix: PrefixCache, tokens: Array, positions: Array
) -> PrefixCache:
    """Read one piece of the texts; a row that ends in it leaves its logits."""
    last = jnp.argmax(positions, axis=1)
    ended = jnp.max(positions, axis=1) >= 0
    logits, state = prefix.forward(
        params, prefix.state, tokens, positions, last[:, None], step=step
    )
    valid = positions >= 0
    rows = jnp.arange(tokens.shape[0])[:, None]
    where = jnp.where(valid, tokens, prefix.occurred.shape[1])
    return dataclasses.replace(
        prefix,
        state=state,
        lengths=prefix.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32),
        logits=jnp.where(ended[:, None], logits[:, 0], prefix.logits),
        occurred=prefix.occurred.at[rows, where].set(True, mode="drop"),
    )


@Program
def _read_first(
    forward: Forward,
    params: Params,
    tokens: Int[Array, "B S"],
    positions: Int[Array, "B S"],
    ends: Int[Array, " B"],
    end: Int[Array, ""],
) -> PrefixCache:
    """Read the first piece; texts are to end after so many tokens, and never later than `end`."""
    batch, vocabulary = tokens.shape[0], forward.config.vocab_size
    prefix = PrefixCache(
        forward,
        told(empty_state(forward, params, batch), ends),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, vocabulary), forward.config.dtype),
        jnp.zeros((batch, vocabulary), bool),
        end,
    )
    return read(0, params, prefix, tokens, positions)


# A prefix cache that is being read is donated; one that is extended is kept, others may extend it
# too.
_read_on = Program(partial(read, 1), name="_read_on", donate_argnums=(1,))
_read_more = Program(partial(read, 1), name="_read_more")
