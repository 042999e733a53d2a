"""Plans of DiTFastAttn: a strategy for every layer and network call, and what it costs."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from effjax.fields import Count, Natural, NotNegative
from effjax.targets import AttentionKind
from effjax.transform import Plan
from pallas_kernels.block_mask import Band, visible_pairs

NAME = "dit_fast_attn"
KINDS: tuple[AttentionKind, ...] = ("self", "joint")  # of attention that plans are for


class Strategy(enum.IntEnum):
    """What one attention layer does in one network call."""

    FULL = 0
    AST = 1
    WARS_ASC = 2
    WARS = 3
    FULL_ASC = 4

    @property
    def dense(self) -> bool:
        return self in (Strategy.FULL, Strategy.FULL_ASC)

    @property
    def windowed(self) -> bool:
        return self in (Strategy.WARS, Strategy.WARS_ASC)

    @property
    def halved(self) -> bool:
        return self in (Strategy.WARS_ASC, Strategy.FULL_ASC)


@dataclasses.dataclass(frozen=True)
class DiTFastAttnPlan(Plan):
    """A strategy for every layer and network call.

    Attributes:
        strategies: `Strategy` numbers by layer and network call; every layer starts with FULL.
        tokens: sequence length N the plan was made for.
        window: tokens that the window reaches to each side.
        guidance: guidance scale of the search; another scale wants another plan.
        threshold: the search's threshold, None for a plan written by hand.
        metric: the search's loss, a key of `METRICS`.
        sampler: the search's sampler; another schedule wants another plan.
        model: the model the plan was made for.
    """

    strategies: tuple[tuple[int, ...], ...]
    tokens: Count
    window: Natural
    guidance: NotNegative | None = None
    threshold: NotNegative | None = None
    metric: str = "relative"
    sampler: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strategies or not self.strategies[0]:
            raise ValueError(
                "a plan needs at least one layer and one network call; strategies is empty"
            )
        if len({len(row) for row in self.strategies}) > 1:
            raise ValueError(
                f"every layer needs a code for every network call; the rows have lengths "
                f"{[len(row) for row in self.strategies]}"
            )
        allowed = {int(strategy) for strategy in Strategy}
        wrong = sorted({value for row in self.strategies for value in row} - allowed)
        if wrong:
            names = {strategy.name: int(strategy) for strategy in Strategy}
            raise ValueError(f"unknown strategies {wrong}; there are {names}")
        late = [layer for layer, row in enumerate(self.strategies) if row[0] != Strategy.FULL]
        if late:
            raise ValueError(
                f"layers {late} do not start with FULL: sharing and window strategies need the "
                f"output and the residual of an earlier FULL call"
            )

    def describe(self) -> str:
        """How often each strategy occurs."""
        strategies = [value for row in self.strategies for value in row]
        shares = ", ".join(
            f"{s.name} {strategies.count(s) / len(strategies):.0%}" for s in Strategy
        )
        return f"{self.layers} layers, {self.calls} calls, window {self.window}: {shares}"

    def computed(self, calls: int) -> Mapping[str, Sequence[float]]:
        dense = 2 * 2 * self.tokens**2  # for both halves of a guided sample
        shares = attention_macs(self, batch=2, width=1) / dense
        return {"attention": np.minimum(shares, 1).mean(axis=0).tolist()}

    @property
    def layers(self) -> int:
        return len(self.strategies)

    @property
    def calls(self) -> int:
        return len(self.strategies[0])

    @cached_property
    def need(self) -> tuple[tuple[bool, ...], ...]:
        """Whether a dense call must refresh the residual: a window follows before the next one."""
        return tuple(
            tuple(
                Strategy(value).dense
                and next((not Strategy(c).dense for c in row[t + 1 :] if c != Strategy.AST), False)
                for t, value in enumerate(row)
            )
            for row in self.strategies
        )


def uniform(
    pattern: tuple[int, ...], *, layers: int, calls: int, tokens: int, window: int | None = None
) -> DiTFastAttnPlan:
    """The plan that gives every layer FULL first and then repeats a pattern of strategies.

    Args:
        pattern: strategies of the calls after the first, repeated as long as there are calls.
        layers: attention layers of the model.
        calls: network calls of a trajectory.
        tokens: of the model's sequence.
        window: tokens that windows reach to each side; an eighth of `tokens` if None.
    """
    row = (int(Strategy.FULL), *(int(pattern[t % len(pattern)]) for t in range(calls - 1)))
    reach = tokens // 8 if window is None else window
    return DiTFastAttnPlan(strategies=(row,) * layers, tokens=tokens, window=reach)


def attention_macs(plan: DiTFastAttnPlan, *, batch: int, width: int) -> np.ndarray:
    """Useful multiply-adds of QK^T and PV, int[layers, calls] (the module's cost formula).

    Args:
        batch: network batch B, both guidance halves together.
        width: heads * head_dim.
    """
    dense = 2 * batch * plan.tokens**2 * width
    window = 2 * batch * visible_pairs(Band(plan.window), plan.tokens) * width

    def cost(value: int, need: bool) -> int:
        strategy = Strategy(value)
        if strategy is Strategy.AST:
            return 0
        macs = window if strategy.windowed else dense + need * window
        return macs // 2 if strategy.halved else macs

    return np.array(
        [[cost(c, n) for c, n in zip(*rows)] for rows in zip(plan.strategies, plan.need)],
        dtype=np.int64,
    )
