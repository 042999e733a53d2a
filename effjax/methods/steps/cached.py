"""What step caches share: a stack of blocks is computed, or what it adds is predicted.

A plan says when to compute (`StepCachePlan.mask`, or a wrapper's `decide`), and which blocks may be
skipped (`StepCachePlan.runs`): all but some at both ends, or a choice. A run of consecutive blocks
that is skipped adds what it added when it was computed last, or a Taylor series of that. Models
with several stacks (FLUX: dual blocks, then single ones) are one list: the first stack decides for
all.

State: for each run `order + 1` arrays like its tokens, in their dtype. One decision holds for the
whole batch, all branches of guidance included; each branch has its own rows of the state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.context import Context, PyTree, State, Step, is_static, when
from effjax.fields import Natural
from effjax.forward import Forward, Params
from effjax.layers.stack import Stack
from effjax.methods.steps.by_module import check_step
from effjax.methods.steps.series import Series
from effjax.targets import TargetModule, Wrapper, target_modules, wrap
from effjax.transform import Pair, Plan, Transform

Decision = bool | Bool[Array, ""]
Runs = tuple[tuple[int, int], ...]  # blocks start ... stop - 1 of a stack, for each run


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

    def computed(self, calls: int) -> Mapping[str, Sequence[bool]]:
        said = [self.computes(step) for step in range(calls)]
        return {} if None in said else {"blocks": [bool(each) for each in said]}

    def computes(self, step: Step) -> Decision | None:
        """Whether a call computes, for a static or a traced step; None if that depends on data."""
        mask = self.mask
        if mask is None:
            return None
        return mask[int(step)] if is_static(step) else jnp.asarray(mask)[step]

    def runs(self, name: str, sizes: Sequence[int]) -> list[Runs]:
        """Which blocks of each stack may be skipped.

        Args:
            name: of the method, for messages.
            sizes: how many blocks each stack has.

        Raises:
            ValueError: if no block may be, or a model has not the blocks that the plan names.
        """
        kept = self.first_blocks + self.last_blocks
        if kept >= sum(sizes) or self.first_blocks > sizes[0]:
            raise ValueError(
                f"{name} always computes the first {self.first_blocks} and the last "
                f"{self.last_blocks} blocks; that must leave some of {sum(sizes)}, and the "
                f"first ones must be of the first stack, which decides and has {sizes[0]}"
            )
        found: list[Runs] = []
        first, left = self.first_blocks, sum(sizes)
        for size in sizes:
            left -= size
            stop = size - min(max(self.last_blocks - left, 0), size)
            found.append(((first, stop),) if first < stop else ())
            first = 0
        return found


def step_cache(name: str, plan: StepCachePlan, wrapper: type[CachedStack]) -> Transform:
    """The transform that caches the stacks of a model."""

    def apply(forward: Forward, params: Params) -> Pair:
        stacks = forward.target_modules(params, Stack)
        if not stacks:
            raise ValueError(f"{forward.model.__name__} has no stack of blocks to cache")
        runs = plan.runs(name, sizes_of(stacks))
        return forward.patch(StepCaching(plan, wrapper, tuple(runs))), params

    return Transform(name, plan, apply)


def sizes_of(stacks: Sequence[TargetModule]) -> list[int]:
    """How many blocks each stack has."""
    return [len(target.module) for target in stacks]  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class StepCaching:
    """The patch: runs of blocks are computed or predicted.

    Attributes:
        plan, wrapper: of the method.
        runs: of each stack.
    """

    plan: StepCachePlan
    wrapper: type[CachedStack]
    runs: tuple[Runs, ...]

    @property
    def calls(self) -> int:
        """Network calls the plan is made for; missing if it is for any number."""
        if self.plan.calls is None:
            raise AttributeError("calls")
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> None:
        if self.plan.calls is not None:
            check_step(context.step, self.plan.calls)
        lead: State | None = None
        for target, runs in zip(target_modules(module, Stack), self.runs, strict=True):
            if lead is not None and not runs:
                continue  # the first stack decides, though all of it may always be computed
            wrap(module, target.path, self.wrapper, self.plan, context.step, lead, runs)
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
        runs: the blocks that may be skipped, in order; the others always run.
    """

    replaces_internals = True
    inner: Stack

    def __init__(
        self,
        inner: nnx.Module,
        plan: Any,
        step: Step,
        lead: State | None,
        runs: Runs,
    ):
        super().__init__(inner)
        self.plan = plan
        self.step = step if is_static(step) else nnx.data(step)
        self.leads = lead is None
        self.computes = State() if lead is None else lead
        self.runs = runs
        self.series = nnx.List([Series(inner, plan.order) for _ in runs])

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        """Whether this call computes the stack, for plans that cannot say it before.

        Args:
            x: tokens before the stack.
            head: tokens after the blocks before the first run.
            conditioning: what blocks are called with beside tokens.
        """
        raise NotImplementedError

    def __call__(self, x: PyTree, *conditioning: PyTree) -> PyTree:
        size = len(self.inner)
        done = self.runs[0][0] if self.runs else size
        head = self._between(0, done, x, *conditioning)
        computes = self.plan.computes(self.step)
        if computes is None and self.leads:
            computes = jnp.asarray(self.decide(x, head, conditioning))
            self.computes.read((), bool)
            self.computes.write(computes)
        elif computes is None:
            computes = self.computes.read((), bool)
        for run, (start, stop) in enumerate(self.runs):
            head = self._between(done, start, head, *conditioning)
            yes, no = partial(_compute, run=run), partial(_predict, run=run)
            head, done = when(computes, yes, no, self, head, *conditioning), stop
        return self._between(done, size, head, *conditioning)

    def kept(self, out: PyTree, head: PyTree) -> PyTree:
        """What to remember of a run of blocks, from what enters and what leaves it."""
        return jax.tree.map(jnp.subtract, out, head)

    def given(self, predicted: PyTree, head: PyTree) -> PyTree:
        """What leaves a skipped run, from what enters it and what is predicted."""
        return jax.tree.map(jnp.add, head, predicted)

    def _between(self, start: int, stop: int, x: PyTree, *conditioning: PyTree) -> PyTree:
        return self.inner.between(start, stop, x, *conditioning) if start < stop else x


def _compute(cache: CachedStack, head: PyTree, *conditioning: PyTree, run: int) -> PyTree:
    """Compute a run of blocks, and renew what is remembered of it."""
    out = cache.inner.between(*cache.runs[run], head, *conditioning)
    cache.series[run].renew(cache.kept(out, head), cache.step)
    return out


def _predict(cache: CachedStack, head: PyTree, *conditioning: PyTree, run: int) -> PyTree:
    return cache.given(cache.series[run].predict(head, cache.step), head)


def image_of(tokens: PyTree) -> Float[Array, "B S C"]:
    """The image's tokens, or all of them in one sequence."""
    return tokens["image"] if isinstance(tokens, Mapping) else tokens


def relative(x: Float[Array, "..."], before: Float[Array, "..."]) -> Float[Array, ""]:
    """mean|x - before| / mean|before| in float32, over the whole batch."""
    x, before = x.astype(jnp.float32), before.astype(jnp.float32)
    least = jnp.finfo(jnp.float32).tiny
    return jnp.mean(jnp.abs(x - before)) / jnp.maximum(jnp.mean(jnp.abs(before)), least)
