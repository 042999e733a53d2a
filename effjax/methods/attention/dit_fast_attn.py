"""DiTFastAttn: window attention, and attention shared over steps and guidance halves.

Buys: most self-attention FLOPs of a trained diffusion transformer, without training. For every
layer and network call a plan names one of five strategies, found by a greedy search:

=========  ==========================================================================
FULL       dense attention
AST        the module's last output again: no projections, no attention (sharing over steps)
WARS_ASC   WARS on the conditional half only, the result used for both halves
WARS       window attention plus the residual (dense - window) of the last FULL call
FULL_ASC   FULL on the conditional half only, the result used for both halves
=========  ==========================================================================

Static: the plan, hence which caches exist. Dynamic: the step, hence the strategy (a branch per
layer; with a static step there is none). Caches per layer: the module's output [B, N, C] if the
layer uses AST, the residual [B, N, H, D] if it uses a window.

Cost of one layer and call, in multiply-adds of QK^T and PV, with A = 2 B N^2 C and
b = ((2W + 1) N - W (W + 1)) / N^2: FULL A, FULL that refreshes the residual A (1 + b), WARS A b,
half of that with ASC, AST 0. See `attention_macs`. On TPU and GPU a FULL that refreshes costs about
A: one kernel makes both (`pallas_kernels.residual_attention`). XLA makes the logits of short
sequences once, for A (1 + b / 2).

Paper: DiTFastAttn, arXiv 2406.08552. As in the released code the window reaches W = N / 8 tokens to
*each* side. Unlike it, WARS_ASC reads the conditional half of the residual in either batch order.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from functools import cached_property, partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from effjax import metrics, testing
from effjax.calibration import Trajectory
from effjax.context import (
    Context,
    Guidance,
    PyTree,
    State,
    StateTree,
    Step,
    current_layout,
    is_static,
    switch,
)
from effjax.fields import Checked, Count, Natural, NotNegative
from effjax.forward import Forward, Params
from effjax.layers.attention import Attention, AttentionCore, attentions
from effjax.loops import Carry
from effjax.samplers import Sampler
from effjax.targets import AttentionKind, Wrapper, wrap
from effjax.transform import Method, Pair, Plan, Shorthand, Transform
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, visible_pairs
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.residual_attention import dense_and_sparse_attention

KINDS: tuple[AttentionKind, ...] = ("self", "joint")  # of attention that plans are for

METRICS = {
    "relative": metrics.relative_difference,
    "dissimilarity": metrics.structural_dissimilarity,
}


class Strategy(enum.IntEnum):
    """What one attention layer does in one network call."""

    FULL = 0
    AST = 1
    WARS_ASC = 2
    WARS = 3
    FULL_ASC = 4

    @property
    def dense(self) -> bool:
        return self in (Strategy.FULL, Strategy.FULL_ASC)

    @property
    def windowed(self) -> bool:
        return self in (Strategy.WARS, Strategy.WARS_ASC)

    @property
    def halved(self) -> bool:
        return self in (Strategy.WARS_ASC, Strategy.FULL_ASC)


# The order in which the search tries candidates, strongest first; it is part of the method.
CANDIDATES = (Strategy.AST, Strategy.WARS_ASC, Strategy.WARS, Strategy.FULL_ASC)


@dataclasses.dataclass(frozen=True)
class DiTFastAttnPlan(Plan):
    """A strategy for every layer and network call.

    Attributes:
        strategies: `Strategy` numbers by layer and network call; every layer starts with FULL.
        tokens: sequence length N the plan was made for.
        window: tokens that the window reaches to each side.
        guidance: guidance scale of the search; another scale wants another plan.
        threshold: the search's threshold, None for a plan written by hand.
        metric: the search's loss, a key of `METRICS`.
        sampler: the search's sampler; another schedule wants another plan.
        model: the model the plan was made for.
    """

    strategies: tuple[tuple[int, ...], ...]
    tokens: Count
    window: Natural
    guidance: NotNegative | None = None
    threshold: NotNegative | None = None
    metric: str = "relative"
    sampler: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strategies or not self.strategies[0]:
            raise ValueError(
                "a plan needs at least one layer and one network call; strategies is empty"
            )
        if len({len(row) for row in self.strategies}) > 1:
            raise ValueError(
                f"every layer needs a code for every network call; the rows have lengths "
                f"{[len(row) for row in self.strategies]}"
            )
        allowed = {int(strategy) for strategy in Strategy}
        wrong = sorted({value for row in self.strategies for value in row} - allowed)
        if wrong:
            names = {strategy.name: int(strategy) for strategy in Strategy}
            raise ValueError(f"unknown strategies {wrong}; there are {names}")
        late = [layer for layer, row in enumerate(self.strategies) if row[0] != Strategy.FULL]
        if late:
            raise ValueError(
                f"layers {late} do not start with FULL: sharing and window strategies need the "
                f"output and the residual of an earlier FULL call"
            )

    def describe(self) -> str:
        """How often each strategy occurs."""
        strategies = [value for row in self.strategies for value in row]
        shares = ", ".join(
            f"{s.name} {strategies.count(s) / len(strategies):.0%}" for s in Strategy
        )
        return f"{self.layers} layers, {self.calls} calls, window {self.window}: {shares}"

    @property
    def layers(self) -> int:
        return len(self.strategies)

    @property
    def calls(self) -> int:
        return len(self.strategies[0])

    @cached_property
    def need(self) -> tuple[tuple[bool, ...], ...]:
        """Whether a dense call must refresh the residual: a window follows before the next one."""
        return tuple(
            tuple(
                Strategy(value).dense
                and next((not Strategy(c).dense for c in row[t + 1 :] if c != Strategy.AST), False)
                for t, value in enumerate(row)
            )
            for row in self.strategies
        )


def uniform(
    pattern: tuple[int, ...], *, layers: int, calls: int, tokens: int, window: int | None = None
) -> DiTFastAttnPlan:
    """The plan that gives every layer FULL first and then repeats a pattern of strategies.

    Args:
        pattern: strategies of the calls after the first, repeated as long as there are calls.
        layers: attention layers of the model.
        calls: network calls of a trajectory.
        tokens: of the model's sequence.
        window: tokens that windows reach to each side; an eighth of `tokens` if None.
    """
    row = (int(Strategy.FULL), *(int(pattern[t % len(pattern)]) for t in range(calls - 1)))
    reach = tokens // 8 if window is None else window
    return DiTFastAttnPlan(strategies=(row,) * layers, tokens=tokens, window=reach)


def attention_macs(plan: DiTFastAttnPlan, *, batch: int, width: int) -> np.ndarray:
    """Useful multiply-adds of QK^T and PV, int[layers, calls] (the module's cost formula).

    Args:
        batch: network batch B, both guidance halves together.
        width: heads * head_dim.
    """
    dense = 2 * batch * plan.tokens**2 * width
    window = 2 * batch * visible_pairs(Band(plan.window), plan.tokens) * width

    def cost(value: int, need: bool) -> int:
        strategy = Strategy(value)
        if strategy is Strategy.AST:
            return 0
        macs = window if strategy.windowed else dense + need * window
        return macs // 2 if strategy.halved else macs

    return np.array(
        [[cost(c, n) for c, n in zip(*rows)] for rows in zip(plan.strategies, plan.need)],
        dtype=np.int64,
    )


def transform(plan: DiTFastAttnPlan) -> Transform:
    """Run a model's self-attention by the plan.

    Raises:
        ValueError: if the model has another number of self-attention layers; while tracing, if the
            sequence length differs, a step lies outside the plan, or the batch is not guided though
            the plan shares over guidance halves.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        layers = len(attentions(forward.module(params), *KINDS))
        if layers != plan.layers:
            raise ValueError(
                f"the plan has {plan.layers} layers (model {plan.model!r}), but this model has "
                f"{layers} self-attention layers. Search a plan for this model."
            )
        return forward.patch(DiTFastAttn(plan)), params

    return Transform(METHOD.name, plan, apply)


@dataclasses.dataclass(frozen=True)
class DiTFastAttn:
    """The patch: every self-attention layer follows its row of the plan."""

    plan: DiTFastAttnPlan

    @property
    def calls(self) -> int:
        """Network calls the plan is made for; samplers compare it with their own."""
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> None:
        plan = self.plan
        _check_tokens(plan.tokens, context)
        if is_static(context.step) and not 0 <= context.step < plan.calls:
            raise ValueError(
                f"step {context.step} lies outside the plan, which has {plan.calls} network calls. "
                f"Use a sampler with {plan.calls} calls, or search a plan for this one."
            )
        for target, strategies, need in zip(attentions(module, *KINDS), plan.strategies, plan.need):
            row = [_action(value, fresh) for value, fresh in zip(strategies, need)]
            step = context.step
            action = row[step] if is_static(step) else jnp.asarray(row, jnp.int32)[step]
            wrap(
                module, target.path, FastAttention, action, set(row), plan.window, context.guidance
            )


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


# A branch of the compiled program is a strategy and whether it refreshes the residual.
def _action(value: int, fresh: bool) -> int:
    return 2 * int(value) + int(fresh)


class FastAttention(Wrapper):
    """Self-attention that does one of several actions, and keeps what later calls share.

    Args:
        action: what to do in this call, static or traced.
        actions: all actions of this layer; only their branches and caches are made.
        window: tokens that the window reaches to each side.
        guidance: arrangement of the batch, None if it is not guided.
    """

    replaces_internals = True
    inner: Attention

    def __init__(
        self,
        inner: nnx.Module,
        action: Step,
        actions: set[int] | frozenset[int],
        window: int,
        guidance: Guidance | None,
    ):
        super().__init__(inner)
        used = {Strategy(action // 2) for action in actions}
        if guidance is None and any(strategy.halved for strategy in used):
            raise ValueError(
                "the plan shares attention over guidance halves (WARS_ASC, FULL_ASC), but this "
                "call is not guided. Sample with guidance, or search a plan without it."
            )
        others = set() if guidance is None else {*guidance.branches} - {"cond", "uncond"}
        if others and any(strategy.halved for strategy in used):
            raise ValueError(
                f"the plan shares the conditional half of attention with all others (WARS_ASC, "
                f"FULL_ASC), but this call has the branches {', '.join(sorted(others))} too, which "
                f"would become equal to it. Search a plan without these strategies."
            )
        self.action = action if is_static(action) else nnx.data(action)
        self.actions = tuple(sorted(actions))
        self.window = window
        self.guidance = guidance or Guidance()  # never asked if the batch is not guided
        self.shares_output = Strategy.AST in used
        self.output = StateTree.of(inner)
        self.residual = State()  # a state that no action touches is not kept

    def __call__(self, x: PyTree) -> PyTree:
        branches = {action: partial(_attend, action=action) for action in self.actions}
        return switch(self.action, branches, self, x)


def _attend(module: FastAttention, x: PyTree, *, action: int) -> PyTree:
    """One action on tokens [B, N, C], or on streams of them, after norm and modulation."""
    strategy, fresh = Strategy(action // 2), bool(action % 2)
    if strategy is Strategy.AST:
        return module.output.read(x)
    guidance = module.guidance
    attention = module.inner
    own = guidance.branch("cond", x) if strategy.halved else x
    q, k, v = attention.project(own)
    q, k = attention.rotate(q, k)
    if strategy.windowed:
        batch = jax.tree.leaves(x)[0].shape[0]
        residual = module.residual.read((batch, *q.shape[1:]), q.dtype)
        residual = guidance.branch("cond", residual) if strategy.halved else residual
        o = _window(q, k, v, module.window) + residual
    else:
        o, window = _dense(attention, q, k, v, module.window if fresh else None)
        if window is not None:
            residual = (o.astype(jnp.float32) - window.astype(jnp.float32)).astype(o.dtype)
            module.residual.write(guidance.duplicate(residual) if strategy.halved else residual)
    y = attention.merge(o, own)
    y = guidance.duplicate(y) if strategy.halved else y
    if module.shares_output:
        module.output.write(y)
    return y


def _dense(
    attention: Attention, q: jax.Array, k: jax.Array, v: jax.Array, window: int | None
) -> tuple[jax.Array, jax.Array | None]:
    """Dense attention, and window attention beside it if asked for."""
    if window is None:
        return attention.core(q, k, v), None
    if type(attention.core) is AttentionCore and window < q.shape[1] - 1:
        _check_raster()
        with jax.named_scope("attention"):
            return dense_and_sparse_attention(q, k, v, Band(window))
    return attention.core(q, k, v), _window(q, k, v, window)


def _window(q: jax.Array, k: jax.Array, v: jax.Array, window: int) -> jax.Array:
    _check_raster()
    with jax.named_scope("attention"):
        if window >= q.shape[1] - 1:
            return dense_attention(q, k, v)
        return block_sparse_attention(q, k, v, Band(window))


def _check_raster() -> None:
    """Raise ValueError if the tokens of this call are no image alone, which windows are for."""
    layout = current_layout()
    if layout is None:
        return
    layout.raster("window attention (dit_fast_attn's WARS)")
    if layout.text:
        raise ValueError(
            f"window attention is for image tokens alone, and this sequence has {layout.text} of "
            f"text too. Search a plan with candidates that have no window (AST, FULL_ASC)."
        )


def _check_tokens(tokens: int, context: Context) -> None:
    if context.layout is not None and context.layout.tokens != tokens:
        raise ValueError(
            f"the plan was made for {tokens} tokens, this call has {context.layout.tokens}. "
            f"Search a plan at this image size."
        )


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
    layers = len(attentions(forward.module(params), *KINDS))
    if threshold < 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; there are {sorted(METRICS)}")
    candidates = tuple(Strategy(c) for c in candidates if sampler.guided or not Strategy(c).halved)

    uncond = sampler.unconditional(forward, cond, uncond)
    x = jnp.zeros((jax.tree.leaves(cond)[0].shape[0], *sampler.sample_shape(forward)))
    layout = forward.layout(params, *sampler.inputs(x, cond, uncond, 0))
    if not layers or layout is None:
        raise ValueError(f"{forward.model.__name__} has no self-attention layers to plan for")
    tokens = layout.tokens
    reach = tokens // 8 if window is None else window
    windowed = any(strategy.windowed for strategy in candidates)
    possible = frozenset(
        {_action(Strategy.FULL, False)}
        | {_action(strategy, False) for strategy in candidates}
        | {_action(s, True) for s in (Strategy.FULL, *candidates) if s.dense and windowed}
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
        return np.array([_action(c, fresh and Strategy(c).dense) for c in column], np.int32)

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


@dataclasses.dataclass(frozen=True)
class Goals(Checked):
    """What a search aims at.

    Attributes:
        threshold: loss that a layer may add; larger saves more, 0 keeps everything dense.
        window: tokens that windows reach to each side; an eighth of the sequence if none.
        metric: the loss; dissimilarity is 1 - SSIM, and wants thresholds of 0.001 ... 0.015.
    """

    threshold: NotNegative = 0.1
    window: Count | None = None
    metric: Literal["relative", "dissimilarity"] = "relative"


def _search(goals: Goals, forward: Forward, params: Params, data: Trajectory) -> DiTFastAttnPlan:
    return search(
        *(forward, params, data.sampler, data.cond),
        key=data.key,
        uncond=data.uncond,
        **dataclasses.asdict(goals),
    )


@dataclasses.dataclass(frozen=True)
class Uniform(Shorthand):
    """Every layer begins with FULL and then repeats a pattern of strategies.

    Attributes:
        pattern: of the calls after the first.
        calls: network calls of a trajectory.
        window: tokens that windows reach to each side; an eighth of the sequence if none.
    """

    pattern: tuple[Literal["FULL", "AST", "WARS_ASC", "WARS", "FULL_ASC"], ...]
    calls: Count
    window: Count | None = None

    def plan(self, forward: Forward, params: Params) -> DiTFastAttnPlan:
        return uniform(
            tuple(Strategy[name] for name in self.pattern),
            layers=len(attentions(forward.module(params), *KINDS)),
            calls=self.calls,
            tokens=forward.config.tokens,
            window=self.window,
        )


def _raw_output(
    sampler: Sampler, forward: Forward, params: Params, x: jax.Array, cond: PyTree, uncond: PyTree
) -> jax.Array:
    """Zeros of the shape of the network's output: a first reference for the compiled program."""

    def raw(params: Params, x: jax.Array) -> jax.Array:
        return sampler.network(forward, params, {}, x, cond, uncond, 0)[1]

    shape = jax.eval_shape(raw, params, x)
    return jnp.zeros(shape.shape, shape.dtype)


def _identity(subject: testing.Subject) -> DiTFastAttnPlan:
    return _for(subject, (Strategy.FULL,))


def _ladder(subject: testing.Subject) -> tuple[DiTFastAttnPlan, ...]:
    patterns = (
        (Strategy.WARS,),
        (Strategy.FULL_ASC,),
        (Strategy.WARS_ASC,),
        (Strategy.WARS_ASC, Strategy.AST),
    )
    return tuple(_for(subject, pattern) for pattern in patterns)


def _for(subject: testing.Subject, pattern: tuple[Strategy, ...]) -> DiTFastAttnPlan:
    layers = len(attentions(subject.forward.module(subject.params), *KINDS))
    calls, tokens = subject.sampler.calls, subject.forward.config.tokens
    return uniform(pattern, layers=layers, calls=calls, tokens=tokens)


METHOD = Method(
    name="dit_fast_attn",
    paper="DiTFastAttn: Attention Compression for Diffusion Transformer Models, arXiv 2406.08552",
    seams=("patches",),
    domain="images",
    plan=DiTFastAttnPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_dit,
    systems=("DiTFastAttn",),
    shorthands=(Uniform,),
    data=Trajectory,
    goals=Goals,
    search=_search,
)
