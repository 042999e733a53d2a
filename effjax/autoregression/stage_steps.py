"""How many Euler steps each stage of an ECAR takes: a grid search under a budget of FLOPs.

A candidate is a number of steps for every stage. What it makes is compared with what many steps in
every stage make of the same noise. FLOPs of a candidate are counted before anything runs,

    flops(N) = sum_k (backbone_k + N_k head_k)

and candidates beyond the budget do not run. Candidates that begin alike share their first stages,
and numbers of steps are data: however large the grid is, two programs are compiled for each stage.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from effjax.autoregression.next_stage import NextStage
from effjax.cost import sampler_cost
from effjax.forward import Forward, Params
from effjax.loops import Carry
from effjax.metrics import psnr
from effjax.search.sensitivity import Metric


@dataclasses.dataclass(frozen=True)
class StageSteps:
    """A candidate.

    Attributes:
        steps: Euler steps of every stage.
        flops: of an image, as `effjax.cost.sampler_cost` counts them.
        value: of the metric, higher is better; None where the candidate was beyond the budget.
    """

    steps: tuple[int, ...]
    flops: int
    value: float | None


@dataclasses.dataclass(frozen=True)
class StepSearch:
    """What a search has found.

    Attributes:
        best: the candidate of the highest value within the budget, of equal ones the cheapest.
        budget: FLOPs of an image.
        candidates: all of the grid, from cheap to dear.
    """

    best: StageSteps
    budget: float | int
    candidates: tuple[StageSteps, ...]

    def within(self, flops: float | int) -> StageSteps:
        """The best candidate of a smaller budget, which takes no other search.

        Raises:
            ValueError: for a budget that no candidate meets, or larger than the one searched with.
        """
        if flops > self.budget:
            raise ValueError(
                f"candidates of up to {self.budget:.6g} FLOPs were tried, got a budget of "
                f"{flops:.6g}: search once more with flops={flops:.6g}"
            )
        return _best(self.candidates, flops)


def search_steps(
    loop: NextStage,
    forward: Forward,
    params: Params,
    labels: Int[Array, " B"],
    key: Array,
    *,
    grid: Sequence[int] | Sequence[Sequence[int]] = (1, 2, 4, 8),
    share: float | int | None = None,
    flops: float | int | None = None,
    reference: int = 32,
    metric: Metric = psnr,
    decode: Callable[[Array], Array] | None = None,
    progress: bool = True,
) -> StepSearch:
    """Find the numbers of steps whose samples are nearest to those of many steps.

        found = search_steps(pipe.sampler(), *pipe.pair, labels, key, share=0.5, decode=pipe.decode)
        images = pipe(labels, key=key, num_inference_steps=found.best.steps)

    Args:
        loop: says guidance and noise, and with `share` the budget.
        forward, params: an ECAR, possibly transformed.
        labels: of the images to compare.
        key: of their noise, which is that of all candidates.
        grid: numbers of steps to try in every stage, or a sequence of them for each stage.
        share: budget, as a share of the FLOPs of `loop`; without any budget it is 1.
        flops: budget, as FLOPs of an image, in place of a share.
        reference: steps of every stage of what candidates are compared with; more than in the grid.
        metric: of the reference's samples and a candidate's, float32[B, ...]: a number, higher is
            better.
        decode: makes what is compared of samples, such as images of latents.
        progress: show a bar over the candidates.

    Raises:
        ValueError: for a loop, a grid or a budget that do not fit the model; samples that are not
            finite; and a model with a plan for its number of calls.

    Source: arXiv 2412.14170 chooses steps by stage; the search is a plain grid.
    """
    from tqdm.auto import tqdm

    loop.check(forward)
    choices = _choices(grid, loop.stages.count, reference)
    costs = _costs(loop, forward, params, labels[:1])
    if share is not None and flops is not None:
        raise ValueError(f"a budget is a share or FLOPs, got share={share} and flops={flops}")
    own = costs(loop.steps)
    budget = (1.0 if share is None else share) * own if flops is None else flops
    counted = sorted((costs(steps), steps) for steps in itertools.product(*choices))
    (least, cheapest), allowed = counted[0], sum(cost <= budget for cost, _ in counted)
    if not allowed:
        raise ValueError(
            f"no candidate is within {budget:.6g} FLOPs of an image ({budget / own:.3g} of the "
            f"loop's): the cheapest, {cheapest} steps, takes {least}. Allow more, or try fewer "
            f"steps in the grid."
        )
    run = _Runs(loop, forward, params, labels)
    for steps in (cheapest, (reference,) * len(choices)):
        forward.check_calls(dataclasses.replace(loop, steps=steps).calls)
    made = (lambda x: x) if decode is None else decode
    begun = run.init(key)
    wanted = made(next(run.all(begun, [(reference,)] * len(choices), lambda _: True))[1].x)
    values: dict[tuple[int, ...], float] = {}

    def fits(steps: tuple[int, ...]) -> bool:
        """Whether a candidate that begins so is within the budget."""
        rest = (own[0] for own in choices[len(steps) :])
        return costs((*steps, *rest)) <= budget

    tried = run.all(begun, choices, fits)
    for steps, carry in tqdm(tried, desc="candidates", total=allowed, disable=not progress):
        values[steps] = float(metric(wanted, made(carry.x)))
        if math.isnan(values[steps]):
            raise ValueError(
                f"with {steps} steps, or with {reference} in each stage, samples are not finite, "
                f"or the metric of them is not: look at the model's images first"
            )
    found = tuple(StageSteps(steps, cost, values.get(steps)) for cost, steps in counted)
    return StepSearch(_best(found, budget), budget, found)


def _best(candidates: Sequence[StageSteps], budget: float | int) -> StageSteps:
    within = [each for each in candidates if each.flops <= budget]
    if not within:
        raise ValueError(
            f"no candidate is within {budget:.6g} FLOPs of an image: the cheapest, "
            f"{candidates[0].steps} steps, takes {candidates[0].flops}"
        )
    return max(within, key=lambda each: (each.value, -each.flops))


def _choices(grid: Any, stages: int, reference: int) -> list[tuple[int, ...]]:
    """The numbers of steps of every stage, from few to many."""
    given = list(grid)
    nested = bool(given) and all(isinstance(each, Sequence) for each in given)
    by_stage = given if nested else [given] * stages
    numbers = [each for own in by_stage for each in own]
    right = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
    if len(by_stage) != stages or not all(by_stage) or not right:
        raise ValueError(
            f"a grid is whole numbers of at least 1, or such a sequence for each of {stages} "
            f"stages; got {grid!r}"
        )
    if reference <= max(numbers):
        raise ValueError(
            f"candidates are compared with more steps than they have: reference must be above "
            f"{max(numbers)}, got {reference}"
        )
    return [tuple(sorted(set(own))) for own in by_stage]


def _costs(
    loop: NextStage, forward: Forward, params: Params, labels: Array
) -> Callable[[Sequence[int]], int]:
    """FLOPs of an image by steps; no call costs more where there are more of its kind."""
    ones = [1] * loop.stages.count

    def counted(steps: Sequence[int]) -> int:
        own = dataclasses.replace(loop, steps=tuple(steps))
        return sampler_cost(own, forward, params, labels).flops

    base = counted(ones)
    heads = [counted([*ones[:k], 2, *ones[k + 1 :]]) - base for k in range(len(ones))]
    return lambda steps: base + sum((n - 1) * head for n, head in zip(steps, heads, strict=True))


class _Runs:
    """Runs stages of many candidates, those that begin alike once."""

    def __init__(self, loop: NextStage, forward: Forward, params: Params, labels: Array):
        # Steps of the loop are static: one loop for all candidates, whose steps are given beside.
        self.loop = dataclasses.replace(loop, steps=(1,) * loop.stages.count)
        self.model = forward, params, labels

    def init(self, key: Array) -> Carry:
        return self.loop.init(*self.model, key)

    def all(
        self,
        carry: Carry,
        choices: Sequence[Sequence[int]],
        fits: Callable[[tuple[int, ...]], bool],
        steps: tuple[int, ...] = (),
    ) -> Iterator[tuple[tuple[int, ...], Carry]]:
        """Candidates and what is left after their last stage.

        Args:
            carry: before the next stage.
            choices: numbers of steps of every stage.
            fits: whether candidates whose first steps are these run.
            steps: of the stages so far.
        """
        stage = len(steps)
        if stage == len(choices):
            yield steps, carry
            return
        begun = _backbone(self.loop, *self.model, carry, stage=stage)
        for count in choices[stage]:
            if fits((*steps, count)):
                after = _flow(self.loop, *self.model, begun, jnp.int32(count), stage=stage)
                yield from self.all(after, choices, fits, (*steps, count))


@partial(jax.jit, static_argnames="stage")
def _backbone(
    loop: NextStage, forward: Forward, params: Params, labels: Array, carry: Carry, *, stage: int
) -> Carry:
    uncond = loop.unconditional(forward, labels)
    return loop.step(forward, params, carry, labels, uncond, loop.starts[stage])


@partial(jax.jit, static_argnames="stage")
def _flow(
    loop: NextStage,
    forward: Forward,
    params: Params,
    labels: Array,
    carry: Carry,
    count: Int[Array, ""],
    *,
    stage: int,
) -> Carry:
    """The flow of a stage in so many steps."""
    uncond = loop.unconditional(forward, labels)
    own = dataclasses.replace(loop, traced=stage, traced_steps=count.astype(jnp.float32))
    first = loop.starts[stage] + 1

    def step(number: Array, carry: Carry) -> Carry:
        return own.step(forward, params, carry, labels, uncond, number)

    return jax.lax.fori_loop(first, first + count, step, carry)
