"""Allocation against brute force, and MixDQ's published numbers."""

import itertools

import numpy as np
import pytest

from effjax.search import allocation
from effjax.search.allocation import (
    Budget,
    allocate,
    bit_budget,
    bit_costs,
    pareto,
    split_bits,
)

RNG = np.random.default_rng(0)
BITS = (2, 4, 8)


def layers(count=6):
    sizes = RNG.integers(1, 20, count).astype(float)
    # More bits are never worse.
    scores = np.sort(RNG.random((count, len(BITS))), axis=1)
    return sizes, scores


def brute_force(scores, budgets):
    best = -np.inf
    rows = np.arange(len(scores))
    for choice in itertools.product(range(scores.shape[1]), repeat=len(scores)):
        totals = [budget.costs[rows, choice].sum() for budget in budgets]
        if all(b.low <= t <= b.high for b, t in zip(budgets, totals)):
            best = max(best, scores[rows, choice].sum())
    return best


@pytest.mark.parametrize("average", [3.0, 4.5, 6.0])
def test_the_best_choice(average):
    sizes, scores = layers()
    budget = bit_budget(sizes, BITS, average, tolerance=0.2)
    found = allocate(scores, [budget])
    assert found.optimal
    assert found.score == pytest.approx(brute_force(scores, [budget]))
    assert abs(found.totals[0] / sizes.sum() - average) <= 0.2 + 1e-9
    rows = np.arange(6)
    assert found.totals[0] == bit_costs(sizes, BITS)[rows, found.choice].sum()


def test_small_differences_between_large_scores():
    """A relative gap of 1e-4 would let any choice pass for the best."""
    sizes, small = layers(8)
    budget = bit_budget(sizes, BITS, 4.0, tolerance=0.3)
    for offset, factor in ((1e6, 1.0), (0.0, 1e-9)):
        scores = offset + factor * small
        found = allocate(scores, [budget])
        assert found.score == pytest.approx(brute_force(scores, [budget]), rel=1e-12, abs=1e-16)
        assert found.optimal
        assert found.gap == 0


def test_ties_go_to_the_cheaper_candidate_and_then_the_first():
    rows = np.arange(4)
    for seed in range(20):
        rng = np.random.default_rng(seed)
        scores, costs = (rng.integers(0, 3, (4, 4)).astype(float) for _ in range(2))
        budget = Budget(costs, high=5.0)
        if costs.min(1).sum() > 5:
            continue
        found = allocate(scores, [budget])
        assert found.optimal
        assert found.score == brute_force(scores, [budget])
        choice = np.asarray(found.choice)
        for layer in rows:
            equal = scores[layer] == scores[layer, choice[layer]]
            cheapest = np.flatnonzero(equal & (costs[layer] == costs[layer, equal].min()))
            assert choice[layer] == cheapest[0]


def test_a_choice_that_is_not_proven_best_says_how_far_it_may_be(monkeypatch):
    sizes, scores = layers()
    budget = bit_budget(sizes, BITS, 4.5, tolerance=0.2)
    solve = allocation.milp

    def stopped(*arguments, **options):
        found = solve(*arguments, **options)
        found.status, found.mip_dual_bound = 1, found.mip_dual_bound - 100
        return found

    best = allocate(scores, [budget])
    monkeypatch.setattr(allocation, "milp", stopped)
    found = allocate(scores, [budget])
    assert not found.optimal
    assert found.choice == best.choice
    assert found.gap == pytest.approx((scores.max(1) - scores.min(1)).max() / 100)


def test_several_budgets():
    sizes, scores = layers()
    bits = bit_budget(sizes, BITS, 5.0, tolerance=0.5)
    compute = Budget(RNG.random(scores.shape) * np.array([1, 2, 4]), high=7.0, name="compute")
    found = allocate(scores, [bits, compute])
    assert found.score == pytest.approx(brute_force(scores, [bits, compute]))
    assert found.totals[1] <= 7.0 + 1e-9


def test_candidates_that_are_not_allowed():
    scores = np.array([[1.0, 9.0], [1.0, 9.0]])
    scores[0, 1] = -np.inf
    costs = np.array([[1.0, 2.0], [1.0, np.inf]])
    assert allocate(scores, [Budget(costs, 10.0)]).choice == (0, 0)


