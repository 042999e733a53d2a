"""TeaCache: blocks run when what enters the first one has changed enough (arXiv 2411.19108).

    s: input of the first block after norm and modulation
    sum += poly(rel(s, s of the call before));   compute if sum >= threshold, then sum = 0

The first and the last call compute. The polynomial turns a change of inputs into one of outputs and
belongs to a model: `RELEASED` holds those of the authors, and `search` fits one to the trajectory
of any model.

Static: nothing. Dynamic: which calls compute. Cost: (computed share) x dense + the modulation of
one block; state: s, and what the blocks add.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import PyTree, State, Step
from effjax.fields import Checked, Count, Natural, NotNegative
from effjax.forward import Forward, Params, StateDict
from effjax.layers.stack import Stack
from effjax.methods.steps.cached import (
    CachedStack,
    Decision,
    Runs,
    StepCachePlan,
    relative,
    step_cache,
)
from effjax.methods.steps.watching import Added, sampler_of, watch
from effjax.targets import original
from effjax.transform import Method, Transform

NAME = "tea_cache"

# Highest power first.
RELEASED = {
    "FLUX.1": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
}
_LEAST = 1e-12


@dataclasses.dataclass(frozen=True)
class TeaCachePlan(StepCachePlan):
    """How much inputs may change.

    Attributes:
        threshold: summed change at which the blocks run.
        steps: network calls of the sampler, of which the last computes; 0 for any number.
        coefficients: of the polynomial, highest power first; (1, 0) takes changes as they are.
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    threshold: NotNegative = 0.1
    steps: Natural = 0
    coefficients: tuple[float, ...] = (1.0, 0.0)

    @property
    def calls(self) -> int | None:
        return self.steps or None


class TeaCached(CachedStack):
    """A stack whose modulated input decides."""

    def __init__(self, inner: nnx.Module, plan: Any, step: Step, lead: State | None, runs: Runs):
        super().__init__(inner, plan, step, lead, runs)
        if lead is None:
            self.before, self.summed = State(), State()

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        block: Any = original(self.inner[0])
        if not hasattr(block, "signal"):
            raise ValueError(
                f"TeaCache looks at what {type(block).__name__} makes of its input by norm and "
                f"modulation, which the block must say as `signal(x, *conditioning)`"
            )
        signal = block.signal(x, *conditioning)
        change = relative(signal, self.before.read(signal.shape, signal.dtype))
        change = jnp.polyval(jnp.asarray(self.plan.coefficients, jnp.float32), change)
        summed = self.summed.read((), jnp.float32) + change
        ends = (self.step == 0) | (self.step == self.plan.steps - 1)  # none is -1
        computes = jnp.asarray(ends) | (summed >= self.plan.threshold)
        self.before.write(signal)
        self.summed.write(jnp.where(computes, 0.0, summed))
        return computes


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What the polynomial is fitted with, and the plan that it goes into.

    Attributes:
        threshold: summed change at which the blocks run.
        degree: of the polynomial.
    """

    threshold: NotNegative = 0.1
    degree: Count = 4


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> TeaCachePlan:
    """Fit the polynomial: changes of what the blocks add, by changes of what enters the first one.

    Both are relative to the call before, over the whole batch; seventy prompts are usual.

    Raises:
        ValueError: for fewer changes along the trajectory than the polynomial has coefficients.
    """
    calls = sampler_of(data).calls
    if calls - 1 <= goals.degree:
        raise ValueError(
            f"a polynomial of degree {goals.degree} needs {goals.degree + 2} or more steps, got "
            f"{calls}"
        )
    caching = transform(TeaCachePlan(threshold=0.0, steps=calls))
    lead = forward.target_modules(params, Stack)[0].path

    def look(state: StateDict, added: Added) -> tuple[Array, Array]:
        return state[f"{lead}.before"].astype(jnp.float32), added

    changes, before = [], None
    for seen in watch(caching, look, forward, params, data):
        if before is not None:
            changes.append([float(relative(*pair)) for pair in zip(seen, before, strict=True)])
        before = seen
    signal, added = np.array(changes).T
    scale = max(float(signal.max()), _LEAST)  # of a fit that is well conditioned
    fitted = np.polyfit(signal / scale, added, goals.degree)
    powers = np.arange(goals.degree, -1, -1)
    coefficients = tuple(float(each) for each in fitted / scale**powers)
    return TeaCachePlan(threshold=goals.threshold, steps=calls, coefficients=coefficients)


def transform(plan: TeaCachePlan) -> Transform:
    """Run the blocks when their modulated input has changed enough."""
    return step_cache(NAME, plan, TeaCached)


METHOD = Method(
    name=NAME,
    paper="TeaCache: Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model, arXiv "
    "2411.19108",
    seams=("patches",),
    domain="images",
    plan=TeaCachePlan,
    transform=transform,
    identity=lambda subject: TeaCachePlan(threshold=0.0, steps=subject.sampler.calls),
    ladder=lambda subject: tuple(
        TeaCachePlan(threshold=each, steps=subject.sampler.calls) for each in (0.05, 0.4, 100.0)
    ),
    tiny=testing.tiny_dit,
    systems=("TeaCache",),
    decides="batch",
    data=Trajectory,
    goals=Goals,
    search=search,
)
