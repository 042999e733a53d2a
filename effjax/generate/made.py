"""The new tokens of a batch, while they are made."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effjax.fields import LARGEST


class Made(NamedTuple):
    """New tokens of a batch so far, in buffers of a fixed width.

    Attributes:
        tokens: int32[B, N].
        log_probs: float32[B, N], log-probabilities by the model itself.
        lengths: int32[B], tokens of each row.
        done: bool[B], rows to which no token is added.
        finite: bool[B], rows whose logits were finite.
        count: int32, tokens that every row has which is not done.
        calls: int32[B], network calls of each row, that of the prompt included.
    """

    tokens: Int[Array, "B N"]
    log_probs: Float[Array, "B N"]
    lengths: Int[Array, " B"]
    done: Bool[Array, " B"]
    finite: Bool[Array, " B"]
    count: Int[Array, ""]
    calls: Int[Array, " B"]

    @staticmethod
    def nothing(done: np.ndarray, width: int) -> Made:
        """No tokens yet, of rows of which some are done (padding)."""
        batch = len(done)
        # Of numpy: arrays of JAX would be a program for each of their shapes.
        arrays: tuple[Any, ...] = (
            np.zeros((batch, width), np.int32),
            np.zeros((batch, width), np.float32),
            np.zeros(batch, np.int32),
            done,
            np.ones(batch, bool),
            np.int32(0),
            np.zeros(batch, np.int32),
        )
        return Made(*arrays)

    @property
    def last(self) -> Int[Array, " B"]:
        """The last token of every row."""
        place = jnp.maximum(self.lengths - 1, 0)
        return jnp.take_along_axis(self.tokens, place[:, None], axis=1)[:, 0]

    def added(
        self,
        tokens: Int[Array, "B W"],
        log_probs: Float[Array, "B W"],
        count: Int[Array, " B"],
        finite: Bool[Array, " B"],
        ends: Int[Array, " E"],
        most: Int[Array, ""] | int = LARGEST,
    ) -> Made:
        """Add the first `count` tokens of every row that is not done, up to the first that ends it.

        Args:
            tokens, log_probs: of the places that follow.
            count: how many of them, at least 1.
            finite: whether the logits that they were made of were finite.
            ends: tokens that end a row.
            most: how many tokens end it, whatever they are.
        """
        column = jnp.arange(tokens.shape[1])
        ended = jnp.any(tokens[:, :, None] == ends, axis=2) & (column < count[:, None])
        done = jnp.any(ended, axis=1)
        count = jnp.where(done, jnp.argmax(ended, axis=1).astype(jnp.int32) + 1, count)
        count = jnp.where(self.done, 0, count)
        rows = jnp.arange(tokens.shape[0])[:, None]
        place = self.lengths[:, None] + column
        place = jnp.where(column < count[:, None], place, self.tokens.shape[1])
        lengths = self.lengths + count
        done |= self.done | (lengths >= most)
        least = jnp.min(jnp.where(done, LARGEST, lengths))
        return Made(
            self.tokens.at[rows, place].set(tokens, mode="drop"),
            self.log_probs.at[rows, place].set(log_probs, mode="drop"),
            lengths,
            done,
            self.finite & (self.done | finite),
            jnp.where(least < LARGEST, least, jnp.max(lengths)),
            self.calls + jnp.where(self.done, 0, 1),
        )
