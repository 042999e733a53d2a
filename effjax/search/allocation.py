"""One candidate for every layer under a budget: small 0/1 programs, and their Pareto front.

    maximize   sum_i sum_c x_ic score_ic      x_ic in {0, 1},  sum_c x_ic = 1
    so that    low <= sum_i sum_c x_ic cost_ic <= high     (one or several budgets)

Candidates are bits in MixDQ and ViDiT-Q, spans of attention in MoA. HiGHS solves the programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

Numbers: TypeAlias = Sequence[float | int] | np.ndarray

# A total that exceeds its budget by no more than rounding is within it.
_SLACK = 1e-9

# Largest coefficient of the objective: the solver stops at an absolute gap of 1e-6.
_OBJECTIVE = 1e4


@dataclasses.dataclass(frozen=True)
class Budget:
    """Limits on the sum of the chosen candidates' costs.

    Attributes:
        costs: by layer and candidate; NaN nowhere, infinity for a candidate that is not allowed.
        high: the most that the sum may be.
        low: the least.
        name: for messages.
    """

    costs: np.ndarray
    high: float
    low: float = -np.inf
    name: str = "budget"


@dataclasses.dataclass(frozen=True)
class Allocation:
    """A choice.

    Attributes:
        choice: index of the candidate of every layer.
        score: sum of their scores.
        totals: sum of their costs in every budget.
        optimal: whether no choice has a higher score, as the solver proved.
        gap: by how much another choice's score may be higher, at most; 0 if this is optimal, which
            allows for rounding to 1e-9 of the most that a layer can lose.
    """

    choice: tuple[int, ...]
    score: float
    totals: tuple[float, ...]
    optimal: bool
    gap: float


def allocate(
    scores: np.ndarray,
    budgets: Sequence[Budget],
    *,
    families: Sequence[int] | None = None,
    distinct: int | None = None,
    time_limit: float = 60.0,
) -> Allocation:
    """The best choice within all budgets.

    Of a layer's candidates with equal scores it takes the one that costs least in the first budget,
    and of those the first, as far as all limits allow.

    Args:
        scores: float[layers, candidates], higher is better; -infinity for a candidate that is not
            allowed.
        budgets: one or several.
        families: family of every layer, such as the block that a head belongs to; with
        distinct: the most candidates that differ within a family.
        time_limit: seconds; the best choice found by then is returned.

    Raises:
        ValueError: for shapes that disagree or NaN, and if no choice meets the budgets; the message
            says what the sums can be.
        TimeoutError: if no choice was found in time.
    """
    scores = np.asarray(scores, float)
    if scores.ndim != 2 or not scores.size:
        raise ValueError(f"scores must be [layers, candidates], got shape {scores.shape}")
    layers, candidates = scores.shape
    costs = [np.asarray(budget.costs, float) for budget in budgets]
    for budget, own in zip(budgets, costs):
        if own.shape != scores.shape:
            raise ValueError(
                f"{budget.name}: costs must have the scores' shape {scores.shape}, got {own.shape}"
            )
        if np.isnan(own).any():
            raise ValueError(f"{budget.name}: layers {_nan_layers(own)} have costs that are NaN")
    if np.isnan(scores).any():
        raise ValueError(f"layers {_nan_layers(scores)} have scores that are NaN")
    allowed = np.isfinite(scores) & np.all([np.isfinite(own) for own in costs], axis=0)
    without = np.flatnonzero(~allowed.any(1)).tolist()
    if without:
        raise ValueError(f"layers {without} have no candidate that is allowed")
    for budget, own in zip(budgets, costs):
        least = np.where(allowed, own, np.inf).min(1).sum()
        most = np.where(allowed, own, -np.inf).max(1).sum()
        slack = _SLACK * max(abs(least), abs(most), 1)
        if least > budget.high + slack or most < budget.low - slack:
            raise ValueError(
                f"{budget.name}: no choice sums to {budget.low:g} ... {budget.high:g}; the sums "
                f"lie in {least:g} ... {most:g}. Change the budget, or allow other candidates."
            )
    count = layers * candidates
    place = np.arange(count)
    shared, used = _families(families, distinct, layers, candidates)
    total = count + used
    each = coo_array((np.ones(count), (place // candidates, place)), shape=(layers, total))
    limits = [LinearConstraint(each, 1, 1), *shared]
    for budget, own in zip(budgets, costs):
        row = np.where(allowed, own, 0).reshape(-1)
        unit = max(np.abs(row).max(), 1e-300)  # the solver's tolerances are absolute
        row = np.pad(row / unit, (0, used))
        limits.append(LinearConstraint(row[None], budget.low / unit, budget.high / unit))
    upper: Any = np.pad(allowed.reshape(-1).astype(float), (0, used), constant_values=1)
    # What a layer loses to its best candidate, in units in which the solver's tolerances vanish.
    best = np.where(allowed, scores, -np.inf).max(1)
    losses = np.where(allowed, best[:, None] - scores, 0)
    unit = max(losses.max(), 1e-300) / _OBJECTIVE
    found = milp(
        np.pad((losses / unit).reshape(-1), (0, used)),
        constraints=limits,
        integrality=np.ones(total),
        bounds=Bounds(0, upper),
        options={"time_limit": time_limit, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        if found.status == 1:
            raise TimeoutError(f"no choice was found within {time_limit} seconds; allow more")
        sums = [f"{budget.name} {budget.low:g} ... {budget.high:g}" for budget in budgets]
        raise ValueError(f"no choice meets all budgets at once: {', '.join(sums)}")
    choice = found.x[:count].reshape(layers, candidates).argmax(1)
    rows = np.arange(layers)
    gap = losses[rows, choice].sum() - found.mip_dual_bound * unit
    gap = 0.0 if gap <= _SLACK * losses.max() else float(gap)
    if families is None or distinct is None:
        choice = _cheapest(choice, np.where(allowed, scores, -np.inf), budgets, costs)
    return Allocation(
        choice=tuple(choice.tolist()),
        score=float(scores[rows, choice].sum()),
        totals=tuple(float(own[rows, choice].sum()) for own in costs),
        optimal=found.status == 0 and gap == 0,
        gap=gap,
    )


def _cheapest(
    choice: np.ndarray, scores: np.ndarray, budgets: Sequence[Budget], costs: Sequence[np.ndarray]
) -> np.ndarray:
    """The choice with each layer's cheapest candidate of those that score as the chosen one."""
    choice, rows = choice.copy(), np.arange(len(choice))
    for layer, scored in enumerate(scores):
        equal = np.flatnonzero(scored == scored[choice[layer]])
        for candidate in equal[np.argsort(costs[0][layer, equal], kind="stable")]:
            trial = choice.copy()
            trial[layer] = candidate
            totals = [own[rows, trial].sum() for own in costs]
            if candidate == choice[layer] or all(
                budget.low <= total <= budget.high for budget, total in zip(budgets, totals)
            ):
                choice = trial
                break
    return choice


