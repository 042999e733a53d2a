"""Text generation: read prompts (prefill), then choose token after token (decode).

    out = generate(forward, params, [[5, 9, 2], [7, 7]], max_new_tokens=64)

Both are one jitted program each; decoding is a `lax.while_loop`. What a text's keys and values are
kept in is the forward's matter: one without a cache gets a dense one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from effjax.context import Step, is_static
from effjax.forward import Forward, Params, StateDict
from effjax.layers.kv_cache import Caches, KVCache, as_it_is
from effjax.samplers import Carry, sample_keys
from effjax.sites import canonical

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_p", "min_p", "repetition_penalty"),
    meta_fields=("top_k",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the distribution of the next token is changed before one is drawn.

    None leaves a step out. Numbers are data: other values do not compile again, but `top_k` does.

    Attributes:
        temperature: divides the logits; None chooses the most likely token (greedy).
        top_k: keeps the k most likely tokens, and those as likely as the last of them.
        top_p: keeps the most likely tokens whose probabilities reach this sum.
        min_p: keeps tokens at least this likely relative to the most likely one.
        repetition_penalty: logits of tokens that occurred are divided by it where positive and
            multiplied where negative (arXiv 1909.05858).
    """

    temperature: float | Array | None = None
    top_k: int | None = None
    top_p: float | Array | None = None
    min_p: float | Array | None = None
    repetition_penalty: float | Array | None = None

    def check(self) -> None:
        """Raise ValueError for numbers out of range; all wrong ones are named."""
        wrong = []
        if self.temperature is not None and not self.temperature > 0:
            wrong.append(f"temperature must be above 0 (None is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                wrong.append(f"{name} must be in (0, 1], got {value}")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            wrong.append(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if wrong:
            raise ValueError("; ".join(wrong))


def process_logits(
    logits: Float[Array, "B V"], sampling: Sampling, occurred: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Log-probabilities of the next token, whole: -inf for tokens that are left out.

    In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        logits: of the model.
        occurred: which tokens the text holds; needed for a repetition penalty.

    Raises:
        ValueError: for a repetition penalty without them.
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty is not None:
        if occurred is None:
            raise ValueError("a repetition penalty must know which tokens occurred")
        penalty = jnp.float32(sampling.repetition_penalty)
        changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(occurred, changed, logits)
    if sampling.temperature is not None:
        logits = logits / jnp.float32(sampling.temperature)
    if sampling.top_k is not None:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        sums = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        needed = jnp.sum(sums < jnp.float32(sampling.top_p), axis=-1, keepdims=True)
        needed = jnp.minimum(needed, logits.shape[-1] - 1)
        least = jnp.take_along_axis(falling, needed, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)


@runtime_checkable
class Streamer(Protocol):
    """Receives tokens as they are made; transformers' `TextStreamer` is one."""

    def put(self, value: np.ndarray) -> None:
        """Take the prompts int[B, S], then int[B] for every new token."""

    def end(self) -> None:
        """The last token has been put."""


class Generated(NamedTuple):
    """New tokens.

    Attributes:
        tokens: int32[B, N] on the host; a row beyond its length repeats its end.
        lengths: int32[B] new tokens of each row, an end-of-text token included.
        log_probs: float32[B, N] of the tokens by the model itself, before `Sampling`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    log_probs: np.ndarray

    def rows(self) -> list[list[int]]:
        """The new tokens of every row."""
        return [row[:count].tolist() for row, count in zip(self.tokens, self.lengths, strict=True)]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("state", "lengths", "logits", "occurred"),
    meta_fields=("forward",),
)
@dataclasses.dataclass(frozen=True)
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
    if new < 0:
        raise ValueError(f"new must be 0 or more tokens, got {new}")
    limit = forward.config.max_positions
    if lengths.max() + new > limit:
        raise ValueError(
            f"{lengths.max()} tokens and {new} new ones are beyond the {limit} that the model was "
            f"made for; shorten the prompt, or ask for fewer"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    pieces = split(tokens, lengths, chunk or tokens.shape[1])
    forward = cached(forward).with_room(tokens.shape[1], new)
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
    state = _empty(forward, params, tokens.shape[0])
    batch, vocabulary = tokens.shape[0], forward.config.vocab_size
    session = Session(
        forward,
        state,
        jnp.zeros(batch, jnp.int32),
        jnp.zeros((batch, vocabulary), forward.config.dtype),
        jnp.zeros((batch, vocabulary), bool),
    )
    for number, (piece, positions) in enumerate(pieces):
        read = _read_first if number == 0 else _read_on
        session = read(params, session, piece, positions)
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
        temperature, top_k, top_p, min_p, repetition_penalty: see `Sampling`; without a temperature
            the most likely token is taken.
        eos: tokens that end a text.
        key: PRNG key for a temperature, `jax.random.key(seed)`: row i draws from
            `fold_in(key, i)`, whatever else is in the batch; or one key for each row.
        streamer: receives the prompts and then the tokens, a few at a time.
        stop: ends a row's text as soon as it is true of its new tokens.
        session: texts that `prefill` has read.
        chunk: see `prefill`.

    Raises:
        ValueError: for numbers out of range, a temperature without a key, and as `prefill`.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    sampling.check()
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature is not None and key is None:
        raise ValueError("sampling at a temperature needs a key: key=jax.random.key(0)")
    if session is None:
        if prompts is None:
            raise ValueError("give prompts, or a session that has read some")
        session = prefill(forward, params, prompts, new=max_new_tokens, chunk=chunk)
    else:
        if prompts is not None:
            session = extend(params, session, prompts)
        check_room(session, max_new_tokens)
    batch = session.lengths.shape[0]
    ends = np.atleast_1d(np.asarray(eos, np.int32))
    check_tokens(session.forward, ends)
    carry = _Carry(
        session,
        jnp.zeros((batch, max_new_tokens), jnp.int32),
        jnp.zeros((batch, max_new_tokens), jnp.float32),
        jnp.zeros(batch, jnp.int32),
        jnp.zeros(batch, bool),
        jnp.int32(0),
    )
    keys = None if key is None else sample_keys(key, batch)
    if streamer is not None:
        streamer.put(np.zeros((batch, 0), np.int32) if prompts is None else padded(prompts)[0])
    stepwise = streamer is not None or stop is not None
    shown, stride = 0, STRIDE if stepwise else max_new_tokens
    carry = _begin(carry, sampling, keys, ends)  # copies the session's state
    while shown < max_new_tokens:
        limit = jnp.int32(min(shown + stride, max_new_tokens))
        carry = _decode(params, carry, sampling, keys, ends, limit)
        made = int(carry.count)
        if stop is not None:
            carry = _stopped(carry, stop, shown)
        if streamer is not None:
            for column in np.asarray(carry.tokens[:, shown:made]).T:
                streamer.put(column)
        shown = max_new_tokens if bool(jnp.all(carry.done)) else made
    if streamer is not None:
        streamer.end()
    lengths = np.asarray(carry.lengths)
    used = max(int(lengths.max()), 1)
    return Generated(
        np.asarray(carry.tokens)[:, :used], lengths, np.asarray(carry.log_probs)[:, :used]
    )


def score(
    forward: Forward,
    params: Params,
    texts: Prompts,
    *,
    context: int | None = None,
) -> np.ndarray:
    """Log-probabilities of the tokens of texts, float32[B, S]; NaN for first tokens and padding.

    Args:
        forward, params: a language model.
        texts: token ids, rows of any lengths.
        context: how many tokens are read at once; the others follow one by one, through the cache,
            as they would be generated: this is what shows a compressed cache's error. None reads
            all at once.

    Raises:
        ValueError: as `prefill`; if the context is not within the texts.
    """
    tokens, lengths = padded(texts)
    check_tokens(forward, tokens)
    columns = tokens.shape[1]
    positions = np.where(np.arange(columns) < lengths[:, None], np.arange(columns), -1)
    if context is not None and not 1 <= context <= columns:
        raise ValueError(f"context must be 1 ... {columns} tokens of the texts, got {context}")
    first = columns if context is None else context
    if has_cache(forward) or context is not None:
        forward = cached(forward).with_room(first, columns - first)
        state = _empty(forward, params, len(tokens))
    else:
        state = {}
    return np.asarray(_score(forward, params, state, tokens, positions.astype(np.int32), first))


@dataclasses.dataclass(frozen=True)
class Reading:
    """Texts read by a language model: the first tokens at once, the others through its cache.

    What a `Sampler` is to a diffusion model, with the same methods: `jax.jit(reading)(forward,
    params, texts)` is one program.

    Attributes:
        prompt: tokens that are read at once.
        new: tokens that are read singly.
    """

    prompt: int
    new: int

    @property
    def calls(self) -> int:
        """Number of network calls."""
        return 1 + self.new

    def __call__(
        self, forward: Forward, params: Params, texts: Int[Array, "B S"], key: Any = None
    ) -> Float[Array, "B N V"]:
        """Logits after the prompt and after every token that is read singly, N = 1 + new."""
        carry = self.init(forward, params, texts, key)
        carry = self.step(forward, params, carry, texts, None, 0)

        def body(carry: Carry, step: Array) -> tuple[Carry, None]:
            return self.step(forward, params, carry, texts, None, step), None

        return jax.lax.scan(body, carry, jnp.arange(1, self.calls))[0].x

    def init(
        self,
        forward: Forward,
        params: Params,
        texts: Int[Array, "B S"],
        key: Any = None,
        *,
        uncond: None = None,
    ) -> Carry:
        """An empty cache, and no logits yet.

        Raises:
            ValueError: for texts of another length.
        """
        if texts.shape[1] != self.prompt + self.new:
            raise ValueError(f"texts have {self.prompt} + {self.new} tokens, got {texts.shape[1]}")
        shape = texts.shape[0], self.calls, forward.config.vocab_size
        state = _empty(self.ready(forward), params, texts.shape[0])
        return Carry(jnp.zeros(shape, forward.config.dtype), (), state, jnp.zeros((0,)))

    def step(
        self, forward: Forward, params: Params, carry: Carry, texts: Array, uncond: None, step: Step
    ) -> Carry:
        """One call of the network."""
        out, _, state = self.network(forward, params, carry.state, carry.x, texts, None, step)
        x = jax.lax.dynamic_update_slice_in_dim(carry.x, out, step, axis=1)
        return carry._replace(x=x, state=state)

    def network(
        self,
        forward: Forward,
        params: Params,
        state: StateDict,
        x: Array,
        texts: Int[Array, "B S"],
        uncond: None,
        step: Step,
    ) -> tuple[Array, Array, StateDict]:
        """Logits [B, 1, V] of call `step`, twice, and the next state; a traced step is above 0."""
        first = is_static(step) and step == 0
        start: Step = 0 if first else self.prompt - 1 + step
        count = self.prompt if first else 1
        tokens = jax.lax.dynamic_slice_in_dim(texts, start, count, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(count), tokens.shape)
        keep = jnp.full((tokens.shape[0], 1), count - 1)
        inputs = tokens, positions, keep
        logits, state = self.ready(forward)(params, state, *inputs, step=0 if first else 1)
        return logits, logits, state

    def unconditional(self, forward: Forward, cond: Array, uncond: None = None) -> None:
        """There is no guidance."""

    def ready(self, forward: Forward) -> Forward:
        """The forward with a cache of this size."""
        return cached(forward).with_room(self.prompt, self.new)


def perplexity(log_probs: np.ndarray) -> float:
    """exp of the mean negative log-probability of the tokens that `score` scored."""
    return float(np.exp(-np.nanmean(log_probs)))


# --- arguments ------------------------------------------------------------------------------------

STRIDE = 8  # tokens between two looks at what is made, for streamers and stop functions


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
    lengths = np.asarray([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: row.size] = row
    return tokens, lengths


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

    @jax.jit
    def shares(params: Params, session: Session) -> dict[str, Array]:
        token = jnp.zeros((session.lengths.shape[0], 1), jnp.int32)
        module = session.forward.loaded(params, session.state, token, step=1)
        found = ((canonical(p), node) for p, node in nnx.iter_graph(module))
        return {p: node.filled(session.lengths) for p, node in found if isinstance(node, KVCache)}

    allocated, useful = 0, 0.0
    for path, share in shares(params, session).items():
        own = sum(leaf.nbytes for name, leaf in session.state.items() if name.startswith(path))
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
def _empty(forward: Forward, params: Params, batch: int) -> StateDict:
    token = jnp.zeros((batch, 1), jnp.int32)
    return forward.init(params, token, token)


def _read(step: int, params: Params, session: Session, tokens: Array, positions: Array) -> Session:
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
_read_first = jax.jit(partial(_read, 0), donate_argnums=1)
_read_on = jax.jit(partial(_read, 1), donate_argnums=1)
_read_more = jax.jit(partial(_read, 1))


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("session", "tokens", "log_probs", "lengths", "done", "count"),
    meta_fields=(),
)
@dataclasses.dataclass(frozen=True)
class _Carry:
    session: Session
    tokens: Array
    log_probs: Array
    lengths: Array
    done: Array
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
        session = _read(1, params, carry.session, _last(carry)[:, None], positions[:, None])
        return _choose(dataclasses.replace(carry, session=session), sampling, keys, ends)

    def going(carry: _Carry) -> Array:
        return (carry.count < limit) & ~jnp.all(carry.done)

    return jax.lax.while_loop(going, step, carry)


def _stopped(carry: _Carry, stop: Callable[[list[int]], bool], shown: int) -> _Carry:
    """End the rows for which `stop` holds after one of the tokens since `shown`."""
    tokens, lengths, done = (np.array(x) for x in (carry.tokens, carry.lengths, carry.done))
    for row in range(len(tokens)):
        for length in range(shown + 1, lengths[row] + 1):
            if stop(tokens[row, :length].tolist()):
                tokens[row, length:] = tokens[row, length - 1]
                lengths[row], done[row] = length, True
                break
    return dataclasses.replace(
        carry, tokens=jnp.asarray(tokens), lengths=jnp.asarray(lengths), done=jnp.asarray(done)
    )


@partial(jax.jit, static_argnums=5)
def _score(
    forward: Forward, params: Params, state: StateDict, tokens: Array, positions: Array, first: int
) -> Array:
    def of(logits: Array, following: Array) -> Array:
        scores = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
        return jnp.take_along_axis(scores, following[..., None], axis=-1)[..., 0]

    shifted = jnp.roll(tokens, -1, axis=1)
    logits, state = forward(params, state, tokens[:, :first], positions[:, :first])
    scores = of(logits, shifted[:, :first])

    def one(state: StateDict, column: tuple[Array, Array, Array]) -> tuple[StateDict, Array]:
        token, position, following = column
        logits, state = forward(params, state, token[:, None], position[:, None], step=1)
        return state, of(logits[:, 0], following)

    rest = (tokens[:, first:].T, positions[:, first:].T, shifted[:, first:].T)
    _, more = jax.lax.scan(one, state, rest)
    scores = jnp.concatenate([scores, more.T], axis=1)
    scores = jnp.concatenate([jnp.zeros_like(scores[:, :1]), scores[:, :-1]], axis=1)
    return jnp.where(positions > 0, scores, jnp.nan)
