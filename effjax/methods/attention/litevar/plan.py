"""Plans of LiteVAR: windows of every scale, layer and head, what guidance shares, and bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Annotated, Literal

import numpy as np

from effjax.fields import Count, Natural, OneOf, Share
from effjax.layers.scales import Sides, token_starts
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan
from effjax.methods.quantization.rules import Bits, described
from effjax.transform import Plan
from pallas_kernels.block_mask import MultiDiagonal, visible_pairs

NAME = "litevar"
FIRST = 3  # the first scale with windows in the paper

Sharing = Literal["none", "map", "output"]
Widths = tuple[tuple[Natural, ...], ...]  # by layer and head
AttentionBits = Annotated[int, OneOf(8, 16)]

# What is left of the products of attention, of both branches: QK^T is a half, and so is PV.
PARTS: Mapping[Sharing, float] = {"none": 1.0, "map": 0.75, "output": 0.5}


@dataclasses.dataclass(frozen=True)
class LiteVARPlan(Plan):
    """Windows, sharing and bits of a model of scales.

    Attributes:
        patch_nums: sides of the model's maps of tokens.
        layers: attention layers of the model.
        heads: of each.
        windows: (scale of queries, scale of keys, half widths by layer and head) of the pairs of
            scales that have windows, numbered from 0; other pairs are dense. Token x of n sees key
            y of m if |x m / n - y| is below the half width: 0 for none, m for all of them.
        share: what the unconditional branch takes of the conditional one: the "map" of its
            attention, or the attention's "output".
        renormalize: weights of the keys that are seen sum to 1. False leaves them as they are among
            all keys, which is how windows are calibrated, and takes a dense product more.
        attention_bits: of queries, keys, probabilities and values, 8 or 16 for floats.
        rules: (selector, weight bits, input bits) of linear layers, as in round_to_nearest.
        min_tokens: scales of fewer tokens stay dense.
        tau: mass that windows keep, of the calibration that found them; None for others.
        model: the model the plan was made for.
    """

    patch_nums: tuple[Count, ...]
    layers: Count
    heads: Count
    windows: tuple[tuple[Natural, Natural, Widths], ...] = ()
    share: Sharing = "output"
    renormalize: bool = True
    attention_bits: AttentionBits = 16
    rules: tuple[tuple[str, Bits, Bits], ...] = ()
    min_tokens: Natural = 0
    tau: Share | None = None
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        token_starts(self.patch_nums)
        RoundToNearestPlan(self.rules)
        pairs = [pair[:2] for pair in self.windows]
        scales = len(self.patch_nums)
        wrong = [pair for pair in pairs if not pair[1] <= pair[0] < scales]
        if wrong or len(set(pairs)) < len(pairs):
            raise ValueError(
                f"windows are of different pairs of scales (queries, keys) of {scales}, keys no "
                f"later than queries; got {wrong or pairs}"
            )
        for query, key, widths in self.windows:
            shape = [len(widths), *{len(row) for row in widths}]
            if shape != [self.layers, self.heads]:
                raise ValueError(
                    f"windows of the scales ({query}, {key}) must have a half width for each of "
                    f"{self.layers} layers and {self.heads} heads, got {shape}"
                )
        for scale in range(scales):
            if (self.widths(scale) == 0).all(-1).any():
                raise ValueError(
                    f"tokens of scale {scale} see no key at all in some head: leave a pair of it "
                    f"dense, or with a window"
                )

    def describe(self) -> str:
        """Kept pairs, what is shared, and bits."""
        bits = "; ".join(f"{described(selector)}: W{w}A{a}" for selector, w, a in self.rules)
        return (
            f"{len(self.windows)} pairs of scales with windows keep {self.kept:.4f} of the pairs "
            f"of attention, shared over guidance: {self.share} (saves "
            f"{attention_saving(self.kept, self.share):.4f}), attention of "
            f"{self.attention_bits} bits; {bits or 'layers as they are'}"
        )

    def computed(self, calls: int) -> Mapping[str, Sequence[float]]:
        if calls != len(self.patch_nums):
            return {}
        pairs = zip(self.kept_pairs, scale_pairs(self.patch_nums))
        return {"attention": [PARTS[self.share] * kept / dense for kept, dense in pairs]}

    def widths(self, scale: int) -> np.ndarray:
        """Half widths of a scale of queries: int[layers, heads, scales of keys]."""
        dense = np.square(self.patch_nums[: scale + 1])
        found = np.tile(dense, (self.layers, self.heads, 1))
        if self.patch_nums[scale] ** 2 < self.min_tokens:
            return found
        for query, key, widths in self.windows:
            if query == scale:
                found[..., key] = np.minimum(widths, dense[key])
        return found

    @cached_property
    def rules_of_attention(self) -> tuple[tuple[MultiDiagonal | None, ...], ...]:
        """What tokens of every scale see, by layer; None for all keys."""
        return tuple(zip(*(self._rules(scale) for scale in range(len(self.patch_nums)))))

    def _rules(self, scale: int) -> list[MultiDiagonal | None]:
        sizes = tuple(side**2 for side in self.patch_nums[: scale + 1])
        found: list[MultiDiagonal | None] = []
        for by_head in self.widths(scale).tolist():
            if by_head.count(by_head[0]) == len(by_head):  # equal heads share their lists
                by_head = by_head[:1]
            levels = [tuple(widths) if len(by_head) > 1 else widths[0] for widths in zip(*by_head)]
            dense = all(np.min(widths) >= size for widths, size in zip(levels, sizes))
            found.append(None if dense else MultiDiagonal(sizes, tuple(levels)))
        return found

    @cached_property
    def kept_pairs(self) -> tuple[float, ...]:
        """Pairs of queries and keys of every scale, a mean over layers and heads."""
        found = []
        starts, lists = token_starts(self.patch_nums), zip(*self.rules_of_attention)
        for side, keys, rules in zip(self.patch_nums, starts[1:], lists):
            counted = [
                side**2 * keys * self.heads
                if rule is None
                else visible_pairs(rule, side**2, keys) * self.heads // len(rule.parameters)
                for rule in rules
            ]
            found.append(sum(counted) / (self.layers * self.heads))
        return tuple(found)

    @property
    def kept(self) -> float:
        """Kept pairs as a share of all."""
        return sum(self.kept_pairs) / sum(scale_pairs(self.patch_nums))


def scale_pairs(patch_nums: Sides) -> tuple[int, ...]:
    """Pairs of queries and keys of every scale, n S: its tokens times those up to and with it."""
    return tuple(side**2 * keys for side, keys in zip(patch_nums, token_starts(patch_nums)[1:]))


def attention_saving(kept: float, share: Sharing) -> float:
    """What is saved of the products of attention, of both branches of guidance.

    1 - kept for windows alone; sharing maps leaves QK^T of one branch and PV of both, 3/4 of it;
    sharing outputs leaves a half.

    Args:
        kept: pairs that are kept, as a share of all.
        share: as in the plan.

    >>> round(attention_saving(0.2966, "output"), 4), round(attention_saving(1.0, "map"), 4)
    (0.8517, 0.25)
    """
    return 1 - kept * PARTS[share]


def windowed_pairs(scales: int, first: int = FIRST) -> tuple[tuple[int, int], ...]:
    """The pairs of scales (queries, keys) that have windows.

    From the scale `first` on, of its own keys and those of the scales before it: the first two such
    scales from `first` - 1 on, later ones from `first` on. Ten scales from 3 on have 30 pairs.

    Raises:
        ValueError: if no scale is left.
    """
    if not 1 <= first < scales:
        raise ValueError(
            f"windows begin at a scale 1 ... {scales - 1} of {scales}, got first={first}"
        )
    return tuple(
        (query, key)
        for query in range(first, scales)
        for key in range(query, max(first - (query < first + 2), 1) - 1, -1)
    )


def uniform(
    patch_nums: Sides,
    *,
    layers: int,
    heads: int,
    window: float | None = None,
    first: int = FIRST,
    share: Sharing = "output",
    **fields: object,
) -> LiteVARPlan:
    """The plan with equal windows in all layers and heads.

    Args:
        patch_nums, layers, heads: of the model.
        window: half width as a share of the keys of a scale; None for no windows.
        first: the first scale with windows.
        share: what the branches of guidance share.
        fields: other fields of the plan.

    Raises:
        ValueError: for windows of a model without scales from `first` on.
    """
    windows = []
    if window is not None:
        for query, key in windowed_pairs(len(patch_nums), first):
            width = max(1, round(window * patch_nums[key] ** 2))
            windows.append((query, key, ((width,) * heads,) * layers))
    return LiteVARPlan(patch_nums, layers, heads, tuple(windows), share, **fields)  # type: ignore


def mixed_precision(
    weights: int, inputs: int, floats: Sequence[str] = ("down",)
) -> tuple[tuple[str, int, int], ...]:
    """Rules for all linear layers of a VAR, some of whose types stay floats.

    Args:
        weights, inputs: bits of the others.
        floats: roles of the layers that stay; "down" is fc2 of the paper.

    Raises:
        ValueError: for roles that a VAR does not have.
    """
    if unknown := sorted({*floats} - {*LAYER_TYPES}):
        raise ValueError(f"a VAR has linear layers of the roles {LAYER_TYPES}, not {unknown}")
    kept = [role for role in LAYER_TYPES if role not in floats]
    if weights == inputs == 16 or not kept:
        return ()
    return ((f"role:{'|'.join(kept)}", weights, inputs),)


# word_embed, mat_qkv, proj, fc1, fc2, ada_lin and head of the paper, by their roles.
LAYER_TYPES = ("embedding", "qkv", "out", "up", "down", "modulation", "head")
