"""DPM-Solver++ (2M) (Lu et al., arXiv 2211.01095), as diffusers' `DPMSolverMultistepScheduler`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.fields import Range
from effjax.samplers.config import DIFFUSION, PLAIN, THRESHOLDS, SchedulerClass, reads
from effjax.samplers.schedule import DiffusionSchedule, data_and_noise, split_output
from effjax.samplers.tables import (
    Column,
    Spacing,
    at,
    check_timesteps,
    constant,
    spaced_timesteps,
)

_FILE = SchedulerClass(
    fields={
        **DIFFUSION,
        "timestep_spacing": ("spacing", "linspace"),
        "use_karras_sigmas": ("karras_sigmas", False),
        "final_sigmas_type": ("final_sigmas", "zero"),
        "lower_order_final": ("lower_order_final", True),
        "lambda_min_clipped": ("lambda_min_clipped", -float("inf")),
    },
    fixed={
        **PLAIN,
        "algorithm_type": "dpmsolver++",
        "solver_order": 2,
        "solver_type": "midpoint",
        "euler_at_final": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "use_dynamic_shifting": False,
    },
    # A learned variance is told by the network's number of channels.
    idle={
        **THRESHOLDS,
        "variance_type": None,
        "flow_shift": 1.0,
        "time_shift_type": "exponential",
    },
)


@reads("DPMSolverMultistepScheduler", _FILE)
@dataclasses.dataclass(frozen=True)
class DPMSolver(DiffusionSchedule):
    """Second-order multistep solver of the diffusion ODE in data prediction, midpoint rule.

    Its memory is the data prediction of the last call. The first step is of first order, and so is
    the last one if it ends at zero noise or if there are fewer than 15 steps.

    Its fields are those of `DiffusionSchedule`, with "linspace" as the default spacing, and these.

    Attributes:
        karras_sigmas: noise levels of Karras et al. (arXiv 2206.00364, equation 5) in place of
            those of the timesteps; the network is fed the nearest timesteps (of cosine betas, the
            reference takes the next lower ones, up to rounding errors).
        final_sigmas: end at "zero" noise or at the smallest training level, "sigma_min".
        lower_order_final: take the last of fewer than 15 steps at first order.
        lambda_min_clipped: least log signal-to-noise ratio (of amplitudes) to start from; "-5.1" is
            usual for cosine betas.
    """

    spacing: Spacing = "linspace"
    karras_sigmas: bool = False
    final_sigmas: Literal["zero", "sigma_min"] = "zero"
    lower_order_final: bool = True
    lambda_min_clipped: Annotated[float, Range(infinite=True)] = -float("inf")

    def tables(self) -> _Tables:
        return _tables(self)

    @property
    def sigmas(self) -> np.ndarray:
        """float32[steps + 1]: noise-to-signal ratio before each step and after the last one."""
        return _sigmas(self)[1].astype(np.float32)

    def start(
        self, x: Float[Array, "B ..."], noise: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        first = at(self.tables(), 0)
        return first.signal * x + first.sigma * noise

    def init(self, x: Float[Array, "B ..."]) -> PyTree:
        return jnp.zeros_like(x)

    def update(
        self,
        x: Float[Array, "B ..."],
        out: Float[Array, "B ..."],
        step: Step,
        memory: PyTree,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        now = at(self.tables(), step)
        out, _ = split_output(out, x)
        data, _ = data_and_noise(self.prediction, x, out, now.signal, now.sigma)
        slope = data - memory
        return now.sample_weight * x + now.data_weight * data + now.slope_weight * slope, data

    @property
    def alphas_cumprod(self) -> np.ndarray:
        left = self.betas.alphas_cumprod
        if self.betas.zero_snr:
            # The solver needs a finite noise-to-signal ratio; the reference chose this one.
            left = np.append(left[:-1], 2.0**-24)
        return left


class _Tables(NamedTuple):
    """float32[calls] each: x = signal data + sigma noise; weights of the next sample."""

    times: Column
    signal: Column
    sigma: Column
    sample_weight: Column
    data_weight: Column
    slope_weight: Column


@functools.lru_cache(maxsize=64)
def _tables(schedule: DPMSolver) -> _Tables:
    times, ratio = _sigmas(schedule)
    signal = 1 / np.sqrt(1 + ratio**2)
    sigma = ratio * signal
    with np.errstate(divide="ignore"):
        lambdas = -np.log(ratio)  # log of signal over noise; infinite at the end of final "zero"
    step_size = np.diff(lambdas)
    data_weight = signal[1:] * -np.expm1(-step_size)
    # Midpoint rule: half the step times the slope between the last two data predictions.
    second_order = np.arange(schedule.steps) > schedule.begin
    few = schedule.lower_order_final and schedule.steps < 15
    if few or schedule.final_sigmas == "zero":
        second_order[-1] = False
    slope_weight = np.zeros(schedule.steps)
    (chosen,) = np.nonzero(second_order)
    slope_weight[chosen] = data_weight[chosen] / 2 * step_size[chosen] / step_size[chosen - 1]
    rows = (times, signal[:-1], sigma[:-1], sigma[1:] / sigma[:-1], data_weight, slope_weight)
    return _Tables(*(constant(row[schedule.begin :], np.float32) for row in rows))


@functools.lru_cache(maxsize=64)
def _sigmas(schedule: DPMSolver) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps [steps] and noise-to-signal ratios float64[steps + 1]."""
    left = schedule.alphas_cumprod
    train, steps = schedule.betas.train_timesteps, schedule.steps
    ratio = np.sqrt((1 - left) / left)  # increasing
    if schedule.karras_sigmas:
        ramp = np.linspace(ratio[-1] ** (1 / 7), ratio[0] ** (1 / 7), steps)
        chosen = ramp**7
        times = np.interp(np.log(chosen), np.log(ratio), np.arange(train)).round()
    else:
        last = int(np.sum(-np.log(ratio) >= schedule.lambda_min_clipped))
        if schedule.spacing == "trailing":
            stride = train / steps
            times = np.arange(last, 0, -stride)[:steps].round().astype(np.int64) - 1
        else:  # one step more, of which the last (time 0) is left out
            offset = schedule.steps_offset
            times = spaced_timesteps(schedule.spacing, steps + 1, last, offset=offset)[:-1]
        check_timesteps(times, steps, train, schedule.spacing)
        chosen = ratio[times]
    end = 0.0 if schedule.final_sigmas == "zero" else ratio[0]
    return constant(times), constant(np.append(chosen, end))
