"""Plans of FasterCache: which calls compute attention, and which run all branches of guidance."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from effjax.fields import Count, Positive
from effjax.methods.steps.by_module import TimedPlan

NAME = "faster_cache"
Between = tuple[float, float]  # times, without the two


@dataclasses.dataclass(frozen=True)
class FasterCachePlan(TimedPlan):
    """Which calls compute what.

    Attributes:
        times: of the network calls, `sampler.schedule.times`.
        guided: whether calls run branches of guidance; false for models that are told a scale.
        every: one of so many calls computes attention, counted from the first one; 1 for all.
        attention_times: between these times attention may be predicted.
        weights: of the last change in a predicted output, at the first call and at the last, and
            linear between; the paper goes from 0 to 1.
        branch_every: one of so many calls runs all branches; 1 for all.
        branch_times: between these times branches may be estimated.
        low_times, high_times: between these times differences of low and of high frequencies grow.
        low_gain, high_gain: by what factor, in each call that estimates.
    """

    guided: bool = True
    every: Count = 2
    attention_times: Between = (-1.0, 681.0)
    weights: tuple[float, float] = (0.5, 0.5)
    branch_every: Count = 5
    branch_times: Between = (-1.0, 641.0)
    low_times: Between = (99.0, 901.0)
    high_times: Between = (-1.0, 301.0)
    low_gain: Positive = 1.1
    high_gain: Positive = 1.1

    def computed(self, calls: int) -> Mapping[str, Sequence[bool]]:
        own = {"attention": self.attention}
        return {**own, "branches of guidance": self.branches} if self.guided else own

    @property
    def branches(self) -> tuple[bool, ...]:
        """Whether each call runs all branches."""
        return tuple(
            step % self.branch_every == 0 or not _within(time, self.branch_times)
            for step, time in enumerate(self.times)
        )

    @property
    def attention(self) -> tuple[bool, ...]:
        """Whether each call computes attention; where all branches run it does."""
        return tuple(
            step % self.every == 0
            or not _within(time, self.attention_times)
            or (self.guided and full)
            for step, (time, full) in enumerate(zip(self.times, self.branches))
        )

    @property
    def weight(self) -> tuple[float, ...]:
        """Of the last change, in each call."""
        first, last = self.weights
        most = max(len(self.times) - 1, 1)
        return tuple(first + (last - first) * step / most for step in range(len(self.times)))

    @property
    def gains(self) -> tuple[tuple[float, float], ...]:
        """What the differences of low and of high frequencies are multiplied by, in each call."""
        low, high, found = 1.0, 1.0, []
        for time, full in zip(self.times, self.branches):
            low *= self.low_gain if _within(time, self.low_times) else 1.0
            high *= self.high_gain if _within(time, self.high_times) else 1.0
            low, high = (1.0, 1.0) if full else (low, high)
            found.append((low, high))
        return tuple(found)


def _within(time: float, times: Between) -> bool:
    return times[0] < time < times[1]
