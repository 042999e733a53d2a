"""DBCache: the first and the last blocks always run, and the change of the first ones decides.

    r: what the first blocks add;   d = rel(r, r of the last computed call)
    compute in the warm-up, where the mask says so, after so many skips in all or in a row, when all
    d so far add up to more than a cap, or if d >= threshold

with rel(a, b) = mean|a - b| / mean|b| over the image's tokens of the whole batch, as in cache-dit
1.5. With `policy="static"` the mask alone decides, and nothing is measured. `MASKS` are cache-dit's
for 28 steps: other numbers of steps cut them at the end.

Use it where quality counts more than with First-Block-Cache: more blocks look at every step. Static
masks save most on a TPU, as they leave no branch in a program of single steps.

Static: masks. Dynamic: which calls compute. Cost: (computed share) x dense + the first and last
blocks of the others; state: r, and what the middle blocks add.

A series (`order=1`) has its first difference from the second computed call on; in cache-dit's
calibrator the difference between the first two calls is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx

from effjax import testing
from effjax.context import PyTree, State, Step
from effjax.fields import Count, Natural, NotNegative
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

NAME = "db_cache"

# Which of 28 steps compute.
MASKS = {
    "slow": "1111111101110011100110010001",
    "medium": "1111110110001100011000110001",
    "fast": "1111110100010000100000100001",
    "ultra": "1111001000001000000100000001",
}


@dataclasses.dataclass(frozen=True)
class DBCachePlan(StepCachePlan):
    """When blocks are computed.

    Attributes:
        steps: network calls of the sampler.
        threshold: relative change, since the last computed call, from which on all blocks run; 1
            or more: no change makes them run.
        first_blocks, last_blocks: blocks that always run.
        warmup: calls at the start that all compute, at most as many as the mask begins with ones.
        warmup_interval: of these, one in so many.
        compute: whether each call computes, as 1 and 0; () for no such mask. Calls behind its end
            are as 0.
        policy: what a 0 of the mask means: "dynamic" lets the change decide, "static" skips.
        max_cached: calls that are skipped at most; -1 for any number.
        max_continuous: calls that are skipped in a row at most; -1 for any number.
        max_accumulated: sum of all measured changes from which on all calls compute; 0 for none.
    """

    steps: Count = 28
    threshold: NotNegative = 0.08
    first_blocks: Count = 8  # pyright: ignore[reportIncompatibleVariableOverride]
    last_blocks: Natural = 0  # pyright: ignore[reportIncompatibleVariableOverride]
    warmup: Natural = 8
    warmup_interval: Count = 1
    compute: tuple[Literal[0, 1], ...] = ()
    policy: Literal["dynamic", "static"] = "dynamic"
    max_cached: Literal[-1] | Natural = -1
    max_continuous: Literal[-1] | Natural = -1
    max_accumulated: NotNegative = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.compute) > self.steps:
            raise ValueError(
                f"compute has {len(self.compute)} entries for {self.steps} steps; a longer mask is "
                f"cut at its end: compute[:{self.steps}]"
            )
        if self.policy == "static" and not self.compute:
            raise ValueError('policy="static" is for a mask: give compute, such as named("fast")')
        if not self.warming(0):
            raise ValueError(
                "the first call must compute: give warmup=1, and a mask that begins so"
            )

    def warming(self, step: int) -> bool:
        """Whether a call belongs to the warm-up."""
        ones = next((at for at, one in enumerate(self.compute) if not one), len(self.compute))
        warmup = min(self.warmup, ones) if self.compute else self.warmup
        return step < warmup and step % self.warmup_interval == 0

    def asked(self, step: int) -> bool:
        """Whether the warm-up or the mask makes a call compute."""
        return self.warming(step) or (step < len(self.compute) and self.compute[step] == 1)

    @property
    def calls(self) -> int:
        return self.steps

    @property
    def mask(self) -> tuple[bool, ...] | None:
        if self.policy == "dynamic":
            return None
        return tuple(self.asked(step) for step in range(self.steps))


def named(name: str, steps: int = 28) -> tuple[int, ...]:
    """One of `MASKS`, cut at its end.

    Raises:
        ValueError: for another name, and for more steps than the mask has.
    """
    if name not in MASKS or steps > len(MASKS[name]):
        raise ValueError(
            f"masks are {', '.join(MASKS)}, for at most 28 steps; got {name!r} for {steps}"
        )
    return tuple(map(int, MASKS[name][:steps]))


class DBCached(CachedStack):
    """A stack whose first blocks decide."""

    def __init__(self, inner: nnx.Module, plan: Any, step: Step, lead: State | None, runs: Runs):
        super().__init__(inner, plan, step, lead, runs)
        if lead is None and plan.mask is None:
            self.before, self.accumulated = State(), State()
            self.skipped, self.in_a_row = State(), State()

    def decide(self, x: PyTree, head: PyTree, conditioning: Sequence[PyTree]) -> Decision:
        plan: DBCachePlan = self.plan
        added = image_of(head) - image_of(x)
        before = self.before.read(added.shape, added.dtype)
        skipped, in_a_row = (each.read((), jnp.int32) for each in (self.skipped, self.in_a_row))
        accumulated = self.accumulated.read((), jnp.float32)
        asked = jnp.asarray([plan.asked(step) for step in range(plan.steps)])[self.step]
        stops = asked
        if plan.max_cached >= 0:
            stops |= skipped >= plan.max_cached
        if plan.max_continuous >= 0:
            stops |= in_a_row >= plan.max_continuous
        if plan.max_accumulated > 0:
            stops |= accumulated >= plan.max_accumulated
        # What was stopped before is not measured: neither here nor in cache-dit.
        if 0 < plan.threshold < 1:
            change = jnp.where(stops, 0.0, relative(added, before))
            computes = stops | (change >= plan.threshold)
            self.accumulated.write(accumulated + change)
        else:
            computes = stops | (plan.threshold < 1)
            self.accumulated.write(accumulated)
        self.before.write(jnp.where(computes, added, before))
        self.skipped.write(jnp.where(computes, skipped, skipped + 1))
        self.in_a_row.write(jnp.where(computes, 0, in_a_row + 1))
        return computes


def transform(plan: DBCachePlan) -> Transform:
    """Let the first blocks decide whether the middle ones run."""
    return step_cache(NAME, plan, DBCached)


def _plan(subject: testing.Subject, threshold: float) -> DBCachePlan:
    calls = subject.sampler.calls
    return DBCachePlan(steps=calls, threshold=threshold, first_blocks=1, warmup=1)


METHOD = Method(
    name=NAME,
    paper="DBCache, of cache-dit 1.5 (after First-Block-Cache; see TeaCache, arXiv 2411.19108)",
    seams=("patches",),
    domain="images",
    plan=DBCachePlan,
    transform=transform,
    identity=lambda subject: _plan(subject, 0.0),
    ladder=lambda subject: tuple(_plan(subject, each) for each in (0.02, 0.2, 1.0)),
    tiny=testing.tiny_dit,
    systems=("DBCache",),
    decides="batch",
)
