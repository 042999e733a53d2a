"""PAB, Pyramid Attention Broadcast: attentions hold their outputs for some calls (2408.12588).

    compute if   t <= low   or   t >= high   or   i mod every == 0

with another `every` for self-attention (2) and for attention to a text (6), which changes less. i
counts all calls from the first one, t is the time of the call. As in diffusers' hook, but with one
state for each branch of guidance: the hook counts two passes of a step as two, and with `every` 2
never computes the second one.

Static: which calls compute. Dynamic: nothing. Cost: dense - (skipped share) x attention with its
projections; state: one array for each attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Checked, Count, NotNegative
from effjax.forward import Forward, Params
from effjax.methods.steps.by_module import TimedPlan, attention_cache
from effjax.methods.steps.watching import times_of
from effjax.transform import Method, Transform

NAME = "pab"


@dataclasses.dataclass(frozen=True)
class PABPlan(TimedPlan):
    """Which calls compute.

    Attributes:
        times: of the network calls, `sampler.schedule.times`.
        every: one of so many calls computes self- and joint attention.
        cross_every: one of so many computes attention to a text.
        low, high: between these times calls may be skipped.
    """

    every: Count = 2
    cross_every: Count = 6
    low: NotNegative = 100.0
    high: NotNegative = 800.0

    def computed(self, calls: int) -> Mapping[str, Sequence[bool]]:
        held = {"attention": self.mask(self.every)}
        return {**held, "attention to texts": self.mask(self.cross_every)}

    def mask(self, every: int) -> tuple[bool, ...]:
        """Whether each call computes what is computed in one of `every` calls."""
        return tuple(
            step % every == 0 or not self.low < time < self.high
            for step, time in enumerate(self.times)
        )


def transform(plan: PABPlan) -> Transform:
    """Hold the outputs of attentions for some calls."""
    own, cross = plan.mask(plan.every), plan.mask(plan.cross_every)
    return attention_cache(NAME, plan, {"self": own, "joint": own, "cross": cross})


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """How often attentions are computed.

    Attributes:
        every: one of so many calls computes self- and joint attention.
        cross_every: one of so many computes attention to a text.
        low, high: between these times calls may be skipped.
    """

    every: Count = 2
    cross_every: Count = 6
    low: NotNegative = 100.0
    high: NotNegative = 800.0


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> PABPlan:
    """The plan for the times of a sampler; nothing runs."""
    return PABPlan(times_of(data), **dataclasses.asdict(goals))


def _plan(subject: testing.Subject, every: int, low: float, high: float) -> PABPlan:
    sampler: Any = subject.sampler
    times = tuple(float(time) + 1 for time in sampler.schedule.times)
    return PABPlan(times, every, every, low, high)


METHOD = Method(
    name=NAME,
    paper="Real-Time Video Generation with Pyramid Attention Broadcast, arXiv 2408.12588",
    seams=("patches",),
    domain="images",
    plan=PABPlan,
    transform=transform,
    identity=lambda subject: _plan(subject, 1, 0.0, 1e3),
    ladder=lambda subject: (
        _plan(subject, 2, 2.0, 1e3),
        _plan(subject, 3, 2.0, 1e3),
        _plan(subject, 9, 0.0, 1e3),
    ),
    tiny=testing.tiny_dit,
    systems=("PAB",),
    data=Trajectory,
    goals=Goals,
    search=search,
)
