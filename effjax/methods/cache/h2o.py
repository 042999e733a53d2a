"""H2O: a fixed number of slots for the last tokens and for those that were attended to most.

Use it for long answers and long prompts with a cache of constant size. Most attention goes to few
tokens, the "heavy hitters", and these show early.

    score(t) = sum over all queries since t of their attention to t, averaged over the query heads
               of a key head

A share of the slots (`recent`, half of them) is for the last tokens. The other slots hold the
tokens with the highest scores among those before. A new token takes an empty slot. If there is
none, it overwrites the token with the lowest score, the latest of equal ones, among those that are
not of the last. The prompt attends to all of itself.

The number of slots and the share are static, and which tokens stay is decided at run time. Several
tokens in one call are appended one by one.

Cost: slots / tokens of the dense cache, and a position and a score for each slot and key head. The
attention within the prompt is computed a second time for its sums, in blocks of queries.

Source: H2O, arXiv 2306.14048. With grouped heads, attention is averaged over the query heads of a
key head.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.caches import AttentionInputs
from effjax.caches.evicting import SlotScores, Weights
from effjax.caches.pressed import Scores
from effjax.caches.slots import Lengths
from effjax.fields import Range
from effjax.methods.cache import press

BLOCK = 64  # queries whose attention to the prompt is there at once


@dataclasses.dataclass(frozen=True)
class H2OPlan(press.EvictingPlan):
    """How many tokens are kept, prompt and new ones together.

    Attributes:
        capacity: slots of a sequence; or None, for
        ratio: the share of a sequence's tokens that has no slot; half of them if neither is given.
        recent: share of the slots that holds the last tokens.
    """

    recent: Annotated[float, Range(0, 1, below=True)] = 0.5

    def last(self, slots: int, room: Lengths) -> Lengths:
        return jnp.asarray((np.arange(slots + 1) * self.recent).astype(np.int32))[room]

    def score(self, inputs: AttentionInputs) -> Scores:
        q, k, positions = inputs.rotated_q, inputs.rotated_k, inputs.positions
        batch, columns, heads, width = k.shape
        short = -columns % BLOCK
        q = jnp.pad(q, ((0, 0), (0, short), (0, 0), (0, 0))) * jnp.asarray(width**-0.5, q.dtype)
        q = q.reshape(batch, -1, min(BLOCK, columns + short), heads, q.shape[2] // heads, width)
        places = jnp.pad(positions, ((0, 0), (0, short)), constant_values=-1)

        def block(parts: tuple[Array, Array]) -> Array:
            q, mine = parts
            logits = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32)
            seen = (positions >= 0)[:, None] & (positions[:, None] <= mine[:, :, None])
            seen = seen[:, None, None]
            logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
            weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), 0.0)
            return jnp.sum(jnp.mean(weights, axis=2), axis=2)

        blocks = q.swapaxes(0, 1), places.reshape(batch, q.shape[1], -1).swapaxes(0, 1)
        return jnp.sum(jax.lax.map(block, blocks), axis=0)

    def observe(self, scores: SlotScores, weights: Weights) -> SlotScores:
        return scores + jnp.mean(weights, axis=2)


METHOD = press.method(
    "h2o",
    "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models, arXiv "
    "2306.14048",
    H2OPlan,
    systems=("H2O",),
)
transform = METHOD.transform
