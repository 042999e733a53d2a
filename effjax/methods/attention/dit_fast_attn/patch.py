"""The patch of DiTFastAttn: attention that follows a plan, and keeps what later calls use again."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.context import (
    Context,
    PyTree,
    State,
    StateTree,
    Step,
    current_layout,
    is_static,
    switch,
)
from effjax.forward import Forward, Params
from effjax.guidance import Guidance, current_guidance
from effjax.layers.attention import Attention, AttentionCore, attentions
from effjax.methods.attention.dit_fast_attn.plan import KINDS, NAME, DiTFastAttnPlan, Strategy
from effjax.targets import Wrapper, wrap
from effjax.transform import Pair, Transform
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.residual_attention import dense_and_sparse_attention


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

    return Transform(NAME, plan, apply)


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
            row = [action_of(value, fresh) for value, fresh in zip(strategies, need)]
            step = context.step
            action = row[step] if is_static(step) else jnp.asarray(row, jnp.int32)[step]
            wrap(
                module, target.path, FastAttention, action, set(row), plan.window, context.guidance
            )


def action_of(value: int, fresh: bool) -> int:
    """The branch of the compiled program: a strategy, and whether it refreshes the residual."""
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
    united = ("actions",)
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
        self.output = StateTree.of(inner)
        self.residual = State()  # a state that no action touches is not kept

    @property
    def shares_output(self) -> bool:
        return any(Strategy(action // 2) is Strategy.AST for action in self.actions)

    def __call__(self, x: PyTree, *positions: jax.Array) -> PyTree:
        branches = {action: partial(_attend, action=action) for action in self.actions}
        return switch(self.action, branches, self, x, *positions)


def _attend(module: FastAttention, x: PyTree, *positions: jax.Array, action: int) -> PyTree:
    """One action on tokens [B, N, C], or on streams of them, after norm and modulation."""
    strategy, fresh = Strategy(action // 2), bool(action % 2)
    if strategy is Strategy.AST:
        return module.output.read(x)
    guidance = current_guidance() or Guidance()  # never asked if the batch is not guided
    attention = module.inner
    own = guidance.branch("cond", x) if strategy.halved else x
    q, k, v = attention.project(own)
    q, k = attention.rotate(q, k, *positions)
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
            f"text too. Search a plan with candidates that have no window (AST, FULL_ASC), or one "
            f"of dit_fast_attn_v2, whose windows leave text dense."
        )


def _check_tokens(tokens: int, context: Context) -> None:
    if context.layout is not None and context.layout.tokens != tokens:
        raise ValueError(
            f"the plan was made for {tokens} tokens, this call has {context.layout.tokens}. "
            f"Search a plan at this image size."
        )
