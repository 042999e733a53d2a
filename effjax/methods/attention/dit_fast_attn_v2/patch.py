"""The patch of DiTFastAttnV2: attention whose heads follow a plan, and keep what they gave."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.context import Context, PyTree, State, current_layout, is_static, switch
from effjax.forward import Forward, Params
from effjax.layers.attention import Attention, AttentionCore, Projections, attentions
from effjax.methods.attention.dit_fast_attn_v2.plan import (
    CACHED,
    DENSE,
    KINDS,
    NAME,
    DiTFastAttnV2Plan,
)
from effjax.targets import Wrapper, wrap
from effjax.transform import Pair, Transform
from pallas_kernels.arrow_attention import arrow_attention

# What a layer does in a call: heads by their windows, all dense, or nothing.
HEAD_WISE, ALL_DENSE, ALL_CACHED = range(3)


def transform(plan: DiTFastAttnV2Plan) -> Transform:
    """Run a model's attention by the plan.

    Raises:
        ValueError: if the model has other layers or heads; while tracing, if its sequences differ
            from the plan's, or a step lies outside of it.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        module = forward.module(params)
        targets = attentions(module, *KINDS)
        if len(targets) != plan.layers:
            raise ValueError(
                f"the plan has {plan.layers} layers (model {plan.model!r}), but this model has "
                f"{len(targets)} attention layers. Search a plan for this model."
            )
        others = {heads_of(target.module) for target in targets} - {plan.heads}
        if others:
            raise ValueError(
                f"the plan is for layers of {plan.heads} heads, but this model has layers of "
                f"{sorted(others)}. Search a plan for this model."
            )
        own = image_layers(module)
        if plan.text and plan.image_layers != own:
            raise ValueError(
                f"of this model the layers {list(own)} attend to the image alone, in the plan "
                f"{list(plan.image_layers)}. Search a plan for this model."
            )
        return forward.patch(DiTFastAttnV2(plan)), params

    return Transform(NAME, plan, apply)


def heads_of(attention: nnx.Module) -> int:
    """Heads of an attention module."""
    return _projections(attention).heads


def _projections(attention: nnx.Module) -> Projections:
    streams = getattr(attention, "streams", ())
    found = getattr(attention, streams[0]) if streams else attention
    assert isinstance(found, Projections)
    return found


def image_layers(module: nnx.Module) -> tuple[int, ...]:
    """Layers that attend to the image alone, in a model whose others attend to the text too."""
    kinds = [target.module.kind for target in attentions(module, *KINDS)]  # pyright: ignore
    return tuple(i for i, kind in enumerate(kinds) if kind == "self") if "joint" in kinds else ()


class Tokens(NamedTuple):
    """The tokens of a layer; static.

    Attributes:
        image, text: how many there are.
        text_first: whether the text precedes the image.
        tile: of windows, None if they are exact.
    """

    image: int
    text: int
    text_first: bool
    tile: tuple[int, int] | None


@dataclasses.dataclass(frozen=True)
class DiTFastAttnV2:
    """The patch: every head of every layer follows the plan."""

    plan: DiTFastAttnV2Plan

    @property
    def calls(self) -> int:
        """Network calls the plan is made for; samplers compare it with their own."""
        return self.plan.calls

    def __call__(self, module: nnx.Module, context: Context) -> None:
        plan, step = self.plan, context.step
        check_layout(plan, context)
        if is_static(step) and not 0 <= step < plan.calls:
            raise ValueError(
                f"step {step} lies outside the plan, which has {plan.calls} network calls. "
                f"Use a sampler with {plan.calls} calls, or search a plan for this one."
            )
        if is_static(step):
            widths, orders = plan.widths[step], plan.orders[step]
        else:
            widths, orders = (jnp.asarray(x)[step] for x in (plan.widths, plan.orders))
        for layer, target in enumerate(attentions(module, *KINDS)):
            wrap(
                *(module, target.path, HeadWiseAttention),
                widths[layer],
                orders[layer],
                Uses.of(plan.widths[:, layer], plan.orders[:, layer]),
                tokens_of(plan, layer),
            )


def check_layout(plan: DiTFastAttnV2Plan, context: Context) -> None:
    """Raise ValueError if a call has other tokens than the plan."""
    layout = context.layout
    if layout is None:
        return
    found = layout.image_tokens, layout.text, bool(layout.text and layout.text_first)
    wanted = plan.image_tokens, plan.text, bool(plan.text and plan.text_first)
    if found != wanted:
        told = [
            f"{image} image tokens and {text} of text{' before them' if first else ''}"
            for image, text, first in (wanted, found)
        ]
        raise ValueError(
            f"the plan was made for {told[0]}, this call has {told[1]}. Search a plan at this size."
        )


def tokens_of(plan: DiTFastAttnV2Plan, layer: int) -> Tokens:
    """The tokens of a layer."""
    return Tokens(plan.image_tokens, plan.text_of(layer), plan.text_first, plan.tile)


class Uses(NamedTuple):
    """What occurs in a layer in any call: only that is compiled, and kept.

    Attributes:
        widths: half widths.
        orders: whether tokens are reordered.
        cases: HEAD_WISE, ALL_DENSE, ALL_CACHED.
    """

    widths: tuple[int, ...]
    orders: tuple[bool, ...]
    cases: tuple[int, ...]

    @classmethod
    def of(cls, widths: np.ndarray, orders: np.ndarray) -> Uses:
        """Of a layer's half widths and orders [calls, heads]."""
        return cls(
            tuple(np.unique(widths).tolist()),
            tuple(np.unique(orders).tolist()),
            tuple(sorted({int(_case(row, np)) for row in widths})),
        )


