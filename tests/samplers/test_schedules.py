"""Properties of the schedules, their errors, and their configurations."""

import dataclasses
import functools
import json
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.samplers import (
    DDIM,
    DDPM,
    Betas,
    DPMSolver,
    FlowMatchEuler,
    Schedule,
    config,
    step_noise,
)
from effjax.samplers.schedule import data_and_noise
from effjax.samplers.tables import Spacing, spaced_timesteps

few = settings(derandomize=True, max_examples=20, deadline=None)
spacings = st.sampled_from(get_args(Spacing))
betas = st.sampled_from(
    [
        Betas(schedule=schedule, train_timesteps=count)
        for schedule in ("linear", "scaled_linear", "squaredcos_cap_v2")
        for count in (100, 1000)
    ]
)

ALL = [
    DDIM(steps=6),
    DDIM(steps=5, spacing="trailing", prediction="v_prediction", betas=Betas(zero_snr=True)),
    DDIM(steps=6, eta=1.0, spacing="linspace", prediction="sample"),
    DDPM(steps=6),
    DDPM(steps=6, variance="fixed_large", prediction="v_prediction"),
    DDPM(steps=6, variance="learned_range"),
    DPMSolver(steps=6),
    DPMSolver(steps=16, prediction="v_prediction", karras_sigmas=True),
    DPMSolver(steps=16, prediction="sample", spacing="trailing"),
    FlowMatchEuler(steps=6, shift=3.0),
    FlowMatchEuler(steps=6, spacing="trailing", mu=0.8),
]
every_schedule = pytest.mark.parametrize("schedule", ALL, ids=repr)
SHAPE = (2, 2, 2, 3)


def normal(seed, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape)


def oracle(schedule, x, data, step):
    """The output of a network that knows the clean sample."""
    if isinstance(schedule, FlowMatchEuler):
        return (x - data) / schedule.sigmas[step]
    if isinstance(schedule, DPMSolver):
        ratio = schedule.sigmas[step]
        signal, sigma = 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)
    else:
        left = schedule.betas.alphas_cumprod[int(schedule.times[step])]
        signal, sigma = np.sqrt(left), np.sqrt(1 - left)
    signal, sigma = np.float32(signal), np.float32(sigma)
    if schedule.prediction == "sample":
        return data
    noise = (x - signal * data) / sigma
    return noise if schedule.prediction == "epsilon" else signal * noise - sigma * data


def run(schedule, network, x, keys=None):
    memory = schedule.init(x)
    for step in range(schedule.calls):
        x, memory = schedule.update(x, network(x, step), step, memory, keys)
    return x


@every_schedule
def test_a_perfect_network_gives_the_clean_sample(schedule):
    data, keys = normal(1), jax.random.split(jax.random.key(2), SHAPE[0])
    if isinstance(schedule, DDPM) and schedule.variance == "learned_range":

        def network(x, step):
            out = oracle(schedule, x, data, step)
            return jnp.concatenate([out, jnp.full_like(out, 0.3)], axis=-1)
    else:

        def network(x, step):
            return oracle(schedule, x, data, step)

    np.testing.assert_allclose(run(schedule, network, normal(3), keys), data, atol=2e-4)


@few
@given(steps=st.integers(1, 100), spacing=spacings, betas=betas)
def test_ddim_times_fall_within_the_training_range(steps, spacing, betas):
    times = DDIM(steps=steps, spacing=spacing, betas=betas).times
    assert times.shape == (steps,)
    assert times.dtype == np.float32
    assert np.all(np.diff(times) < 0)
    assert np.all((times >= 0) & (times < betas.train_timesteps))


