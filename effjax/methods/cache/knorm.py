"""Knorm: keep the tokens of a prompt whose keys are short.

Buys: a share of the prompt's keys and values, for a sort of one number a token. Keys of small norm
are those that queries attend to most, which was found by looking, layer after layer.

    score(t) = -|k_t|        for each key head alone

Static: how many tokens are kept. Dynamic: which. The prompt itself attends to all of itself; tokens
that follow are all kept. Cost: (kept + new) / (prompt + new) of the dense cache.

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
