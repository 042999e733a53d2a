"""Flow matching with Euler steps, as diffusers' `FlowMatchEulerDiscreteScheduler`.

The network predicts the velocity of x = (1 - sigma) data + sigma noise (arXiv 2403.03206).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.fields import Count, Natural, Positive
from effjax.samplers.config import SchedulerClass, reads
from effjax.samplers.schedule import Schedule, per_sample, split_output
from effjax.samplers.tables import Column, at, check_steps, constant

_FILE = SchedulerClass(
    fields={
        "num_train_timesteps": ("train_timesteps", 1000),
        "shift": ("shift", 1.0),
        "use_dynamic_shifting": ("dynamic", False),
        "base_shift": ("base_shift", 0.5),
        "max_shift": ("max_shift", 1.15),
        "base_image_seq_len": ("base_tokens", 256),
        "max_image_seq_len": ("max_tokens", 4096),
    },
    fixed={
        "time_shift_type": "exponential",
        "shift_terminal": None,
        "invert_sigmas": False,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "stochastic_sampling": False,
    },
)


@reads("FlowMatchEulerDiscreteScheduler", _FILE)
@dataclasses.dataclass(frozen=True)
class FlowMatchEuler(Schedule):
    """Follow the predicted velocity from sigma = 1 (noise) to sigma = 0 (data).

    Attributes:
        steps: number of steps, one network call each.
        shift: s in sigma -> s sigma / (1 + (s - 1) sigma); above 1 more steps go to high noise.
        spacing: sigmas before the shift: "linspace" from the largest to the smallest of training,
            which are shifted themselves (SD3), or "trailing": 1, 1 - 1/N, ..., 1/N (FLUX).
        mu: logarithm of a shift that depends on the image size (FLUX); it replaces `shift`.
        train_timesteps: time fed to the network at sigma = 1.
        base_shift, max_shift, base_tokens, max_tokens: the line through (base_tokens, base_shift)
            and (max_tokens, max_shift) that gives `mu` for a number of image tokens.
        begin: steps at the start that are left out.

    >>> FlowMatchEuler(steps=4, spacing="trailing").sigmas
    array([1.  , 0.75, 0.5 , 0.25, 0.  ], dtype=float32)
    """

    steps: Count
    shift: Positive = 1.0
    spacing: Literal["linspace", "trailing"] = "linspace"
    mu: float | None = None
    train_timesteps: Count = 1000
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: Count = 256
    max_tokens: Count = 4096
    begin: Natural = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, self.train_timesteps, self.begin)
        if self.base_tokens >= self.max_tokens:
            raise ValueError(
                f"base_tokens must be smaller than max_tokens; got {self.base_tokens} and "
                f"{self.max_tokens}"
            )

    @property
    def dynamic(self) -> bool:
        """True if the shift is given by `mu`."""
        return self.mu is not None

    def for_tokens(self, tokens: int) -> FlowMatchEuler:
        """The schedule with the dynamic shift for images of this many tokens."""
        if tokens < 1:
            raise ValueError(f"tokens must be at least 1, got {tokens}")
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return dataclasses.replace(self, mu=self.base_shift + slope * (tokens - self.base_tokens))

    @property
    def times(self) -> np.ndarray:
        return _tables(self).times

    @property
    def sigmas(self) -> np.ndarray:
        """float32[calls + 1]: noise level before each call, and 0 after the last one."""
        return np.append(_tables(self).sigmas, np.float32(0))

    def update(
        self,
        x: Float[Array, "B ..."],
        out: Float[Array, "B ..."],
        step: Step,
        memory: PyTree,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        velocity, _ = split_output(out, x)
        return x + at(_tables(self), step).step_size * velocity, memory

    def add_noise(
        self, x: Float[Array, "B ..."], noise: Float[Array, "B ..."], time: ArrayLike
    ) -> Float[Array, "B ..."]:
        sigma = per_sample(jnp.asarray(time).astype(jnp.float32) / self.train_timesteps, x)
        return (1 - sigma) * x + sigma * noise


class _Tables(NamedTuple):
    """float32[calls] each; step sizes are negative."""

    times: Column
    sigmas: Column
    step_size: Column


@functools.lru_cache(maxsize=64)
def _tables(schedule: FlowMatchEuler) -> _Tables:
    shift = schedule.shift if schedule.mu is None else math.exp(schedule.mu)

    def shifted(sigma: np.ndarray) -> np.ndarray:
        return shift * sigma / (1 + (shift - 1) * sigma)

    if schedule.spacing == "trailing":
        sigmas = np.linspace(1, 1 / schedule.steps, schedule.steps)
    else:
        ends = np.array([1, 1 / schedule.train_timesteps])
        # The reference's training table is already shifted, unless the shift is dynamic.
        first, last = ends if schedule.dynamic else shifted(ends)
        sigmas = np.linspace(first, last, schedule.steps)
    sigmas = shifted(sigmas)
    rows = (schedule.train_timesteps * sigmas, sigmas, np.diff(sigmas, append=0))
    return _Tables(*(constant(row[schedule.begin :], np.float32) for row in rows))
