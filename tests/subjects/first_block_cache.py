"""A first-block cache: the first block always runs, and its change decides about all others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax import testing
from effjax.context import Context, PyTree, StateTree, Step, when
from effjax.fields import NotNegative
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.targets import Wrapper, target_modules, wrap
from effjax.transform import Method, Pair, Plan, Transform
from tests.subjects.step_cache import relative


@dataclasses.dataclass(frozen=True)
class FirstBlockCachePlan(Plan):
    """When the other blocks are run.

    Attributes:
        threshold: relative change of what the first block adds, since the last call that ran them.
    """

    threshold: NotNegative


def transform(plan: FirstBlockCachePlan) -> Transform:
    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(FirstBlockCaching(plan)), params

    return Transform(METHOD.name, plan, apply)


@dataclasses.dataclass(frozen=True)
class FirstBlockCaching:
    plan: FirstBlockCachePlan

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for target in target_modules(module, Stack):
            wrap(module, target.path, FirstBlockCache, self.plan.threshold, context.step)


class FirstBlockCache(Wrapper):
    replaces_internals = True
    inner: Stack

    def __init__(self, inner: nnx.Module, threshold: float, step: Step):
        super().__init__(inner)
        self.threshold = threshold
        self.step = step if isinstance(step, int) else nnx.data(step)
        self.added, self.rest = StateTree.of(inner), StateTree.of(inner)

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        out = self.inner[0](x, *conditioning)
        added = jax.tree.map(jnp.subtract, out, x)
        before = self.added.read(added)
        image, last = (a["image"] if isinstance(a, Mapping) else a for a in (added, before))
        run = (self.step == 0) | (relative(image, last) > self.threshold)
        return when(jnp.asarray(run), _run, _skip, self, out, added, *conditioning)


def _run(cache: FirstBlockCache, x: PyTree, added: PyTree, *conditioning: PyTree) -> PyTree:
    out = cache.inner.between(1, len(cache.inner), x, *conditioning)
    cache.added.write(added)
    cache.rest.write(jax.tree.map(jnp.subtract, out, x))
    return out


def _skip(cache: FirstBlockCache, x: PyTree, added: PyTree, *conditioning: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, x, cache.rest.read(x))


def _ladder(subject: testing.Subject) -> tuple[FirstBlockCachePlan, ...]:
    return tuple(map(FirstBlockCachePlan, (0.02, 0.2, 100.0)))


def declaration(tiny: Any) -> Method:
    return Method(
        name="first_block_cache",
        paper="in the manner of diffusers' first-block cache; see TeaCache, arXiv 2411.19108",
        seams=("patches",),
        plan=FirstBlockCachePlan,
        transform=transform,
        domain="images",
        identity=lambda subject: FirstBlockCachePlan(0.0),
        ladder=_ladder,
        tiny=tiny,
        decides="batch",
    )


METHOD = declaration(testing.tiny_dit)
