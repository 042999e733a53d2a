"""The search for plans of MoA.

Integer programs give candidates, plans of which none is better than another at all lengths; of
these the search takes the one with the least loss at a length that it has not seen.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from effjax.forward import Forward, Params
from effjax.layers.attention import required_attentions
from effjax.methods.cache.moa.caches import NAME, transform
from effjax.methods.cache.moa.plan import MoAPlan, Rule
from effjax.methods.cache.moa.profile import Samples, influence, response_loss
from effjax.search.allocation import Allocation, Budget, allocate


def search(
    forward: Forward,
    params: Params,
    samples: Mapping[int, Samples],
    *,
    validation: Samples,
    density: float = 0.5,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    distinct: int = 2,
    block: int = 64,
    sink: int = 64,
    floor: int = 128,
    time_limit: float = 60.0,
    progress: bool = True,
) -> MoAPlan:
    """Find the plan of a density that loses least.

    Args:
        forward, params: a model without a cache.
        samples: samples by length, such as `answered` makes: answers of the dense model itself that
            depend on something far back.
        validation: samples of another length, on which the best candidate is chosen.
        density: the most that heads keep of a sequence, on average, at every length.
        extend: lengths at which the density holds too, without samples.
        rules: candidates (alpha, beta); `rule_grid` of the lengths if None.
        distinct: rules in a layer.
        block, sink, floor: of the plan; for short sequences all smaller.
        time_limit: seconds for each integer program.
        progress: show a bar over samples and programs.

    Raises:
        ValueError: if no choice of rules has the density at all lengths.
    """
    required_attentions(forward.module(params), "causal", needed_by=NAME)
    options = {"block": block, "sink": sink, "floor": floor}
    plans = candidates(
        {
            n: influence(forward, params, own, block=block, progress=progress)
            for n, own in samples.items()
        },
        density=density,
        extend=extend,
        rules=rules,
        distinct=distinct,
        time_limit=time_limit,
        progress=progress,
        **options,
    )
    losses = [response_loss(*transform(plan)(forward, params), validation) for plan in plans]
    return plans[int(np.argmin(losses))]


def rule_grid(
    profile: Sequence[int], extend: Sequence[int] = (), *, step: int = 1024, shares: int = 9
) -> tuple[Rule, ...]:
    """Make candidates for the rules (alpha, beta) of heads, on a grid.

    Rules without a span at some length, or with a span longer than the sequence, are left out.

    Args:
        profile: lengths with samples.
        extend: lengths without samples.
        step: distance between alphas, in tokens.
        shares: number of betas between 0 and 1, both included.

    Returns:
        Rules in the order of their spans at the longest length.
    """
    lengths = (*profile, *extend)
    least, most, longest = min(lengths), max(profile), max(lengths)
    alphas = np.linspace(-least, most, (most + least) // step + 1)
    grid = [
        (float(alpha), float(beta))
        for alpha in alphas
        for beta in np.linspace(0, 1, shares)
        if alpha + beta * most <= most
        and alpha + beta * longest <= longest
        and alpha + beta * least > 0
    ]
    return tuple(sorted(grid, key=lambda rule: rule[0] + rule[1] * longest))


def candidates(
    profiles: Mapping[int, np.ndarray],
    *,
    block: int = 64,
    sink: int = 64,
    floor: int = 128,
    density: float = 0.5,
    extend: Sequence[int] = (),
    rules: Sequence[Rule] | None = None,
    distinct: int = 2,
    cells: int = 4,
    time_limit: float = 60.0,
    progress: bool = True,
) -> tuple[MoAPlan, ...]:
    """Plans of which none is better than another at all lengths.

    One length's loss is minimized while those of the others lie in cells of their ranges, for all
    lengths and cells.

    Args:
        profiles: `influence` by length.
        cells: into which the range of each loss is cut.
        block, sink, floor, density, extend, rules, distinct, time_limit, progress: as in `search`.

    Raises:
        ValueError: if no choice of rules has the density at all lengths.
    """
    lengths = sorted(profiles)
    layers, heads = profiles[lengths[0]].shape[:2]
    rules = tuple(rules or rule_grid(lengths, extend))
    losses = {n: _losses(profiles[n], rules, block=block, sink=sink) for n in lengths}
    budgets = []
    for n in (*lengths, *extend):
        row = [n * _kept(rule, n, block=block, sink=sink) * block / n for rule in rules]
        high = density * n * layers * heads
        costs = np.tile(row, (layers * heads, 1))
        budgets.append(Budget(costs, high, 0.9 * high, f"density {density:g} at {n} tokens"))
    families = np.arange(layers).repeat(heads).tolist()

    def best(n: int, limits: Sequence[Budget]) -> Allocation:
        return allocate(
            -losses[n],
            [*budgets, *limits],
            families=families,
            distinct=distinct,
            time_limit=time_limit,
        )

    def totals(choice: Sequence[int]) -> tuple[float, ...]:
        return tuple(float(losses[n][np.arange(len(choice)), choice].sum()) for n in lengths)

    found = {best(n, ()).choice for n in lengths}
    table = np.array([totals(choice) for choice in found])
    edges = [np.linspace(low, high, cells + 1) for low, high in zip(table.min(0), table.max(0))]
    programs = [
        (primary, cell)
        for primary in range(len(lengths))
        for cell in itertools.product(range(cells), repeat=len(lengths) - 1)
        if len(lengths) > 1
    ]
    for primary, cell in tqdm(programs, desc="plans", disable=not progress, leave=False):
        others = [i for i in range(len(lengths)) if i != primary]
        limits = [
            Budget(losses[lengths[i]], edges[i][c + 1], edges[i][c], f"loss at {lengths[i]}")
            for i, c in zip(others, cell, strict=True)
        ]
        with contextlib.suppress(ValueError, TimeoutError):  # nothing lies in this cell
            found.add(best(lengths[primary], limits).choice)
    scored = {choice: totals(choice) for choice in found}
    front = [
        choice
        for choice, own in scored.items()
        if not any(
            all(a <= b for a, b in zip(other, own)) and other != own for other in scored.values()
        )
    ]
    return tuple(
        MoAPlan(
            *(
                tuple(
                    tuple(rules[choice[layer * heads + head]][part] for head in range(heads))
                    for layer in range(layers)
                )
                for part in range(2)
            ),
            block=block,
            sink=sink,
            floor=floor,
        )
        for choice in sorted(front, key=lambda choice: scored[choice])
    )


def _kept(rule: Rule, tokens: int, *, block: int, sink: int) -> int:
    """Blocks that the last query block keeps: the sinks' and the span's."""
    alpha, beta = rule
    blocks = tokens // block
    local = max(int(alpha // block + beta * blocks), 1)
    return min(local + sink // block, blocks)


def _losses(profile: np.ndarray, rules: Sequence[Rule], *, block: int, sink: int) -> np.ndarray:
    """What lies outside of each rule's blocks: float[layers * heads, rules]."""
    blocks = profile.shape[-1]
    i, j = np.arange(blocks)[:, None], np.arange(blocks)[None]
    table = []
    for alpha, beta in rules:
        local = max(int(alpha // block + beta * blocks), 1)
        outside = (j <= i) & (j >= sink // block) & (i - j >= local)
        table.append(np.sum(profile, axis=(2, 3), where=outside).reshape(-1))
    return np.stack(table, axis=1)