def test_it_beats_sorting_and_cutting_at_equal_bits():
    sizes, scores = layers(40)
    budget = bit_budget(sizes, BITS, 4.0)
    found = allocate(scores, [budget])
    # The least sensitive layers get few bits until the budget is met.
    choice = np.full(40, 2)
    for layer in np.argsort(scores[:, 2] - scores[:, 0]):
        if bit_costs(sizes, BITS)[np.arange(40), choice].sum() <= budget.high:
            break
        choice[layer] = 0
    greedy = scores[np.arange(40), choice].sum()
    uniform = scores[:, 1].sum()
    assert found.score > greedy
    assert found.score > uniform


def test_the_front_rises():
    sizes, scores = layers()
    costs = bit_costs(sizes, BITS)
    front = pareto(scores, costs, [b * sizes.sum() for b in (2, 3, 3, 4, 6, 8, 20)])
    totals = [each.totals[0] for each in front]
    assert totals == sorted(set(totals))
    assert [each.score for each in front] == sorted({each.score for each in front})
    assert front[-1].choice == (2,) * 6


def test_mixdq_budgets_of_sdxl():
    content, quality = 154026.67, 68706.00  # in units of conv_in's 11,520 weights
    proportion = content / quality
    assert proportion == pytest.approx(2.24182, abs=1e-5)
    # Whatever the ratio, the groups together have the average.
    for ratio in np.linspace(0.46, 1.36, 10):
        of_content, of_quality = split_bits(4.0, ratio, proportion)
        assert of_content == pytest.approx(ratio * of_quality)
        assert (proportion * of_content + of_quality) / (1 + proportion) == pytest.approx(4.0)
    # The published plan of 5.03 bits.
    of_content, of_quality = split_bits(5.030, 4.087 / 7.143, proportion)
    assert of_content == pytest.approx(4.087, abs=2e-3)
    assert of_quality == pytest.approx(7.143, abs=2e-3)
    weights = (content + quality) * 11520
    assert weights == pytest.approx(2.5659e9, rel=1e-4)
    assert weights * 4.0064 / 8 == pytest.approx(1.285e9, rel=1e-3)


@pytest.mark.parametrize(
    ("scores", "budgets", "message"),
    [
        (np.ones(3), [], r"must be \[layers, candidates\]"),
        (np.ones((2, 3)), [Budget(np.ones((2, 2)), 1.0)], "the scores' shape"),
        (np.full((2, 3), np.nan), [], r"layers \[0, 1\] have scores that are NaN"),
        (np.full((1, 2), -np.inf), [], r"layers \[0\] have no candidate"),
        (
            np.ones((2, 3)),
            [bit_budget((1, 1), BITS, 1.0)],
            "1 bits on average: no choice sums to 1.96 ... 2.04; the sums lie in 4 ... 16",
        ),
        (
            np.ones((1, 2)),
            [Budget(np.array([[1.0, 2.0]]), 1.5), Budget(np.array([[2.0, 1.0]]), 1.5)],
            "no choice meets all budgets at once",
        ),
    ],
)
def test_errors(scores, budgets, message):
    with pytest.raises(ValueError, match=message):
        allocate(scores, budgets)


def test_families_share_few_candidates():
    """Against every choice, of six layers in two families."""
    rng = np.random.default_rng(1)
    scores, costs = rng.random((6, 4)), rng.random((6, 4))
    families = [0, 0, 0, 1, 1, 1]
    budget = Budget(costs, 3.0)
    found = allocate(scores, [budget], families=families, distinct=1)
    rows = np.arange(6)
    best = max(
        scores[rows, list(choice)].sum()
        for choice in itertools.product(range(4), repeat=6)
        if costs[rows, list(choice)].sum() <= 3.0
        and max(len(set(choice[:3])), len(set(choice[3:]))) == 1
    )
    assert found.score == pytest.approx(best)
    assert allocate(scores, [budget]).score > found.score
    with pytest.raises(ValueError, match="families must name all 6 layers"):
        allocate(scores, [budget], families=[0, 1], distinct=2)
