"""AdaKV: the heads of a layer share its budget, token by token.

Use it with the score of another press where heads differ: a head that attends to few tokens keeps
few, and other heads get its slots. The bytes are those of one budget for all heads.

    n = tokens that a head would keep by itself, K key heads
    kept: first the max(1, int(floor n)) best tokens of each head, then the best of all others, K n
          tokens together

The score is that of another press (`press`, SnapKV by default), and it must have one scale for all
heads. The slots of all heads lie on one axis, so that a layer takes the memory of K n tokens,
whatever a single head takes of it. K n is static; how many tokens each head keeps, and which, is
decided at run time. The prompt attends to all of itself, and all tokens that follow are kept.

Cost: (kept + new) / (prompt + new) of the dense cache. For each slot the queries of its head are
gathered, which takes more time than equal budgets for all heads do.

Source: Ada-KV, arXiv 2407.11550; kvpress' `AdaKVPress`, which keeps all keys and masks them.
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
