"""The greedy search for plans of DiTFastAttn.

Network call by network call, and layer by layer, it tries the strategies from the strongest on, and
takes the first one with which the output of the network stays near enough to that with dense
attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from effjax import metrics
from effjax.context import Context, PyTree
from effjax.forward import Forward, Params
from effjax.layers.attention import attentions, required_attentions
from effjax.loops import Carry
from effjax.methods.attention.dit_fast_attn.patch import FastAttention, action_of
from effjax.methods.attention.dit_fast_attn.plan import KINDS, NAME, DiTFastAttnPlan, Strategy
from effjax.samplers import Sampler
from effjax.targets import wrap

METRICS = {
    "relative": metrics.relative_difference,
    "dissimilarity": metrics.structural_dissimilarity,
}

# The order in which candidates are tried, strongest first; it is part of the method.
CANDIDATES = (Strategy.AST, Strategy.WARS_ASC, Strategy.WARS, Strategy.FULL_ASC)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    """The search's patch: an action for every layer as data, so that one program runs them all."""

    actions: jax.Array
    possible: frozenset[int]
    window: int

    def __call__(self, module: nnx.Module, context: Context) -> None:
        for layer, target in enumerate(attentions(module, *KINDS)):
            action = self.actions[layer]
            guidance = context.guidance
            wrap(module, target.path, FastAttention, action, self.possible, self.window, guidance)


def search(
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    threshold: float,
    window: int | None = None,
    metric: str = "relative",
    candidates: tuple[Strategy, ...] = CANDIDATES,
    graded: bool = True,
    uncond: PyTree = None,
    progress: bool = True,
    callback: Callable[[int, jax.Array], None] | None = None,
) -> DiTFastAttnPlan:
    """Find a plan greedily, call by call and layer by layer, on the compressed trajectory.

    A candidate is taken if the loss between the network's output with it and with dense attention,
    at the same latents, is below (layer + 1) / layers * threshold. One program is compiled; a
    candidate is data. Cost: at most calls * (2 + layers * candidates) network evaluations.

    Args:
        forward: the model, without an attention plan.
        params: its parameters.
        sampler: the sampler that will run the plan; the plan fits its guidance and calls only.
        cond: conditioning of a small calibration batch (labels int[B] for DiT; the paper takes 8).
        key: PRNG key of the calibration noise.
        threshold: 0 keeps everything dense; the paper's grid is 0.025 ... 0.15.
        window: tokens to each side; an eighth of the sequence if None.
        metric: loss, a key of `METRICS`; "dissimilarity" (1 - SSIM) wants 0.001 ... 0.015.
        candidates: strategies in the order of trial; those that share over guidance halves are left
            out when the sampler is not guided.
        graded: False takes the same threshold for all layers, `threshold` being their mean.
        uncond: unconditional counterpart of `cond`; the model's null condition if None.
        progress: show a progress bar.
        callback: called as `callback(step, x)` with the compressed trajectory's latents after
            every network call.

    Raises:
        ValueError: for a negative threshold, an unknown metric, or a model without self-attention.
    """
    layers = len(required_attentions(forward.module(params), *KINDS, needed_by=NAME))
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; there are {sorted(METRICS)}")
    candidates = tuple(Strategy(c) for c in candidates if sampler.guided or not Strategy(c).halved)

    uncond = sampler.unconditional(forward, cond, uncond)
    x = jnp.zeros((jax.tree.leaves(cond)[0].shape[0], *sampler.sample_shape(forward)))
    layout = forward.layout(params, *sampler.inputs(x, cond, uncond, 0))
    if layout is None:
        raise ValueError(f"{forward.model.__name__} says no layout of its tokens to plan for")
    tokens = layout.tokens
    reach = tokens // 8 if window is None else window
    windowed = any(strategy.windowed for strategy in candidates)
    possible = frozenset(
        {action_of(Strategy.FULL, False)}
        | {action_of(strategy, False) for strategy in candidates}
        | {action_of(s, True) for s in (Strategy.FULL, *candidates) if s.dense and windowed}
    )

    def patched(actions: jax.Array) -> Forward:
        return forward.patch(_Candidate(actions, possible, reach))

    @jax.jit
    def start(params: Params, key: jax.Array, actions: jax.Array) -> Carry:
        return sampler.init(patched(actions), params, cond, key, uncond=uncond)

    @jax.jit
    def evaluate(
        params: Params, carry: Carry, step: jax.Array, actions: jax.Array, reference: jax.Array
    ) -> tuple[jax.Array, jax.Array, Carry]:
        """One call of the network: its loss against `reference`, its output, the next carry."""
        out, raw, state = sampler.network(
            patched(actions), params, carry.state, carry.x, cond, uncond, step
        )
        loss = METRICS[metric](reference, raw)
        return loss, raw, sampler.update(carry._replace(state=state), out, step)

    def actions_at(step: int, *, commit: bool) -> np.ndarray:
        # Only the run that moves on writes residuals: a trial's state is thrown away.
        fresh = commit and windowed
        column = [row[step] for row in strategies]
        return np.array([action_of(c, fresh and Strategy(c).dense) for c in column], np.int32)

    limits = threshold * (np.arange(1, layers + 1) / layers)
    if not graded:
        limits = np.full(layers, threshold)
    strategies = [[int(Strategy.FULL)] * sampler.calls for _ in range(layers)]
    dense = actions_at(0, commit=False)
    carry = start(params, key, dense)
    reference = _raw_output(sampler, forward, params, x, cond, uncond)
    bar = tqdm(
        total=sampler.calls * layers, desc="search", unit="layer", disable=not progress, leave=False
    )
    with bar:
        for step in range(sampler.calls):
            at = np.int32(step)
            if step and threshold > 0:
                _, reference, _ = evaluate(params, carry, at, dense, reference)
                for layer in range(layers):
                    for strategy in candidates:
                        strategies[layer][step] = int(strategy)
                        trial = actions_at(step, commit=False)
                        loss, _, _ = evaluate(params, carry, at, trial, reference)
                        if loss < limits[layer]:
                            break
                        strategies[layer][step] = int(Strategy.FULL)
                    bar.update()
            else:
                bar.update(layers)
            chosen = actions_at(step, commit=True)
            _, _, carry = evaluate(params, carry, at, chosen, reference)
            if callback is not None:
                callback(step, carry.x)
    return DiTFastAttnPlan(
        strategies=tuple(map(tuple, strategies)),
        tokens=tokens,
        window=reach,
        guidance=sampler.scale,
        threshold=float(threshold),
        metric=metric,
        sampler=repr(sampler.schedule),
        model=f"{forward.model.__name__}({forward.config})",
    )


def _raw_output(
    sampler: Sampler, forward: Forward, params: Params, x: jax.Array, cond: PyTree, uncond: PyTree
) -> jax.Array:
    """Zeros of the shape of the network's output: a first reference for the compiled program."""

    def raw(params: Params, x: jax.Array) -> jax.Array:
        return sampler.network(forward, params, {}, x, cond, uncond, 0)[1]

    shape = jax.eval_shape(raw, params, x)
    return jnp.zeros(shape.shape, shape.dtype)
