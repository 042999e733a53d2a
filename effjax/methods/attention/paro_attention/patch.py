"""The patch of PAROAttention: heads in their orders, attention on the blocks of a mask."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from effjax.context import Context, Step, current_layout, is_static
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.attention import Attention, AttentionCore, Heads, attentions
from effjax.methods.attention.paro_attention.masks import (
    check_masks,
    diagonal_masks,
    shapes,
    unpack,
)
from effjax.methods.attention.paro_attention.order import Grid, permute, unpermute
from effjax.methods.attention.paro_attention.plan import (
    KINDS,
    NAME,
    Blocks,
    Masks,
    ParoAttentionPlan,
)
from effjax.targets import Wrapper, original, wrap
from effjax.transform import Pair, Transform
from pallas_kernels.block_mask import EVERYTHING, block_mask, from_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.implementation import Implementation
from pallas_kernels.quantized_attention import quantized_attention


def transform(plan: ParoAttentionPlan, learned: Masks | None = None) -> Transform:
    """Run a model's attention on the blocks that each head keeps, in the head's order.

    Args:
        learned: the masks, of `find` or `calibrate`; None for a plan whose masks are "diagonal".

    Raises:
        ValueError: for a model with other layers or heads, masks of another plan, or none; while
            tracing, for other numbers of tokens or a step outside of the plan.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        paths = _paths(plan, forward, params)
        masks = learned
        if plan.masks == "diagonal":
            if masks is not None:
                raise ValueError(
                    'masks are given for a plan that makes its own (masks="diagonal"): leave them '
                    'out, or take masks="calibrated"'
                )
            masks = diagonal_masks(plan, paths)
        if masks is None:
            raise ValueError(
                f"a calibrated plan of {NAME} needs its masks: give transform(plan, masks) with "
                f'those of `find` or `calibrate`, or take masks="diagonal"'
            )
        check_masks(plan, paths, masks)
        return _with(plan, forward, params, {name: jnp.asarray(masks[name]) for name in masks})

    def on_shapes(forward: Forward, params: Params) -> Pair:
        paths = _paths(plan, forward, params)
        masks = {name: jnp.zeros(shape, jnp.uint8) for name, shape in shapes(plan, paths).items()}
        return _with(plan, forward, params, masks)

    return Transform(NAME, plan, apply, on_shapes)


def _with(plan: ParoAttentionPlan, forward: Forward, params: Params, masks: Any) -> Pair:
    methods = {**params.get(METHODS, {}), NAME: nest_params(masks)}
    return forward.patch(ParoAttention(plan)), {**params, METHODS: methods}


class Layers(NamedTuple):
    """The attention layers of a model: paths, heads, and whether text is in their sequence."""

    paths: list[str]
    heads: list[int]
    joint: tuple[bool, ...]


def layers_of(module: nnx.Module) -> Layers:
    """The attention layers of a model.

    Raises:
        ValueError: for a layer that does not attend from all tokens to all, or whose heads share
            keys.
    """
    layers = Layers([], [], ())
    for path, attention in attentions(module, *KINDS):
        assert isinstance(attention, Attention)
        core = type(original(attention.core)).__name__
        parts: list[Any] = [getattr(attention, each) for each in getattr(attention, "streams", ())]
        own = (parts or [attention])[0]
        if core != AttentionCore.__name__ or own.heads != own.kv_heads:
            raise ValueError(
                f"{NAME} is for attention of all tokens to all in which each head has keys of its "
                f"own; {path} has {own.heads} heads, {own.kv_heads} of keys, and the core {core}"
            )
        layers.paths.append(path)
        layers.heads.append(own.heads)
        layers = layers._replace(joint=(*layers.joint, attention.kind == "joint"))
    return layers


def _paths(plan: ParoAttentionPlan, forward: Forward, params: Params) -> list[str]:
    """The paths of a model's attention layers, which must be those of the plan."""
    layers = layers_of(forward.module(params))
    planned = [len(row) for row in plan.orders]
    if layers.heads != planned or layers.joint != plan.joint:
        raise ValueError(
            f"the plan has {plan.layers} layers with {sorted(set(planned))} heads, "
            f"{sum(plan.joint)} of them joint (model {plan.model!r}), but this model has "
            f"{len(layers.paths)} self-attention layers with {sorted(set(layers.heads))} heads, "
            f"{sum(layers.joint)} of them joint. Search a plan for this model."
        )
    return layers.paths


@dataclasses.dataclass(frozen=True)
class ParoAttention:
    """The patch: every self-attention layer follows its part of the plan."""

    plan: ParoAttentionPlan

    @property
    def calls(self) -> int:
        """Network calls the plan is made for; samplers compare it with their own."""
        return self.plan.steps

    def __call__(self, module: nnx.Module, context: Context) -> None:
        plan, step = self.plan, context.step
        if is_static(step) and not 0 <= step < plan.steps:
            raise ValueError(
                f"step {step} lies outside the plan, which has {plan.steps} network calls. Use a "
                f"sampler with {plan.steps} calls, or search a plan for this one."
            )
        masks = flatten_params(context.learned[NAME])
        slot = plan.slot_of_step[step] if is_static(step) else jnp.asarray(plan.slot_of_step)[step]
        for layer, target in enumerate(attentions(module, *KINDS)):
            listed = _listed(plan, plan.joint[layer], int(step) if is_static(step) else None)
            options = Options.of(plan, layer, listed)
            keep = masks[f"{target.path}.keep"]
            wrap(module, f"{target.path}.core", ParoCore, keep, slot, plan.orders[layer], options)


