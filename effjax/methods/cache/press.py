"""Presses: methods that keep a part of a prompt. Each is a plan with a score, and a declaration.

    @dataclasses.dataclass(frozen=True)
    class KnormPlan(PressPlan):
        def score(self, inputs: AttentionInputs) -> Scores:
            return -jnp.linalg.norm(inputs.k.astype(jnp.float32), axis=-1).transpose(0, 2, 1)

    METHOD = press.method("knorm", "..., arXiv 2406.11430", KnormPlan, systems=("KNorm",))
    transform = METHOD.transform

A plan is a budget and a storage (`BudgetPlan`); a press has a score besides (`PressPlan`). What
changes the budget or the choice of any press takes its score by name (`WrapperPlan`). What evicts
while decoding says also what a new token changes of the scores (`EvictingPlan`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import jax.numpy as jnp

import effjax.methods
from effjax import testing
from effjax.caches import (
    AttentionInputs,
    Caches,
    DenseCache,
    Dropped,
    Kind,
    Lengths,
    PressedCache,
    Sizes,
    budgets,
    check_budget,
)
from effjax.caches.evicting import EvictingCache, SlotScores, Weights
from effjax.caches.install import Place
from effjax.caches.pressed import Choice, Highest, Scores
from effjax.caches.quantization import FLOAT, Bits
from effjax.fields import Count
from effjax.forward import Forward, Params
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class BudgetPlan(Plan):
    """How many tokens are kept, and how they are held.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share that is dropped; a half if neither is given.
        bits: of keys and values in their slots: 16 (floats), 8 or 4. New tokens see quantized
            values, the prompt sees floats, see `effjax.caches.storage`.
    """

    capacity: Count | None = None
    ratio: Dropped | None = None
    bits: Bits = FLOAT

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self, **self.always)

    @property
    def always(self) -> Mapping[str, int]:
        """Tokens that are kept in any case, by the name of the field that counts them."""
        return {}

    def budget(self, most: int) -> tuple[int, Sizes | None]:
        """Slots for sequences of at most so many tokens, and for each row, see `budgets`."""
        return budgets(self.capacity, self.ratio, most, always=sum(self.always.values()))

    def kind(self, place: Place) -> Kind:
        """The cache of a layer."""
        raise NotImplementedError(f"{type(self).__name__} must say its cache")


@dataclasses.dataclass(frozen=True)
class PressPlan(BudgetPlan):
    """How many tokens of a prompt are kept, and by what score; all tokens that follow are kept.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
    """

    def score(self, inputs: AttentionInputs) -> Scores:
        """How much each key head needs each token of a prompt, float32[B, K, S].

        Infinity for what is kept in any case; what padding gets does not matter.
        """
        raise NotImplementedError(f"{type(self).__name__} must say its score")

    def kind(self, place: Place) -> Kind:
        keep, own = self.budget(place.cache_length.prompt)
        return self.pressed(Highest(self.score), keep, own, place)

    def pressed(self, choose: Choice, keep: int, own: Sizes | None, place: Place) -> Kind:
        """A cache of what a choice keeps; a dense one where that is everything."""
        if keep >= place.cache_length.prompt and own is None:
            return DenseCache, {"bits": self.bits}
        return PressedCache, {"choose": choose, "keep": keep, "own": own, "bits": self.bits}


@dataclasses.dataclass(frozen=True)
class EvictingPlan(BudgetPlan):
    """How many tokens are kept of a sequence, by what, and what new tokens change of that.

    Attributes:
        capacity: slots of a sequence, prompt and new tokens together; or None, for
        ratio: the share of a sequence's tokens that has no slot; half of them if neither is given.
    """

    def score(self, inputs: AttentionInputs) -> Scores:
        """How much each key head needs each token of a prompt, float32[B, K, S]."""
        raise NotImplementedError(f"{type(self).__name__} must say its score")

    def observe(self, scores: SlotScores, weights: Weights) -> SlotScores:
        """The scores of slots after a token has attended to them."""
        raise NotImplementedError(f"{type(self).__name__} must say what a token changes")

    def last(self, slots: int, room: Lengths) -> Lengths:
        """How many of the last tokens never go, by the slots of a row, at most `slots`: one."""
        return jnp.ones_like(room)

    def kind(self, place: Place) -> Kind:
        slots, own = self.budget(place.cache_length.total)
        if slots >= place.cache_length.total and own is None:
            return DenseCache, {"bits": self.bits}
        options = {"score": self.score, "observe": self.observe, "own": own, "bits": self.bits}
        return EvictingCache, {**options, "slots": slots, "recent": Recent(self, slots)}


@dataclasses.dataclass(frozen=True)
class Recent:
    """How many of the last tokens never go, by a row's slots."""

    plan: EvictingPlan
    slots: int

    def __call__(self, room: Lengths) -> Lengths:
        return self.plan.last(self.slots, room)