def _families(
    families: Sequence[int] | None, distinct: int | None, layers: int, candidates: int
) -> tuple[list[LinearConstraint], int]:
    """Constraints x_ic <= y_fc and sum_c y_fc <= distinct, and how many variables y there are."""
    if families is None or distinct is None:
        return [], 0
    if len(families) != layers or distinct < 1:
        raise ValueError(
            f"families must name all {layers} layers and distinct be at least 1; got "
            f"{len(families)} and {distinct}"
        )
    names = sorted(set(families))
    count, used = layers * candidates, len(names) * candidates
    place = np.arange(count)
    family = np.asarray([names.index(each) for each in families])
    theirs = count + family.repeat(candidates) * candidates + place % candidates
    values = np.concatenate([np.ones(count), -np.ones(count)])
    within = coo_array(
        (values, (np.tile(place, 2), np.concatenate([place, theirs]))), shape=(count, count + used)
    )
    own = np.arange(used)
    few = coo_array(
        (np.ones(used), (own // candidates, count + own)), shape=(len(names), count + used)
    )
    return [LinearConstraint(within, -np.inf, 0), LinearConstraint(few, 0, distinct)], used


def pareto(
    scores: np.ndarray, costs: np.ndarray, highs: Numbers, *, time_limit: float = 60.0
) -> tuple[Allocation, ...]:
    """The best choice for each of several budgets, those that a cheaper one equals left out.

    Args:
        scores, costs: [layers, candidates].
        highs: the budgets to try.
        time_limit: seconds for each.

    Returns:
        From cheap to dear; scores rise strictly.

    Raises:
        ValueError: as `allocate`, for the smallest budget too.
    """
    front: list[Allocation] = []
    for high in sorted(highs):
        found = allocate(scores, [Budget(costs, high)], time_limit=time_limit)
        if not front or found.score > front[-1].score:
            front.append(found)
    return tuple(front)


def bit_costs(sizes: Numbers, bits: Numbers) -> np.ndarray:
    """Bits that layers of these sizes take with each candidate: float[layers, candidates]."""
    return np.asarray(sizes, float)[:, None] * np.asarray(bits, float)


def bit_budget(sizes: Numbers, bits: Numbers, average: float, *, tolerance: float = 0.02) -> Budget:
    """An average number of bits, up to a tolerance to both sides (MixDQ's constraint)."""
    total = float(np.sum(sizes))
    return Budget(
        bit_costs(sizes, bits),
        high=(average + tolerance) * total,
        low=(average - tolerance) * total,
        name=f"{average:g} bits on average",
    )


def split_bits(average: float, ratio: float, proportion: float) -> tuple[float, float]:
    """Average bits of two groups of layers that together have a given average.

    B_q = B (1 + r) / (k r + 1), B_c = k B_q: MixDQ's quality and content groups.

    Args:
        average: B.
        ratio: k = B_c / B_q.
        proportion: r = size of the content group / size of the quality group.

    Returns:
        B_c and B_q.

    Source: MixDQ, arXiv 2405.17873.
    """
    quality = average * (1 + proportion) / (ratio * proportion + 1)
    return ratio * quality, quality


def _nan_layers(values: np.ndarray) -> list[int]:
    return np.flatnonzero(np.isnan(values).any(1)).tolist()
