"""What ViDiT-Q learns: absolute maxima of the inputs' channels, segment by segment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from effjax.capture import Tap, tapped_call
from effjax.context import PyTree, Step
from effjax.forward import Forward, Params, flatten_params
from effjax.layers.linear import Linear
from effjax.loops import Carry, Loop
from effjax.methods.quantization.vidit_q.plan import Rule, ViDiTQPlan

Calibration = Mapping[str, jax.Array]  # float32[segments, *E, I] by path of a layer


def calibrate(
    plan: ViDiTQPlan,
    forward: Forward,
    params: Params,
    sampler: Loop,
    cond: PyTree,
    *,
    key: jax.Array,
    uncond: PyTree = None,
    decay: float | None = None,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Measure the absolute maxima of the inputs of layers, while the model makes samples.

    Smoothing scales are made of these. Plans without smoothing scales need no calibration.

    Args:
        plan: whose layers and segments.
        forward, params: the model, not quantized.
        sampler: with the calls of the plan.
        cond, uncond, key: a small calibration batch (the paper takes 10 to 32 prompts).
        decay: None takes the maximum over samples and calls (second generation); a number averages
            over calls with it, each call giving the mean over samples of the maximum over tokens
            (first generation: 0.95). For a stack of matrices, whose inputs are [*E, B, ..., I], B
            stands for samples.
        progress: show a bar over the calls.

    Returns:
        float32[segments, I] by path of a layer, for a stack [segments, *E, I], of each matrix by
        the inputs that it is given; `np.savez` keeps it.

    Raises:
        ValueError: if a selector of the plan finds no layer, or the plan is made for another number
            of calls.
    """
    plan.check_calls(sampler.calls)
    paths, flat = plan.decided(forward, params), flatten_params(params)
    stacked = {path: flat[f"{path}.kernel"].ndim - 2 for path in paths}
    patch = Tap(Linear, "|".join(map(re.escape, paths)), "input")

    def channels(x: jax.Array, leading: int) -> jax.Array:
        absmax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(leading + 1, x.ndim - 1)))
        return (jnp.max if decay is None else jnp.mean)(absmax, axis=leading)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.maximum(old, new) if decay is None else decay * old + (1 - decay) * new

    uncond = sampler.unconditional(forward, cond, uncond)

    def call(params: Params, carry: Carry, step: Step) -> tuple[Carry, dict[str, jax.Array]]:
        inputs = sampler.inputs(carry.x, cond, uncond, step)
        options: dict[str, Any] = {
            "state": carry.state,
            "step": step,
            "guidance": sampler.joined,
        }
        ready = sampler.ready(forward, cond)
        raw, state, seen = tapped_call(ready, params, inputs, patch, **options)
        out = sampler.output(raw, carry.x, step)
        carry = sampler.update(carry._replace(state=state), out, step)
        return carry, {path: channels(x, stacked[path]) for path, x in seen.items()}

    carry = jax.jit(lambda params: sampler.init(forward, params, cond, key, uncond=uncond))(params)
    found: list[dict[str, jax.Array]] = [{} for _ in plan.segments]
    alike = jax.jit(call)
    for step in tqdm(range(sampler.calls), desc="calibration", disable=not progress, leave=False):
        if step in sampler.apart:
            carry, seen = jax.jit(partial(call, step=step))(params, carry)
        else:
            carry, seen = alike(params, carry, np.int32(step))
        own = found[sum(step >= boundary for boundary in plan.boundaries)]
        for path, new in seen.items():
            own[path] = new if path not in own else join(own[path], new)
    return {path: jnp.stack([own[path] for own in found]) for path in paths}


def check_calibration(
    calibration: Calibration | None,
    decided: Mapping[str, tuple[Rule | None, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    """Check that a calibration has the absolute maxima that a plan needs.

    Args:
        decided: rules of the segments, by path.
        shapes: [*E, I] of the inputs of the layers, by path.

    Raises:
        ValueError: if it is missing, or belongs to another model or plan.
    """
    smoothed = [
        path
        for path, rules in decided.items()
        if any(rule is not None and rule[3] is not None for rule in rules)
    ]
    if not smoothed:
        return
    count = len(decided[smoothed[0]])
    if calibration is None:
        raise ValueError(
            "the plan smooths channels by the absolute maxima of inputs: give "
            "transform(plan, calibrate(plan, ...)), or take alpha=None"
        )
    wrong = [
        f"{path} {'is missing' if path not in calibration else list(calibration[path].shape)}, "
        f"must be {[count, *shapes[path]]}"
        for path in smoothed
        if path not in calibration or calibration[path].shape != (count, *shapes[path])
    ]
    if wrong:
        raise ValueError(
            "the calibration belongs to another model or plan:\n  " + "\n  ".join(wrong)
        )
