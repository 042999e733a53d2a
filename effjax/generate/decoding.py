"""Choosing token after token: one jitted `lax.while_loop`."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from effjax.finite import NotFiniteWarning
from effjax.forward import Forward, Params
from effjax.generate.sampling import Sampling, process_logits
from effjax.generate.sessions import (
    ADVICE,
    Prompts,
    Session,
    check_count,
    check_maker,
    check_room,
    check_tokens,
    extend,
    padded,
    prefill,
    read,
)
from effjax.samplers import sample_keys

STRIDE = 8  # tokens between two looks at what is made, for streamers and stop functions


@runtime_checkable
class Streamer(Protocol):
    """Receives tokens as they are made; for one text, transformers' `TextStreamer` is one.

    What it gets is what `Generated.rows` gives later, token for token: nothing after a stop, an end
    token as the last. In a batch -1 stands where there is no token: around shorter prompts, and in
    rows that have ended.
    """

    def put(self, value: np.ndarray) -> None:
        """Take the prompts int32[B, S], then int32[B] for every new token."""

    def end(self) -> None:
        """The last token has been put."""


class Generated(NamedTuple):
    """New tokens.

    Attributes:
        tokens: int32[B, N] on the host; a row beyond its length repeats its end.
        lengths: int32[B] new tokens of each row, an end-of-text token included.
        log_probs: float32[B, N] of the tokens by the model itself, before `Sampling`; 0 beyond a
            row's length.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray

    def rows(self) -> list[list[int]]:
        """The new tokens of every row."""
        return [row[:count].tolist() for row, count in zip(self.tokens, self.lengths, strict=True)]


