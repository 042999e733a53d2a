"""TOVA: a fixed number of slots; what the newest token attends to least is overwritten.

Use it for long answers and long prompts with a cache of constant size. Unlike in StreamingLLM, the
tokens that stay are chosen by attention, anew at every token, and not by their place.

    score(t) = mean over all heads of the newest token's attention to t, the same for every head

The last token of a prompt gives the scores of its tokens, and every new token those of the tokens
in the slots. A new token takes an empty slot. If there is none, it overwrites the token with the
lowest score, the latest of equal ones, but never the token just before it. The prompt attends to
all of itself.

The number of slots is static, and which tokens they hold is decided at run time. Several tokens in
one call are appended one by one.

Cost: slots / tokens of the dense cache, and a position and a score for each slot and key head.

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
