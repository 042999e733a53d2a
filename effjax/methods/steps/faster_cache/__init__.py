"""FasterCache: attention continues its last change, and "uncond" is estimated from "cond".

Two parts, both in calls whose times lie in a range (arXiv 2410.19355):

- In all but one of `branch_every` calls the model runs on the branch "cond" of guidance alone; the
  others are "cond" plus their last difference from it, in which low and high frequencies grow
  (see `faster_cache.branches`). This halves the calls of classifier-free guidance.
- In these calls every second one predicts the outputs of attention, y = last + w (last - before),
  from its two last outputs, of which one may have been predicted itself. A model that is told its
  scale (FLUX) has no branches and predicts in every second call of the range.

Use it for guided models: most is saved by the first part. It goes with every other method; these
then see fewer rows in some calls, and keep the rows that did not run as they were.

Static: which calls compute what. Dynamic: nothing. Cost: of N branches, dense / N in calls that
estimate, less attention with its projections where that is predicted; state: two arrays for each
attention, of "cond" alone, and 2 (N - 1) like the model's output in float32.

As in diffusers' hook, where that is right: see docs/diffusion.md for what differs.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

from flax import nnx

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import Context
from effjax.fields import Checked, Count
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions
from effjax.methods.steps.by_module import CachedAttention, check_attentions, check_step
from effjax.methods.steps.faster_cache.attention import ConditionalAttention, LastTwo
from effjax.methods.steps.faster_cache.branches import EstimatedBranches, low_frequencies
from effjax.methods.steps.faster_cache.plan import NAME, Between, FasterCachePlan
from effjax.methods.steps.watching import times_of
from effjax.targets import AttentionKind, wrap
from effjax.transform import Method, Pair, Transform

__all__ = [
    "METHOD",
    "FasterCachePlan",
    "FasterCaching",
    "Goals",
    "low_frequencies",
    "search",
    "transform",
]

KINDS: tuple[AttentionKind, ...] = ("self", "joint")


def transform(plan: FasterCachePlan) -> Transform:
    """Predict attentions, and estimate branches of guidance, in some calls.

    Raises:
        ValueError: for a model without self- or joint attention; while tracing, if calls are guided
            and the plan is not, or the other way round, or a step lies outside of it.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        check_attentions(NAME, forward, params, *KINDS)
        return forward.patch(FasterCaching(plan)), params

    return Transform(NAME, plan, apply)


@dataclasses.dataclass(frozen=True)
class FasterCaching:
    """The patch: attentions and the whole model follow the plan."""

    plan: FasterCachePlan

    @property
    def calls(self) -> int:
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> nnx.Module | None:
        plan, guidance = self.plan, context.guidance
        check_step(context.step, self.calls)
        if plan.guided != (guidance is not None):
            told, seen = ("guided", "not") if plan.guided else ("not guided", "is")
            raise ValueError(
                f"the plan of {NAME} is for calls that are {told}, and this one {seen}: give "
                f"guided={not plan.guided}, or search a plan with this sampler"
            )
        memory = partial(LastTwo, weight=plan.weight)
        kind = CachedAttention if guidance is None else ConditionalAttention
        for target in attentions(module, *KINDS) if not all(plan.attention) else ():
            wrap(module, target.path, kind, plan.attention, memory, context.step)
        if guidance is None or all(plan.branches):
            return None
        return EstimatedBranches(module, plan.branches, plan.gains, context.step, guidance)


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """How much is predicted and estimated.

    Attributes:
        every: one of so many calls computes attention.
        attention_times: between these times attention may be predicted.
        weights: of the last change in a predicted output, at the first call and at the last.
        branch_every: one of so many calls runs all branches.
        branch_times: between these times branches may be estimated.
    """

    every: Count = 2
    attention_times: Between = (-1.0, 681.0)
    weights: tuple[float, float] = (0.5, 0.5)
    branch_every: Count = 5
    branch_times: Between = (-1.0, 641.0)


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> FasterCachePlan:
    """The plan for the times and the guidance of a sampler; nothing runs."""
    return FasterCachePlan(times_of(data), data.sampler.guided, **dataclasses.asdict(goals))


def _plan(subject: testing.Subject, every: int, branch_every: int) -> FasterCachePlan:
    sampler: Any = subject.sampler
    goals = Goals(every=every, branch_every=branch_every)
    return search(goals, subject.forward, subject.params, Trajectory(sampler, (), subject.cond))


METHOD = Method(
    name=NAME,
    paper="FasterCache: Training-Free Video Diffusion Model Acceleration with High Quality, arXiv "
    "2410.19355",
    seams=("patches",),
    domain="images",
    plan=FasterCachePlan,
    transform=transform,
    identity=lambda subject: _plan(subject, 1, 1),
    ladder=lambda subject: (_plan(subject, 1, 2), _plan(subject, 1, 9), _plan(subject, 2, 9)),
    tiny=testing.tiny_dit,
    systems=("FasterCache",),
    data=Trajectory,
    goals=Goals,
    search=search,
)