Options = tuple[tuple[str, int | float], ...]


@dataclasses.dataclass(frozen=True)
class WrapperPlan(PressPlan):
    """A press whose score is that of another one.

    Attributes:
        press: name of the method whose score is taken.
        options: fields of its plan that its score depends on, such as (("window", 16),); defaults
            for others. Budget and bits are those of this plan.
    """

    press: str = "snap_kv"
    options: Options = ()

    @property
    def inner(self) -> PressPlan:
        """The plan whose score is taken."""
        return _press(self.press, self.options)

    @property
    def always(self) -> Mapping[str, int]:
        return self.inner.always

    def score(self, inputs: AttentionInputs) -> Scores:
        return self.inner.score(inputs)


@lru_cache(maxsize=64)
def _press(name: str, options: Options) -> PressPlan:
    found = getattr(getattr(effjax.methods, name, None), "METHOD", None)
    plan = getattr(found, "plan", None)
    if not (isinstance(plan, type) and issubclass(plan, PressPlan)):
        raise ValueError(
            f"press must be the name of a method with a score, such as 'snap_kv' or 'knorm', got "
            f"{name!r}"
        )
    if issubclass(plan, WrapperPlan):
        raise ValueError(f"press must have a score of its own, {name!r} takes another one's")
    if own := [name for name, _ in options if name in BudgetPlan.__dataclass_fields__]:
        raise ValueError(
            f"options say what the score of {name!r} depends on; {', '.join(own)} must be said of "
            f"the plan that takes the score"
        )
    made = plan.from_dict(dict(options))
    assert isinstance(made, PressPlan)
    return made


def method(
    name: str,
    paper: str,
    plan: type[BudgetPlan],
    *,
    systems: tuple[str, ...],
    ratios: tuple[float, ...] = (0.25, 0.5, 0.75),
    **tiny: Any,
) -> Method:
    """The declaration of a method whose plan says what its caches are.

    Args:
        name, paper, plan, systems: of the method.
        ratios: of its ladder, whose last plan has 4 bits.
        tiny: fields of the plans for a tiny model, such as a window that fits a prompt of 12.
    """

    def transform(plan: BudgetPlan) -> Transform:
        """Give every attention layer the cache that the plan says."""

        def apply(forward: Forward, params: Params) -> Pair:
            return forward.patch(Caches(_kind, plan)), params

        return Transform(name, plan, apply)

    transform.__module__ = plan.__module__
    return Method(
        name=name,
        paper=paper,
        seams=("patches",),
        domain="language models",
        plan=plan,
        transform=transform,
        identity=lambda subject: plan(ratio=0.0, **tiny),
        ladder=lambda subject: (
            *(plan(ratio=ratio, **tiny) for ratio in ratios[:-1]),
            plan(ratio=ratios[-1], bits=4, **tiny),
        ),
        tiny=testing.tiny_llama,
        systems=systems,
    )


def _kind(plan: BudgetPlan, place: Place) -> Kind:
    return plan.kind(place)
