"""Step Rehash: all but the last blocks are skipped where features of a step are as those before.

    skip call i if   cos(f_i, f_j) >= threshold,   f: input of the last blocks,   j: computed last

A skipped call runs its last blocks on the features of the last computed one, in place of its own;
other step caches add what blocks added. Which calls these are is searched on one trajectory of the
uncached model, and is the same for all samples.

Use it as part of Streamlined Inference (NeurIPS 2024), beside `streamlined`. The authors' code does
not have it: this is made after the paper's description, for a list of blocks in the place of a UNet
without its last part. `even_steps` and `mag_cache` follow the input and are nearer to the model.

Static: which calls compute. Dynamic: nothing. Cost: (share of computed calls) x dense + the last
blocks of the others; state: one array like the tokens of each stack.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import PyTree
from effjax.fields import Checked, Count, Share
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.methods.steps.cached import CachedStack, StepCachePlan, step_cache
from effjax.methods.steps.watching import sampled
from effjax.transform import Method, Transform

NAME = "step_rehash"


@dataclasses.dataclass(frozen=True)
class StepRehashPlan(StepCachePlan):
    """Which calls compute.

    Attributes:
        compute: whether each call computes, as 1 and 0; the first is 1.
        last_blocks: blocks that always run.
        order: of the Taylor series in steps that predicts features; 0 holds the last ones.
    """

    compute: tuple[Literal[0, 1], ...] = dataclasses.field(kw_only=True)
    last_blocks: Count = 1  # pyright: ignore[reportIncompatibleVariableOverride]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.compute or not self.compute[0]:
            raise ValueError(
                f"compute must be 1 or 0 for each call, and begin with 1, got {self.compute}. "
                f"Search it."
            )

    @property
    def mask(self) -> tuple[bool, ...]:
        return tuple(map(bool, self.compute))


class ReplacedStack(CachedStack):
    """A stack whose skipped blocks give the features of the last computed call."""

    def kept(self, out: PyTree, head: PyTree) -> PyTree:
        return out

    def given(self, predicted: PyTree, head: PyTree) -> PyTree:
        return predicted


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """How alike features must be.

    Attributes:
        threshold: cosine of the features of two calls from which on the second is skipped.
        last_blocks: blocks that always run.
    """

    threshold: Share = 0.95
    last_blocks: Count = 1


def search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> StepRehashPlan:
    """Compare the features along a trajectory of the uncached model, over the whole batch."""
    calls = data.sampler.calls
    plan = StepRehashPlan(compute=(1,) * calls, last_blocks=goals.last_blocks)
    watched, params = transform(plan)(forward, params)
    (*_, last) = (
        target.path
        for target, runs in zip(
            forward.target_modules(params, Stack), watched.patches[-1].runs, strict=True
        )
        if runs
    )

    def look(carry: Any) -> Array:
        stem = f"{last}.series.0.terms.0"
        found = [carry.state.get(f"{stem}.{name}") for name in ("image", "tokens")]
        (features,) = (each for each in found if each is not None)
        return features.astype(jnp.float32)

    compute, before = [], None
    for features in sampled(watched, params, data, look):
        skips = before is not None and _cosine(features, before) >= goals.threshold
        compute.append(0 if skips else 1)
        before = before if skips else features
    return dataclasses.replace(plan, compute=tuple(compute))


@jax.jit
def _cosine(a: Array, b: Array) -> Array:
    norms = jnp.linalg.norm(a.reshape(-1)) * jnp.linalg.norm(b.reshape(-1))
    return jnp.sum(a * b) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)


def transform(plan: StepRehashPlan) -> Transform:
    """Run the last blocks alone in the calls that the plan skips."""
    return step_cache(NAME, plan, ReplacedStack)


def _plan(subject: testing.Subject, *computed: int) -> StepRehashPlan:
    calls = range(subject.sampler.calls)
    return StepRehashPlan(compute=tuple(1 if call in computed else 0 for call in calls))


METHOD = Method(
    name=NAME,
    paper="Step Rehash of Streamlined Inference, NeurIPS 2024 (Fast and Memory-Efficient Video "
    "Diffusion Using Streamlined Inference, arXiv 2411.01171)",
    seams=("patches",),
    domain="images",
    plan=StepRehashPlan,
    transform=transform,
    identity=lambda subject: _plan(subject, *range(subject.sampler.calls)),
    ladder=lambda subject: (
        _plan(subject, 0, 1, 3),
        _plan(subject, 0, 2),
        _plan(subject, 0),
    ),
    tiny=testing.tiny_dit,
    data=Trajectory,
    goals=Goals,
    search=search,
)
