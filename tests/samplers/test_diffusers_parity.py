"""Whole trajectories against diffusers: live where it is installed, else against golden.npz."""

import jax.numpy as jnp
import numpy as np
import pytest

from effjax.samplers import FlowMatchEuler, Schedule
from effjax.samplers import ddim as ddim_module
from effjax.samplers import ddpm as ddpm_module
from tests.samplers.diffusers_trajectories import CASES, GOLDEN, fakes, kept, reference, scheduler

TOLERANCE = 2e-5  # of the largest value of a sample


def trajectory(case, monkeypatch):
    """Times and samples of this library, with the same fake outputs and noises."""
    schedule = Schedule.from_config(
        {"_class_name": case.scheduler, **case.config}, steps=case.steps, **case.options
    )
    x, outs, noises = map(jnp.asarray, fakes(case))
    for module in (ddim_module, ddpm_module):
        monkeypatch.setattr(module, "step_noise", lambda _, step, shape: noises[step])
    x = schedule.initial_scale * x
    memory = schedule.init(x)
    samples = []
    for step in range(schedule.calls):
        x, memory = schedule.update(x, outs[step], step, memory)
        samples.append(np.asarray(x))
    return schedule.times, np.stack(samples)


def assert_same(times, samples, expected_times, expected_samples):
    np.testing.assert_allclose(times, expected_times, rtol=1e-6, atol=1e-4)
    for ours, theirs in zip(samples, expected_samples, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * np.abs(theirs).max())


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_diffusers(name, monkeypatch):
    pytest.importorskip("diffusers")
    assert_same(*trajectory(CASES[name], monkeypatch), *reference(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_golden(name, monkeypatch):
    times, samples = trajectory(CASES[name], monkeypatch)
    with np.load(GOLDEN) as golden:
        assert_same(times, kept(samples), golden[f"{name}.times"], golden[f"{name}.samples"])


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_config_is_the_file_of_diffusers(name):
    """diffusers' own file is read; what is written is that file, but for its version."""
    pytest.importorskip("diffusers")
    case = CASES[name]
    file = {"_class_name": case.scheduler, **scheduler(case).config}
    schedule = Schedule.from_config(file, steps=case.steps, **case.options)
    written = schedule.to_config()
    expected = {key: value for key, value in file.items() if not key.startswith("_")}
    assert written == {"_class_name": case.scheduler, **expected}
    assert Schedule.from_config(written, steps=case.steps, **case.options) == schedule


def test_sigma_tables_of_sd3_and_flux():
    sd3 = FlowMatchEuler(steps=28, shift=3.0).sigmas
    np.testing.assert_allclose(sd3[:3], [1, 0.98738, 0.97411], atol=5e-6)
    np.testing.assert_allclose(sd3[-3:], [0.11091, 0.00893, 0], atol=5e-6)
    flux = FlowMatchEuler(steps=28, spacing="trailing").for_tokens(4096)
    assert flux.mu == pytest.approx(1.15)
    np.testing.assert_allclose(flux.sigmas[:3], [1, 0.98841, 0.97622], atol=5e-6)
    np.testing.assert_allclose(flux.sigmas[-3:], [0.19545, 0.10472, 0], atol=5e-6)
