"""Plans of DiTFastAttnV2: a window for every network call, layer and head, and what it costs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated

import numpy as np

from effjax.fields import LARGEST, Count, Natural, NotNegative, Positive, Range
from effjax.targets import AttentionKind
from effjax.transform import Plan
from pallas_kernels.block_mask import Arrow, visible_pairs

NAME = "dit_fast_attn_v2"
KINDS: tuple[AttentionKind, ...] = ("self", "joint")  # of attention that plans are for

DENSE, CACHED = -1, 0  # half widths that are no windows
CANDIDATES = ("cache", "arrow_8", "arrow_16", "arrow_32")

HalfWidth = Annotated[int, Range(-1, LARGEST)]


@dataclasses.dataclass(frozen=True)
class DiTFastAttnV2Plan(Plan):
    """What every head does in every network call.

    Attributes:
        half_width: by network call, layer and head: -1 for dense attention, 0 for a head whose last
            output is used again, else the image tokens that its window reaches to each side.
        image_tokens: of the sequence.
        text: text tokens of the sequence.
        text_first: whether they stand before the image.
        image_layers: layers that attend to the image alone (the second attention of SD3.5's
            blocks).
        reorder: by network call, layer and head, whether a window is over the tokens of a video in
            the order of their places, frame by frame within a place; None if none is.
        tile: (queries, keys) of tiles that are seen whole or not at all, as in the fused kernel of
            the released code; None for exact windows.
        delta: the search's budget of error; None for a plan written by hand.
        c_head: the search's limit of a head, None for none.
        candidates: of the search.
        uniform_saving: whether all candidates counted the same in it.
        guidance: guidance scale of the search; another scale wants another plan.
        sampler: the search's sampler; another schedule wants another plan.
        model: the model the plan was made for.
    """

    half_width: tuple[tuple[tuple[HalfWidth, ...], ...], ...]
    image_tokens: Count
    text: Natural = 0
    text_first: bool = False
    image_layers: tuple[Natural, ...] = ()
    reorder: tuple[tuple[tuple[bool, ...], ...], ...] | None = None
    tile: tuple[Count, Count] | None = None
    delta: NotNegative | None = None
    c_head: Positive | None = None
    candidates: tuple[str, ...] = ()
    uniform_saving: bool = False
    guidance: NotNegative | None = None
    sampler: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        shape = _shape("half_width", self.half_width)
        if self.reorder is not None and _shape("reorder", self.reorder) != shape:
            raise ValueError(
                f"reorder must be of as many calls, layers and heads as half_width, {list(shape)}; "
                f"it is of {list(_shape('reorder', self.reorder))}"
            )
        if early := _layers(self.widths[0] == CACHED):
            raise ValueError(
                f"layers {early} have heads of half width 0 in the first network call: these give "
                f"their last output again, and there is none yet. Use -1 (dense) there."
            )
        wrong = np.logical_and(self.orders, self.widths <= 0)
        if late := _layers(wrong.transpose(1, 0, 2).reshape(self.layers, -1)):
            raise ValueError(f"layers {late} reorder tokens of heads that have no window")
        if beyond := [layer for layer in self.image_layers if layer >= self.layers]:
            raise ValueError(f"image_layers {beyond} are not among {self.layers} layers")
        for name in self.candidates:
            half_width_of(name, self.image_tokens)

    def describe(self) -> str:
        """How many heads do what, and the share of attention that is left out."""
        widths, size = self.widths, self.widths.size
        shares = [("dense", (widths == DENSE).sum()), ("cached", (widths == CACHED).sum())]
        shares += [
            (f"window {width}", (widths == width).sum()) for width in sorted({*widths[widths > 0]})
        ]
        listed = ", ".join(f"{name} {count / size:.0%}" for name, count in shares if count)
        calls, layers, heads = widths.shape
        return (
            f"{calls} calls, {layers} layers of {heads} heads, {self.image_tokens} image tokens "
            f"and {self.text} of text: {listed}; sparsity {self.sparsity:.3f}"
        )

    @cached_property
    def widths(self) -> np.ndarray:
        """Half widths as int32[calls, layers, heads]."""
        return np.asarray(self.half_width, np.int32)

    @cached_property
    def orders(self) -> np.ndarray:
        """`reorder` as bool[calls, layers, heads]."""
        return np.zeros(self.widths.shape, bool) if self.reorder is None else np.array(self.reorder)

    @property
    def calls(self) -> int:
        return len(self.half_width)

    @property
    def layers(self) -> int:
        return len(self.half_width[0])

    @property
    def heads(self) -> int:
        return len(self.half_width[0][0])

    def text_of(self, layer: int) -> int:
        """Text tokens that a layer attends to."""
        return 0 if layer in self.image_layers else self.text

    @cached_property
    def savings(self) -> np.ndarray:
        """Mean saving of all heads in each call, float64[calls]."""
        found = np.zeros(self.widths.shape)
        for layer in range(self.layers):
            own = self.widths[:, layer]
            for width in np.unique(own):
                share = saving(int(width), self.image_tokens, self.text_of(layer))
                found[:, layer][own == width] = share
        return found.mean(axis=(1, 2))

    @property
    def sparsity(self) -> float:
        """Mean saving of all heads in all calls."""
        return float(self.savings.mean())

    def computed(self, calls: int) -> Mapping[str, Sequence[float]]:
        return {"attention": (1 - self.savings).tolist()}


def _shape(name: str, rows: Sequence) -> tuple[int, int, int]:
    """Calls, layers and heads of a nested tuple."""
    layers = {len(row) for row in rows}
    heads = {len(each) for row in rows for each in row}
    if len(layers) != 1 or len(heads) != 1 or 0 in layers | heads:
        raise ValueError(
            f"{name} needs as many layers in every network call, and as many heads in every layer, "
            f"at least one of each; got {len(rows)} calls, layers {sorted(layers)}, heads "
            f"{sorted(heads)}"
        )
    return len(rows), layers.pop(), heads.pop()


def _layers(wrong: np.ndarray) -> list[int]:
    return np.flatnonzero(wrong.any(-1)).tolist()


def half_width_of(candidate: str, image_tokens: int) -> tuple[int, bool]:
    """The half width of a candidate, and whether it reorders tokens.

    Args:
        candidate: "cache", "arrow_8" for a window of an eighth of the image tokens, or
            "reorder_arrow_8" for one over reordered tokens.
        image_tokens: of the sequence.

    Raises:
        ValueError: for another name, or a window of less than one token to each side.
    """
    if candidate == "cache":
        return CACHED, False
    found = re.fullmatch(r"(reorder_)?arrow_([1-9][0-9]*)", candidate)
    if found is None:
        raise ValueError(
            f"unknown candidate {candidate!r}; there are 'cache', 'arrow_8' for a window of an "
            f"eighth of the image (any whole number), and 'reorder_arrow_8'"
        )
    width = image_tokens // (2 * int(found[2]))
    if width < 1:
        raise ValueError(
            f"the windows of {candidate!r} reach no token to each side: they need at least "
            f"{2 * int(found[2])} image tokens, and there are {image_tokens}. Leave it out."
        )
    return width, found[1] is not None


def saving(half_width: int, image_tokens: int, text: int) -> float:
    """The share of a head's QK^T and PV that it leaves out: 1 if cached, (Nv - w)^2 / S^2."""
    if half_width <= 0:
        return 1.0 if half_width == CACHED else 0.0
    return (max(image_tokens - half_width, 0) / (image_tokens + text)) ** 2


