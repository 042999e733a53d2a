"""The plan of ViDiT-Q: bits, smoothing scales and rotations of layers, by network call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from effjax.fields import Count, Natural, Share
from effjax.forward import Forward, Params
from effjax.layers.linear import Linear
from effjax.methods.quantization.rules import Bits, check_rule, decided, deciding, described
from effjax.samplers import Sampler
from effjax.targets import BLOCK_LAYERS, TargetModule
from effjax.transform import Plan, check_by_layer

NAME = "vidit_q"

# Selector, weight bits, input bits, alpha (None for no smoothing scale), rotate.
Rule = tuple[str, Bits, Bits, Share | None, bool]


@dataclasses.dataclass(frozen=True)
class ViDiTQPlan(Plan):
    """Bits, smoothing scales and rotations of linear layers.

    Attributes:
        segments: (first network call, rules); one segment starting at 0 holds for all calls. A rule
            is (selector, weight bits, input bits, alpha, rotate): the first one whose selector
            (`role:qkv|out`, or a regular expression for whole paths) finds a layer decides; a layer
            without one stays as it is. Bits are 2 ... 8, or 16 for floats; alpha None is no
            smoothing scale.
        calls: network calls of the sampler that a plan of several segments fits.
        seed: of the rotations' signs.
        strict: whether a width without a Hadamard matrix is an error; else it is rotated in blocks.
        fold: put smoothing scales into the layers and norms before, where `effjax.layers.folding`
            knows how: layers that read the same inputs share a smoothing scale, which costs nothing
            when the model runs.
    """

    segments: tuple[tuple[int, tuple[Rule, ...]], ...]
    calls: Count | None = None
    seed: Natural = 0
    strict: bool = True
    fold: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        starts = [start for start, _ in self.segments]
        if not starts or starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            raise ValueError(
                f"segments must start at call 0 and then later and later, got {starts}"
            )
        if len(starts) > 1 and (self.calls is None or self.calls <= starts[-1]):
            raise ValueError(
                f"a plan of several segments needs the sampler's number of calls, more than "
                f"{starts[-1]}; got {self.calls}"
            )
        if self.fold and len(starts) > 1:
            raise ValueError(
                "smoothing scales of several segments cannot be folded: what makes the inputs is "
                "shared"
            )
        for _, rules in self.segments:
            for rule in rules:
                check_rule(rule)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Network calls at which parameters change."""
        return tuple(start for start, _ in self.segments[1:])

    def rule(self, target: TargetModule, segment: int = 0) -> Rule | None:
        """The rule that decides about a layer in a segment; None if the layer stays as it is."""
        return deciding(self.segments[segment][1], target)

    def decided(self, forward: Forward, params: Params) -> dict[str, tuple[Rule | None, ...]]:
        """The rule of each segment, by the path of a layer that some segment quantizes.

        Raises:
            ValueError: for a selector that finds no linear layer, or lacks layers of a role that it
                names, and for stacked parameters.
        """
        check_by_layer(NAME, params)
        targets = forward.target_modules(params, Linear)
        parts = [decided(rules, targets) for _, rules in self.segments]
        return {
            target.path: tuple(part.get(target.path) for part in parts)
            for target in targets
            if any(target.path in part for part in parts)
        }

    def check_calls(self, calls: int) -> None:
        """Raise ValueError for a sampler of another number of network calls."""
        if self.calls is not None and self.calls != calls:
            raise ValueError(f"the plan is made for {self.calls} network calls, not for {calls}")

    def describe(self) -> str:
        """Segments and rules, in the field's notation."""
        lines = []
        for start, rules in self.segments:
            written = "; ".join(
                f"{described(selector)}: W{w}A{a}"
                + ("" if alpha is None else f", alpha {alpha:g}")
                + (", rotated" if rotate else "")
                for selector, w, a, alpha, rotate in rules
            )
            lines.append(f"from call {start}: {written or 'nothing'}")
        return "\n".join(lines)


