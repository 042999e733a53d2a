"""MagCache: how much what blocks add shrinks from step to step is known, and so is when to compute.

    gamma_i = mean over tokens of |r_i| / |r_(i-1)|,   r: what all blocks add to the image's tokens
    rho *= gamma_i;  k += 1;  e += |1 - rho|;   skip while e <= threshold and k <= skips

(arXiv 2506.09045), after a share of the steps that all compute; a computed step sets rho = 1,
e = 0, k = 0. The ratios of a model hardly depend on prompts: `search` measures them on one
trajectory, and `FLUX` holds those released for FLUX.1. They belong to a schedule and its shift.

Static: which calls compute. Dynamic: nothing. Cost: (share of computed calls) x dense; state: what
the stacks add.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax import testing
from effjax.calibration import Trajectory
from effjax.fields import Checked, Count, Natural, NotNegative, Positive, Range, Share
from effjax.forward import Forward, Params, StateDict
from effjax.methods.steps import even_steps
from effjax.methods.steps.cached import CachedStack, StepCachePlan, step_cache
from effjax.methods.steps.watching import Added, watch
from effjax.transform import Method, Transform

NAME = "mag_cache"

# Of FLUX.1 with 28 steps.
FLUX = (
    *(1.0, 1.21094, 1.11719, 1.07812, 1.0625, 1.03906, 1.03125, 1.03906, 1.02344, 1.03125),
    *(1.02344, 0.98047, 1.01562, 1.00781, 1.0, 1.00781, 1.0, 1.00781, 1.0, 1.0, 0.99609),
    *(0.99609, 0.98047, 0.98828, 0.96484, 0.95703, 0.93359, 0.89062),
)


@dataclasses.dataclass(frozen=True)
class MagCachePlan(StepCachePlan):
    """The ratios of a model, and how far they may lead.

    Attributes:
        ratios: of what blocks add, step by step; the first one is not read. Those of another number
            of steps are taken at the nearest place.
        steps: network calls of the sampler.
        threshold: summed error up to which calls are skipped.
        skips: calls that are skipped in a row, at most.
        retention: share of the calls at the start that all compute.
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    ratios: tuple[Positive, ...] = FLUX
    steps: Count = 28
    threshold: NotNegative = 0.06
    skips: Natural = 3
    retention: Share = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ratios:
            raise ValueError("ratios must be one for each step; got none. Search them.")

    @property
    def mask(self) -> tuple[bool, ...]:
        return _mask(self)


@functools.lru_cache(maxsize=64)
def _mask(plan: MagCachePlan) -> tuple[bool, ...]:
    """Which calls compute."""
    kept = max(int(plan.retention * plan.steps + 0.5), 1)
    rho, error, skipped, mask = 1.0, 0.0, 0, []
    for step, ratio in enumerate(resampled(plan.ratios, plan.steps)):
        computes = step < kept
        if not computes:
            rho, skipped = rho * ratio, skipped + 1
            error += abs(1 - rho)
            computes = error > plan.threshold or skipped > plan.skips
            if computes:
                rho, error, skipped = 1.0, 0.0, 0
        mask.append(computes)
    return tuple(mask)


def resampled(ratios: tuple[float, ...], steps: int) -> tuple[float, ...]:
    """Ratios for another number of steps, each taken from the nearest place."""
    if steps == 1:
        return ratios[-1:]
    places = np.arange(steps, dtype=np.float32) * ((len(ratios) - 1) / (steps - 1))
    return tuple(ratios[int(place)] for place in np.round(places))


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """How far measured ratios may lead.

    Attributes:
        threshold: summed error up to which calls are skipped.
        skips: calls that are skipped in a row, at most.
        retention: share of the calls at the start that all compute.
    """

    threshold: Annotated[float, Range(0)] = 0.06
    skips: Natural = 3
    retention: Share = 0.2


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> MagCachePlan:
    """Measure the ratios on a trajectory of the uncached model."""
    calls = data.sampler.calls
    caching = even_steps.transform(even_steps.EvenStepsPlan(steps=calls, every=1))
    ratios, before = [1.0], None
    for norms in watch(caching, _norms, forward, params, data):
        if before is not None:
            ratios.append(float(jnp.mean(norms / jnp.maximum(before, 1e-12))))
        before = norms
    chosen = dataclasses.asdict(goals)
    return MagCachePlan(ratios=tuple(ratios), steps=calls, **chosen)


def _norms(state: StateDict, added: Added) -> Float[Array, "B S"]:
    return jnp.linalg.norm(added, axis=-1)


def transform(plan: MagCachePlan) -> Transform:
    """Compute the blocks in the calls that the ratios leave."""
    return step_cache(NAME, plan, CachedStack)


def _plan(subject: testing.Subject, threshold: float) -> MagCachePlan:
    calls = subject.sampler.calls
    return MagCachePlan(steps=calls, threshold=threshold, retention=0.0, skips=calls)


METHOD = Method(
    name=NAME,
    paper="MagCache: Fast Video Generation with Magnitude-Aware Cache, arXiv 2506.09045",
    seams=("patches",),
    domain="images",
    plan=MagCachePlan,
    transform=transform,
    identity=lambda subject: MagCachePlan(steps=subject.sampler.calls, skips=0),
    ladder=lambda subject: tuple(_plan(subject, each) for each in (0.03, 0.08, 1.0)),
    tiny=testing.tiny_dit,
    systems=("MagCache",),
    data=Trajectory,
    goals=Goals,
    search=search,
)
