"""The search for plans of DiTFastAttnV2: one calibration run that decides head by head.

At every network call but the first, each attention layer computes dense attention and what every
candidate would give, measures the error of each candidate in each head, and solves a small 0/1
program for the heads of that layer. What the chosen candidates give goes on through the network,
and is what "cached" means in the next call: the run is the compressed trajectory itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from effjax.context import Context, PyTree, State, Step
from effjax.forward import Forward, Params
from effjax.layers.attention import Attention, attentions, required_attentions
from effjax.loops import Carry
from effjax.methods.attention.dit_fast_attn_v2.patch import (
    Tokens,
    check_layout,
    heads_before_core,
    heads_of,
    image_layers,
    tokens_of,
    windows,
)
from effjax.methods.attention.dit_fast_attn_v2.plan import (
    CACHED,
    CANDIDATES,
    DENSE,
    KINDS,
    NAME,
    DiTFastAttnV2Plan,
    half_width_of,
    saving,
    uniform,
)
from effjax.samplers import Sampler
from effjax.search.allocation import Budget, allocate
from effjax.targets import Wrapper, wrap


class Choice(NamedTuple):
    """How heads are decided; static.

    Attributes:
        kinds: half width and order of each candidate.
        delta: what the errors of a layer's chosen candidates may sum to.
        c_head: a candidate is allowed in a head if its error is below c_head / heads * delta; None
            for no such limit.
        uniform_saving: whether all candidates save the same.
    """

    kinds: tuple[tuple[int, bool], ...]
    delta: float
    c_head: float | None
    uniform_saving: bool

    def savings(self, tokens: Tokens) -> np.ndarray:
        """What each candidate saves of a head."""
        if self.uniform_saving:
            return np.ones(len(self.kinds))
        return np.array([saving(width, tokens.image, tokens.text) for width, _ in self.kinds])


def choose(errors: np.ndarray, savings: np.ndarray, choice: Choice) -> np.ndarray:
    """Solve the 0/1 program of a layer: which candidate each head takes, and -1 for none.

        maximize sum x_hc saving_c    so that    sum_c x_hc <= 1,  sum x_hc error_hc <= delta

    over the candidates that the limit of a head allows.

    Args:
        errors: float[heads, candidates].
        savings: float[candidates].
        choice: delta and c_head.

    Returns:
        int32[heads].
    """
    heads = len(errors)
    limit = np.inf if choice.c_head is None else choice.c_head / heads * choice.delta
    allowed = np.isfinite(errors) & (errors < limit) & (errors <= choice.delta)
    allowed &= choice.delta > 0
    if not allowed.any():
        return np.full(heads, -1, np.int32)
    # Dense attention is one more candidate, which saves nothing and costs nothing.
    costs = np.pad(np.where(allowed, errors, np.inf), ((0, 0), (1, 0)))
    scores = np.broadcast_to(np.pad(savings, (1, 0)), costs.shape)
    found = allocate(np.array(scores), [Budget(costs, choice.delta, name="delta")])
    return np.asarray(found.choice, np.int32) - 1


def relative_errors(candidates: list[jax.Array], dense: jax.Array) -> jax.Array:
    """float32[H, C]: mean (o - y)^2 / mean (y - mean y)^2, means over all but the heads.

    Args:
        candidates: what each gives, [B, S, H, D].
        dense: y, of the same shape.
    """
    dense, axes = dense.astype(jnp.float32), (0, 1, 3)
    spread = jnp.mean(jnp.square(dense - jnp.mean(dense, axis=axes, keepdims=True)), axis=axes)
    errors = [jnp.mean(jnp.square(o.astype(jnp.float32) - dense), axis=axes) for o in candidates]
    some = jnp.maximum(spread, jnp.finfo(jnp.float32).tiny)  # of a constant head
    return jnp.stack(errors, axis=1) / some[:, None]


@dataclasses.dataclass(frozen=True)
class Calibration:
    """The search's patch: every attention layer measures, decides, and gives what it decided.

    Attributes:
        plan: with the tokens of the model; its half widths are not read.
        choice: how heads are decided.
    """

    plan: DiTFastAttnV2Plan
    choice: Choice

    def __call__(self, module: nnx.Module, context: Context) -> None:
        check_layout(self.plan, context)
        for layer, target in enumerate(attentions(module, *KINDS)):
            tokens = tokens_of(self.plan, layer)
            wrap(module, target.path, CalibratedAttention, context.step, self.choice, tokens)


class CalibratedAttention(Wrapper):
    """Attention that decides what its heads do in this call.

    Args:
        step: of the call; the first one is dense.
        choice: how heads are decided.
        tokens: of its sequence.
    """

    replaces_internals = True
    apart = True
    inner: Attention

    def __init__(self, inner: nnx.Module, step: Step, choice: Choice, tokens: Tokens):
        super().__init__(inner)
        self.step = nnx.data(jnp.asarray(step))
        self.choice, self.tokens = choice, tokens
        self.output, self.chosen, self.errors = State(), State(), State()

    def __call__(self, x: PyTree, *positions: jax.Array) -> PyTree:
        choice, attention = self.choice, self.inner
        q, k, v = heads_before_core(attention, x, *positions)
        dense = attention.core(q, k, v)  # pyright: ignore
        kept = self.output.read(dense.shape, dense.dtype)
        gives = [self._candidate(q, k, v, kept, *kind) for kind in choice.kinds]
        errors = jnp.where(self.step > 0, relative_errors(gives, dense), jnp.inf)
        savings = choice.savings(self.tokens)

        def decide(errors: Any) -> np.ndarray:
            return choose(np.asarray(errors), savings, choice)

        heads = jax.ShapeDtypeStruct(errors.shape[:1], jnp.int32)
        chosen = jax.pure_callback(decide, heads, errors)
        o = dense
        for place, own in enumerate(gives):
            o = jnp.where((chosen == place)[:, None], own, o)
        self.output.write(o)
        self.chosen.write(chosen)
        self.errors.write(errors)
        return attention.merge(o, x)

    def _candidate(
        self, q: jax.Array, k: jax.Array, v: jax.Array, kept: jax.Array, width: int, reorder: bool
    ) -> jax.Array:
        if width == CACHED:
            return kept
        every = (width,) * q.shape[2]
        orders = (True,) * q.shape[2] if reorder else None
        return windows(q, k, v, every, orders, widths=(width,), kept=None, tokens=self.tokens)


def search(
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    delta: float,
    c_head: float | None = 1.5,
    candidates: tuple[str, ...] = CANDIDATES,
    uniform_saving: bool = False,
    tile: tuple[int, int] | None = None,
    uncond: PyTree = None,
    progress: bool = True,
    callback: Callable[[int, jax.Array, dict[str, np.ndarray]], None] | None = None,
) -> DiTFastAttnV2Plan:
    """Find a plan in one run of the sampler, on the compressed trajectory.

    One program is compiled. It costs a network call and, in every attention layer, all candidates
    beside dense attention; decisions are made on the host. A layer's error of a candidate is the
    mean square of its difference from dense attention over the variance of that, head by head.

    Args:
        forward: the model, without an attention plan.
        params: its parameters.
        sampler: the sampler that will run the plan; the plan fits its guidance and calls only.
        cond: conditions of a small calibration batch; the paper takes 8 captions.
        key: PRNG key of the calibration noise.
        delta: what the errors of a layer's heads may sum to in a call; 0 keeps all dense.
        c_head: a head takes only candidates with an error below c_head / heads * delta; None for
            no such limit.
        candidates: see `half_width_of`.
        uniform_saving: count all candidates the same, as the released script for FLUX does, in
            place of the share of attention that they leave out.
        tile: of windows, see `DiTFastAttnV2Plan`.
        uncond: unconditional counterpart of `cond`; the model's null condition if None.
        progress: show a progress bar.
        callback: called as `callback(step, x, errors)` after every call, with the latents of the
            compressed trajectory and the errors float32[heads, candidates] by path of the layer.

    Raises:
        ValueError: for a negative delta, unknown candidates, windows that reach no token, or a
            model without attention layers of one kind.
    """
    if not delta >= 0 or (c_head is not None and not c_head > 0):
        raise ValueError(f"delta must be at least 0 and c_head above it, got {delta} and {c_head}")
    if not candidates or len(set(candidates)) < len(candidates):
        raise ValueError(f"candidates must be different names, at least one; got {candidates}")
    targets = required_attentions(forward.module(params), *KINDS, needed_by=NAME)
    uncond = sampler.unconditional(forward, cond, uncond)
    x = jnp.zeros((jax.tree.leaves(cond)[0].shape[0], *sampler.sample_shape(forward)))
    layout = forward.layout(params, *sampler.inputs(x, cond, uncond, 0))
    heads = {heads_of(target.module) for target in targets}
    if layout is None or len(heads) != 1:
        raise ValueError(
            f"{forward.model.__name__} has no attention layers of equally many heads to plan for"
        )
    kinds = tuple(half_width_of(name, layout.image_tokens) for name in candidates)
    blank = uniform(
        ("dense",),
        calls=sampler.calls,
        layers=len(targets),
        heads=heads.pop(),
        image_tokens=layout.image_tokens,
        text=layout.text,
        text_first=bool(layout.text and layout.text_first),
        image_layers=image_layers(forward.module(params)) if layout.text else (),
        tile=tile,
    )
    patched = forward.patch(Calibration(blank, Choice(kinds, float(delta), c_head, uniform_saving)))

    @jax.jit
    def start(params: Params, key: jax.Array) -> Carry:
        return sampler.init(patched, params, cond, key, uncond=uncond)

    @jax.jit
    def advance(params: Params, carry: Carry, step: jax.Array) -> Carry:
        return sampler.step(patched, params, carry, cond, uncond, step)

    carry, calls = start(params, key), []
    for step in tqdm(range(sampler.calls), desc="search", disable=not progress, leave=False):
        carry = advance(params, carry, np.int32(step))
        held = jax.device_get([carry.state[f"{target.path}.chosen"] for target in targets])
        calls.append(held)
        if callback is not None:
            found = {each.path: carry.state[f"{each.path}.errors"] for each in targets}
            callback(step, carry.x, jax.device_get(found))
    known = ((DENSE, False), *kinds)
    widths, orders = (
        tuple(
            tuple(tuple(known[place + 1][part] for place in layer) for layer in call)
            for call in np.asarray(calls).tolist()
        )
        for part in range(2)
    )
    return dataclasses.replace(
        blank,
        half_width=widths,
        reorder=orders if any(reorder for _, reorder in kinds) else None,
        delta=float(delta),
        c_head=c_head,
        candidates=candidates,
        uniform_saving=uniform_saving,
        guidance=sampler.scale,
        sampler=repr(sampler.schedule),
        model=f"{forward.model.__name__}({forward.config})",
    )
