"""Schedules that leave out steps at the start, for image to image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.samplers import DDIM, DPMSolver, FlowMatchEuler

SINGLE = (
    DDIM(steps=10),
    FlowMatchEuler(steps=10, shift=3.0),
    FlowMatchEuler(steps=10, spacing="trailing"),
)


def network(x, time):
    return jnp.sin(x + time / 300)


def follow(schedule, x, memory, first=0):
    keys = jax.random.split(jax.random.key(0), len(x))
    for step in range(first, schedule.calls):
        x, memory = schedule.update(x, network(x, schedule.times[step]), step, memory, keys)
    return x


@pytest.mark.parametrize("schedule", SINGLE, ids=lambda each: f"{type(each).__name__}")
def test_the_last_steps_are_those_of_the_whole(schedule):
    x = jax.random.normal(jax.random.key(1), (2, 4, 4, 1))
    late = schedule.from_strength(0.35)
    assert (late.begin, late.calls, late.steps) == (6, 4, 10)
    np.testing.assert_array_equal(late.times, schedule.times[6:])
    np.testing.assert_array_equal(follow(late, x, ()), follow(schedule, x, (), first=6))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("karras", [False, True])
def test_the_solver_starts_as_the_reference_does(karras):
    """At first order, and with its own noise level, which may be between two training steps."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    ours = DPMSolver(steps=20, karras_sigmas=karras).from_strength(0.5)
    reference = diffusers.DPMSolverMultistepScheduler.from_config(ours.to_config())
    reference.set_timesteps(20)
    reference.set_begin_index(10)
    x, noise = np.random.default_rng(0).standard_normal((2, 2, 4, 4, 1)).astype(np.float32)
    wanted = reference.add_noise(*map(torch.tensor, (x, noise)), reference.timesteps[[10, 10]])
    x = ours.start(jnp.asarray(x), jnp.asarray(noise))
    np.testing.assert_allclose(x, wanted.numpy(), atol=2e-6)
    for time in reference.timesteps[10:]:
        out = torch.tensor(np.asarray(network(wanted.numpy(), float(time))))
        wanted = reference.step(out, time, wanted).prev_sample
    got = follow(ours, x, ours.init(x))
    np.testing.assert_allclose(got, wanted.numpy(), atol=2e-5)


def test_bad_input():
    for strength in (0.0, 1.5):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            DDIM(steps=4).from_strength(strength)
    with pytest.raises(ValueError, match="begin must be below steps=4, got 4"):
        FlowMatchEuler(steps=4, begin=4)
    assert DDIM(steps=4).from_strength(1.0) == DDIM(steps=4)
    assert DDIM(steps=4).from_strength(0.01).calls == 1
