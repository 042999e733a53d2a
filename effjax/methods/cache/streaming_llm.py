"""StreamingLLM: keep the first tokens and the last ones.

Use it for very long sequences of which only the recent part matters, and as the baseline that every
choice of tokens has to beat. The cache and the attention of a new token have a constant size,
however long the sequence becomes. What stood between the first tokens and the last ones is lost.
The first tokens ("sinks") are kept because trained models put the attention there that they have no
use for.

    slot(p) = p for the first tokens, then sinks + (p - sinks) mod ring

Tokens keep their own positions; the paper moves them together. The prompt attends to all of itself.
The number of slots is static, and nothing is decided at run time.

Cost: slots / tokens of the dense cache.

Source: StreamingLLM, arXiv 2309.17453.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from effjax.caches import Kind, RingCache
from effjax.caches.install import Place
from effjax.fields import Natural
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class StreamingLLMPlan(press.BudgetPlan):
    """How many tokens are kept.

    Attributes:
        capacity: slots of a sequence, sinks included; or None, for
        ratio: the share of a sequence's tokens (prompt and new ones) that has no slot; half of them
            if neither is given.
        sinks: first tokens that are never overwritten.
    """

    sinks: Natural = 4

    @property
    def always(self) -> Mapping[str, int]:
        return {"sinks": self.sinks}

    def kind(self, place: Place) -> Kind:
        slots, own = self.budget(place.cache_length.total)
        ring = max(slots - self.sinks, 1)
        return RingCache, {"sinks": self.sinks, "ring": ring, "own": own, "bits": self.bits}


METHOD = press.method(
    "streaming_llm",
    "Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    StreamingLLMPlan,
    systems=("StreamingLLM",),
    ratios=(0.3, 0.5, 0.7),
    sinks=2,
)
transform = METHOD.transform
