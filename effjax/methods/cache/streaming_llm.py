"""StreamingLLM: keep the first tokens and the last ones.

Buys: keys and values of a constant number of tokens, whatever the length of the text, and attention
of as many for every new token. What stood between is forgotten; the first tokens are kept because
trained models put their surplus attention there ("sinks").

    slot(p) = p for the first sinks, then sinks + (p - sinks) mod ring

Tokens keep their own positions (the paper moves them together). The prompt itself attends to all of
itself. Static: the number of slots. Dynamic: nothing. Cost: slots / tokens of the dense cache.

Source: StreamingLLM, arXiv 2309.17453. The baseline that every choice of tokens has to beat.
"""

from __future__ import annotations

import dataclasses

from effjax import testing
from effjax.context import CacheLength
from effjax.fields import Count, Natural
from effjax.forward import Forward, Params
from effjax.layers.attention import CausalCore
from effjax.layers.kv_cache import Caches, Dropped, Kind, RingCache, budgets, check_budget
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class StreamingLLMPlan(Plan):
    """How many tokens are kept.

    Attributes:
        capacity: slots of a text, sinks included; or None, for
        ratio: the share of a text's tokens (prompt and new ones) that has no slot; half of them if
            neither is given.
        sinks: first tokens that are never overwritten.
    """

    capacity: Count | None = None
    ratio: Dropped | None = None
    sinks: Natural = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self, sinks=self.sinks)


def transform(plan: StreamingLLMPlan) -> Transform:
    """Give every attention layer a cache of sinks and a ring."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(
    plan: StreamingLLMPlan, core: CausalCore, cache_length: CacheLength, layer: int
) -> Kind:
    slots, own = budgets(plan.capacity, plan.ratio, cache_length.total, always=plan.sinks)
    return RingCache, {"sinks": plan.sinks, "ring": max(slots - plan.sinks, 1), "own": own}


def _identity(subject: testing.Subject) -> StreamingLLMPlan:
    return StreamingLLMPlan(ratio=0.0)


def _ladder(subject: testing.Subject) -> tuple[StreamingLLMPlan, ...]:
    return tuple(StreamingLLMPlan(ratio=ratio, sinks=2) for ratio in (0.3, 0.5, 0.7))


METHOD = Method(
    name="streaming_llm",
    paper="Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453",
    seams=("patches",),
    domain="language models",
    plan=StreamingLLMPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("StreamingLLM",),
)
