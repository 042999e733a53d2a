"""DDPM, ancestral sampling (Ho et al., arXiv 2006.11239), as diffusers' `DDPMScheduler`."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.fields import Positive
from effjax.samplers.config import (
    CLIPPING,
    DIFFUSION,
    LEADING,
    PLAIN,
    THRESHOLDS,
    SchedulerClass,
    reads,
)
from effjax.samplers.schedule import (
    DiffusionSchedule,
    data_and_noise,
    split_output,
    step_noise,
)
from effjax.samplers.tables import (
    Column,
    at,
    check_signal,
    check_timesteps,
    constant,
    spaced_timesteps,
)

_FILE = SchedulerClass(
    fields={**DIFFUSION, **LEADING, **CLIPPING, "variance_type": ("variance", "fixed_small")},
    fixed=PLAIN,
    idle=THRESHOLDS,
)


@reads("DDPMScheduler", _FILE)
@dataclasses.dataclass(frozen=True)
class DDPM(DiffusionSchedule):
    """Sample the posterior q(x_{t'} | x_t, data) of the next timestep, with predicted data.

    Its fields are those of `DiffusionSchedule` and these.

    Attributes:
        variance: "fixed_small" (the posterior's), "fixed_large" (that of the forward step), or
            "learned_range": between the two, by the second half of the network's channels (Nichol
            & Dhariwal, arXiv 2102.09672, equation 15), as DiT was trained.
        clip_sample: clip the predicted clean sample to +- clip_sample_range (pixel models).
    """

    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = False
    clip_sample_range: Positive = 1.0

    def tables(self) -> _Tables:
        return _tables(self)

    def update(
        self,
        x: Float[Array, "B ..."],
        out: Float[Array, "B ..."],
        step: Step,
        memory: PyTree,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        now = at(self.tables(), step)
        out, learned = split_output(out, x)
        data, _ = data_and_noise(self.prediction, x, out, now.signal, now.sigma)
        if self.clip_sample:
            data = jnp.clip(data, -self.clip_sample_range, self.clip_sample_range)
        mean = now.data_weight * data + now.sample_weight * x
        if self.variance == "fixed_small":
            log_variance = now.log_small
        elif self.variance == "fixed_large":
            log_variance = now.log_large
        else:
            if learned is None:
                raise ValueError(
                    f'variance "learned_range" needs a network with {2 * x.shape[-1]} output '
                    f"channels, twice those of the sample; this one has {out.shape[-1]}. Use "
                    f'"fixed_small" or "fixed_large".'
                )
            share = (learned + 1) / 2
            log_variance = share * now.log_large + (1 - share) * now.log_small
        noise = step_noise(keys, step, x.shape[1:])
        return mean + now.noisy * jnp.exp(log_variance / 2) * noise, memory


class _Tables(NamedTuple):
    """float32[calls] each: x = signal data + sigma noise; weights of the posterior's mean."""

    times: Column
    signal: Column
    sigma: Column
    data_weight: Column
    sample_weight: Column
    log_small: Column
    log_large: Column
    noisy: Column


@functools.lru_cache(maxsize=64)
def _tables(schedule: DDPM) -> _Tables:
    left = schedule.betas.alphas_cumprod
    train = schedule.betas.train_timesteps
    times = spaced_timesteps(schedule.spacing, schedule.steps, train, offset=schedule.steps_offset)
    check_timesteps(times, schedule.steps, train, schedule.spacing)
    now = left[times]
    check_signal(now, schedule.prediction)
    following = np.append(now[1:], 1.0)
    kept = now / following  # alpha of the step from the next timestep to this one
    small = np.maximum((1 - following) / (1 - now) * (1 - kept), 1e-20)
    rows = (
        times,
        np.sqrt(now),
        np.sqrt(1 - now),
        np.sqrt(following) * (1 - kept) / (1 - now),
        np.sqrt(kept) * (1 - following) / (1 - now),
        np.log(small),
        np.log(1 - kept),
        times > 0,  # a last step from a time above 0 keeps its noise, as in the reference
    )
    return _Tables(*(constant(row[schedule.begin :], np.float32) for row in rows))
