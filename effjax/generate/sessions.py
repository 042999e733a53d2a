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

from effjax.cost import state_bytes
from effjax.forward import Forward, Params, StateDict
from effjax.layers.kv_cache import Caches, KVCache, as_it_is
from effjax.sites import canonical

INT32_MAX = 2**31 - 1
ADVICE = (
    'Compute with a wider range, compute_dtype="float32" or "bfloat16"; if that does not help, '
    "the weights are damaged, or a method's plan does not fit them."
)

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "lengths", "logits", "occurred"),
    meta_fields=("forward",),
)
@dataclasses.dataclass(frozen=True, repr=False)
class Session:
    """Texts that were read once, to be continued any number of times.

    It is a value: `generate` and `extend` leave it as it is.

    Attributes:
        forward: with a cache and its room.
        state: what the cache holds.
        lengths: int32[B] tokens of each text.
        logits: [B, V] of the token that follows.
        occurred: which tokens each text holds.
    """

    forward: Forward
    state: StateDict
    lengths: Int[Array, " B"]
    logits: Float[Array, "B V"]
    occurred: Bool[Array, "B V"]

    def __repr__(self) -> str:
        held = state_bytes(self.state)
        return f"Session({self.forward}, {len(self.lengths)} texts, {held:,} bytes of cache)"


def prefill(
    forward: Forward,
    params: Params,
    prompts: Prompts,
    *,
    new: int,
    chunk: int | None = None,
) -> Session:
    """Read prompts into a cache.

    Args:
        forward: a language model; one without a cache gets a dense one.
        params: its parameters.
        prompts: token ids, rows of any lengths.
        new: how many tokens may follow, those that `extend` adds included.
        chunk: read in pieces of so many tokens, for prompts whose activations do not fit; all at
            once if None.

    Raises:
        ValueError: for empty prompts, unknown tokens, prompts longer than the model's texts, or
            chunks that this kind of cache cannot read.
    """
    tokens, lengths = padded(prompts)
    check_tokens(forward, tokens)
    check_count("new", new, least=0)
    limit = forward.config.max_length
    if lengths.max() + new > limit:
        raise ValueError(
            f"{lengths.max()} tokens and {new} new ones are beyond the {limit} that the model was "
            f"made for; shorten the prompt, or ask for fewer"
        )
    if chunk is not None:
        check_count("chunk", chunk)
    pieces = split(tokens, lengths, chunk or tokens.shape[1])
    forward = cached(forward).with_room(tokens.shape[1], new)
    check_shortest(forward, int(lengths.min()) + new)
    if len(pieces) > 1:
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
    state = empty_state(forward, params, tokens.shape[0])
    batch, vocabulary = tokens.shape[0], forward.config.vocab_size
    session = Session(
        forward,
        state,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, vocabulary), forward.config.dtype),
        jnp.zeros((batch, vocabulary), bool),
    )
    for number, (piece, positions) in enumerate(pieces):
        program = _read_first if number == 0 else _read_on
        session = program(params, session, piece, positions)
    return session


def extend(params: Params, session: Session, prompts: Prompts) -> Session:
    """Append tokens to the texts of a session, such as a question to a context.

    Raises:
        ValueError: if there is no room, or the kind of cache appends tokens singly only.
    """
    tokens, lengths = padded(prompts)
    check_tokens(session.forward, tokens)
    if tokens.shape[0] != session.lengths.shape[0]:
        raise ValueError(
            f"the session has {session.lengths.shape[0]} texts, got {tokens.shape[0]} continuations"
        )
    check_room(session, int(lengths.max()))
    columns = jnp.arange(tokens.shape[1])
    positions = jnp.where(columns < lengths[:, None], session.lengths[:, None] + columns, -1)
    return _read_more(params, session, tokens, positions)


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


def check_room(session: Session, new: int) -> None:
    """Raise ValueError if a session's longest text has no room for so many tokens."""
    room = session.forward.room
    assert room is not None
    longest = int(jnp.max(session.lengths))
    if longest + new > room.total:
        raise ValueError(
            f"the session has {longest} tokens and room for {room.total}; {new} more do not fit. "
            f"Give prefill a larger `new`."
        )


def check_maker(session: Session, forward: Forward) -> None:
    """Raise ValueError if another model, or another kind of cache, has read a session's texts."""
    if not isinstance(session, Session):
        raise ValueError(f"a session is what prefill gives, got {type(session).__name__}")
    own = cached(forward)
    for what in ("model", "config", "edits"):
        read_by, asked = getattr(session.forward, what), getattr(own, what)
        if read_by != asked:
            raise ValueError(
                f"the session was read by another model or into another kind of cache: its {what} "
                f"is {read_by}, this model's is {asked}. Read the text with this model."
            )


def check_shortest(forward: Forward, tokens: int) -> None:
    """Raise ValueError if a cache has nothing for a batch's shortest text, of so many tokens."""
    for edit in forward.edits:
        if isinstance(edit, Caches):
            edit.check(tokens)


def has_cache(forward: Forward) -> bool:
    """Whether an edit of the forward puts caches into it."""
    return any(getattr(edit, "caches", False) for edit in forward.edits)


def cached(forward: Forward) -> Forward:
    """The forward, with a dense cache if it has none."""
    return forward if has_cache(forward) else forward.edit(Caches(as_it_is))


def caches(forward: Forward, params: Params) -> dict[str, KVCache]:
    """The caches of a forward by site, without what they hold."""
    found: dict[str, KVCache] = {}

    def look(params: Params) -> None:
        token = jnp.zeros((1, 1), jnp.int32)
        for path, node in nnx.iter_graph(forward.edited(params, (token,))):
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


def cache_bytes(params: Params, session: Session) -> CacheBytes:
    """What the caches of a session take, and how much of that its texts use."""
    shares = _filled(session.forward, params, session.state, session.lengths)
    return _bytes(session.state, shares)


def text_bytes(forward: Forward, params: Params, tokens: int) -> CacheBytes:
    """What the caches of one prompt of so many tokens take, and how much of that it uses."""
    forward = cached(forward).with_room(tokens, 0)
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
    """Share of each cache's slots that hold a token, by site."""
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


def read(step: int, params: Params, session: Session, tokens: Array, positions: Array) -> Session:
    """Read one piece of the texts; a row that ends in it leaves its logits."""
    last = jnp.argmax(positions, axis=1)
    ended = jnp.max(positions, axis=1) >= 0
    logits, state = session.forward(
        params, session.state, tokens, positions, last[:, None], step=step
    )
    valid = positions >= 0
    rows = jnp.arange(tokens.shape[0])[:, None]
    where = jnp.where(valid, tokens, session.occurred.shape[1])
    return dataclasses.replace(
        session,
        state=state,
        lengths=session.lengths + jnp.sum(valid, axis=1, dtype=jnp.int32),
        logits=jnp.where(ended[:, None], logits[:, 0], session.logits),
        occurred=session.occurred.at[rows, where].set(True, mode="drop"),
    )


# Prompts own their state; a session that is extended is kept, as others may extend it too.
_read_first = jax.jit(partial(read, 0), donate_argnums=1)
_read_on = jax.jit(partial(read, 1), donate_argnums=1)
_read_more = jax.jit(partial(read, 1))
