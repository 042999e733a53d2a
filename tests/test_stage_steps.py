"""The search of steps by stage: equal to sampling each candidate, budgets, programs, errors."""

import dataclasses
import itertools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.autoregression import search_steps, stage_steps
from effjax.cost import sampler_cost
from effjax.metrics import psnr

GRID, REFERENCE = (1, 3), 5


@pytest.fixture(scope="module")
def subject():
    """Two stages and one block in both parts: what compiles fast."""
    options = {"sample_size": 4, "num_stages": 2, "num_layers": 1, "head_layers": 1}
    made = testing.tiny_ecar(head="dit", **options)
    return dataclasses.replace(made, sampler=dataclasses.replace(made.sampler, steps=(3, 1)))


def searched(subject, loop=None, **options):
    options = {"grid": GRID, "reference": REFERENCE, "progress": False, **options}
    key, loop = jax.random.key(4), loop or subject.sampler
    return search_steps(loop, subject.forward, subject.params, subject.cond, key, **options)


@pytest.fixture(scope="module")
def found(subject):
    """All candidates, with what was compiled for them."""
    programs: Any = stage_steps._backbone, stage_steps._flow
    before = [program._cache_size() for program in programs]
    made = searched(subject, share=2.0)
    return made, [program._cache_size() - old for program, old in zip(programs, before)]


def test_candidates_are_samples_of_the_loop(subject, found):
    """Two are sampled once more by themselves, from the same noise; all are counted so."""
    made, compiled = found
    assert compiled == [2, 2]  # one of each kind for a stage, of all candidates and the reference
    assert {each.steps for each in made.candidates} == set(itertools.product(GRID, GRID))
    assert [each.flops for each in made.candidates] == sorted(e.flops for e in made.candidates)

    def sample(steps):
        loop = dataclasses.replace(subject.sampler, steps=steps)
        return jax.jit(loop)(subject.forward, subject.params, subject.cond, jax.random.key(4))

    wanted = sample((REFERENCE,) * 2)
    for each in made.candidates:
        if each.steps in ((1, 3), (3, 1)):
            assert each.value == pytest.approx(float(psnr(wanted, sample(each.steps))), abs=1e-2)
        loop = dataclasses.replace(subject.sampler, steps=each.steps)
        counted = sampler_cost(loop, subject.forward, subject.params, subject.cond[:1])
        assert each.flops == counted.flops
    best = max(made.candidates, key=lambda each: each.value)
    assert made.best == best
    assert len({each.value for each in made.candidates}) == 4


def test_candidates_beyond_the_budget_do_not_run(subject, found):
    whole, _ = found
    cheap = whole.candidates[:3]
    ran = []

    def metric(wanted, x):
        ran.append(x)
        return psnr(wanted, x)

    made = searched(subject, flops=cheap[-1].flops, metric=metric)
    assert len(ran) == 3
    assert [each.value is None for each in made.candidates] == [False, False, False, True]
    assert made.best.value == pytest.approx(max(each.value for each in cheap))
    assert made.best.steps == whole.within(cheap[-1].flops).steps
    assert whole.within(cheap[0].flops) == cheap[0]
    # Without a budget it is that of the loop, whose own steps are a candidate here.
    own = searched(subject)
    loop = subject.sampler
    assert own.budget == sampler_cost(loop, subject.forward, subject.params, subject.cond[:1]).flops
    values = {each.steps: each.value for each in own.candidates}
    assert own.best.value == max(each for each in values.values() if each is not None)
    assert loop.steps in values
    with pytest.raises(ValueError, match=r"of up to .* FLOPs were tried, got a budget of"):
        own.within(2 * own.budget)
    with pytest.raises(ValueError, match=r"no candidate is within .* the cheapest, \(1, 1\)"):
        own.within(cheap[0].flops - 1)


def test_grids_by_stage_metrics_and_decoders(subject):
    """Of equal values the cheapest is best; decoders make what is compared."""
    seen = []

    def decode(x):
        seen.append(x.shape)
        return x[:, :1]

    def equal(wanted, x):
        assert wanted.shape == x.shape == (2, 1, 4, 1)
        return jnp.float32(1.0)

    made = searched(subject, grid=[(3, 1, 3), (2,)], share=9.0, decode=decode, metric=equal)
    assert [each.steps for each in made.candidates] == [(1, 2), (3, 2)]
    assert made.best.steps == (1, 2)
    assert seen == [(2, 4, 4, 1)] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": ()}, "a grid is whole numbers of at least 1"),
        ({"grid": (1, 0)}, "a grid is whole numbers of at least 1"),
        ({"grid": (1, 2.0)}, "a grid is whole numbers of at least 1"),
        ({"grid": [(1, 2)]}, "such a sequence for each of 2 stages"),
        ({"grid": [(1, 2), ()]}, "such a sequence for each of 2 stages"),
        ({"reference": 3}, "reference must be above 3, got 3"),
        ({"share": 0.5, "flops": 1e6}, "a budget is a share or FLOPs, got share=0.5"),
        (
            {"share": 0.01},
            r"no candidate is within .* \(0\.01 of the loop's\): the cheapest, \(1, ",
        ),
        ({"metric": lambda wanted, x: jnp.float32(np.nan)}, "samples are not finite"),
    ],
)
def test_bad_searches(untyped, subject, options, message):
    with pytest.raises(ValueError, match=message):
        searched(subject, **options)


def test_other_models_are_refused(subject):
    other = testing.tiny_ecar()
    with pytest.raises(ValueError, match=re.escape("give stages=forward.config.stages")):
        searched(subject, other.sampler)


def test_plans_for_a_number_of_calls_are_refused(subject):
    @dataclasses.dataclass(frozen=True)
    class Planned:
        calls: int = 6

        def __call__(self, module, context):
            pass

    planned = dataclasses.replace(subject, forward=subject.forward.patch(Planned()))
    with pytest.raises(ValueError, match="Planned is planned for 6 network calls"):
        searched(planned)
