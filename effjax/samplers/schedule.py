"""The interface of noise schedules, and functions that their updates have in common.

A schedule says at which times the network is called, and how each output of the network moves the
sample. It is a frozen dataclass, hashable and equal by value, so that it can be a static argument
of a jitted function. It does not call the network: `Sampler` does.

    Schedule             what all schedules have
    DiffusionSchedule    what schedules for models of a training diffusion (DDPM) have besides

All schedules follow the numerics of the schedulers in diffusers, so that a checkpoint gives the
images that it gives there. To write a new one, inherit from one of these classes, implement the
abstract methods, and declare by `config.reads` which scheduler class of diffusers it stands for.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Key

from effjax.context import PyTree, Step
from effjax.fields import Checked, Count, Natural
from effjax.samplers import config as configuration
from effjax.samplers.tables import Betas, Spacing, check_steps

Prediction = Literal["epsilon", "sample", "v_prediction"]


class Schedule(Checked, abc.ABC):
    """The interface of a noise schedule.

    A subclass is a frozen dataclass of scalars and tuples. `Sampler` makes a sample as follows:
    noise with the standard deviation `initial_scale`, `init` for the memory, and then, for each of
    the `calls`, one network call at `times[step]` and one `update`.

    Attributes:
        steps: number of denoising steps from noise to data.
        begin: steps at the start that are left out: sampling begins with a noisy image (image to
            image, SDEdit, arXiv 2108.01073).
    """

    steps: int
    begin: int = 0

    @property
    def calls(self) -> int:
        """Number of network calls for a sample; one a step, unless a step takes several calls."""
        return self.steps - self.begin

    @property
    @abc.abstractmethod
    def times(self) -> np.ndarray:
        """float32[calls]: the time that the network is fed at each call, in training timesteps."""

    @property
    def initial_scale(self) -> float:
        """Standard deviation of the initial noise."""
        return 1.0

    @property
    def dynamic(self) -> bool:
        """Whether the noise levels depend on the number of tokens of a sample, see `for_tokens`."""
        return False

    def for_tokens(self, tokens: int) -> Schedule:
        """The schedule for samples of so many tokens; the same one if the number has no effect."""
        return self

    def from_strength(self, strength: float) -> Schedule:
        """The schedule that changes an image: the last `strength` of the steps, as in diffusers.

        Args:
            strength: above 0 and at most 1; 1 begins with noise and takes all steps.

        Raises:
            ValueError: for another strength, and for schedules of your own without a field `begin`.
        """
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
        begin = min(int(self.steps - self.steps * strength), self.steps - 1)
        if "begin" not in {field.name for field in dataclasses.fields(self)}:  # pyright: ignore
            raise ValueError(f"a {type(self).__name__} cannot leave out steps at the start")
        return dataclasses.replace(self, begin=begin)  # pyright: ignore[reportArgumentType]

    def init(self, x: Float[Array, "B ..."]) -> PyTree:
        """What the first `update` gets as its memory.

        Multistep schedules remember earlier outputs in it. Others have none: ().

        Args:
            x: the initial noise, for its shape and dtype.
        """
        return ()

    @abc.abstractmethod
    def update(
        self,
        x: Float[Array, "B ..."],
        out: Float[Array, "B ..."],
        step: Step,
        memory: PyTree,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B ..."], PyTree]:
        """Move the sample from the noise level of one call to that of the next call.

        Args:
            x: the sample, float32[B, ..., C].
            out: the output of the network for `(x, times[step])`, after guidance, [B, ..., C] or
                [B, ..., 2 C]. The second C channels are a learned variance, which only `DDPM` with
                `variance="learned_range"` reads.
            step: index of the call: an int, or int32[] that is traced.
            memory: what `init` or the last update returned.
            keys: one PRNG key for each sample. Only schedules that add noise read them.

        Returns:
            The sample float32[B, ..., C] at the next noise level, and the next memory.
        """

    @abc.abstractmethod
    def add_noise(
        self, x: Float[Array, "B ..."], noise: Float[Array, "B ..."], time: ArrayLike
    ) -> Float[Array, "B ..."]:
        """Add noise to clean samples, as in training.

        Args:
            x: clean samples.
            noise: unit noise of the same shape.
            time: in training timesteps, one for all samples or [B].
        """

    def start(
        self, x: Float[Array, "B ..."], noise: Float[Array, "B ..."]
    ) -> Float[Array, "B ..."]:
        """Clean samples with the noise of the first call: where changing an image begins.

        A schedule whose noise levels are between those of training says its own.
        """
        return self.add_noise(x, noise, self.times[0])

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], *, steps: int, tokens: int | None = None, **options: Any
    ) -> Schedule:
        """Read the contents of a diffusers `scheduler_config.json`.

        Args:
            config: the parsed file; `_class_name` chooses the schedule.
            steps: number of denoising steps, which the file does not hold.
            tokens: image tokens of the model's sequence, for files with a dynamic shift.
            options: fields of the schedule that the file does not hold (such as `eta`), or that are
                to differ from it.

        Raises:
            ValueError: for an unsupported class, or options, all listed at once.
        """
        schedule = configuration.from_config(config, steps=steps, tokens=tokens, **options)
        if not isinstance(schedule, cls):
            raise ValueError(
                f"{config['_class_name']} is read as {type(schedule).__name__}, not as "
                f"{cls.__name__}. Use Schedule.from_config; another schedule can take over its "
                f"betas and prediction."
            )
        return schedule

    def to_config(self) -> dict[str, Any]:
        """The contents of a diffusers `scheduler_config.json` for this schedule.

        The file holds neither `steps` nor what diffusers' pipelines pass at run time: `eta`, and
        the `mu` and `spacing` of `FlowMatchEuler`.
        """
        return configuration.to_config(self)


@dataclasses.dataclass(frozen=True)
class DiffusionSchedule(Schedule):
    """Base of schedules for models that were trained with a diffusion of many small noise steps.

    Its fields are those that every scheduler_config.json of such a class has. A subclass adds its
    own, says its numbers in `tables`, and how a call moves the sample in `update`.

    Attributes:
        steps: number of steps, one network call each.
        betas: noise of the training diffusion.
        prediction: what the network predicts: "epsilon", "sample" or "v_prediction".
        spacing: "leading", "trailing" or "linspace": which training timesteps the network is called
            at, see `spaced_timesteps`.
        steps_offset: added to leading timesteps.
        begin: steps at the start that are left out.
    """

    steps: Count
    betas: Betas = dataclasses.field(default=Betas())
    prediction: Prediction = "epsilon"
    spacing: Spacing = "leading"
    steps_offset: Natural = 0
    begin: Natural = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.steps, self.betas.train_timesteps, self.begin)
        self.tables()  # raises for timesteps that do not fit

    @abc.abstractmethod
    def tables(self) -> Any:
        """A named tuple of float32[calls], `times` among them, computed once for equal schedules.

        Raises:
            ValueError: if the fields give no timesteps, or none that the network can be called at.
        """

    @property
    def times(self) -> np.ndarray:
        return self.tables().times

    @property
    def alphas_cumprod(self) -> np.ndarray:
        """float64[train_timesteps]: the share of the signal's variance that is left at each."""
        return self.betas.alphas_cumprod

    def add_noise(
        self, x: Float[Array, "B ..."], noise: Float[Array, "B ..."], time: ArrayLike
    ) -> Float[Array, "B ..."]:
        time = jnp.asarray(time).astype(jnp.int32)
        left = self.alphas_cumprod
        signal = jnp.asarray(np.sqrt(left), jnp.float32)[time]
        sigma = jnp.asarray(np.sqrt(1 - left), jnp.float32)[time]
        return per_sample(signal, x) * x + per_sample(sigma, x) * noise


