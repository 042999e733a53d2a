"""ProfilingDiT: blocks that look at the background are cached, those for the foreground run.

    compute all blocks if   i < warmup   or   (i - warmup) mod every == 0   or   i in `at`

In the other calls every run of consecutive cached blocks adds what it added in the last computed
call, out - in over the run, and the other blocks run on that (arXiv 2504.03140). Which blocks look
at the background hardly depends on prompts: `search` profiles a trajectory (see
`effjax.methods.steps.foreground`), and `RELEASED` holds the authors' choices.

Use it where the other step caches lose detail of what moves or stands in front: some blocks see
every step. It saves less than a cache of all blocks in as many calls.

Static: blocks, and which calls compute. Dynamic: nothing. Cost: dense - (skipped share of the
calls) x (share of cached blocks) x the blocks; state: one array for each run.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Checked, Count, Natural, Share
from effjax.forward import Forward, Params
from effjax.methods.steps.cached import CachedStack, Runs, StepCachePlan, step_cache
from effjax.methods.steps.foreground import Mask, foreground_of, preferences, raster_of
from effjax.methods.steps.watching import sampled
from effjax.transform import Method, Transform

NAME = "profiling_dit"

# Cached blocks of 60 (20 dual, then 40 single ones) and of 40.
RELEASED = {
    "HunyuanVideo": (*(20, 22, 24, 25, 26, 27, *range(30, 42), 43, 45, 46, 47, 51, 53),),
    "Wan2.1-14B": (0, *range(2, 8), *range(10, 21), *range(25, 33), 37, 38),
}


@dataclasses.dataclass(frozen=True)
class ProfilingDiTPlan(StepCachePlan):
    """Which blocks are cached, and which calls compute them.

    Attributes:
        blocks: numbers of the cached blocks, in order; those of several stacks (FLUX's dual and
            single blocks) are counted on.
        steps: network calls of the sampler.
        warmup: calls at the start that all compute.
        every: one of so many calls computes after the warm-up; 1 for all.
        at: calls that compute after the warm-up, in the place of `every`; () for `every`.
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    blocks: tuple[Natural, ...] = dataclasses.field(kw_only=True)
    steps: Count = 50
    warmup: Count = 6
    every: Count = 6
    at: tuple[Natural, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.blocks or any(a >= b for a, b in itertools.pairwise(self.blocks)):
            raise ValueError(
                f"blocks must be different numbers of blocks in order, at least one, got "
                f"{self.blocks}. Search them, or take RELEASED of your model."
            )
        if late := [step for step in self.at if not self.warmup <= step < self.steps]:
            raise ValueError(
                f"at must be calls from warmup={self.warmup} to {self.steps - 1}, got {late}"
            )

    @property
    def mask(self) -> tuple[bool, ...]:
        return tuple(
            step < self.warmup
            or (step in self.at if self.at else (step - self.warmup) % self.every == 0)
            for step in range(self.steps)
        )

    def computed(self, calls: int) -> Mapping[str, Sequence[bool]]:
        return {f"{len(self.blocks)} background blocks": self.mask}

    def runs(self, name: str, sizes: Sequence[int]) -> list[Runs]:
        if self.blocks[-1] >= sum(sizes):
            raise ValueError(
                f"the plan of {name} caches block {self.blocks[-1]}, but this model has "
                f"{sum(sizes)}. Search a plan for this model."
            )
        found: list[Runs] = []
        for size, end in zip(sizes, itertools.accumulate(sizes)):
            own = [each - end + size for each in self.blocks if end - size <= each < end]
            starts = [i for i, each in enumerate(own) if not i or each != own[i - 1] + 1]
            ends = [*starts[1:], len(own)]
            found.append(tuple((own[a], own[b - 1] + 1) for a, b in zip(starts, ends)))
        return found


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """How many blocks are cached, and for how long.

    Attributes:
        share: of the blocks that are cached, those that prefer the foreground least; the released
            plans cache 0.4 ... 0.7 of them. None for all that attend less to the foreground than
            its share of the image.
        warmup: calls at the start that all compute.
        every: one of so many calls computes after the warm-up.
    """

    share: Share | None = 0.6
    warmup: Count = 6
    every: Count = 6


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> ProfilingDiTPlan:
    """Profile a trajectory; its own samples say what is foreground. See `find`."""
    return find(goals, forward, params, data)


def find(
    goals: Goals,
    forward: Forward,
    params: Params,
    data: Trajectory,
    foreground: Mask | None = None,
) -> ProfilingDiTPlan:
    """Profile a trajectory: which blocks attend least to the foreground.

    The model runs once to make samples, if no masks are given, and once to be measured.

    Args:
        goals: how many blocks are cached.
        forward, params: the model, without a cache.
        data: what to sample.
        foreground: bool[B, image tokens] of the samples, such as a segmentation model gives them;
            `foreground_of` the samples if None.

    Raises:
        ValueError: if no block is left to cache, and as `preferences`.
    """
    if foreground is None:
        layout = raster_of(forward, params, data)
        *_, samples = sampled(forward, params, data, lambda carry: carry.x)
        foreground = foreground_of(samples, layout)
    measured = preferences(forward, params, data, foreground).mean(0)
    order = np.argsort(measured, kind="stable")
    if goals.share is None:
        chosen = [number for number in order if measured[number] < 1]
    else:
        chosen = order[: round(goals.share * len(order))].tolist()
    if not chosen:
        asked = "prefers the background" if goals.share is None else f"is in share={goals.share}"
        raise ValueError(f"no block of {len(order)} {asked}: give a larger share")
    blocks = tuple(sorted(map(int, chosen)))
    calls = data.sampler.calls
    return ProfilingDiTPlan(
        blocks=blocks, steps=calls, warmup=min(goals.warmup, calls), every=goals.every
    )


def transform(plan: ProfilingDiTPlan) -> Transform:
    """Compute the plan's blocks in some calls only."""
    return step_cache(NAME, plan, CachedStack)


def _tiny(**options: Any) -> testing.Subject:
    return testing.tiny_dit(**{"num_layers": 3} | options)


def _plan(subject: testing.Subject, blocks: tuple[int, ...], every: int) -> ProfilingDiTPlan:
    return ProfilingDiTPlan(blocks=blocks, steps=subject.sampler.calls, warmup=1, every=every)


METHOD = Method(
    name=NAME,
    paper="Model Reveals What to Cache: Profiling-Based Feature Reuse for Video Diffusion Models, "
    "arXiv 2504.03140",
    seams=("patches",),
    domain="images",
    plan=ProfilingDiTPlan,
    transform=transform,
    identity=lambda subject: _plan(subject, (0, 2), 1),
    ladder=lambda subject: (
        _plan(subject, (1,), 2),
        _plan(subject, (0, 2), 2),
        _plan(subject, (0, 2), 9),
    ),
    tiny=_tiny,
    systems=("ProfilingDiT",),
    data=Trajectory,
    goals=Goals,
    search=search,
)