def uniform(
    pattern: tuple[str, ...],
    *,
    calls: int,
    layers: int,
    heads: int,
    image_tokens: int,
    text: int = 0,
    text_first: bool = False,
    image_layers: tuple[int, ...] = (),
    tile: tuple[int, int] | None = None,
) -> DiTFastAttnV2Plan:
    """The plan whose heads all begin dense, and then repeat a pattern.

    Args:
        pattern: of the calls after the first: "dense", or candidates as in `half_width_of`.
        calls, layers, heads: of the sampler and the model.
        image_tokens, text, text_first, image_layers, tile: as in `DiTFastAttnV2Plan`.

    Raises:
        ValueError: for a pattern without calls, or with unknown names.
    """
    if not pattern:
        raise ValueError("a pattern needs what at least one call does, such as 'arrow_8'")
    kinds = [
        (DENSE, False) if name == "dense" else half_width_of(name, image_tokens) for name in pattern
    ]
    row = [(DENSE, False), *(kinds[t % len(kinds)] for t in range(calls - 1))]

    def everywhere(value: int | bool) -> tuple[tuple, ...]:
        return ((value,) * heads,) * layers

    reorders = any(reorder for _, reorder in row)
    return DiTFastAttnV2Plan(
        half_width=tuple(everywhere(width) for width, _ in row),
        image_tokens=image_tokens,
        text=text,
        text_first=text_first,
        image_layers=image_layers,
        reorder=tuple(everywhere(reorder) for _, reorder in row) if reorders else None,
        tile=tile,
    )


def attention_macs(plan: DiTFastAttnV2Plan, *, batch: int, head_dim: int) -> np.ndarray:
    """Useful multiply-adds of QK^T and PV, int64[layers, calls] (the module's cost formula).

    Args:
        batch: network batch B, all branches of guidance together.
        head_dim: width of a head.
    """
    macs = np.zeros((plan.layers, plan.calls), np.int64)
    pairs: dict[tuple[int, int], int] = {}
    for call, layer, head in np.ndindex(*plan.widths.shape):
        width, text = int(plan.widths[call, layer, head]), plan.text_of(layer)
        if (width, text) not in pairs:
            rule = Arrow(width, text, plan.text_first, plan.tile)
            pairs[width, text] = visible_pairs(rule, plan.image_tokens + text)
        macs[layer, call] += 2 * batch * head_dim * pairs[width, text]
    return macs
