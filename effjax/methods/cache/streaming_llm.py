"""StreamingLLM: keep the first tokens and the last ones.

Buys: keys and values of a constant number of tokens, however long the sequence is, and attention to
as many for every new token. What stood between is forgotten; the first tokens are kept because
trained models put their surplus attention there ("sinks").

    slot(p) = p for the first sinks, then sinks + (p - sinks) mod ring

Tokens keep their own positions (the paper moves them together). The prompt itself attends to all of
itself. Static: the number of slots. Dynamic: nothing. Cost: slots / tokens of the dense cache.

Source: StreamingLLM, arXiv 2309.17453. The baseline that every choice of tokens has to beat.
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
