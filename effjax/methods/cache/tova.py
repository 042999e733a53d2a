"""TOVA: a fixed number of slots; what the newest token attends to least is overwritten.

Buys: keys and values of a constant number of tokens, however long the sequence is, chosen anew at
every token and not by place.

    score(t) = mean over all heads of the newest token's attention to t, the same for every head

The last token of a prompt scores its tokens, and every new token those that are held. A new token
without an empty slot overwrites the one of least score, the latest of equal ones; the token before
it never goes. The prompt itself attends to all of itself.

Static: the number of slots. Dynamic: which tokens. Cost: slots / tokens of the dense cache, and for
each slot and head a position and a score.

Source: TOVA, arXiv 2401.06104; kvpress' `TOVAPress` for the prompt.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from effjax.caches import AttentionInputs
from effjax.caches.evicting import SlotScores, Weights
from effjax.caches.pressed import Scores
from effjax.methods.cache import press
from effjax.methods.cache.snap_kv import last_attention


@dataclasses.dataclass(frozen=True)
class TOVAPlan(press.EvictingPlan):
    """How many tokens are kept, prompt and new ones together, see `EvictingPlan`."""

    def score(self, inputs: AttentionInputs) -> Scores:
        weights, _ = last_attention(inputs, 1)
        mean = jnp.mean(weights, axis=(1, 2, 3))[:, None]
        return jnp.broadcast_to(mean, (mean.shape[0], inputs.k.shape[2], mean.shape[2]))

    def observe(self, scores: SlotScores, weights: Weights) -> SlotScores:
        return jnp.broadcast_to(jnp.mean(weights, axis=(1, 2))[:, None], scores.shape)


METHOD = press.method(
    "tova",
    "Transformers are Multi-State RNNs, arXiv 2401.06104",
    TOVAPlan,
    systems=("TOVA",),
)
transform = METHOD.transform
