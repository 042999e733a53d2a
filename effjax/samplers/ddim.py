"""DDIM (Song et al., arXiv 2010.02502), as diffusers' `DDIMScheduler`."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.fields import Positive, Share
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
    fields={
        **DIFFUSION,
        **LEADING,
        **CLIPPING,
        "set_alpha_to_one": ("set_alpha_to_one", True),
    },
    fixed=PLAIN,
    idle=THRESHOLDS,
)


@reads("DDIMScheduler", _FILE)
@dataclasses.dataclass(frozen=True)
class DDIM(DiffusionSchedule):
    """Predict the clean sample and the noise, and mix them again at the next, lower noise level.

    Its fields are those of `DiffusionSchedule` and these.

    Attributes:
        eta: 0 is deterministic, 1 adds as much noise as DDPM.
        set_alpha_to_one: end at the clean sample; otherwise at the noise level of timestep 0.
        clip_sample: clip the predicted clean sample to +- clip_sample_range (pixel models).

    >>> DDIM(steps=4).times
    array([750., 500., 250.,   0.], dtype=float32)
    """

    eta: Share = 0.0
    set_alpha_to_one: bool = True
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
        out, _ = split_output(out, x)
        data, noise = data_and_noise(self.prediction, x, out, now.signal, now.sigma)
        if self.clip_sample:
            data = jnp.clip(data, -self.clip_sample_range, self.clip_sample_range)
        following = now.next_signal * data + now.next_sigma * noise
        if self.eta > 0:
            following += now.deviation * step_noise(keys, step, x.shape[1:])
        return following, memory


class _Tables(NamedTuple):
    """float32[calls] each: x = signal data + sigma noise, and the same at the next step."""

    times: Column
    signal: Column
    sigma: Column
    next_signal: Column
    next_sigma: Column
    deviation: Column


@functools.lru_cache(maxsize=64)
def _tables(schedule: DDIM) -> _Tables:
    left = schedule.betas.alphas_cumprod
    train = schedule.betas.train_timesteps
    times = spaced_timesteps(schedule.spacing, schedule.steps, train, offset=schedule.steps_offset)
    check_timesteps(times, schedule.steps, train, schedule.spacing)
    now = left[times]
    check_signal(now, schedule.prediction)
    # The reference goes back by a constant number of timesteps, whatever the spacing.
    previous = times - train // schedule.steps
    end = 1.0 if schedule.set_alpha_to_one else left[0]
    following = np.where(previous >= 0, left[np.maximum(previous, 0)], end)
    variance = schedule.eta**2 * (1 - following) / (1 - now) * (1 - now / following)
    rows = (
        times,
        np.sqrt(now),
        np.sqrt(1 - now),
        np.sqrt(following),
        np.sqrt(np.maximum(1 - following - variance, 0)),
        np.sqrt(variance),
    )
    return _Tables(*(constant(row[schedule.begin :], np.float32) for row in rows))
