"""The plan of MoA: a rule (alpha, beta) for the span of each key head.

A head keeps alpha + beta N tokens of a sequence of N. Plans come from `search`, from a published
file (`read_released`), or have one rule for all heads (`uniform`).
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from effjax.caches.quantization import FLOAT, Bits
from effjax.fields import Count
from effjax.storage import read_json
from effjax.transform import Plan

Rule = tuple[float, float]  # alpha and beta
Rules = tuple[tuple[float, ...], ...]

SlotLayout = Literal["flat", "grouped"]
LAYOUTS = get_args(SlotLayout)


@dataclasses.dataclass(frozen=True)
class MoAPlan(Plan):
    """The spans of all key heads of a model.

    Attributes:
        alphas: constant part of a span, in tokens, by layer and key head.
        betas: part of a span that grows, as a share of the sequence, by layer and key head.
        block: spans are rounded up to a multiple of so many tokens.
        sink: number of first tokens that every head keeps; a multiple of `block`.
        floor: the least number of slots of a head; a multiple of `block`, more than `sink`.
        layout: "flat" has one pair of arrays for all heads of a layer, "grouped" one for the heads
            with the same rule; only the latter can be sharded by heads.
        bits: of keys and values in their slots: 16 (floats), 8 or 4.
    """

    alphas: Rules
    betas: Rules
    block: Count = 64
    sink: Count = 64
    floor: Count = 128
    layout: SlotLayout = "flat"
    bits: Bits = FLOAT

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = [[len(row) for row in table] for table in (self.alphas, self.betas)]
        if not shapes[0] or shapes[0] != shapes[1]:
            raise ValueError(
                f"alphas and betas must name the same heads, layer by layer; alphas have "
                f"{shapes[0]} heads and betas {shapes[1]}"
            )
        if self.sink % self.block or self.floor % self.block:
            raise ValueError(
                f"sink and floor must be multiples of the block; got block={self.block}, "
                f"sink={self.sink}, floor={self.floor}"
            )
        if any(beta < 0 for row in self.betas for beta in row):
            raise ValueError(
                f"betas are shares of a sequence, 0 or more, since spans do not shrink as it "
                f"grows; the least one is {min(min(row) for row in self.betas if row)}"
            )
        if self.floor <= self.sink:
            raise ValueError(
                f"floor={self.floor} leaves no slot beside sink={self.sink}: take at least "
                f"{self.sink + self.block}"
            )

    def slots(self, layer: int, tokens: int) -> tuple[int, ...]:
        """The number of slots of every key head of a layer, for sequences of so many tokens.

        Raises:
            ValueError: if a rule gives no span at this length.
        """
        rules = self.rules(layer)
        for head, (alpha, beta) in enumerate(rules):
            if alpha + beta * tokens <= 0:
                raise ValueError(
                    f"layer {layer}, head {head}: {alpha} + {beta} x {tokens} tokens is no span; "
                    f"this plan is for longer sequences"
                )
        return self.slots_of(rules, tokens)

    def slots_of(self, rules: Sequence[Rule], tokens: int) -> tuple[int, ...]:
        """Slots C of heads with these rules."""
        return tuple(int(self.span(rule, np.asarray(tokens))) for rule in rules)

    def rules(self, layer: int) -> tuple[Rule, ...]:
        """The rule (alpha, beta) of every key head of a layer."""
        return tuple(zip(self.alphas[layer], self.betas[layer], strict=True))

    def span(self, rule: Rule, tokens: np.ndarray) -> np.ndarray:
        """The number of slots of a head for sequences of so many tokens, at least `floor`."""
        alpha, beta = rule
        kept = np.minimum((alpha + beta * tokens).astype(int), tokens)
        return np.asarray(-(-np.maximum(kept, self.floor) // self.block) * self.block)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if some head has no span in a sequence of so many tokens."""
        for layer in range(len(self.alphas)):
            self.slots(layer, tokens)

    def describe(self) -> str:
        """A line that says how many heads follow which rule, and the bits of quantized values."""
        counts: dict[tuple[float, float], int] = {}
        for layer in range(len(self.alphas)):
            for rule in self.rules(layer):
                counts[rule] = counts.get(rule, 0) + 1
        listed = sorted(counts.items(), key=lambda item: -item[1])
        told = [f"{n} heads {alpha:g} + {beta:g} N" for (alpha, beta), n in listed]
        return ", ".join(told + [f"{self.bits} bits"] * (self.bits != FLOAT))


def uniform(layers: int, heads: int, *, alpha: float = 0.0, beta: float = 0.5) -> MoAPlan:
    """The plan with one rule for all heads.

    It is StreamingLLM at the same density, the baseline that a search has to beat.

    Args:
        layers, heads: attention layers of the model, and key heads of each.
        alpha: tokens of every span.
        beta: share of a sequence that every span takes beside them.
    """
    return MoAPlan(((float(alpha),) * heads,) * layers, ((float(beta),) * heads,) * layers)


def read_released(source: str | os.PathLike | Mapping[str, Any], **options: Any) -> MoAPlan:
    """Read a published plan, `moa_alpha_beta.json`.

    Such a file has two lists, `alphas` and `betas`, by layer and head.

    Args:
        source: path of the file, or its parsed contents.
        options: other fields of the plan.

    Raises:
        ValueError: if the contents are something else.
    """
    held = source if isinstance(source, Mapping) else read_json(Path(source))
    if not {"alphas", "betas"} <= set(held):
        raise ValueError(f"a released plan has alphas and betas, this one has {sorted(held)}")
    tables = {}
    for name in ("alphas", "betas"):
        table = held[name]
        if not isinstance(table, list) or not all(isinstance(row, list) for row in table):
            raise ValueError(
                f"{name} of a released plan must be lists [layer][head], got {table!r}"
            )
        tables[name] = tuple(map(tuple, table))
    return MoAPlan(tables["alphas"], tables["betas"], **options)


def check_fits(plan: MoAPlan, layers: int, heads: int, kv_heads: int) -> None:
    """Raise ValueError if a plan is for another model."""
    given = [len(row) for row in plan.alphas]
    if len(given) == layers and set(given) == {kv_heads}:
        return
    hint = ""
    if set(given) == {heads}:
        hint = (
            f" It has a rule for each query head; {heads // kv_heads} query heads share a key head "
            f"here, and with it a rule."
        )
    raise ValueError(
        f"the plan is for {len(given)} layers of {sorted(set(given))} heads, the model has "
        f"{layers} layers of {kv_heads} key heads.{hint}"
    )
