"""Even steps: blocks are computed in every n-th call, and predicted in the others.

The baseline of step caches: what is skipped is known before anything runs. With `order` 1 or more
it is TaylorSeer on whole stacks (its "lite" form, arXiv 2503.06923).

Static: which calls compute. Dynamic: nothing. Cost: (share of computed calls) x dense; state: what
the stacks add, `order + 1` times.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from effjax import testing
from effjax.context import Step
from effjax.fields import Count, Natural
from effjax.methods.steps.cached import CachedStack, Decision, StepCachePlan, step_cache
from effjax.transform import Method, Transform

NAME = "even_steps"


@dataclasses.dataclass(frozen=True)
class EvenStepsPlan(StepCachePlan):
    """Which calls compute: the first `warmup`, then one of `every`, then all of the last ones.

    Attributes:
        steps: network calls of the sampler; 0 for any number, without `last`.
        every: one of so many calls computes; 1 for all.
        warmup: calls at the start that all compute.
        last: calls at the end that all compute; 0 for none.
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    steps: Natural = 0
    every: Count = 2
    warmup: Count = 1
    last: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.last > self.steps:
            raise ValueError(
                f"last must be at most steps={self.steps}, got {self.last}; it is counted from the "
                f"end, so give steps"
            )

    @property
    def mask(self) -> tuple[bool, ...] | None:
        if not self.steps:
            return None
        return tuple(bool(self.computes(step)) for step in range(self.steps))

    def computes(self, step: Step) -> Decision:
        due: Any = (step < self.warmup) | ((step - self.warmup) % self.every == self.every - 1)
        return due | (step >= self.steps - self.last) if self.steps else due


def transform(plan: EvenStepsPlan) -> Transform:
    """Compute the blocks in some calls only."""
    return step_cache(NAME, plan, CachedStack)


def _ladder(subject: testing.Subject) -> tuple[EvenStepsPlan, ...]:
    calls = subject.sampler.calls
    return (
        EvenStepsPlan(steps=calls, every=2, warmup=2),
        EvenStepsPlan(steps=calls, every=2),
        EvenStepsPlan(steps=calls, every=calls),
    )


METHOD = Method(
    name=NAME,
    paper="an even interval, the baseline of step caches; with a series TaylorSeer lite, arXiv "
    "2503.06923",
    seams=("patches",),
    domain="images",
    plan=EvenStepsPlan,
    transform=transform,
    identity=lambda subject: EvenStepsPlan(steps=subject.sampler.calls, every=1),
    ladder=_ladder,
    tiny=testing.tiny_dit,
)