def split_output(
    out: Float[Array, "B ..."], x: Float[Array, "B ..."]
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."] | None]:
    """Split the output of a network into its prediction and its learned variance.

    Args:
        out: [B, ..., C], or [B, ..., 2 C] from a network that learned variances too.
        x: the sample [B, ..., C].

    Returns:
        The prediction float32[B, ..., C], and the variance float32[B, ..., C] or None.

    Raises:
        ValueError: for an output of another shape.
    """
    channels = x.shape[-1]
    if out.shape[:-1] != x.shape[:-1] or out.shape[-1] not in (channels, 2 * channels):
        raise ValueError(
            f"for samples {list(x.shape)} the network must return the same shape, or twice the "
            f"channels (with a learned variance); it returned {list(out.shape)}"
        )
    out = out.astype(jnp.float32)
    if out.shape[-1] == channels:
        return out, None
    return out[..., :channels], out[..., channels:]


def data_and_noise(
    prediction: str,
    x: Float[Array, "B ..."],
    out: Float[Array, "B ..."],
    signal: Float[Array, ""] | np.float32,
    sigma: Float[Array, ""] | np.float32,
) -> tuple[Float[Array, "B ..."], Float[Array, "B ..."]]:
    """Find the clean sample and the noise in a noisy sample, from what the network predicts.

    The sample is x = signal * data + sigma * noise. The network predicts the noise ("epsilon"), the
    data ("sample"), or v = signal * noise - sigma * data ("v_prediction", arXiv 2202.00512; with
    signal^2 + sigma^2 = 1).

    Args:
        prediction: which of these.
        x: the sample, float32[B, ..., C].
        out: the prediction, float32[B, ..., C].
        signal, sigma: factors at the time of the call.

    Returns:
        The data and the noise, float32[B, ..., C] each.
    """
    if prediction == "epsilon":
        return (x - sigma * out) / signal, out
    if prediction == "sample":
        return out, (x - signal * out) / sigma
    return signal * x - sigma * out, signal * out + sigma * x  # v = signal * noise - sigma * data


def per_sample(value: Float[Array, "..."], x: Float[Array, "B ..."]) -> Float[Array, "..."]:
    """Reshape one value, or one for each sample [B], so that it broadcasts over x [B, ...]."""
    return value.reshape(value.shape + (1,) * (x.ndim - 1))


def step_noise(
    keys: Key[Array, " B"] | None, step: Step, shape: Sequence[int]
) -> Float[Array, "B ..."]:
    """Draw the noise of a step.

    The noise of a sample depends only on its own key and on the step. So a sample is the same in a
    batch as alone.

    Args:
        keys: one PRNG key for each sample.
        step: index of the call.
        shape: of one sample.

    Returns:
        Unit noise, float32[B, *shape].

    Raises:
        ValueError: if there are no keys.
    """
    if keys is None:
        raise ValueError("this schedule adds noise at every step: pass keys, one for each sample")

    def one(key: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(key, step), tuple(shape), jnp.float32)

    return jax.vmap(one)(keys)
