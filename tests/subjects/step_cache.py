"""A step cache: all blocks are skipped while the tokens that enter them hardly change.

The changes of what enters the first block, relative to the call before, are summed since the last
call that ran the blocks. Below a threshold the blocks are skipped: what left them last is added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax import testing
from effjax.context import Context, PyTree, State, StateTree, Step, when
from effjax.fields import Count, NotNegative
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.targets import Wrapper, target_modules, wrap
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class StepCachePlan(Plan):
    """When blocks are run.

    Attributes:
        threshold: summed relative change at which they are; 0 always.
        calls: of the sampler; the first and the last one always run.
    """

    threshold: NotNegative
    calls: Count


def transform(plan: StepCachePlan) -> Transform:
    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(StepCaching(plan)), params

    return Transform(METHOD.name, plan, apply)


@dataclasses.dataclass(frozen=True)
class StepCaching:
    plan: StepCachePlan

    @property
    def calls(self) -> int:
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in target_modules(module, Stack):
            wrap(module, target.path, StepCache, self.plan, context.step)


class StepCache(Wrapper):
    def __init__(self, inner: nnx.Module, plan: StepCachePlan, step: Step):
        super().__init__(inner)
        self.plan = plan
        self.step = step if isinstance(step, int) else nnx.data(step)
        self.change, self.before = StateTree.of(inner), StateTree.of(inner)
        self.summed = State()

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        image = x["image"] if isinstance(x, Mapping) else x
        before = self.before.read(x)
        before = before["image"] if isinstance(x, Mapping) else before
        summed = self.summed.read((), jnp.float32) + relative(image, before)
        ends = (self.step == 0) | (self.step == self.plan.calls - 1)
        run = ends | (summed >= self.plan.threshold)
        self.before.write(x)
        self.summed.write(jnp.where(run, 0.0, summed))
        return when(jnp.asarray(run), _run, _skip, self, x, *conditioning)


def relative(x: jax.Array, before: jax.Array) -> jax.Array:
    """mean|x - before| / mean|before|, float32."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    least = jnp.finfo(jnp.float32).tiny
    return jnp.mean(jnp.abs(x - before)) / jnp.maximum(jnp.mean(jnp.abs(before)), least)


def _run(cache: StepCache, x: PyTree, *conditioning: PyTree) -> PyTree:
    out = cache.inner(x, *conditioning)
    cache.change.write(jax.tree.map(jnp.subtract, out, x))
    return out


def _skip(cache: StepCache, x: PyTree, *conditioning: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, cache.change.read(x))


def _ladder(subject: testing.Subject) -> tuple[StepCachePlan, ...]:
    return tuple(StepCachePlan(each, subject.sampler.calls) for each in (0.05, 0.4, 100.0))


def declaration(tiny: Any) -> Method:
    return Method(
        name="step_cache",
        paper="in the manner of TeaCache, arXiv 2411.19108",
        seams=("patches",),
        plan=StepCachePlan,
        transform=transform,
        domain="images",
        identity=lambda subject: StepCachePlan(0.0, subject.sampler.calls),
        ladder=_ladder,
        tiny=tiny,
        decides="batch",
    )


METHOD = declaration(testing.tiny_dit)