@few
@given(
    steps=st.integers(1, 99),
    spacing=spacings,
    betas=betas,
    karras=st.booleans(),
    final=st.sampled_from(["zero", "sigma_min"]),
)
def test_dpm_sigmas_fall(steps, spacing, betas, karras, final):
    schedule = DPMSolver(
        steps=steps, spacing=spacing, betas=betas, karras_sigmas=karras, final_sigmas=final
    )
    assert schedule.times.shape == (steps,)
    assert schedule.sigmas.shape == (steps + 1,)
    falls = np.diff(schedule.sigmas)
    assert np.all(falls[:-1] < 0)
    assert falls[-1] < 0 or final == "sigma_min"
    assert (schedule.sigmas[-1] == 0) == (final == "zero")


@few
@given(
    steps=st.integers(1, 200),
    shift=st.floats(0.2, 8),
    mu=st.none() | st.floats(-1, 2),
    spacing=st.sampled_from(["linspace", "trailing"]),
)
def test_flow_sigmas_fall_from_one_to_zero(steps, shift, mu, spacing):
    schedule = FlowMatchEuler(steps=steps, shift=shift, mu=mu, spacing=spacing)
    assert schedule.sigmas[0] == 1
    assert schedule.sigmas[-1] == 0
    assert np.all(np.diff(schedule.sigmas) < 0)
    np.testing.assert_allclose(schedule.times, 1000 * schedule.sigmas[:-1], rtol=1e-6)


@few
@given(betas=betas, zero_snr=st.booleans())
def test_noise_grows_with_time(betas, zero_snr):
    left = dataclasses.replace(betas, zero_snr=zero_snr).alphas_cumprod
    assert np.all(np.diff(left) < 0)
    assert 0 <= left[-1] < left[0] < 1
    assert (left[-1] == 0) == zero_snr


@few
@given(steps=st.integers(1, 100))
def test_spacings_as_in_the_paper(steps):
    """arXiv 2305.08891, table 2 (there counted from 1)."""
    assert spaced_timesteps("leading", steps, 1000)[-1] == 0
    assert spaced_timesteps("trailing", steps, 1000)[0] == 999
    if steps > 1:
        linspace = spaced_timesteps("linspace", steps, 1000)
        assert (linspace[0], linspace[-1]) == (999, 0)
    assert list(spaced_timesteps("trailing", 5, 1000)) == [999, 799, 599, 399, 199]
    assert list(spaced_timesteps("leading", 5, 1000, offset=1)) == [801, 601, 401, 201, 1]


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_add_noise_is_what_predictions_undo(prediction):
    schedule = DDIM(steps=10, prediction=prediction)
    data, noise = normal(1), normal(2)
    time = schedule.times[4]
    x = schedule.add_noise(data, noise, time)
    left = schedule.betas.alphas_cumprod[int(time)]
    signal, sigma = np.float32(np.sqrt(left)), np.float32(np.sqrt(1 - left))
    out = {"epsilon": noise, "sample": data, "v_prediction": signal * noise - sigma * data}
    undone = data_and_noise(prediction, x, out[prediction], signal, sigma)
    np.testing.assert_allclose(undone[0], data, atol=1e-5)
    np.testing.assert_allclose(undone[1], noise, atol=1e-5)


@every_schedule
def test_add_noise_takes_one_time_for_each_sample(schedule):
    data, noise = normal(1), normal(2)
    times = jnp.array([5.0, 700.0])
    both = schedule.add_noise(data, noise, times)
    for row, time in enumerate((5, 700)):
        one = schedule.add_noise(data[row : row + 1], noise[row : row + 1], time)
        np.testing.assert_allclose(both[row], one[0], atol=1e-6)
    assert jnp.std(both[1] - data[1]) > jnp.std(both[0] - data[0])


@every_schedule
def test_a_traced_step_is_a_static_step(schedule):
    x, out = normal(1), normal(2)
    if isinstance(schedule, DDPM) and schedule.variance == "learned_range":
        out = jnp.concatenate([out, out], axis=-1)
    keys = jax.random.split(jax.random.key(3), SHAPE[0])
    memory = jax.tree.map(lambda leaf: leaf + normal(4), schedule.init(x))
    traced = jax.jit(schedule.update)
    for step in (0, 2, schedule.calls - 1):
        static = schedule.update(x, out, step, memory, keys)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5),
            traced(x, out, np.int32(step), memory, keys),
            static,
        )


