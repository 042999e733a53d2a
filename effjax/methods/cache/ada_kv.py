"""AdaKV: the heads of a layer share its budget, token by token.

Buys: the same bytes as one budget for all heads, spent where attention is spread: a head that looks
at few tokens keeps few, and others get its slots.

    n = tokens that each head would keep, K heads
    kept: the K n highest scores of all heads together, after the max(1, int(floor n)) best ones of
    each head

The score is that of another press, SnapKV's by default, on one scale for all heads. The slots of a
layer lie on one axis, so that its memory is K n tokens whatever heads take of it. Static: K n.
Dynamic: how many tokens each head keeps, and which. The prompt itself attends to all of itself;
tokens that follow are all kept. Cost: (kept + new) / (prompt + new) of the dense cache.

Source: Ada-KV, arXiv 2407.11550; kvpress' `AdaKVPress` (which keeps all keys and masks them).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.caches import DenseCache, Kind, Lengths
from effjax.caches.install import Place
from effjax.caches.pressed import Scores
from effjax.caches.shared import SharedCache
from effjax.fields import Share
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class AdaKVPlan(press.WrapperPlan):
    """How many tokens of a prompt heads keep on average, and by which score.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        press, options: whose score, see `WrapperPlan`.
        floor: share of the mean that every head keeps at least.
    """

    floor: Share = 0.2

    def kind(self, place: Place) -> Kind:
        keep, own = self.budget(place.cache_length.prompt)
        if keep >= place.cache_length.prompt and own is None:
            return DenseCache, {"bits": self.bits}
        options = {"score": self.score, "choose": self.choose, "bits": self.bits}
        return SharedCache, {**options, "keep": keep, "own": own}

    def choose(self, scores: Scores, keep: Lengths, slots: int) -> Int[Array, "B N"]:
        """Places of the kept tokens of all heads."""
        batch, heads, columns = scores.shape
        least = (np.arange(slots + 1) * self.floor).astype(np.int32)
        least = jnp.asarray(np.maximum(least, int(self.floor > 0)))[keep]
        _, best = jax.lax.top_k(scores, min(max(int(slots * self.floor), 1), columns))
        safe = jnp.arange(best.shape[2]) < least[:, None, None]
        safe &= jnp.take_along_axis(scores, best, axis=2) > -jnp.inf
        at = jnp.arange(batch)[:, None, None], jnp.arange(heads)[:, None]
        scores = scores.at[(*at, jnp.where(safe, best, columns))].set(jnp.inf, mode="drop")
        _, kept = jax.lax.top_k(scores.reshape(batch, -1), heads * min(slots, columns))
        kept = jnp.where(jnp.arange(kept.shape[1]) < heads * keep[:, None], kept, heads * columns)
        short = ((0, 0), (0, heads * slots - kept.shape[1]))
        return jnp.pad(kept, short, constant_values=heads * columns)


METHOD = press.method(
    "ada_kv",
    "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM "
    "Inference, arXiv 2407.11550",
    AdaKVPlan,
    systems=("AdaKV",),
    options=(("window", 2),),
)
transform = METHOD.transform
