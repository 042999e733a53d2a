"""KNorm: keep the tokens of a prompt whose keys are short.

Use it to shrink the cache of a prompt at almost no cost: the score is one norm for each token and
key head. In trained models queries attend most to keys of small norm; this was found by experiment,
layer by layer.

    score(t) = -|k_t|        for each key head by itself, before the rotation

The number of kept tokens is static, and which tokens they are is decided at run time. The prompt
attends to all of itself, and all tokens that follow are kept.

Cost: (kept + new) / (prompt + new) of the dense cache, and a sort of one number for each token and
key head.

Source: arXiv 2406.11430; kvpress' `KnormPress`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp

from effjax.caches import AttentionInputs
from effjax.caches.pressed import Scores
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class KnormPlan(press.PressPlan):
    """How many tokens of a prompt are kept, see `PressPlan`."""

    def score(self, inputs: AttentionInputs) -> Scores:
        return -jnp.linalg.norm(inputs.k.astype(jnp.float32), axis=-1).transpose(0, 2, 1)


METHOD = press.method(
    "knorm",
    "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv 2406.11430",
    KnormPlan,
    systems=("KNorm",),
)
transform = METHOD.transform
