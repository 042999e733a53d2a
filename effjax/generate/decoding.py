"""Choosing token after token: one jitted `lax.while_loop`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from effjax.buckets import POWERS, Buckets
from effjax.executables import Program
from effjax.finite import NotFiniteWarning
from effjax.forward import Forward, Params, StateDict
from effjax.generate.arguments import Prompts, check_count, check_tokens, padded, rows_of
from effjax.generate.decoders import check_decoder
from effjax.generate.installed import check_rollback
from effjax.generate.jacobi import Drafts, Drawn, JacobiDecoding, begin, decode
from effjax.generate.made import Made
from effjax.generate.prefix_cache import (
    ADVICE,
    PrefixCache,
    check_maker,
    check_room,
    extend,
    prefill,
    read,
    with_room,
)
from effjax.generate.sampling import Sampling, process_logits
from effjax.samplers import sample_keys

STRIDE = 8  # tokens between two looks at what is made, for streamers and stop functions


@runtime_checkable
class Streamer(Protocol):
    """An object that receives tokens as they are made.

    For one sequence you can use transformers' `TextStreamer`. A streamer receives the same tokens
    that `Generated.rows` gives later: an end token is the last, and nothing follows a stop. In a
    batch it receives -1 where there is no token: around shorter prompts, and in rows that have
    ended.
    """

    def put(self, value: np.ndarray) -> None:
        """Take the prompts int32[B, S], then int32[B] for every new token."""

    def end(self) -> None:
        """The last token has been put."""


class Generated(NamedTuple):
    """New tokens.

    Attributes:
        tokens: int32[B, N] on the host. Beyond its length a row repeats its end.
        lengths: int32[B], number of new tokens of each row, including an end-of-sequence token.
        log_probs: float32[B, N], log-probabilities of the tokens by the model itself, before
            `Sampling`; 0 beyond the length of a row.
        calls: int32[B], network calls that made them, that of the prompt included.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray
    calls: np.ndarray

    def rows(self) -> list[list[int]]:
        """The new tokens of every row."""
        return [row[:count].tolist() for row, count in zip(self.tokens, self.lengths, strict=True)]


