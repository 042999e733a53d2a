"""First-Block-Cache: the first block always runs, and its change decides about all others.

    compute if   rel(r, r of the last computed call) > threshold,   r = first block's out - in

with rel(a, b) = mean|a - b| / mean|b| over the image's tokens of the whole batch, as in diffusers'
hook. The first call computes; nothing else is forced.

Static: nothing. Dynamic: which calls compute. Cost: (computed share) x dense + the first block of
the others; state: r, and what the other blocks add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx

from effjax import testing
from effjax.context import PyTree, State, Step
from effjax.fields import NotNegative
from effjax.methods.steps.cached import (
    CachedStack,
    Decision,
    Runs,
    StepCachePlan,
    image_of,
    relative,
    step_cache,
)
from effjax.transform import Method, Transform

NAME = "fb_cache"


@dataclasses.dataclass(frozen=True)
class FBCachePlan(StepCachePlan):
    """How much the first block's output may change.

    Attributes:
        threshold: relative change, since the last computed call, above which all blocks run.
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    threshold: NotNegative = 0.05

    first_blocks = 1


class FirstBlockCached(CachedStack):
    """A stack whose first block decides."""

    def __init__(self, inner: nnx.Module, plan: Any, step: Step, lead: State | None, runs: Runs):
        super().__init__(inner, plan, step, lead, runs)
        if lead is None:
            self.before = State()

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        added = image_of(head) - image_of(x)
        before = self.before.read(added.shape, added.dtype)
        changed = relative(added, before) > self.plan.threshold
        computes = jnp.asarray(self.step == 0) | changed
        self.before.write(jnp.where(computes, added, before))
        return computes


def transform(plan: FBCachePlan) -> Transform:
    """Let the first block decide whether the others run."""
    return step_cache(NAME, plan, FirstBlockCached)


METHOD = Method(
    name=NAME,
    paper="First-Block-Cache, of ParaAttention and diffusers; see TeaCache, arXiv 2411.19108",
    seams=("patches",),
    domain="images",
    plan=FBCachePlan,
    transform=transform,
    identity=lambda subject: FBCachePlan(threshold=0.0),
    ladder=lambda subject: tuple(FBCachePlan(threshold=each) for each in (0.02, 0.2, 100.0)),
    tiny=testing.tiny_dit,
    systems=("First-Block-Cache",),
    decides="batch",
)
