"""What blocks add to the image's tokens along a trajectory, for caches that are fitted to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax.calibration import Trajectory
from effjax.context import Layout
from effjax.forward import Forward, Params, StateDict
from effjax.layers.stack import Stack
from effjax.loops import Carry
from effjax.samplers import Sampler
from effjax.transform import Transform

Added = Float[Array, "B S C"]
Look = Callable[[StateDict, Added], Any]


def watch(
    caching: Transform, look: Look, forward: Forward, params: Params, data: Trajectory
) -> Iterator[Any]:
    """Sample with a step cache that always computes, and look at its state after every call.

    Args:
        caching: the step cache; its plan must compute in every call.
        look: `look(state, added)`: what to return of a call, from the state and from what all
            blocks added to the image's tokens, in float32.
        forward, params: the model without the cache.
        data: what to sample.
    """
    watched, params = caching(forward, params)
    layout = layout_of(forward, params, data)
    paths = [target.path for target in forward.target_modules(params, Stack)]

    def seen(carry: Carry) -> Any:
        return look(carry.state, _added(carry.state, paths, layout))

    return sampled(watched, params, data, seen)


def layout_of(forward: Forward, params: Params, data: Trajectory) -> Layout | None:
    """The tokens of a trajectory's network calls; None if the model does not say.

    Raises:
        ValueError: for a loop that is no sampler of a diffusion model.
    """
    sampler = sampler_of(data)
    x = jnp.zeros((jax.tree.leaves(data.cond)[0].shape[0], *sampler.sample_shape(forward)))
    uncond = sampler.unconditional(forward, data.cond, data.uncond)
    return forward.layout(params, *sampler.inputs(x, data.cond, uncond, 0))


def sampler_of(data: Trajectory) -> Sampler:
    """The sampler of a trajectory.

    Raises:
        ValueError: for a loop that is no sampler of a diffusion model.
    """
    if not isinstance(data.sampler, Sampler):
        raise ValueError(
            f"this looks at trajectories of diffusion models, and {type(data.sampler).__name__} is "
            f"no Sampler of one"
        )
    return data.sampler


def times_of(data: Trajectory) -> tuple[float, ...]:
    """The times of a trajectory's network calls.

    Raises:
        ValueError: for a loop without times.
    """
    schedule = getattr(data.sampler, "schedule", None)
    if schedule is None:
        raise ValueError(
            f"this goes by the times of network calls, and {type(data.sampler).__name__} has none"
        )
    return tuple(float(time) for time in schedule.times)


def sampled(
    forward: Forward, params: Params, data: Trajectory, look: Callable[[Carry], Any]
) -> Iterator[Any]:
    """Sample, and look at the carry after every call, within its program.

    Raises:
        ValueError: for a loop that is no sampler of a diffusion model.
    """
    sampler = sampler_of(data)
    uncond = sampler.unconditional(forward, data.cond, data.uncond)
    options = {} if data.uncond is None else {"uncond": data.uncond}
    carry = sampler.init(forward, params, data.cond, data.key, **options)

    @jax.jit
    def step(params: Params, carry: Carry, index: Array) -> tuple[Carry, Any]:
        carry = sampler.step(forward, params, carry, data.cond, uncond, index)
        return carry, look(carry)

    for index in range(sampler.calls):
        carry, seen = step(params, carry, jnp.int32(index))
        yield seen


def _added(state: StateDict, paths: list[str], layout: Layout | None) -> Added:
    """What all stacks added to the image's tokens, in float32."""
    total: Any = 0.0
    for path in paths:
        stem = f"{path}.series.0.terms.0"
        if f"{stem}.image" in state:
            added = state[f"{stem}.image"]
        else:
            added = state[f"{stem}.tokens"]
            if layout is not None and layout.text and added.shape[1] == layout.tokens:
                start = layout.text if layout.text_first else 0
                added = added[:, start : start + layout.image_tokens]
        total = total + added.astype(jnp.float32)
    return total
