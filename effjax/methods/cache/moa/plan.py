"""Which spans heads have."""

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
    """Spans of all key heads.

    Attributes:
        alphas: tokens, by layer and key head.
        betas: shares of a sequence, by layer and key head.
        block: tokens of a block: what spans are rounded up to.
        sink: first tokens that every head keeps.
        floor: the least number of slots.
        layout: "flat" or "grouped".
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
        """Slots C of every key head of a layer, for sequences of so many tokens.

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
        """alpha and beta of every key head of a layer."""
        return tuple(zip(self.alphas[layer], self.betas[layer], strict=True))

    def span(self, rule: Rule, tokens: np.ndarray) -> np.ndarray:
        """Slots C of a head, by the tokens of sequences; `floor` where its rule gives no span."""
        alpha, beta = rule
        kept = np.minimum((alpha + beta * tokens).astype(int), tokens)
        return np.asarray(-(-np.maximum(kept, self.floor) // self.block) * self.block)

    def check_length(self, tokens: int) -> None:
        """Raise ValueError if some head has no span in a sequence of so many tokens."""
        for layer in range(len(self.alphas)):
            self.slots(layer, tokens)

    def describe(self) -> str:
        """How many heads follow which rule, and bits if slots hold quantized values."""
        counts: dict[tuple[float, float], int] = {}
        for layer in range(len(self.alphas)):
            for rule in self.rules(layer):
                counts[rule] = counts.get(rule, 0) + 1
        listed = sorted(counts.items(), key=lambda item: -item[1])
        told = [f"{n} heads {alpha:g} + {beta:g} N" for (alpha, beta), n in listed]
        return ", ".join(told + [f"{self.bits} bits"] * (self.bits != FLOAT))


def uniform(layers: int, heads: int, *, alpha: float = 0.0, beta: float = 0.5) -> MoAPlan:
    """One rule for all heads: the baseline, StreamingLLM at the same density.

    Args:
        layers, heads: attention layers of the model, and key heads of each.
        alpha: tokens of every span.
        beta: share of a sequence that every span takes beside them.
    """
    return MoAPlan(((float(alpha),) * heads,) * layers, ((float(beta),) * heads,) * layers)


def read_released(source: str | os.PathLike | Mapping[str, Any], **options: Any) -> MoAPlan:
    """A plan from a published `moa_alpha_beta.json`: lists `alphas`, `betas` by layer and head.

    Args:
        source: the file, or what it holds.
        options: other fields of the plan.

    Raises:
        ValueError: if it holds something else.
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