def generate(
    forward: Forward,
    params: Params,
    prompts: Prompts | None = None,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    eos: int | Sequence[int] = (),
    key: Key[Array, "..."] | None = None,
    streamer: Streamer | None = None,
    stop: Callable[[list[int]], bool] | None = None,
    session: Session | None = None,
    chunk: int | None = None,
) -> Generated:
    """Continue texts.

    Args:
        forward, params: a language model, possibly compressed.
        prompts: token ids, rows of any lengths; with a session they continue its texts, and None
            continues them with nothing between.
        max_new_tokens: the most tokens to make for a row.
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; without a temperature,
            and with 0, the most likely token is taken.
        eos: tokens that end a text.
        key: PRNG key for a temperature, `jax.random.key(seed)`: row i draws from
            `fold_in(key, i)`, whatever else is in the batch; or one key for each row.
        streamer: receives the prompts and then the tokens, a few at a time.
        stop: ends a row's text as soon as it is true of its new tokens.
        session: texts that `prefill` has read with this model.
        chunk: see `prefill`.

    Raises:
        ValueError: for numbers out of range, a temperature without a key, a session of another
            model, and as `prefill`.

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
    if session is None:
        if prompts is None:
            raise ValueError("give prompts, or a session that has read some")
        session = prefill(forward, params, prompts, new=max_new_tokens, chunk=chunk)
    else:
        check_maker(session, forward)
        if prompts is not None:
            session = extend(params, session, prompts)
        check_room(session, max_new_tokens)
    batch = session.lengths.shape[0]
    keys = None if key is None else sample_keys(key, batch)
    carry = _Carry(
        session,
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.ones(batch, bool),
        jnp.int32(0),
    )
    if streamer is not None:
        streamer.put(_shown_prompts(prompts, batch))
    stepwise = streamer is not None or stop is not None
    seen, stride = 0, STRIDE if stepwise else max_new_tokens
    carry = _begin(carry, sampling, keys, ends)  # copies the session's state
    while seen < max_new_tokens:
        limit = jnp.int32(min(seen + stride, max_new_tokens))
        carry = _decode(params, carry, sampling, keys, ends, limit)
        made = int(carry.count)
        if stop is not None:
            carry = _stopped(carry, stop, seen)
        if streamer is not None:
            _show(streamer, carry, seen, made)
        seen = max_new_tokens if bool(jnp.all(carry.done)) else made
    if streamer is not None:
        streamer.end()
    _warn_of_rows(np.flatnonzero(~np.asarray(carry.finite)), batch)
    lengths = np.asarray(carry.lengths)
    used = int(lengths.max())
    return Generated(
        np.asarray(carry.tokens)[:, :used], lengths, np.asarray(carry.log_probs)[:, :used]
    )


def _shown_prompts(prompts: Prompts | None, batch: int) -> np.ndarray:
    if prompts is None:
        return np.zeros((batch, 0), np.int32)
    tokens, lengths = padded(prompts)
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, -1)


def _show(streamer: Streamer, carry: _Carry, start: int, stop: int) -> None:
    """Put the columns of tokens in which some row goes on."""
    tokens, lengths = np.asarray(carry.tokens), np.asarray(carry.lengths)
    for column in range(start, min(stop, lengths.max())):
        streamer.put(np.where(column < lengths, tokens[:, column], -1))


def _warn_of_rows(rows: np.ndarray, batch: int) -> None:
    if rows.size:
        warnings.warn(
            f"the logits of {rows.size} of {batch} texts (rows {rows[:8].tolist()}) became NaN or "
            f"infinite: their tokens mean nothing from there on. {ADVICE}",
            NotFiniteWarning,
            stacklevel=3,
        )


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("session", "tokens", "log_probs", "lengths", "done", "finite", "count"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class _Carry:
    session: Session
    tokens: Array
    log_probs: Array
    lengths: Array
    done: Array
    finite: Array
    count: Array


def _choose(carry: _Carry, sampling: Sampling, keys: Array | None, ends: Array) -> _Carry:
    """Take the next token of every row that is not done."""
    logits, count = carry.session.logits, carry.count
    changed = process_logits(logits, sampling, carry.session.occurred)
    if sampling.temperature is None:
        token = jnp.argmax(changed, axis=-1)
    else:
        assert keys is not None
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, count)
        token = jax.vmap(jax.random.categorical)(own, changed)
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    log_prob = jnp.take_along_axis(log_probs, token[:, None], axis=-1)[:, 0]
    token = jnp.where(carry.done, _last(carry), token.astype(jnp.int32))
    return _Carry(
        carry.session,
        carry.tokens.at[:, count].set(token),
        carry.log_probs.at[:, count].set(jnp.where(carry.done, 0.0, log_prob)),
        carry.lengths + jnp.where(carry.done, 0, 1),
        carry.done | jnp.any(token[:, None] == ends, axis=1),
        carry.finite & (carry.done | jnp.all(jnp.isfinite(logits), axis=-1)),
        count + 1,
    )


def _last(carry: _Carry) -> Array:
    """The last token that was chosen for every row."""
    place = jnp.maximum(carry.lengths - 1, 0)
    return jnp.take_along_axis(carry.tokens, place[:, None], axis=1)[:, 0]


# The state is the carry's own, but for the first time: see `generate`.
_begin = jax.jit(_choose)


@partial(jax.jit, donate_argnums=1)
def _decode(
    params: Params,
    carry: _Carry,
    sampling: Sampling,
    keys: Array | None,
    ends: Array,
    limit: Array,
) -> _Carry:
    """Make tokens until `limit`, or until every row is done."""

    def step(carry: _Carry) -> _Carry:
        positions = jnp.where(carry.done, -1, carry.session.lengths)
        session = read(1, params, carry.session, _last(carry)[:, None], positions[:, None])
        return _choose(dataclasses.replace(carry, session=session), sampling, keys, ends)

    def going(carry: _Carry) -> Array:
        return (carry.count < limit) & ~jnp.all(carry.done)

    return jax.lax.while_loop(going, step, carry)


def _stopped(carry: _Carry, stop: Callable[[list[int]], bool], seen: int) -> _Carry:
    """End the rows for which `stop` holds after one of the tokens since `seen`."""
    arrays = carry.tokens, carry.log_probs, carry.lengths, carry.done
    tokens, log_probs, lengths, done = (np.array(array) for array in arrays)
    for row in range(len(tokens)):
        for length in range(seen + 1, lengths[row] + 1):
            if stop(tokens[row, :length].tolist()):
                tokens[row, length:], log_probs[row, length:] = tokens[row, length - 1], 0
                lengths[row], done[row] = length, True
                break
    return dataclasses.replace(
        carry,
        tokens=jnp.asarray(tokens),
        log_probs=jnp.asarray(log_probs),
        lengths=jnp.asarray(lengths),
        done=jnp.asarray(done),
    )
