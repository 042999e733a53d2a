"""TaylorSeer: every attention's output is predicted by a Taylor series in steps (arXiv 2503.06923).

    compute if   i < warmup   or   (i - warmup - 1) mod every == 0   or   i >= steps - last

so the call behind the warm-up is the first that is predicted, as in diffusers' hook. Norms, gates
and feed-forward layers run in every call. A series on what whole stacks add costs far less memory
and saves more: `order=1` of `even_steps` and of every other step cache.

Static: which calls compute. Dynamic: nothing. Cost: dense - (skipped share) x attention with its
projections; state: `order + 1` arrays for each attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax import testing
from effjax.fields import Count, Natural
from effjax.methods.steps.by_module import attention_cache
from effjax.transform import Method, Plan, Transform

NAME = "taylor_seer"


@dataclasses.dataclass(frozen=True)
class TaylorSeerPlan(Plan):
    """Which calls compute.

    Attributes:
        steps: network calls of the sampler.
        every: one of so many calls computes after the warm-up; 1 for all.
        warmup: calls at the start that all compute.
        last: calls at the end that all compute; 0 for none.
        order: of the series; 0 holds what was computed last.
    """

    steps: Count = 50
    every: Count = 5
    warmup: Count = 3
    last: Natural = 0
    order: Natural = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last > self.steps:
            raise ValueError(f"last must be at most steps={self.steps}, got {self.last}")

    @property
    def calls(self) -> int:
        """Network calls that the plan is made for."""
        return self.steps

    @property
    def mask(self) -> tuple[bool, ...]:
        """Whether each call computes."""
        return tuple(
            step < self.warmup
            or step >= self.steps - self.last
            or (step - self.warmup - 1) % self.every == 0
            for step in range(self.steps)
        )

    def computed(self, calls: int) -> Mapping[str, Sequence[bool]]:
        return {"attention": self.mask}


def transform(plan: TaylorSeerPlan) -> Transform:
    """Predict attentions in some calls."""
    kinds = ("self", "joint", "cross")
    return attention_cache(NAME, plan, dict.fromkeys(kinds, plan.mask), order=plan.order)


def _tiny(**options: Any) -> testing.Subject:
    return testing.tiny_dit(steps=6, **options)


def _ladder(subject: testing.Subject) -> tuple[TaylorSeerPlan, ...]:
    calls = subject.sampler.calls
    return tuple(TaylorSeerPlan(calls, every, warmup) for every, warmup in ((2, 4), (2, 2), (9, 1)))


METHOD = Method(
    name=NAME,
    paper="From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers, arXiv "
    "2503.06923",
    seams=("patches",),
    domain="images",
    plan=TaylorSeerPlan,
    transform=transform,
    identity=lambda subject: TaylorSeerPlan(subject.sampler.calls, 1),
    ladder=_ladder,
    tiny=_tiny,
    systems=("TaylorSeer",),
)
