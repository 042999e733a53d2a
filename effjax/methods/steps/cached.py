"""What step caches share: a stack of blocks is computed, or what it adds is predicted.

A plan says when to compute (`StepCachePlan.mask`, or a wrapper's `decide`). A skipped stack adds
what it added when it was computed last, or a Taylor series of that. Models with several stacks
(FLUX: dual blocks, then single ones) are one list: the first stack decides for all.

State: for each stack `order + 1` arrays like its tokens, in their dtype. One decision holds for the
whole batch, all branches of guidance included; each branch has its own rows of the state.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.context import Context, PyTree, State, StateTree, Step, is_static, when
from effjax.fields import Natural
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.targets import Wrapper, target_modules, wrap
from effjax.transform import Pair, Plan, Transform

Decision = bool | Bool[Array, ""]


@dataclasses.dataclass(frozen=True)
class StepCachePlan(Plan):
    """When blocks are computed, and how they are predicted otherwise.

    Attributes:
        order: of the Taylor series in steps that predicts; 0 holds what was computed last.
    """

    order: Natural = 0

    # Blocks at the start that are always computed, and look at by `decide`.
    first: ClassVar[int] = 0

    @property
    def mask(self) -> tuple[bool, ...] | None:
        """Whether each call computes; None if that depends on what is computed."""
        return None

    @property
    def calls(self) -> int | None:
        """Network calls that the plan is made for; None for any number."""
        return None if self.mask is None else len(self.mask)


def step_cache(name: str, plan: StepCachePlan, wrapper: type[CachedStack]) -> Transform:
    """The transform that caches the stacks of a model."""

    def apply(forward: Forward, params: Params) -> Pair:
        stacks = forward.target_modules(params, Stack)
        if not stacks:
            raise ValueError(f"{forward.model.__name__} has no stack of blocks to cache")
        blocks = sum(len(target.module) for target in stacks)  # pyright: ignore
        if plan.first >= blocks:
            raise ValueError(f"{name} keeps {plan.first} blocks and needs more, there are {blocks}")
        return forward.patch(StepCaching(plan, wrapper)), params

    return Transform(name, plan, apply)


@dataclasses.dataclass(frozen=True)
class StepCaching:
    """The patch: every stack is computed or predicted."""

    plan: StepCachePlan
    wrapper: type[CachedStack]

    @property
    def calls(self) -> int:
        """Network calls the plan is made for; missing if it is for any number."""
        if self.plan.calls is None:
            raise AttributeError("calls")
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> None:
        calls = self.plan.calls
        if calls is not None and is_static(context.step) and not 0 <= context.step < calls:
            raise ValueError(
                f"step {context.step} lies outside the plan, which is for {calls} network calls"
            )
        lead: State | None = None
        for target in target_modules(module, Stack):
            wrap(module, target.path, self.wrapper, self.plan, context.step, lead)
            if lead is None:
                (own,) = (each for each in _wrappers(module) if isinstance(each, self.wrapper))
                lead = own.computes


def _wrappers(module: nnx.Module) -> list[Wrapper]:
    return [node for _, node in nnx.iter_graph(module) if isinstance(node, Wrapper)]


class CachedStack(Wrapper):
    """A stack that is computed in some calls and predicted in others.

    Args:
        plan: what it goes by.
        step: index of the network call.
        lead: the decision of the model's first stack; None for that stack itself.
    """

    replaces_internals = True
    inner: Stack

    def __init__(self, inner: nnx.Module, plan: Any, step: Step, lead: State | None):
        super().__init__(inner)
        self.plan = plan
        self.step = step if is_static(step) else nnx.data(step)
        self.leads = lead is None
        self.computes = State() if lead is None else lead
        self.series = nnx.List([StateTree.of(inner) for _ in range(plan.order + 1)])
        self.last, self.count = State(), State()

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        """Whether this call computes the stack.

        Args:
            x: tokens before the stack.
            head: tokens after the plan's first blocks.
            conditioning: what blocks are called with beside tokens.
        """
        mask = self.plan.mask
        assert mask is not None
        return mask[int(self.step)] if is_static(self.step) else jnp.asarray(mask)[self.step]

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        first = min(self.plan.first, len(self.inner)) if self.leads else 0
        head = self.inner.between(0, first, x, *conditioning) if first else x
        if self.plan.mask is not None:
            computes = self.decide(x, head, conditioning)
        elif self.leads:
            computes = jnp.asarray(self.decide(x, head, conditioning))
            self.computes.read((), bool)
            self.computes.write(computes)
        else:
            computes = self.computes.read((), bool)
        return when(computes, _compute, _predict, self, head, *conditioning)


def _compute(cache: CachedStack, head: PyTree, *conditioning: PyTree) -> PyTree:
    """Run the blocks and renew the series: F_0 is what they add, F_(j+1) its change in a step."""
    start = len(cache.inner) - _rest(cache)
    out = cache.inner.between(start, len(cache.inner), head, *conditioning)
    added = jax.tree.map(jnp.subtract, out, head)
    if cache.plan.order:
        count = cache.count.read((), jnp.int32)
        apart = jnp.maximum(cache.step - cache.last.read((), jnp.int32), 1).astype(jnp.float32)
        new = added
        for order, series in enumerate(cache.series):
            before = series.read(added)
            series.write(new)
            known = count > order  # so many were computed before
            new = jax.tree.map(
                lambda n, b, known=known: jnp.where(known, _over(n - b, apart), 0).astype(n.dtype),
                new,
                before,
            )
        cache.count.write(count + 1)
        cache.last.write(jnp.asarray(cache.step, jnp.int32))
    else:
        cache.series[0].read(added)
        cache.series[0].write(added)
    return out


def _over(x: Float[Array, "..."], apart: Float[Array, ""]) -> Float[Array, "..."]:
    return x.astype(jnp.float32) / apart


def _predict(cache: CachedStack, head: PyTree, *conditioning: PyTree) -> PyTree:
    """Add sum_j F_j t^j / j!, t steps after the last computed call."""
    if not cache.plan.order:
        return jax.tree.map(jnp.add, head, cache.series[0].read(head))
    t = (cache.step - cache.last.read((), jnp.int32)).astype(jnp.float32)
    factors = [t**order / math.factorial(order) for order in range(cache.plan.order + 1)]
    held = [series.read(head) for series in cache.series]

    def one(x: Array, *terms: Array) -> Array:
        wide = sum(f * term.astype(jnp.float32) for f, term in zip(factors, terms, strict=True))
        return x + jnp.asarray(wide).astype(x.dtype)

    return jax.tree.map(one, head, *held)


def _rest(cache: CachedStack) -> int:
    return len(cache.inner) - (min(cache.plan.first, len(cache.inner)) if cache.leads else 0)


def image_of(tokens: PyTree) -> Float[Array, "B S C"]:
    """The image's tokens, or all of them in one sequence."""
    return tokens["image"] if isinstance(tokens, Mapping) else tokens


def relative(x: Float[Array, "..."], before: Float[Array, "..."]) -> Float[Array, ""]:
    """mean|x - before| / mean|before| in float32, over the whole batch."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    least = jnp.finfo(jnp.float32).tiny
    return jnp.mean(jnp.abs(x - before)) / jnp.maximum(jnp.mean(jnp.abs(before)), least)