def _listed(plan: ParoAttentionPlan, joint: bool, step: int | None) -> int:
    """Kept blocks of a layer: the mean of those with (or without) text, in a call or in all."""
    layers = [layer for layer, each in enumerate(plan.joint) if each == joint]
    by_slot = [sum(sum(slot[layer]) for layer in layers) / len(layers) for slot in plan.kept]
    if step is not None:
        return round(by_slot[plan.slot_of_step[step]])
    return round(float(np.mean([by_slot[slot] for slot in plan.slot_of_step])))


class Options(NamedTuple):
    """What all layers of a kind have in common; static.

    Attributes:
        grid: of the image tokens.
        blocks: of the sequence.
        widths: the most kept blocks of each row.
        listed: kept blocks of all heads, for costs.
        dense: every block is kept and nothing is quantized.
        bits, values, scales, unit, smooth, renormalize: as in the plan.
    """

    grid: Grid
    blocks: Blocks
    widths: tuple[int, ...]
    listed: int | None = None
    bits: int = 16
    values: int = 16
    scales: tuple[int, int] = (32, 64)
    unit: str = "tile"
    smooth: bool = False
    renormalize: bool = True
    dense: bool = False

    @classmethod
    def of(cls, plan: ParoAttentionPlan, layer: int, listed: int | None = None) -> Options:
        """Those of a layer of a plan."""
        blocks = plan.blocks(layer)
        arithmetic = (plan.bits, plan.values, plan.scales, plan.unit, plan.smooth)
        widths = blocks.widths(plan.width)
        return cls(plan.grid, blocks, widths, listed, *arithmetic, plan.renormalize, plan.dense)


class ParoCore(Wrapper):
    """Attention of every head on the blocks that it keeps.

    Args:
        keep: packed masks uint8[slots, H, M, ceil(M / 8)].
        slot: which of them this call uses, static or traced.
        orders: number of the order of each head.
        options: what is static otherwise.
    """

    replaces_internals = True
    inner: AttentionCore

    def __init__(
        self,
        inner: nnx.Module,
        keep: jax.Array,
        slot: Step,
        orders: tuple[int, ...],
        options: Options,
    ):
        super().__init__(inner)
        self.keep = nnx.Variable(keep)
        self.slot = int(slot) if is_static(slot) else nnx.data(slot)
        self.orders = orders
        self.options = options

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        options = self.options
        check_raster(q.shape[1], options.grid, options.blocks.tokens)
        if options.dense:
            return self.inner(q, k, v)
        with jax.named_scope("attention"):
            keep = unpack(self.keep.get_value()[self.slot], options.blocks.count)
            return paro_attention(q, k, v, keep, self.orders, options)


def paro_attention(
    q: Heads,
    k: Heads,
    v: Float[Array, "B S H E"],
    keep: Bool[Array, "H M M"],
    orders: tuple[int, ...],
    options: Options,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Float[Array, "B S H E"]:
    """Attend within the kept blocks of each head, in the head's order.

    Sums are float32 on every path, so values need no factor that keeps sums of half precision in
    range. A query without any kept block gets zeros.

    Args:
        q, k, v: [B, S, H, D] with tokens in the order of the model, rotated and normed; values may
            have another width.
        keep: the blocks, of queries and keys in the heads' orders; rows beyond `options.widths`
            lose their last blocks.
        orders: number of the order of each head.
        options: static settings.
        implementation, interpret: see `pallas_kernels.implementation`.
    """
    blocks = options.blocks
    place: dict[str, Any] = {"text": blocks.text, "text_first": blocks.text_first}
    q, k, v = (permute(x, orders, options.grid, **place) for x in (q, k, v))
    attend: Any = partial(block_sparse_attention, implementation=implementation)
    if options.bits != 16:
        attend = partial(
            quantized_attention,
            bits=options.bits,
            values=None if options.values == 16 else f"int{options.values}",
            tokens=options.scales,
            unit=options.unit,
            smooth=options.smooth,
            implementation=implementation,
        )
    attend = partial(attend, q, k, v, return_lse=True, interpret=interpret)
    mask = from_map(
        *(jnp.asarray(keep), blocks.tokens),
        block=blocks.size,
        width=options.widths,
        listed=options.listed,
    )
    out, lse = attend(mask)
    if not options.renormalize:
        _, whole = attend(block_mask(EVERYTHING, blocks.tokens, block=blocks.size))
        out = (out * jnp.exp(lse - whole)[..., None]).astype(out.dtype)
    return unpermute(out, orders, options.grid, **place)


def check_raster(tokens: int, grid: Grid, planned: int) -> None:
    """Check that heads hold the tokens of a plan, as they come from the raster.

    Raises:
        ValueError: for tokens that another method moved, another grid or another number of them.
    """
    layout = current_layout()
    given = grid if layout is None else layout.raster(NAME)
    if given != grid or tokens != planned:
        raise ValueError(
            f"the plan of {NAME} was made for the grid {grid} and {planned} tokens with the text, "
            f"this call has the grid {given} and {tokens} tokens. Search a plan at this size."
        )
