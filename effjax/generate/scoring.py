"""Log-probabilities and logits of given sequences."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.buckets import POWERS, Buckets, bucket, sizes_of
from effjax.caches.slots import told
from effjax.context import PyTree, Step, is_static
from effjax.finite import warn_unless_finite
from effjax.forward import Forward, Params, StateDict
from effjax.generate.arguments import Prompts, check_tokens, padded, wider
from effjax.generate.installed import cached, check_shortest, empty_state, has_cache
from effjax.generate.prefix_cache import ADVICE, LEAST
from effjax.loops import Carry, Loop


def score(
    forward: Forward,
    params: Params,
    sequences: Prompts,
    *,
    context: int | None = None,
    buckets: Buckets = POWERS,
) -> np.ndarray:
    """Compute the log-probabilities of the tokens of sequences.

    Use it to measure how well a model, or a compressed cache, predicts given sequences. Logits are
    made in chunks of tokens, so the logits of all tokens are never in memory at once.

    Args:
        forward, params: a language model.
        sequences: token ids, rows of any lengths.
        context: how many tokens are read at once. The others follow one by one through the cache,
            as in generation, which shows the error of a compressed cache. None reads all tokens at
            once.
        buckets: sizes for sequences that are read at once, see `prefill`. With a context shapes are
            exact.

    Returns:
        float32[B, S]; NaN for first tokens and padding.

    Raises:
        ValueError: as `prefill`; if the context is not within the sequences.

    Warns:
        NotFiniteWarning: if the model gave NaN or infinite values.
    """
    tokens, lengths = padded(sequences)
    check_tokens(forward, tokens)
    rows, columns = shape = tokens.shape
    if context is not None and not 1 <= context <= columns:
        raise ValueError(f"context must be 1 ... {columns} tokens of the sequences, got {context}")
    shortest = int(lengths.min())
    if context is None and sizes_of(buckets) is not None:
        rounded = min(bucket(columns, buckets, least=LEAST), forward.config.max_length)
        rows, columns = bucket(rows, POWERS), max(columns, rounded)
        tokens, lengths = wider(tokens, rows, columns), wider(lengths, rows)
    positions = np.where(np.arange(columns) < lengths[:, None], np.arange(columns), -1)
    first = columns if context is None else context
    if has_cache(forward) or context is not None:
        forward = cached(forward).with_cache_length(first, columns - first)
        check_shortest(forward, shortest)
        state = told(empty_state(forward, params, rows), jnp.asarray(lengths))
    else:
        state = {}
    scores = np.array(_score(forward, params, state, tokens, positions.astype(np.int32), first))
    scores, positions = (each[: shape[0], : shape[1]] for each in (scores, positions))
    warn_unless_finite("the log-probabilities of sequences", scores[positions > 0], ADVICE)
    return scores


@dataclasses.dataclass(frozen=True)
class Reading(Loop):
    """The loop that reads given sequences with a language model.

    The first tokens are read at once, and the others one by one through the cache. It is to a
    language model what a `Sampler` is to a diffusion model:
    `jax.jit(reading)(forward, params, sequences)` is one program.

    Attributes:
        prompt: tokens that are read at once.
        new: tokens that are read singly.
    """

    prompt: int
    new: int

    @property
    def apart(self) -> tuple[int, ...]:
        return (0,)

    @property
    def calls(self) -> int:
        """Number of network calls."""
        return 1 + self.new

    def __call__(
        self, forward: Forward, params: Params, sequences: Int[Array, "B S"], key: Any = None
    ) -> Float[Array, "B N V"]:
        """Logits after the prompt and after every token that is read singly, N = 1 + new."""
        return self.run(forward, params, self.init(forward, params, sequences, key), sequences).x

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, "B S"],
        key: Any = None,
        *,
        uncond: None = None,
    ) -> Carry:
        """An empty cache, and no logits yet.

        Raises:
            ValueError: for sequences of another length.
        """
        if cond.shape[1] != self.prompt + self.new:
            raise ValueError(
                f"sequences have {self.prompt} + {self.new} tokens, got {cond.shape[1]}"
            )
        shape = cond.shape[0], self.calls, forward.config.vocab_size
        state = empty_state(self.ready(forward), params, cond.shape[0])
        return Carry(jnp.zeros(shape, forward.config.dtype), (), state, jnp.zeros((0,)))

    def inputs(
        self, x: Array, cond: Int[Array, "B S"], uncond: None, step: Step
    ) -> tuple[Array, Array, Array]:
        """Tokens, their positions and the column whose logits are wanted."""
        first = is_static(step) and step == 0
        start: Step = 0 if first else self.prompt - 1 + step
        count = self.prompt if first else 1
        tokens = jax.lax.dynamic_slice_in_dim(cond, start, count, axis=1)
        positions = jnp.broadcast_to(start + jnp.arange(count), tokens.shape)
        return tokens, positions, jnp.full((tokens.shape[0], 1), count - 1)

    def network(
        self,
        forward: Forward,
        params: Params,
        state: StateDict,
        x: Array,
        cond: Int[Array, "B S"],
        uncond: None,
        step: Step,
    ) -> tuple[Array, Array, StateDict]:
        """Logits [B, 1, V] of call `step`, twice, and the next state; a traced step is above 0."""
        inputs = self.inputs(x, cond, uncond, step)
        later = 0 if is_static(step) and step == 0 else 1
        logits, state = self.ready(forward)(params, state, *inputs, step=later)
        return logits, logits, state

    def update(self, carry: Carry, out: Array, step: Step) -> Carry:
        """Keep the logits of a call."""
        return carry._replace(x=jax.lax.dynamic_update_slice_in_dim(carry.x, out, step, axis=1))

    def ready(self, forward: Forward, cond: PyTree = None) -> Forward:
        """The forward with a cache of this size."""
        return cached(forward).with_cache_length(self.prompt, self.new)


def perplexity(log_probs: np.ndarray) -> float:
    """exp of the mean negative log-probability of the tokens that `score` scored."""
    return float(np.exp(-np.nanmean(log_probs)))


@partial(jax.jit, static_argnums=5)
def _score(
    forward: Forward, params: Params, state: StateDict, tokens: Array, positions: Array, first: int
) -> Array:
    shifted = jnp.roll(tokens, -1, axis=1)
    pieces = (tokens[:, :first], positions[:, :first], None, shifted[:, :first])
    scores, state = forward(params, state, *pieces)

    def one(state: StateDict, column: tuple[Array, Array, Array]) -> tuple[StateDict, Array]:
        token, position, labels = (each[:, None] for each in column)
        scores, state = forward(params, state, token, position, None, labels, step=1)
        return state, scores[:, 0]

    rest = (tokens[:, first:].T, positions[:, first:].T, shifted[:, first:].T)
    _, more = jax.lax.scan(one, state, rest)
    scores = jnp.concatenate([scores, more.T], axis=1)
    scores = jnp.concatenate([jnp.zeros_like(scores[:, :1]), scores[:, :-1]], axis=1)
    return jnp.where(positions > 0, scores, jnp.nan)