def generate(
    forward: Forward,
    params: Params,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int,
    inputs_embeds: Any = None,
    positions: Any = None,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos: int | Sequence[int] = (),
    key: Key[Array, "..."] | None = None,
    streamer: Streamer | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    prefix: PrefixCache | None = None,
    chunk: int | None = None,
    buckets: Buckets = POWERS,
    decoder: JacobiDecoding | None = None,
) -> Generated:
    """Continue sequences of tokens.

    Use it for token ids or embeddings. For texts and chats use a pipeline, see `effjax.pipeline`.

        out = generate(forward, params, [[5, 9, 2], [7, 7]], max_new_tokens=64)
        out.rows()  # the new tokens of each row

    Args:
        forward, params: a language model, possibly compressed.
        prompts: token ids, rows of any lengths. With a prefix cache they continue its sequences;
            None then continues these sequences directly.
        max_new_tokens: the most tokens to make for a row.
        inputs_embeds, positions: see `prefill`.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`. Without a temperature,
            and with 0, the most likely token is taken.
        eos: tokens that end a sequence.
        key: PRNG key for a temperature, `jax.random.key(seed)`, or one key for each row. With one
            key row i draws from `fold_in(key, i)`, whatever else is in the batch.
        streamer: an object that receives the prompts and then the tokens, a few at a time.
        stop: function of the new tokens of a row. The row ends as soon as it returns True.
        prefix: sequences that `prefill` has read with this model.
        chunk, buckets: see `prefill`.
        decoder: how several tokens are found in one call; None finds one. The distribution of texts
            is the same.

    Raises:
        ValueError: for numbers out of range, a temperature without a key, a prefix cache of another
            model, a decoder with a cache that cannot go back, and as `prefill`.

    Warns:
        NotFiniteWarning: if logits were NaN or infinite.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling.check()
    # What is off is not part of the program.
    sampling = Sampling(
        float(temperature) if temperature else None,
        int(top_k) if top_k else None,
        None if top_p is None or top_p == 1 else float(top_p),
        float(min_p) if min_p else None,
        None
        if repetition_penalty is None or repetition_penalty == 1
        else float(repetition_penalty),
    )
    check_count("max_new_tokens", max_new_tokens)
    if sampling.temperature is not None and key is None:
        raise ValueError("sampling at a temperature needs a key: key=jax.random.key(0)")
    if not (streamer is None or isinstance(streamer, Streamer)):
        raise ValueError(f"a streamer has the functions put and end, got {streamer!r}")
    ends = np.atleast_1d(np.asarray(eos, np.int32))
    check_tokens(forward, ends)
    if decoder is not None:
        check_decoder(decoder)
        decoder.check(forward.config.vocab_size, max_new_tokens)
        decoder = decoder.within(max_new_tokens)
    given: Any = {"inputs_embeds": inputs_embeds, "positions": positions, "buckets": buckets}
    if prefix is None:
        if prompts is None and inputs_embeds is None:
            raise ValueError("give prompts, or a prefix cache that has read some")
        if decoder is not None:
            longest = rows_of(forward, prompts, inputs_embeds, positions).columns
            check_rollback(with_room(forward, longest, max_new_tokens, buckets), params)
        prefix = prefill(forward, params, prompts, new=max_new_tokens, chunk=chunk, **given)
    else:
        check_maker(prefix, forward)
        if decoder is not None:
            check_rollback(prefix.forward, params)
        if prompts is not None or inputs_embeds is not None:
            prefix = extend(params, prefix, prompts, **given)
        check_room(prefix, max_new_tokens)
        prefix = _copied(prefix)
    rows, batch = prefix.sequences, len(prefix.lengths)
    keys = None if key is None else _row_keys(key, rows, batch)
    if streamer is not None:
        streamer.put(_shown_prompts(prompts, rows))
    stepwise = streamer is not None or stop is not None
    seen, stride = 0, STRIDE if stepwise else max_new_tokens
    cache_length = prefix.forward.cache_length
    assert cache_length is not None
    made = Made.nothing(np.asarray(prefix.lengths) == 0, cache_length.new)
    drawing, drafts = (sampling, keys, ends), None
    begun = made, prefix.logits, prefix.occurred, *drawing
    if decoder is None:
        made = _begin(*begun)
    else:
        drawing = *drawing, np.int32(max_new_tokens)
        made, drafts = _begin_drafting(decoder, *begun, drawing[-1])
    while seen < max_new_tokens:
        limit = np.int32(min(seen + stride, max_new_tokens))
        if drafts is None:
            prefix, made = _decode(params, prefix, made, *drawing, limit)
        else:
            prefix, made, drafts = _decode_drafting(
                decoder, params, prefix, made, drafts, *drawing, limit
            )
        count = int(made.count)
        if stop is not None:
            made = _stopped(made, stop, seen)
            count = int(np.max(made.lengths)) if np.all(made.done) else count
        if streamer is not None:
            _show(streamer, made, rows, seen, count)
        seen = max_new_tokens if np.all(made.done) else count
    if streamer is not None:
        streamer.end()
    _warn_of_rows(np.flatnonzero(~np.asarray(made.finite)), rows)
    lengths = np.asarray(made.lengths)[:rows]
    used = int(lengths.max())
    tokens, log_probs = (np.asarray(each)[:rows, :used] for each in (made.tokens, made.log_probs))
    last = np.asarray(made.last)[:rows, None]
    tokens = np.where(np.arange(used) < lengths[:, None], tokens, last)
    return Generated(tokens, lengths, log_probs, np.asarray(made.calls)[:rows])


def _copied(prefix: PrefixCache) -> PrefixCache:
    """A prefix cache that may be donated: nothing of it is the caller's."""

    def copy(leaf: Array) -> Array:
        return jax.device_put(leaf, leaf.sharding, may_alias=False)

    return jax.tree.map(copy, prefix)


def _row_keys(key: Key[Array, "..."], rows: int, batch: int) -> Key[Array, " B"]:
    """A key for each row of a batch, of which those beyond the sequences draw nothing."""
    if np.shape(key) == ():
        return sample_keys(key, batch)
    keys = sample_keys(key, rows)
    return keys if rows == batch else keys[np.minimum(np.arange(batch), rows - 1)]


def _shown_prompts(prompts: Prompts | None, batch: int) -> np.ndarray:
    if prompts is None:
        return np.zeros((batch, 0), np.int32)
    tokens, lengths = padded(prompts)
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)


def _show(streamer: Streamer, made: Made, rows: int, start: int, stop: int) -> None:
    """Put the columns of tokens in which some row goes on."""
    tokens, lengths = (np.asarray(each)[:rows] for each in (made.tokens, made.lengths))
    for column in range(start, min(stop, lengths.max())):
        streamer.put(np.where(column < lengths, tokens[:, column], -1))