@every_schedule
def test_schedules_are_values(schedule):
    same = dataclasses.replace(schedule)
    assert same == schedule
    assert hash(same) == hash(schedule)
    assert dataclasses.replace(schedule, steps=schedule.steps + 1) != schedule
    assert schedule.initial_scale == 1.0
    with pytest.raises(ValueError, match="read-only"):
        schedule.times[0] = 0
    with pytest.raises(ValueError, match=f"0 ... {schedule.calls - 1}, got {schedule.calls}"):
        schedule.update(normal(0), normal(1), schedule.calls, schedule.init(normal(0)))


def test_one_step_of_the_solver_is_ddim():
    x, out = normal(1), normal(2)
    ours, _ = DPMSolver(steps=4, spacing="trailing").update(x, out, 0, jnp.zeros_like(x))
    ddim, _ = DDIM(steps=4, spacing="trailing").update(x, out, 0, ())
    np.testing.assert_allclose(ours, ddim, rtol=1e-5, atol=1e-5)


def test_the_solver_is_of_second_order():
    """Twice the steps, a quarter of the error; half without the slope."""

    def error(steps, second_order):
        schedule = DPMSolver(
            steps=steps, prediction="sample", karras_sigmas=True, final_sigmas="sigma_min"
        )
        x = jnp.full((1, 1), 100.0)
        memory = schedule.init(x)
        for step in range(steps):
            # Predict data = lambda, the log of signal over noise: integration by parts solves it.
            data = jnp.full((1, 1), -np.log(schedule.sigmas[step]))
            x, memory = schedule.update(x, data, step, memory if second_order else data)
        ratio = schedule.sigmas[[0, -1]].astype(np.float64)
        signal, lambdas = 1 / np.sqrt(1 + ratio**2), -np.log(ratio)
        sigma = ratio * signal
        growth = np.exp(lambdas) * (lambdas - 1)
        exact = sigma[1] / sigma[0] * 100.0 + sigma[1] * (growth[1] - growth[0])
        return abs(float(x[0, 0]) - exact)

    assert error(20, True) / error(40, True) == pytest.approx(4, rel=0.1)
    assert error(20, False) / error(40, False) == pytest.approx(2, rel=0.15)


def test_a_learned_variance_moves_only_learned_range():
    x, out, keys = normal(1), normal(2), jax.random.split(jax.random.key(3), SHAPE[0])
    wide = jnp.concatenate([out, normal(4)], axis=-1)
    for schedule in ALL:
        memory = schedule.init(x)
        if schedule == DDPM(steps=6, variance="learned_range"):
            bounds = [
                schedule.update(x, jnp.concatenate([out, jnp.full_like(out, end)], -1), 1, (), keys)
                for end in (-1.0, 1.0)
            ]
            for (bounded, _), variance in zip(bounds, ("fixed_small", "fixed_large"), strict=True):
                fixed, _ = DDPM(steps=6, variance=variance).update(x, out, 1, (), keys)
                np.testing.assert_allclose(bounded, fixed, rtol=1e-5, atol=1e-6)
        else:
            narrow, _ = schedule.update(x, out, 1, memory, keys)
            np.testing.assert_array_equal(schedule.update(x, wide, 1, memory, keys)[0], narrow)