def _case(window: Any, xp: Any) -> Any:
    """What a layer does whose heads have these windows."""
    dense, cached = xp.all(window == DENSE), xp.all(window == CACHED)
    return xp.where(cached, ALL_CACHED, xp.where(dense, ALL_DENSE, HEAD_WISE))


class HeadWiseAttention(Wrapper):
    """Attention whose heads are dense, have windows, or give again what they gave.

    Args:
        window: half widths of the heads in this call, static or traced.
        reorder: whether their windows are over reordered tokens.
        uses: what occurs in this layer in any call.
        tokens: of its sequence.
    """

    replaces_internals = True
    united = ("widths", "orders", "cases")
    inner: Attention

    def __init__(self, inner: nnx.Module, window: Any, reorder: Any, uses: Uses, tokens: Tokens):
        super().__init__(inner)
        static = isinstance(window, np.ndarray)
        self.window = tuple(window.tolist()) if static else nnx.data(window)
        self.reorder = tuple(reorder.tolist()) if static else nnx.data(reorder)
        self.widths, self.orders, self.cases = uses
        self.tokens = tokens
        self.output = State()  # of the heads, before they are joined

    @property
    def keeps(self) -> bool:
        """Whether some head gives its last output again in some call."""
        return CACHED in self.widths

    def __call__(self, x: PyTree, *positions: jax.Array) -> PyTree:
        static = isinstance(self.window, tuple)
        case = int(_case(np.asarray(self.window), np)) if static else _case(self.window, jnp)
        known = {HEAD_WISE: _head_wise, ALL_DENSE: _all_dense, ALL_CACHED: _all_cached}
        return switch(case, {each: known[each] for each in self.cases}, self, x, *positions)


def heads_before_core(
    attention: Attention, x: PyTree, *positions: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, of an attention whose core nothing else replaces."""
    if type(attention.core) is not AttentionCore:
        raise ValueError(
            f"head-wise windows ({NAME}) take the place of the attention core, which "
            f"{type(attention.core).__name__} has replaced already. Use one of the two."
        )
    q, k, v = attention.project(x)
    return *attention.rotate(q, k, *positions), v


def _all_dense(module: HeadWiseAttention, x: PyTree, *positions: jax.Array) -> PyTree:
    attention = module.inner
    return _given(module, attention.core(*heads_before_core(attention, x, *positions)), x)  # pyright: ignore


def _head_wise(module: HeadWiseAttention, x: PyTree, *positions: jax.Array) -> PyTree:
    q, k, v = heads_before_core(module.inner, x, *positions)
    kept = module.output.read((*q.shape[:3], v.shape[3]), v.dtype) if module.keeps else None
    attend = partial(windows, widths=module.widths, kept=kept, tokens=module.tokens)
    reorder = module.reorder if True in module.orders else None
    return _given(module, attend(q, k, v, module.window, reorder), x)


def _all_cached(module: HeadWiseAttention, x: PyTree, *positions: jax.Array) -> PyTree:
    parts, own = jax.tree.leaves(x), _projections(module.inner)  # pyright: ignore
    tokens = sum(part.shape[1] for part in parts)
    shape = (parts[0].shape[0], tokens, own.heads, own.head_dim)
    return module.inner.merge(module.output.read(shape, parts[0].dtype), x)


def _given(module: HeadWiseAttention, o: jax.Array, x: PyTree) -> PyTree:
    if module.keeps:
        module.output.write(o)
    return module.inner.merge(o, x)


def windows(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: Any,
    reorder: Any = None,
    *,
    widths: Sequence[int],
    kept: jax.Array | None,
    tokens: Tokens,
) -> jax.Array:
    """Attend in each head through its window, over tokens in the order that it wants.

    Args:
        q, k, v: [B, S, H, D].
        window: half widths by head, static or traced.
        reorder: whether heads reorder tokens, likewise; None if none does.
        widths: the half widths that can occur.
        kept: what cached heads give.
        tokens: of the sequence.

    Raises:
        ValueError: for a sequence of other tokens, or image tokens that are no raster.
    """
    if q.shape[1] != tokens.image + tokens.text:
        raise ValueError(
            f"the plan was made for {tokens.image} image tokens and {tokens.text} of text, but "
            f"this attention has {q.shape[1]} in all. Search a plan at this size."
        )
    layout = current_layout()
    grid = None if layout is None else layout.raster(f"a window of a head ({NAME})")
    _, text, text_first, tile = tokens
    options: dict[str, Any] = {"text": text, "text_first": text_first, "tile": tile}
    options |= {"widths": widths, "kept": kept}
    with jax.named_scope("attention"):
        if reorder is None:
            return arrow_attention(q, k, v, window, **options)
        if grid is None:
            raise ValueError(
                "tokens are reordered by frames, and this model does not say its layout"
            )
        order = token_major(grid, tokens)
        back, turned = np.argsort(order), jnp.asarray(reorder)[:, None]
        q, k, v = (jnp.where(turned, x[:, order], x) for x in (q, k, v))
        out = arrow_attention(q, k, v, window, **options)
        return jnp.where(turned, out[:, back], out)


def token_major(grid: tuple[int, int, int], tokens: Tokens) -> np.ndarray:
    """The order that puts the frames of a place side by side: p F + f for f P + p; text stays."""
    frames, rows, columns = grid
    image = np.arange(frames * rows * columns, dtype=np.int32)
    image = image.reshape(frames, rows * columns).T.reshape(-1)
    text = np.arange(tokens.text, dtype=np.int32)
    if tokens.text_first:
        return np.concatenate([text, tokens.text + image])
    return np.concatenate([image, tokens.image + text])
