"""Tables of noise schedules: training noise, timestep spacings, and how a step reads its row.

Tables are computed once, in float64, and used in float32.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np

from effjax.context import Step, is_static
from effjax.fields import Checked, Count, Positive

Spacing = Literal["leading", "trailing", "linspace"]

Column = Any  # of a tuple of tables: float32[calls]; of its row at one step: float32[]
Columns = TypeVar("Columns", bound=tuple)


@dataclasses.dataclass(frozen=True)
class Betas(Checked):
    """Variances of the training diffusion q(x_t | x_{t-1}).

    Attributes:
        schedule: "linear", "scaled_linear" (linear in the square root, Stable Diffusion) or
            "squaredcos_cap_v2" (cosine; it ignores `start` and `end`).
        start, end: first and last variance.
        train_timesteps: number of diffusion steps in training.
        zero_snr: rescale so that the last timestep is pure noise (arXiv 2305.08891, algorithm 1).
    """

    schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    start: Positive = 1e-4
    end: Positive = 0.02
    train_timesteps: Count = 1000
    zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.start <= self.end < 1:
            raise ValueError(
                f"variances must satisfy 0 < start <= end < 1; got start={self.start}, "
                f"end={self.end}"
            )

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """float64[train_timesteps], falling: the share of the signal's variance that is left."""
        return _alphas_cumprod(self)


@functools.lru_cache(maxsize=64)
def _alphas_cumprod(betas: Betas) -> np.ndarray:
    count = betas.train_timesteps
    if betas.schedule == "linear":
        variances = np.linspace(betas.start, betas.end, count)
    elif betas.schedule == "scaled_linear":
        variances = np.linspace(betas.start**0.5, betas.end**0.5, count) ** 2
    else:
        angles = [(i / count + 0.008) / 1.008 * math.pi / 2 for i in range(count + 1)]
        signal = np.cos(angles) ** 2
        variances = np.minimum(1 - signal[1:] / signal[:-1], 0.999)

    # Rounded to float32 wherever the reference rounds: at small times 1 - alphas_cumprod has only
    # three digits left, and models were trained with just those.
    def accumulate(variances: np.ndarray) -> np.ndarray:
        alphas = np.float32(1) - variances.astype(np.float32)
        return np.cumprod(alphas, dtype=np.float64).astype(np.float32).astype(np.float64)

    alphas_cumprod = accumulate(variances)
    if betas.zero_snr:
        root = np.sqrt(alphas_cumprod)
        squared = ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
        alphas_cumprod = accumulate(1 - np.append(squared[:1], squared[1:] / squared[:-1]))
    return constant(alphas_cumprod)


def spaced_timesteps(
    spacing: str, steps: int, train_timesteps: int, *, offset: int = 0
) -> np.ndarray:
    """Timesteps int64[steps], from noise to data (arXiv 2305.08891, table 2).

    Args:
        spacing: "leading" (multiples of train_timesteps // steps, plus `offset`), "trailing" (from
            the last timestep down) or "linspace" (both ends included).
        steps: number of timesteps.
        train_timesteps: timesteps are below this.
        offset: added to leading timesteps.
    """
    one_of("spacing", spacing, get_args(Spacing))
    if spacing == "leading":
        return np.arange(steps)[::-1] * (train_timesteps // steps) + offset
    if spacing == "linspace":
        return np.linspace(0, train_timesteps - 1, steps).round()[::-1].astype(np.int64)
    # arange may run one value too far by rounding.
    times = np.arange(train_timesteps, 0, -train_timesteps / steps)[:steps]
    return times.round().astype(np.int64) - 1


def check_timesteps(times: np.ndarray, steps: int, train_timesteps: int, spacing: str) -> None:
    """Raise ValueError unless these are `steps` falling timesteps of the training range."""
    fits = len(times) == steps and np.all((times >= 0) & (times < train_timesteps))
    if not fits or np.any(np.diff(times) >= 0):
        raise ValueError(
            f"{spacing!r} spacing does not give {steps} different timesteps within 0 ... "
            f"{train_timesteps - 1}. Use fewer steps, another spacing or no steps_offset."
        )


def check_steps(steps: int, train_timesteps: int, begin: int = 0) -> None:
    """Raise ValueError unless 1 <= steps <= train_timesteps and begin < steps."""
    if not 1 <= steps <= train_timesteps:
        raise ValueError(
            f"steps must be between 1 and the {train_timesteps} timesteps of training, got {steps}"
        )
    if begin >= steps:
        raise ValueError(f"begin must be below steps={steps}, got {begin}")


def check_signal(signal: np.ndarray, prediction: str) -> None:
    """Raise ValueError where data cannot be told from predicted noise."""
    if prediction == "epsilon" and np.min(signal) <= 0:
        raise ValueError(
            "with zero_snr the first timestep holds no signal, so the clean sample does not follow "
            'from a predicted "epsilon". Such models are trained with "v_prediction"; or use '
            '"leading" spacing, which leaves that timestep out.'
        )


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raise ValueError unless the value is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}; got {value!r}")


def constant(values: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """A copy that nobody can write to, because caches hand it out again and again."""
    copy = np.array(values, dtype)
    copy.flags.writeable = False
    return copy


def at(tables: Columns, step: Step) -> Columns:
    """The row of a tuple of tables [calls] at one step, static or traced.

    Raises:
        ValueError: for a static step outside the tables.
    """
    if is_static(step):
        if not 0 <= step < len(tables[0]):
            raise ValueError(f"step must be in 0 ... {len(tables[0]) - 1}, got {step}")
        return jax.tree.map(lambda table: table[step], tables)
    return jax.tree.map(lambda table: jnp.asarray(table)[step], tables)