def test_step_noise_depends_on_key_and_step_only():
    draw = jax.jit(lambda keys, step: step_noise(keys, step, (8, 8, 3)))
    keys = jax.random.split(jax.random.key(0), 16)
    noise = draw(keys, 3)
    np.testing.assert_array_equal(draw(keys[2:4], 3), noise[2:4])
    assert not np.allclose(draw(keys, 4), noise)
    assert not np.allclose(noise[0], noise[1])
    assert abs(float(noise.mean())) < 0.05
    assert abs(float(noise.std()) - 1) < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(steps=0), "steps must be a whole number of at least 1, got 0"),
        (lambda: DDPM(steps=1001), "got 1001"),
        (lambda: FlowMatchEuler(steps=-1), "got -1"),
        (lambda: DDIM(steps=5, spacing="even"), "spacing must be one of 'leading'.*'even'"),
        (lambda: DPMSolver(steps=5, spacing="even"), "spacing must be one of"),
        (lambda: FlowMatchEuler(steps=5, spacing="leading"), "one of 'linspace', 'trailing'"),
        (lambda: DDPM(steps=5, prediction="noise"), "prediction must be one of 'epsilon'"),
        (lambda: DDPM(steps=5, variance="learned"), "variance must be one of 'fixed_small'"),
        (lambda: DDIM(steps=5, eta=1.5), "eta must be a finite number of at least 0 and at most 1"),
        (lambda: DDIM(steps=1000, steps_offset=1), "'leading' spacing does not give 1000"),
        (lambda: DPMSolver(steps=1000), "Use fewer steps"),
        (lambda: DPMSolver(steps=5, final_sigmas="none"), "final_sigmas must be one of 'zero'"),
        (lambda: Betas("cosine"), "schedule must be one of 'linear'"),
        (lambda: Betas(start=0.5, end=0.1), "0 < start <= end < 1"),
        (lambda: Betas(train_timesteps=0), "train_timesteps must be a whole number of at least 1"),
        (lambda: DDIM(steps=5, spacing="trailing", betas=Betas(zero_snr=True)), "v_prediction"),
        (lambda: FlowMatchEuler(steps=5, shift=0.0), "shift must be a finite number above 0"),
        (lambda: FlowMatchEuler(steps=5, mu=float("nan")), "mu must be a finite number or none"),
        (lambda: FlowMatchEuler(steps=5, max_tokens=256), "base_tokens must be smaller"),
        (lambda: FlowMatchEuler(steps=5).for_tokens(0), "tokens must be at least 1"),
        (
            lambda: DDIM(steps=5).update(normal(0), normal(1, (2, 2, 2, 4)), 0, ()),
            "twice the channels",
        ),
        (lambda: DDPM(steps=5).update(normal(0), normal(1), 0, ()), "pass keys"),
        (
            lambda: DDPM(steps=5, variance="learned_range").update(normal(0), normal(1), 0, ()),
            "6 output channels",
        ),
    ],
)
def test_errors(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()


DIT_FILE = """{
  "_class_name": "DDIMScheduler", "_diffusers_version": "0.12.0.dev0",
  "beta_end": 0.02, "beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": false,
  "num_train_timesteps": 1000, "prediction_type": "epsilon", "set_alpha_to_one": true,
  "steps_offset": 0, "trained_betas": null
}"""
PIXART_FILE = """{
  "_class_name": "DPMSolverMultistepScheduler", "_diffusers_version": "0.22.0.dev0",
  "algorithm_type": "dpmsolver++", "beta_end": 0.02, "beta_schedule": "linear",
  "beta_start": 0.0001, "dynamic_thresholding_ratio": 0.995, "euler_at_final": false,
  "lambda_min_clipped": -Infinity, "lower_order_final": true, "num_train_timesteps": 1000,
  "prediction_type": "epsilon", "sample_max_value": 1.0, "solver_order": 2,
  "solver_type": "midpoint", "steps_offset": 0, "thresholding": false,
  "timestep_spacing": "linspace", "trained_betas": null, "use_karras_sigmas": false,
  "use_lu_lambdas": false, "variance_type": null
}"""
FLUX_FILE = """{
  "_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.30.0.dev0",
  "base_image_seq_len": 256, "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15,
  "num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": true
}"""


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        (DIT_FILE, {"steps": 50}, DDIM(steps=50)),
        (DIT_FILE, {"steps": 50, "eta": 1.0}, DDIM(steps=50, eta=1.0)),
        (PIXART_FILE, {"steps": 20}, DPMSolver(steps=20)),
        (
            FLUX_FILE,
            {"steps": 28, "spacing": "trailing", "tokens": 4096},
            FlowMatchEuler(steps=28, spacing="trailing", shift=3.0, mu=1.15),
        ),
        (FLUX_FILE, {"steps": 28, "mu": 0.5}, FlowMatchEuler(steps=28, shift=3.0, mu=0.5)),
    ],
)
def test_published_files(text, options, expected):
    schedule = Schedule.from_config(json.loads(text), **options)
    if isinstance(schedule, FlowMatchEuler):
        assert schedule.mu == pytest.approx(expected.mu)
        schedule = dataclasses.replace(schedule, mu=expected.mu)
    assert schedule == expected
    written = json.loads(json.dumps(schedule.to_config()))
    given = {name: value for name, value in json.loads(text).items() if name[1:9] != "diffuser"}
    assert given.items() <= written.items()


