"""PyramidKV: budgets that fall linearly over the layers.

Buys: the same bytes as one budget for all layers, spent where attention is spread: the first layers
look at everything, the last ones at few tokens.

    n = tokens of a prompt, b = what each layer would keep, w = what is kept in any case
    least = b / beta,  most = 2 b - least
    layer l of L keeps round(most - l (most - least) / (L - 1)), n at most and w at least

With a ratio, b = n (1 - ratio): where most > n - w, most = n - w and least = 2 b - most; if then
not n >= most >= least >= w (prompts too short for a pyramid), all layers keep b.

Which tokens is the matter of another press' score, SnapKV's by default. Static: budgets. Dynamic:
which tokens. Cost: (mean budget + new) / (prompt + new) of the dense cache. With a ratio a layer
has slots for the largest budget that a shorter prompt may have.

Source: PyramidKV, arXiv 2406.02069; kvpress' `PyramidKVPress`.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from effjax.caches import Kind
from effjax.caches.budgets import by_length
from effjax.caches.install import Place
from effjax.caches.pressed import highest
from effjax.fields import Count
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class PyramidKVPlan(press.WrapperPlan):
    """How many tokens of a prompt the layers keep on average, and by which score.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        press, options: whose score, see `WrapperPlan`.
        beta: how steep: the last layer keeps 1 / beta of the mean.
    """

    beta: Count = 20

    def kind(self, place: Place) -> Kind:
        table = _table(self, place.cache_length.prompt, place.layer, place.layers)
        return self.pressed(highest(self.score), *by_length(table), place)


@lru_cache(maxsize=256)
def _table(plan: PyramidKVPlan, most: int, layer: int, layers: int) -> np.ndarray:
    """What a layer keeps of 0 ... `most` tokens."""
    return np.array([layer_budget(plan, tokens, layer, layers) for tokens in range(most + 1)])


def layer_budget(plan: PyramidKVPlan, tokens: int, layer: int, layers: int) -> int:
    """What a layer keeps of a prompt of so many tokens."""
    always, ratio, capacity = sum(plan.always.values()), plan.ratio, plan.capacity
    if ratio == 0.0:
        return tokens
    mean = tokens * (1 - ratio) if ratio is not None else float(capacity or tokens)
    least = mean / plan.beta
    most = 2 * mean - least
    if capacity is None:
        if most >= tokens - always:
            most, least = tokens - always, 2 * mean - (tokens - always)
        if not tokens >= most >= least >= always:
            most = least = mean
    kept = round(most - layer * (most - least) / max(layers - 1, 1))
    return min(tokens, max(always, 1, kept))


METHOD = press.method(
    "pyramid_kv",
    "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling, arXiv "
    "2406.02069",
    PyramidKVPlan,
    systems=("PyramidKV",),
    options=(("window", 2),),
    beta=4,
)
transform = METHOD.transform
