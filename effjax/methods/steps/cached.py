"""What step caches share: a stack of blocks is computed, or what it adds is predicted.

A plan says when to compute (`StepCachePlan.mask`, or a wrapper's `decide`), and how many blocks at
both ends always are. The others, when they are skipped, add what they added when they were computed
last, or a Taylor series of that. Models with several stacks (FLUX: dual blocks, then single ones)
are one list: the first stack decides for all.

State: for each stack `order + 1` arrays like its tokens, in their dtype. One decision holds for the
whole batch, all branches of guidance included; each branch has its own rows of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.context import Context, PyTree, State, Step, is_static, when
from effjax.fields import Natural
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.methods.steps.series import Series
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

    # Blocks at the start that are always computed, which `decide` looks at, and at the end.
    first_blocks: ClassVar[int] = 0
    last_blocks: ClassVar[int] = 0

    @property
    def mask(self) -> tuple[bool, ...] | None:
        """Whether each call computes; None if that depends on what is computed."""
        return None

    @property
    def calls(self) -> int | None:
        """Network calls that the plan is made for; None for any number."""
        return None if self.mask is None else len(self.mask)

    def masks(self, calls: int) -> Mapping[str, Sequence[bool]]:
        said = [self.computes(step) for step in range(calls)]
        return {} if None in said else {"blocks": [bool(each) for each in said]}

    def computes(self, step: Step) -> Decision | None:
        """Whether a call computes, for a static or a traced step; None if that depends on data."""
        mask = self.mask
        if mask is None:
            return None
        return mask[int(step)] if is_static(step) else jnp.asarray(mask)[step]


def step_cache(name: str, plan: StepCachePlan, wrapper: type[CachedStack]) -> Transform:
    """The transform that caches the stacks of a model."""

    def apply(forward: Forward, params: Params) -> Pair:
        stacks = forward.target_modules(params, Stack)
        if not stacks:
            raise ValueError(f"{forward.model.__name__} has no stack of blocks to cache")
        sizes: list[int] = [len(target.module) for target in stacks]  # pyright: ignore
        kept = plan.first_blocks + plan.last_blocks
        if kept >= sum(sizes) or plan.first_blocks > sizes[0]:
            raise ValueError(
                f"{name} always computes the first {plan.first_blocks} and the last "
                f"{plan.last_blocks} blocks; that must leave some of {sum(sizes)}, and the "
                f"first ones must be of the first stack, which decides and has {sizes[0]}"
            )
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
        stacks = target_modules(module, Stack)
        left = sum(len(target.module) for target in stacks)  # pyright: ignore
        for target in stacks:
            size: int = len(target.module)  # pyright: ignore
            left -= size
            first = self.plan.first_blocks if lead is None else 0
            last = min(max(self.plan.last_blocks - left, 0), size)
            middle = (first, max(first, size - last))
            if lead is not None and middle[0] == middle[1]:
                continue  # the first stack decides, though all of it may always be computed
            wrap(module, target.path, self.wrapper, self.plan, context.step, lead, middle)
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
        middle: the blocks start ... stop - 1 that may be skipped; the others always run.
    """

    replaces_internals = True
    inner: Stack

    def __init__(
        self,
        inner: nnx.Module,
        plan: Any,
        step: Step,
        lead: State | None,
        middle: tuple[int, int],
    ):
        super().__init__(inner)
        self.plan = plan
        self.step = step if is_static(step) else nnx.data(step)
        self.leads = lead is None
        self.computes = State() if lead is None else lead
        self.middle = middle
        self.series = Series(inner, plan.order)

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        """Whether this call computes the stack, for plans that cannot say it before.

        Args:
            x: tokens before the stack.
            head: tokens after the plan's first blocks.
            conditioning: what blocks are called with beside tokens.
        """
        raise NotImplementedError

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        start, stop = self.middle
        head = self.inner.between(0, start, x, *conditioning) if start else x
        computes = self.plan.computes(self.step)
        if computes is None and self.leads:
            computes = jnp.asarray(self.decide(x, head, conditioning))
            self.computes.read((), bool)
            self.computes.write(computes)
        elif computes is None:
            computes = self.computes.read((), bool)
        out = when(computes, _compute, _predict, self, head, *conditioning)
        size = len(self.inner)
        return self.inner.between(stop, size, out, *conditioning) if stop < size else out


def _compute(cache: CachedStack, head: PyTree, *conditioning: PyTree) -> PyTree:
    """Run the blocks, and renew what they add."""
    out = cache.inner.between(*cache.middle, head, *conditioning)
    cache.series.renew(jax.tree.map(jnp.subtract, out, head), cache.step)
    return out


def _predict(cache: CachedStack, head: PyTree, *conditioning: PyTree) -> PyTree:
    return jax.tree.map(jnp.add, head, cache.series.predict(head, cache.step))


def image_of(tokens: PyTree) -> Float[Array, "B S C"]:
    """The image's tokens, or all of them in one sequence."""
    return tokens["image"] if isinstance(tokens, Mapping) else tokens


def relative(x: Float[Array, "..."], before: Float[Array, "..."]) -> Float[Array, ""]:
    """mean|x - before| / mean|before| in float32, over the whole batch."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    least = jnp.finfo(jnp.float32).tiny
    return jnp.mean(jnp.abs(x - before)) / jnp.maximum(jnp.mean(jnp.abs(before)), least)
