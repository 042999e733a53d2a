"""Plans without data: the blocks next to the diagonal."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import jax

from effjax.context import Layout
from effjax.fields import Count, Natural, Range
from effjax.forward import Forward, Params
from effjax.methods.attention.paro_attention.masks import equal_rows
from effjax.methods.attention.paro_attention.patch import layers_of
from effjax.methods.attention.paro_attention.plan import (
    NAME,
    Bits,
    Blocks,
    Order,
    ParoAttentionPlan,
)
from effjax.transform import Shorthand


@dataclasses.dataclass(frozen=True)
class Diagonal(Shorthand):
    """The blocks next to the diagonal, without data: equally many of each row, one order for all.

    A baseline, and a window over tokens in another order.

    Attributes:
        density: kept blocks as a share of all, at most; blocks that are always kept count.
        calls: network calls of a trajectory.
        order: number of the order of all heads.
        block: tokens of a block.
        bits: of queries and keys.
        values: bits of probabilities and values.
        text: text tokens of a joint sequence; those of the model's example inputs if none.
    """

    density: Annotated[float, Range(0, 1, above=True)]
    calls: Count
    order: Order = 0
    block: Count = 64
    bits: Bits = 16
    values: Bits = 16
    text: Natural | None = None

    def plan(self, forward: Forward, params: Params) -> ParoAttentionPlan:
        module = forward.module(params)
        inputs, found = module.example_inputs(), []
        if inputs is not None:
            jax.eval_shape(lambda *inputs: found.append(module.layout(*inputs)), *inputs)
        layout = found[0] if found else None
        if layout is None:
            raise ValueError(f"{forward.model.__name__} does not say what its tokens are")
        if self.text is not None:
            layout = dataclasses.replace(layout, text=self.text)
        made: dict[str, Any] = {"block": self.block, "bits": self.bits, "values": self.values}
        layers = layers_of(module)
        if not layers.paths:
            raise ValueError(f"{forward.model.__name__} has no self-attention layers to plan for")
        orders = tuple((self.order,) * heads for heads in layers.heads)
        return diagonal(self.density, orders, layers.joint, layout, steps=self.calls, **made)


def diagonal(
    density: float,
    orders: tuple[tuple[int, ...], ...],
    joint: tuple[bool, ...],
    layout: Layout,
    *,
    steps: int,
    block: int = 64,
    bits: Bits = 16,
    values: Bits = 16,
) -> ParoAttentionPlan:
    """The plan that keeps equally many blocks of each row, next to the diagonal.

    Args:
        density: kept blocks as a share of all, at most.
        orders: number of the order of each layer and head.
        joint: by layer, whether the text is in its sequence.
        layout: tokens of the model.
        steps: network calls of a trajectory.
        block, bits, values: as in the plan.

    Raises:
        ValueError: if the density leaves no block for each row.
    """
    sequences = [
        Blocks(layout.image_tokens + text, text, layout.text_first, block)
        for text in (layout.text if each else 0 for each in joint)
    ]
    heads = [len(row) for row in orders]
    width, counts = equal_rows(density, sequences, heads, least=0)
    kept = tuple((count,) * h for count, h in zip(counts, heads))
    return ParoAttentionPlan(
        orders=orders,
        joint=joint,
        kept=(kept,),
        grid=layout.raster(NAME),
        width=width,
        steps=steps,
        text=layout.text,
        text_first=layout.text_first,
        block=block,
        bits=bits,
        values=values,
        least=0,
        masks="diagonal",
    )
