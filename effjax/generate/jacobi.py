"""Speculative Jacobi decoding (arXiv 2410.01699): several tokens in a call, of the same law.

A call gets the last token and drafts of the `window - 1` places that follow. It gives the laws P of
all these places, each given the drafts before it. Drafts are judged in order,

    accept x with probability min(1, P(x) / Q(x)),        Q: the law that x was drawn from
    else draw from max(P - Q, 0), normalized, and stop

and if all are accepted, one more token is drawn from the last law. So tokens have the model's law,
exactly, whatever the drafts are. Places that were not reached are drafted anew from this call's
laws. What was rejected stays in the cache behind the row's length, where the next call overwrites
it: rows have lengths of their own, nothing is moved.

What is drawn for a place depends on the row's key and the place alone (`noise="place"`): every
place is judged once, so this changes no law, and a draft changes only where its law does. The
published code draws anew in each call (`noise="call"`).

A call costs the arithmetic of W = `window` tokens. With t(W) the time of a call, n tokens take
n / (tokens per call) t(W): it pays where tokens per call > t(W) / t(1), which is near 1 as long as
reading the weights takes the time, and near W where arithmetic does. Memory: 4 (W - 1) V bytes of
laws for a row. Calls: ceil(n / W) at best, n at worst.

Source: arXiv 2410.01699, algorithm 1. The acceptance is that of arXiv 2211.17192.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from effjax.fields import LARGEST, Checked, Count
from effjax.generate.grid import Grid
from effjax.generate.made import Made
from effjax.generate.sampling import Sampling, process_logits

# (state, tokens [B, W], positions [B, W]) -> logits [B, W, V], state
Call = Callable[[Any, Array, Array], tuple[Array, Any]]


@dataclasses.dataclass(frozen=True)
class JacobiDecoding(Checked):
    """A decoder: how many places a call looks at, and how they are drafted.

    Attributes:
        window: places of a call, the last token's among them; 1 decodes plainly.
        initial: what a new draft is, whose law is not known yet: any token ("random"); its left
            neighbor's, or the nearest one that there is ("repeat_horizon"); the likeliest token of
            that one's law ("sample_horizon"). At the left edge it is random. The last two need a
            grid.
        acceptance: "speculative" as above; "equal" accepts a draft that is the token that its own
            place draws now, which is plain Jacobi decoding. Without a temperature the two are one.
        noise: whether a place is drawn with the same noise in all calls, or with new one.
        start, stop: the numbers of tokens of a row between which calls have drafts; no end if None.
        grid: of images, where structural tokens are; None for texts, and where the model says it.
    """

    window: Count = 16
    initial: Literal["random", "repeat_horizon", "sample_horizon"] = "random"
    acceptance: Literal["speculative", "equal"] = "speculative"
    noise: Literal["place", "call"] = "place"
    start: Count = 1
    stop: Count | None = None
    grid: Grid | None = None

    systems = ("Speculative Jacobi decoding",)

    @property
    def first(self) -> int:
        """The lowest token that is drawn."""
        return 0 if self.grid is None else self.grid.first

    def codes(self, vocabulary: int) -> int:
        """How many tokens are drawn among, from that one on."""
        grid = self.grid
        return vocabulary - self.first if grid is None or grid.codes is None else grid.codes

    def within(self, new: int) -> JacobiDecoding:
        """The decoder for so many tokens: a window has no more places than there are tokens."""
        return dataclasses.replace(self, window=min(self.window, new))

    def check(self, vocabulary: int, new: int) -> None:
        """Raise ValueError for a grid that is missing, or that does not fit a model."""
        if self.grid is None and self.initial != "random":
            raise ValueError(
                f"{self.initial} copies the left neighbor in a row of an image: give the decoder "
                f'grid=Grid(width, height), or initial="random"'
            )
        if self.grid is not None:
            self.grid.check(vocabulary, new)

    def room(self, made: Made, most: Int[Array, ""]) -> Int[Array, " B"]:
        """How many drafts the next call may have, in every row."""
        count = jnp.minimum(self.window - 1, most - made.lengths - 1)
        active = made.lengths >= self.start
        if self.stop is not None:
            active &= made.lengths < self.stop
        return jnp.where(active & ~made.done, jnp.maximum(count, 0), 0)


class Drafts(NamedTuple):
    """What is known of the places that follow a row's last token.

    Attributes:
        tokens: int32[B, W - 1].
        laws: float32[B, W - 1, V], what each was drawn from. V is 0 where tokens are compared.
        known: int32[B], how many were drawn from a law; those behind are new.
        nearest: int32[B], the last token of the image that a call drew or judged.
        likeliest: int32[B], the likeliest token of its law.
        calls: int32, network calls so far.
    """

    tokens: Int[Array, "B M"]
    laws: Float[Array, "B M V"]
    known: Int[Array, " B"]
    nearest: Int[Array, " B"]
    likeliest: Int[Array, " B"]
    calls: Int[Array, ""]


class Drawn(NamedTuple):
    """How tokens are drawn: the same in all calls.

    Attributes:
        sampling: changes the laws. Without a temperature the likeliest token is taken.
        keys: of the rows; None without a temperature.
        ends: tokens that end a row.
        most: how many tokens end it.
        vocabulary: how many tokens the model knows.
    """

    sampling: Sampling
    keys: Array | None
    ends: Int[Array, " E"]
    most: Int[Array, ""]
    vocabulary: int

    def compares(self, decoder: JacobiDecoding) -> bool:
        """Whether tokens are compared, so that laws need not be kept."""
        return decoder.acceptance == "equal" or self.sampling.temperature is None

    def noise(self, what: int, places: Int[Array, "B N"], calls: Array | None = None) -> Array:
        """Keys [B, N] for what is drawn at places; 0 are the tokens, as in plain decoding."""
        keys = self.keys
        if keys is None:
            keys = jnp.broadcast_to(jax.random.key(0), places.shape[:1])

        def one(key: Array, place: Array) -> Array:
            if what:  # streams of their own, at places that no sequence reaches
                key = jax.random.fold_in(key, LARGEST - what)
            key = jax.random.fold_in(key, place)
            return key if calls is None else jax.random.fold_in(key, calls)

        return jax.vmap(jax.vmap(one, (None, 0)))(keys, places)


_TOKENS, _JUDGED, _RESIDUAL, _NEW = range(4)  # what is drawn at a place


def begin(
    decoder: JacobiDecoding,
    made: Made,
    logits: Float[Array, "B V"],
    occurred: Bool[Array, "B V"] | None,
    drawn: Drawn,
) -> tuple[Made, Drafts]:
    """Draw the first token of every row, from the logits of its prompt."""
    batch, drafts = logits.shape[0], decoder.window - 1
    kept = 0 if drawn.compares(decoder) else decoder.codes(drawn.vocabulary)
    zeros = jnp.zeros(batch, jnp.int32)
    nothing = Drafts(
        jnp.zeros((batch, drafts), jnp.int32),
        jnp.zeros((batch, drafts, kept), jnp.float32),
        *(zeros, zeros, zeros, jnp.int32(0)),
    )
    return settled(decoder, made, nothing, zeros, logits[:, None], occurred, None, drawn)


def decode(
    decoder: JacobiDecoding,
    call: Call,
    state: Any,
    made: Made,
    drafts: Drafts,
    drawn: Drawn,
    *,
    before: Int[Array, " B"],
    limit: Int[Array, ""],
    occurred: Bool[Array, "B V"] | None = None,
) -> tuple[Any, Made, Drafts, Bool[Array, "B V"] | None]:
    """Call the model until every row has `limit` tokens or is done.

    Args:
        decoder: the decoder.
        call: a network call that appends tokens at their positions to what the state holds of
            sequences; each sees what is held before it. A later call may append at the same
            positions again. With guidance all branches get the same tokens.
        state: what the calls hand on.
        made, drafts: results of `begin`.
        drawn: how tokens are drawn.
        before: tokens that the sequences had before.
        limit: tokens at which rows stop for now; they may have more by then.
        occurred: tokens that the sequences had before, for a repetition penalty.
    """
    column = jnp.arange(decoder.window)

    def going(carry: tuple) -> Array:
        made = carry[1]
        return (made.count < limit) & ~jnp.all(made.done)

    def step(carry: tuple) -> tuple:
        state, made, drafts, occurred = carry
        room = decoder.room(made, drawn.most)
        drafts = filled(decoder, drafts, made.lengths, drawn)
        tokens = jnp.concatenate([made.last[:, None], drafts.tokens], axis=1)
        read = (column <= room[:, None]) & ~made.done[:, None]
        positions = jnp.where(read, (before + made.lengths)[:, None] - 1 + column, -1)
        logits, state = call(state, tokens, positions)
        longer, drafts = settled(decoder, made, drafts, room, logits, occurred, tokens, drawn)
        if occurred is not None:
            added = column < (longer.lengths - made.lengths)[:, None]
            occurred = _marked(occurred, jnp.where(added, tokens, occurred.shape[1]))
        return state, longer, drafts, occurred

    return jax.lax.while_loop(going, step, (state, made, drafts, occurred))


def filled(
    decoder: JacobiDecoding, drafts: Drafts, lengths: Int[Array, " B"], drawn: Drawn
) -> Drafts:
    """Drafts of all places of a window: those behind the known ones are new, of one-hot laws."""
    count, grid = decoder.window - 1, decoder.grid
    if not count:
        return drafts
    column = jnp.arange(count)
    places = lengths[:, None] + column
    first, codes = decoder.first, decoder.codes(drawn.vocabulary)
    keys = drawn.noise(_NEW, places)
    new = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), first, first + codes)))(keys)
    if grid is not None:
        if decoder.initial != "random":
            copied = drafts.nearest if decoder.initial == "repeat_horizon" else drafts.likeliest
            new = jnp.where(grid.column(places) == 0, new, copied[:, None])
        forced = grid.forced(places)
        new = jnp.where(forced >= 0, forced, new)
    known = column < drafts.known[:, None]
    laws = drafts.laws
    if laws.shape[2]:
        laws = jnp.where(known[:, :, None], laws, jax.nn.one_hot(new - first, codes))
    return drafts._replace(tokens=jnp.where(known, drafts.tokens, new), laws=laws)


def settled(
    decoder: JacobiDecoding,
    made: Made,
    drafts: Drafts,
    room: Int[Array, " B"],
    logits: Float[Array, "B W V"],
    occurred: Bool[Array, "B V"] | None,
    tokens: Int[Array, "B W"] | None,
    drawn: Drawn,
) -> tuple[Made, Drafts]:
    """Judge the drafts of a call, add what is accepted and one token more, and draft the rest.

    Args:
        decoder: the decoder.
        made: tokens so far.
        drafts: of which every row has the first `room`.
        room: how many.
        logits: of the places of the call, which may be fewer than a window.
        occurred: tokens that the sequences had, for a repetition penalty.
        tokens: those of the call, where there are any.
        drawn: how tokens are drawn.
    """
    columns, first = logits.shape[1], decoder.first
    column = jnp.arange(columns)
    places = made.lengths[:, None] + column
    calls = drafts.calls if decoder.noise == "call" else None
    log_laws = _log_laws(decoder, logits, drawn, occurred, tokens)
    likeliest = jnp.argmax(log_laws, axis=-1).astype(jnp.int32) + first
    samples = likeliest
    if drawn.sampling.temperature is not None:
        samples = _draw(drawn.noise(_TOKENS, places, calls), log_laws) + first
    forced = jnp.full(places.shape, -1) if decoder.grid is None else decoder.grid.forced(places)
    samples = jnp.where(forced >= 0, forced, samples)

    judged = drafts.tokens[:, : columns - 1]
    if drawn.compares(decoder):
        laws = drafts.laws
        accepted = _accepted(judged == samples[:, :-1], room)
        last = _at(samples, accepted)
    else:
        laws, olds = jnp.exp(log_laws), drafts.laws[:, : columns - 1]
        ids = jnp.clip(judged - first, 0, laws.shape[-1] - 1)[:, :, None]
        p, q = (jnp.take_along_axis(law, ids, axis=2)[:, :, 0] for law in (laws[:, :-1], olds))
        keys = drawn.noise(_JUDGED, places[:, :-1], calls)
        share = jax.vmap(jax.vmap(jax.random.uniform))(keys)
        accepted = _accepted((share * q < p) | (forced[:, :-1] >= 0), room)
        last = _at(samples, accepted)
        if columns > 1:
            rest = residual(_at(laws, accepted), _at(olds, jnp.minimum(accepted, columns - 2)))
            keys = drawn.noise(_RESIDUAL, _at(places, accepted)[:, None], calls)
            again = _draw(keys, jnp.log(rest)[:, None])[:, 0] + first
            last = jnp.where(accepted < room, again, last)
    new = jnp.concatenate([judged, last[:, None]], axis=1)
    new = jnp.where(column < accepted[:, None], new, last[:, None])

    valid = column <= room[:, None]
    finite = jnp.all(jnp.isfinite(logits) | ~valid[:, :, None], axis=(1, 2))
    scores = jnp.take_along_axis(logits, new[:, :, None], axis=2)[:, :, 0].astype(jnp.float32)
    scores -= jax.nn.logsumexp(logits.astype(jnp.float32), axis=2)
    longer = made.added(new, scores, accepted + 1, finite, drawn.ends, drawn.most)

    rest = accepted[:, None] + 1 + jnp.arange(decoder.window - 1)
    rest = jnp.minimum(rest, columns - 1)
    free = jnp.max(jnp.where(valid & (forced < 0), column, -1), axis=1)
    return longer, Drafts(
        jnp.take_along_axis(samples, rest, axis=1),
        jnp.take_along_axis(laws, rest[:, :, None], axis=1) if drafts.laws.shape[2] else laws,
        room - accepted,
        jnp.where(free < 0, drafts.nearest, _at(samples, jnp.maximum(free, 0))),
        jnp.where(free < 0, drafts.likeliest, _at(likeliest, jnp.maximum(free, 0))),
        drafts.calls + 1,
    )


def residual(p: Float[Array, "B V"], q: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """What a token is drawn from when one of the law q was rejected for the law p, not normalized.

    Where q is p nothing is left, and nothing is rejected but by rounding: then p.
    """
    rest = jnp.maximum(p - q, 0.0)
    return jnp.where(jnp.sum(rest, axis=-1, keepdims=True) > 0, rest, p)


def _log_laws(
    decoder: JacobiDecoding,
    logits: Float[Array, "B W V"],
    drawn: Drawn,
    occurred: Bool[Array, "B V"] | None,
    tokens: Int[Array, "B W"] | None,
) -> Float[Array, "B W C"]:
    """Logarithms of the laws that tokens are drawn from, each given the tokens before its place."""
    part = slice(decoder.first, decoder.first + decoder.codes(drawn.vocabulary))
    if drawn.sampling.repetition_penalty is None:
        return process_logits(logits[:, :, part], drawn.sampling)
    assert occurred is not None
    seen = occurred[:, None]
    if tokens is not None:
        hot = jax.nn.one_hot(tokens, occurred.shape[1], dtype=jnp.int8)
        seen |= jax.lax.cummax(hot, axis=1) > 0
    return process_logits(logits[:, :, part], drawn.sampling, seen[:, :, part])


def _draw(keys: Array, log_laws: Float[Array, "B W C"]) -> Int[Array, "B W"]:
    return jax.vmap(jax.vmap(jax.random.categorical))(keys, log_laws).astype(jnp.int32)


def _accepted(accept: Bool[Array, "B M"], room: Int[Array, " B"]) -> Int[Array, " B"]:
    """How many drafts are accepted before the first that is not, of the first `room`."""
    accept &= jnp.arange(accept.shape[1]) < room[:, None]
    return jnp.sum(jnp.cumprod(accept.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


def _at(x: Array, column: Int[Array, " B"]) -> Array:
    """x[b, column[b]] for every row."""
    return x[jnp.arange(x.shape[0]), column]


def _marked(occurred: Bool[Array, "B V"], tokens: Int[Array, "B W"]) -> Bool[Array, "B V"]:
    return occurred.at[jnp.arange(len(tokens))[:, None], tokens].set(True, mode="drop")