@every_schedule
def test_configs_hold_all_but_the_run_time_options(schedule):
    run_time = {"eta": getattr(schedule, "eta", None), "mu": getattr(schedule, "mu", None)}
    if isinstance(schedule, FlowMatchEuler):
        run_time["spacing"] = schedule.spacing
    options = {name: value for name, value in run_time.items() if value is not None}
    config = json.loads(json.dumps(schedule.to_config()))
    assert type(schedule).from_config(config, steps=schedule.steps, **options) == schedule


def test_files_of_converted_checkpoints():
    """Options of other schedulers have no effect, in diffusers too."""
    config = {**json.loads(DIT_FILE), "skip_prk_steps": True, "lower_order_final": False}
    assert Schedule.from_config(config, steps=50) == DDIM(steps=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "PNDMScheduler"}, "one of 'DDIMScheduler', .*; got 'PNDMScheduler'"),
        ({"thresholding": True}, "thresholding=True: only False is supported"),
        ({"trained_betas": [0.1]}, "trained_betas"),
        ({"color": "red"}, "color='red': unknown option"),
        ({"_class_name": "DDPMScheduler", "variance_type": "learned"}, "'learned_range'"),
        ({"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3}, "only 2 is supported"),
        (
            {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True},
            "tokens",
        ),
    ],
)
def test_unsupported_configs(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule.from_config({**json.loads(DIT_FILE), **change}, steps=10)


def test_all_problems_of_a_config_at_once():
    config = {"_class_name": "DDIMScheduler", "thresholding": True, "color": "red"}
    with pytest.raises(ValueError, match=r"(?s)thresholding.*color.*Supported options: beta_end"):
        Schedule.from_config(config, steps=10)


def test_a_config_of_another_schedule():
    with pytest.raises(ValueError, match="read as DDIM, not as DDPM"):
        DDPM.from_config(json.loads(DIT_FILE), steps=10)


def test_a_schedule_joins_those_that_read_files(monkeypatch):
    for name in ("_schedules", "_classes", "_ELSEWHERE"):
        monkeypatch.setattr(config, name, getattr(config, name).copy())
    table = config.SchedulerClass(
        fields={"num_train_timesteps": ("train_timesteps", 1000), "use_own": ("dynamic", False)},
        fixed={"own_order": 1},
    )

    @config.reads("OwnScheduler", table)
    @dataclasses.dataclass(frozen=True)
    class Own(FlowMatchEuler):
        pass

    file = {"_class_name": "OwnScheduler", "num_train_timesteps": 500, "own_order": 1}
    assert Schedule.from_config(file, steps=4) == Own(4, train_timesteps=500)
    sized = Schedule.from_config(file | {"use_own": True}, steps=4, tokens=256)
    assert (type(sized), sized.mu) == (Own, 0.5)
    assert sized.to_config() == file | {"use_own": True}
    with pytest.raises(ValueError, match="own_order=2: only 1 is supported"):
        Schedule.from_config(file | {"own_order": 2}, steps=4)
    with pytest.raises(ValueError, match="OwnScheduler is read by Own already"):
        config.reads("OwnScheduler", table)(FlowMatchEuler)
