"""The exponent of the smoothing scales, swept on samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effjax.context import PyTree
from effjax.forward import Forward, Params, flatten_params
from effjax.methods.quantization.vidit_q.calibration import Calibration
from effjax.methods.quantization.vidit_q.leaves import balance
from effjax.methods.quantization.vidit_q.plan import ViDiTQPlan
from effjax.quant import FLOAT
from effjax.quant.hadamard import Rotation
from effjax.samplers import Sampler
from effjax.search.sensitivity import Metric, Preparation, Rounding, sqnr


def best_alpha(
    plan: ViDiTQPlan,
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    calibration: Calibration,
    grid: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99),
    metric: Metric = sqnr,
    uncond: PyTree = None,
) -> ViDiTQPlan:
    """Find the alpha of the smoothing scales whose samples are nearest to the float model's.

    One program is compiled, and run once for each alpha of the grid.

    Args:
        plan: of one segment; the alpha of all its smoothed layers is replaced.
        forward, params: the model, not quantized.
        sampler, cond, uncond, key: what is sampled, always from the same noise.
        calibration: of the plan.
        grid: to try.
        metric: of dense samples and others, higher is better.

    Raises:
        ValueError: for a plan of several segments or without smoothing scales.
    """
    decided = plan.decided(forward, params)
    rules = {path: own[0] for path, own in decided.items() if own[0] is not None}
    paths = [path for path, rule in rules.items() if rule[3] is not None]
    if plan.boundaries or not paths:
        raise ValueError("alpha is swept on a plan of one segment with smoothed layers")
    flat = flatten_params(params)

    @jax.jit
    def sample(
        params: Params, bits: jax.Array, smoothing_scales: Mapping[str, jax.Array]
    ) -> jax.Array:
        preparations = {
            path: Preparation(
                smoothing_scales.get(path),
                Rotation(flat[f"{path}.kernel"].shape[-2], plan.seed, plan.strict)
                if rule[4]
                else None,
            )
            for path, rule in rules.items()
        }
        rounded = forward.patch(Rounding(bits, preparations))
        return sampler(rounded, params, cond, key, uncond=uncond)

    def smoothing_scales(alpha: float) -> dict[str, jax.Array]:
        return {p: balance(flat[f"{p}.kernel"], calibration[p][0], alpha) for p in paths}

    bits = jnp.asarray([rule[1:3] for rule in rules.values()], jnp.int32)
    dense = sample(params, jnp.full_like(bits, FLOAT), smoothing_scales(grid[0]))
    scores = [float(metric(dense, sample(params, bits, smoothing_scales(alpha)))) for alpha in grid]
    best = grid[int(np.argmax(scores))]
    swept = tuple(
        (selector, w, a, None if alpha is None else best, rotate)
        for selector, w, a, alpha, rotate in plan.segments[0][1]
    )
    return dataclasses.replace(plan, segments=((0, swept),))
