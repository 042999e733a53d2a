"""PyramidKV: budgets that fall linearly over the layers.

Use it with the score of another press, at the bytes of one budget for all layers. The first layers
of a model attend to everything and keep more; the last ones attend to few tokens and keep fewer.

    n = tokens of a prompt, b = what each layer would keep, w = what is always kept
    least = b / beta,  most = 2 b - least
    layer l of L keeps round(most - l (most - least) / (L - 1)), at most n and at least w

If b comes from a ratio, b = n (1 - ratio), and if most > n - w, then most = n - w and least =
2 b - most. If after that n >= most >= least >= w does not hold, the prompt is too short for a
pyramid, and all layers keep b.

Which tokens are kept is decided at run time by the score of another press (`press`, SnapKV by
default). Budgets are static.

Cost: (mean budget + new) / (prompt + new) of the dense cache. With a ratio, a layer has as many
slots as the largest budget that a shorter prompt may have.

Source: PyramidKV, arXiv 2406.02069; kvpress' `PyramidKVPress`.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from effjax.caches import Kind
from effjax.caches.budgets import by_length
from effjax.caches.install import Place
from effjax.caches.pressed import Highest
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
        return self.pressed(Highest(self.score), *by_length(table), place)


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