def _warn_of_rows(rows: np.ndarray, batch: int) -> None:
    if rows.size:
        warnings.warn(
            f"the logits of {rows.size} of {batch} sequences (rows {rows[:8].tolist()}) became NaN "
            f"or infinite: their tokens mean nothing from there on. {ADVICE}",
            NotFiniteWarning,
            stacklevel=3,
        )


def _choose(
    made: Made,
    logits: Array,
    occurred: Array,
    sampling: Sampling,
    keys: Array | None,
    ends: Array,
) -> Made:
    """Take the next token of every row that is not done."""
    changed = process_logits(logits, sampling, occurred)
    if sampling.temperature is None:
        token = jnp.argmax(changed, axis=-1)
    else:
        assert keys is not None
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, made.count)
        token = jax.vmap(jax.random.categorical)(own, changed)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    token = token[:, None].astype(jnp.int32)
    log_prob = jnp.take_along_axis(log_probs, token, axis=-1)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return made.added(token, log_prob, jnp.ones_like(made.lengths), finite, ends)


_begin = Program(_choose)  # needs no model: one program, whatever room there is


@partial(Program, donate_argnums=(1, 2))
def _decode(
    params: Params,
    prefix: PrefixCache,
    made: Made,
    sampling: Sampling,
    keys: Array | None,
    ends: Array,
    limit: Array,
) -> tuple[PrefixCache, Made]:
    """Make tokens until `limit`, or until every row is done."""

    def step(carry: tuple[PrefixCache, Made]) -> tuple[PrefixCache, Made]:
        prefix, made = carry
        positions = jnp.where(made.done, -1, prefix.lengths)[:, None]
        if prefix.shift is not None:
            angles = (prefix.lengths + prefix.shift)[:, None]
            positions = jnp.stack([positions, angles], axis=1)
        prefix = read(1, params, prefix, made.last[:, None], positions)
        return prefix, _choose(made, prefix.logits, prefix.occurred, sampling, keys, ends)

    def going(carry: tuple[PrefixCache, Made]) -> Array:
        _, made = carry
        return (made.count < limit) & ~jnp.all(made.done)

    return jax.lax.while_loop(going, step, (prefix, made))


@partial(Program, static_argnums=(0,))
def _begin_drafting(
    decoder: JacobiDecoding,
    made: Made,
    logits: Array,
    occurred: Array,
    sampling: Sampling,
    keys: Array | None,
    ends: Array,
    most: Array,
) -> tuple[Made, Drafts]:
    drawn = Drawn(sampling, keys, ends, most, logits.shape[-1])
    return begin(decoder, made, logits, occurred, drawn)


@partial(Program, static_argnums=(0,), donate_argnums=(2, 3, 4))
def _decode_drafting(
    decoder: JacobiDecoding,
    params: Params,
    prefix: PrefixCache,
    made: Made,
    drafts: Drafts,
    sampling: Sampling,
    keys: Array | None,
    ends: Array,
    most: Array,
    limit: Array,
) -> tuple[PrefixCache, Made, Drafts]:
    """Make tokens until every row has `limit` of them or is done, several in a call."""

    def call(state: StateDict, tokens: Array, positions: Array) -> tuple[Array, StateDict]:
        rows = positions
        if prefix.shift is not None:
            angles = jnp.where(positions >= 0, positions + prefix.shift[:, None], -1)
            rows = jnp.stack([positions, angles], axis=1)
        return prefix.forward(params, state, tokens, rows, step=1)

    drawn = Drawn(sampling, keys, ends, most, prefix.logits.shape[-1])
    state, made, drafts, occurred = decode(
        decoder,
        call,
        prefix.state,
        made,
        drafts,
        drawn,
        before=prefix.lengths,
        limit=limit,
        occurred=None if sampling.repetition_penalty is None else prefix.occurred,
    )
    occurred = prefix.occurred if occurred is None else occurred
    return dataclasses.replace(prefix, state=state, occurred=occurred), made, drafts


def _stopped(made: Made, stop: Callable[[list[int]], bool], seen: int) -> Made:
    """End the rows for which `stop` holds after one of the tokens since `seen`."""
    tokens, log_probs, lengths, done = (np.array(array) for array in made[:4])
    for row in range(len(tokens)):
        for length in range(seen + 1, lengths[row] + 1):
            if stop(tokens[row, :length].tolist()):
                tokens[row, length:], log_probs[row, length:] = tokens[row, length - 1], 0
                lengths[row], done[row] = length, True
                break
    held = zip(("tokens", "log_probs", "lengths", "done"), (tokens, log_probs, lengths, done))
    return made._replace(**{name: jnp.asarray(array) for name, array in held})