def uniform(
    weights: int,
    inputs: int = 8,
    *,
    alpha: float | None = 0.99,
    rotate: bool = True,
    layers: str = BLOCK_LAYERS,
    seed: int = 0,
    fold: bool = False,
) -> ViDiTQPlan:
    """The plan that gives some layers these bits; see `ViDiTQPlan` for the other arguments.

    Args:
        layers: their selector. By default self-attention and feed-forward layers: embeddings,
            modulations, projections of the text and the final layer stay floats, and so does
            cross-attention, whose keys and values come from the text (its first token is an
            outlier).
    """
    rules = ((layers, weights, inputs, alpha, rotate),)
    return ViDiTQPlan(((0, rules),), seed=seed, fold=fold)


def smooth_quant(weights: int = 8, inputs: int = 8, *, strength: float = 0.5) -> ViDiTQPlan:
    """The plan of SmoothQuant (arXiv 2211.10438): smoothing scales without rotations.

    Args:
        weights, inputs: bits.
        strength: SmoothQuant's alpha, the exponent of the inputs' maxima.
    """
    return uniform(weights, inputs, alpha=1 - strength, rotate=False)


def pixart_sigma(weights: int = 4) -> ViDiTQPlan:
    """The released plans for PixArt-Sigma's 28 blocks: W4A8 with 8 bits where it hurts, or W8A8.

    W4A8 has weights of 8 bits in the first and the last block and in all feed-forward layers. W8A8
    leaves the keys and values of cross-attention floats. alpha is 0.99, all quantized layers
    rotate.

    Raises:
        ValueError: for other bits than 4 and 8.
    """
    how = (8, 0.99, True)  # bits of inputs, alpha, rotate
    if weights == 8:
        return ViDiTQPlan(
            ((0, ((BLOCK_LAYERS, 8, *how), (r"blocks\..*\.cross\.to_(q|out)", 8, *how))),)
        )
    if weights != 4:
        raise ValueError(f"there are plans for weights of 4 and 8 bits, not {weights}")
    kept = ("role:up|down", 8, *how), (r"blocks\.(0|27)\.(attn|cross)\..*", 8, *how)
    rest = ("role:qkv|out|cross_qkv|cross_out", 4, *how)
    return ViDiTQPlan(((0, (*kept, rest)),))


def by_time(
    ranges: Sequence[tuple[int, int, Sequence[Rule]]], sampler: Sampler, *, seed: int = 0
) -> ViDiTQPlan:
    """A plan whose rules depend on the time: the first generation's "timestep-aware" plans.

    Args:
        ranges: (low, high, rules), times low ... high inclusive as in [[0, 500], [501, 1000]];
            together they must cover 0 ... 1000 once.
        sampler: whose calls are assigned to ranges by their times.

    Raises:
        ValueError: for gaps or overlaps, or a sampler whose times do not fall.
    """
    ordered = sorted(ranges, key=lambda each: each[0])
    ends = [(low, high) for low, high, _ in ordered]
    tiled = all(b[0] == a[1] + 1 for a, b in pairwise(ends))
    if not ends or ends[0][0] != 0 or ends[-1][1] != 1000 or not tiled:
        raise ValueError(
            f"time ranges must cover 0 ... 1000 without gap or overlap, such as (0, 500) and "
            f"(501, 1000); got {ends}"
        )
    times = np.asarray(sampler.schedule.times)
    if (np.diff(times) > 0).any():
        raise ValueError("times must fall from call to call; this sampler goes back in time")
    place = [next(i for i, (_, high) in enumerate(ends) if t < high + 1) for t in times]
    starts = [0, *(i for i in range(1, len(place)) if place[i] != place[i - 1])]
    segments = tuple((start, tuple(ordered[place[start]][2])) for start in starts)
    return ViDiTQPlan(segments, calls=len(times) if len(segments) > 1 else None, seed=seed)
