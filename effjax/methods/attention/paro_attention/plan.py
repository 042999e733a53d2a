"""Plans of PAROAttention: an order for every head, and where its masks come from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from effjax.fields import Count, Natural, Range
from effjax.methods.attention.paro_attention.order import ORDERS
from effjax.targets import AttentionKind
from effjax.transform import Plan

NAME = "paro_attention"
KINDS: tuple[AttentionKind, ...] = ("self", "joint")  # of attention that plans are for

Order = Annotated[int, Range(0, len(ORDERS) - 1)]
Bits = Literal[16, 8, 4]
Sharing = Literal["even", "half"]
Masks = Mapping[str, Any]  # uint8[slots, H, M, ceil(M / 8)] by path of a layer and ".keep"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The blocks of a sequence: they begin at multiples of their size, wherever the image begins.

    Attributes:
        tokens: of the sequence, text included.
        text: tokens of text in it.
        text_first: whether they stand before the image.
        size: tokens of a block; the last one may have fewer.
    """

    tokens: int
    text: int
    text_first: bool
    size: int

    @property
    def count(self) -> int:
        """Blocks M, the last one included."""
        return -(-self.tokens // self.size)

    @cached_property
    def fixed(self) -> np.ndarray:
        """bool[M], blocks that are always kept: those with a token of text, and an incomplete one.

        They are so as rows and as columns of a mask.
        """
        first = np.arange(self.count) * self.size
        last = np.minimum(first + self.size, self.tokens) - 1
        start = 0 if self.text_first else self.tokens - self.text
        text = (first < start + self.text) & (last >= start)
        return text | (last - first + 1 < self.size)

    @cached_property
    def always(self) -> np.ndarray:
        """bool[M, M], what every mask keeps."""
        return self.fixed[:, None] | self.fixed

    def widths(self, width: int) -> tuple[int, ...]:
        """The most blocks of each row: all of a fixed one, `width` of the others."""
        most = np.where(self.fixed, self.count, min(width, self.count))
        return tuple(int(number) for number in most)


@dataclasses.dataclass(frozen=True)
class ParoAttentionPlan(Plan):
    """Orders by layer and head, and how many blocks each keeps.

    The masks themselves are arrays: `find` and `calibrate` measure them, and they stand in
    `params["methods"]`, a bit for each block. Layers are the self-attention and joint attention
    layers in the order of the model.

    Attributes:
        orders: number of the order of each layer and head, see `order`.
        joint: by layer, whether the text is in its sequence.
        kept: kept blocks by slot, layer and head, those that are always kept included.
        grid: frames, rows and columns of the image tokens.
        width: most blocks of a row without text: lists of kept blocks are so long.
        steps: network calls of the sampler.
        sharing: which of the masks ("slots") a call uses. "even" cuts the calls evenly; "half" does
            so with the first half of the calls, and uses the last slot for the second half.
        text: text tokens of the sequence.
        text_first: whether they stand before the image.
        block: tokens of a block.
        bits: of queries and keys; 16 leaves them floats.
        values: bits of probabilities and values; 16 leaves them floats.
        scales: consecutive queries and keys that share a scale.
        unit: what quantized probabilities are counted in, see
            `pallas_kernels.quantized_attention`.
        smooth: subtract the mean of the keys before they are quantized.
        renormalize: softmax over the kept blocks. False takes that over all keys and leaves blocks
            out of its sum: for experiments, as it costs more than dense attention.
        least: blocks without text that each row keeps whatever their mass.
        masks: "calibrated", or "diagonal" for `kept` blocks next to the diagonal of each row, which
            needs no data.
        taus: thresholds of the masses of blocks that a search found, by slot.
        mass: share of the attention in the best fifth of the blocks that a search saw: in the
            raster, and in the orders of the plan.
        sampler, model: what the plan was made for.
    """

    orders: tuple[tuple[Order, ...], ...]
    joint: tuple[bool, ...]
    kept: tuple[tuple[tuple[Natural, ...], ...], ...]
    grid: tuple[Count, Count, Count]
    width: Count
    steps: Count
    sharing: Sharing = "half"
    text: Natural = 0
    text_first: bool = False
    block: Count = 64
    bits: Bits = 16
    values: Bits = 16
    scales: tuple[Count, Count] = (32, 64)
    unit: Literal["tile", "one", "query"] = "tile"
    smooth: bool = False
    renormalize: bool = True
    least: Natural = 1
    masks: Literal["calibrated", "diagonal"] = "calibrated"
    taus: tuple[float, ...] = ()
    mass: tuple[float, ...] = ()
    sampler: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        layers = [len(row) for row in self.orders]
        if not layers or 0 in layers or not self.kept:
            raise ValueError("a plan needs at least one layer, one head and one slot")
        if len(self.joint) != len(layers):
            raise ValueError(
                f"joint must say of each of {len(layers)} layers whether text is in its sequence; "
                f"it has {len(self.joint)} entries"
            )
        if any([len(row) for row in slot] != layers for slot in self.kept):
            raise ValueError(
                f"kept must have a number for every slot, layer and head, as orders do "
                f"({len(layers)} layers with {sorted(set(layers))} heads)"
            )
        if self.slots > self.steps:
            raise ValueError(
                f"there are masks for {self.slots} slots and {self.steps} network calls: no more "
                f"slots than calls can be used"
            )
        if len(self.taus) not in (0, self.slots) or len(self.mass) not in (0, 2):
            raise ValueError(
                f"taus are one for each of {self.slots} slots or none, mass is two numbers or "
                f"none; got {len(self.taus)} and {len(self.mass)}"
            )
        check_bits(self.bits, self.values)
        for layer in range(len(layers)):
            blocks = self.blocks(layer)
            fixed, least = int(blocks.fixed.sum()), int(blocks.always.sum())
            if self.width < fixed:
                raise ValueError(
                    f"width must be at least {fixed}, the blocks of text and of an incomplete end "
                    f"that every row of layer {layer} keeps; got {self.width}"
                )
            most = sum(blocks.widths(self.width))
            counts = [count for slot in self.kept for count in slot[layer]]
            if not least <= min(counts) <= max(counts) <= most:
                raise ValueError(
                    f"layer {layer} has {blocks.count} x {blocks.count} blocks, of which {least} "
                    f"are always kept and {most} at most with the width {self.width}; kept is "
                    f"{min(counts)} ... {max(counts)}"
                )

    @property
    def layers(self) -> int:
        return len(self.orders)

    @property
    def slots(self) -> int:
        """Masks of each head."""
        return len(self.kept)

    def blocks(self, layer: int) -> Blocks:
        """The blocks of a layer's sequence."""
        text = self.text if self.joint[layer] else 0
        return Blocks(math.prod(self.grid) + text, text, self.text_first, self.block)

    @cached_property
    def slot_of_step(self) -> np.ndarray:
        """The slot of every network call, int32[steps]."""
        return slots_of_steps(self.steps, self.slots, self.sharing)

    @property
    def density(self) -> list[np.ndarray]:
        """Kept blocks as a share of all, float64[slots, H] by layer; always kept ones count."""
        return [
            np.asarray([slot[layer] for slot in self.kept]) / self.blocks(layer).count ** 2
            for layer in range(self.layers)
        ]

    @property
    def mean_density(self) -> float:
        """Kept blocks of all slots, layers and heads, as a share of all."""
        kept = sum(count for slot in self.kept for row in slot for count in row)
        blocks = (self.blocks(i).count ** 2 * len(row) for i, row in enumerate(self.orders))
        return kept / (self.slots * sum(blocks))

    def computed(self, calls: int) -> Mapping[str, Sequence[float]]:
        if calls != self.steps:
            return {}
        kept = np.array([sum(map(sum, slot)) for slot in self.kept])
        blocks = sum(self.blocks(i).count ** 2 * len(row) for i, row in enumerate(self.orders))
        return {"attention": (kept[self.slot_of_step] / blocks).tolist()}

    @property
    def dense(self) -> bool:
        """Whether every block is kept and nothing is quantized."""
        return self.bits == 16 and self.mean_density == 1.0

    @property
    def mask_bytes(self) -> int:
        """Bytes of all masks: M ceil(M / 8) for each slot, layer and head."""
        sizes = (self.blocks(layer).count for layer in range(self.layers))
        return self.slots * sum(
            len(row) * size * -(-size // 8) for row, size in zip(self.orders, sizes)
        )

    def describe(self) -> str:
        """Density, orders and sizes."""
        orders = [number for row in self.orders for number in row]
        shares = ", ".join(
            f"{''.join('FHW'[axis] for axis in ORDERS[number])} {orders.count(number)}"
            for number in sorted(set(orders))
        )
        mass = ""
        if self.mass:
            mass = (
                f"; the best fifth of the blocks holds {self.mass[1]:.0%} of the attention, "
                f"{self.mass[0]:.0%} in the raster"
            )
        return (
            f"{self.layers} layers, {self.steps} calls, {self.slots} slots: density "
            f"{self.mean_density:.3f} in blocks of {self.block}, bits {self.bits}/{self.values}, "
            f"heads by order: {shares}{mass}; masks take {self.mask_bytes:,} bytes"
        )


def check_bits(bits: int, values: int) -> None:
    """Raise ValueError for quantized values beside queries and keys that are floats."""
    if values != 16 and bits == 16:
        raise ValueError(
            f"values in {values} bits need queries and keys in 8 or 4 bits; got bits=16"
        )


def slots_of_steps(steps: int, slots: int, sharing: Sharing) -> np.ndarray:
    """The slot of every network call, int32[steps].

    "even": floor(step slots / steps). "half": of the first ceil(steps / 2) calls with one slot
    less, and the last slot for all other calls.
    """
    step = np.arange(steps)
    if sharing == "even" or slots == 1:
        return (step * slots // steps).astype(np.int32)
    half = -(-steps // 2)
    return np.where(step < half, step * (slots - 1) // half, slots - 1).astype(np.int32)


def attention_flops(plan: ParoAttentionPlan, *, batch: int, head_dim: int) -> np.ndarray:
    """FLOPs of Q K^T and P V over the kept blocks, int[steps, layers]: density 4 B H N^2 d.

    The last block counts as a whole one.

    Args:
        batch: network batch B, all branches of guidance together.
        head_dim: width d of a head.
    """
    by_slot = np.array([[sum(row) for row in slot] for slot in plan.kept], np.int64)
    return 4 * batch * head_dim * plan.block**2 * by_slot[plan.slot_of_step]
