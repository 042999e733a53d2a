"""Recipes that were measured for a model, and how `accelerate` chooses one.

`recipes.json` holds them by the class of the denoiser, from mild to strong: methods with their
plans, which hold for any number of steps, how many times as many images a second they gave, how far
the images were from the dense ones, and what they were measured on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from effjax import registry
from effjax.fields import Checked, Positive
from effjax.forward import Forward, Params
from effjax.methods.steps.cached import StepCachePlan
from effjax.quant import FLOAT, QTensor
from effjax.transform import Transform

FILE = Path(__file__).with_suffix(".json")
COARSE = 4


@dataclasses.dataclass(frozen=True)
class Measured(Checked):
    """A recipe and its figures.

    Attributes:
        methods: names of methods and their plans as JSON texts, in the order in which they are
            applied.
        speed: images a second, as a multiple of the dense model's.
        psnr: in dB, of its images to the dense ones from the same noise; None where that was not
            measured here.
        measured: on what and how, with the command or the paper.
        recommended: whether `accelerate()` takes it.
    """

    methods: tuple[tuple[str, str], ...]
    speed: Positive
    psnr: float | None
    measured: str
    recommended: bool = False

    def transforms(self, params: Params) -> list[Transform]:
        """The methods with their plans, for a model with these parameters.

        Step caches hold what they keep (order 0) where inputs are rounded to `COARSE` bits or
        fewer: a difference between two calls has the noise of both, which order 1 continues. At 8
        bits it is far below what changes between calls (`python -m experiments.composition`).
        """
        coarse = _input_bits(params) <= COARSE
        found = []
        for name, said in self.methods:
            method = registry.method(name)
            plan = method.plan.from_json(said)
            if coarse and getattr(plan, "order", 0):
                plan = dataclasses.replace(plan, order=0)  # pyright: ignore[reportCallIssue]
            found.append(method.transform(plan))
        return found


def check_one_step_cache(forward: Forward, transforms: Sequence[Transform]) -> None:
    """Check that there is one cache of whole stacks at most, which is all that a model takes.

    Raises:
        ValueError: if a model that has one would get another.
    """
    held = [name for name, plan in forward.recipe if isinstance(plan, StepCachePlan)]
    if held and any(isinstance(each.plan, StepCachePlan) for each in transforms):
        raise ValueError(
            f"this pipeline has a step cache already, {held[0]}, and a model takes one: accelerate "
            f"the pipeline that it was made of"
        )


def _input_bits(params: Params) -> int:
    """The fewest bits that inputs of a layer are rounded to; `FLOAT` for none."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    rounded = [leaf.activations for leaf in leaves if isinstance(leaf, QTensor)]
    return min((each.quantizer.bits for each in rounded if each is not None), default=FLOAT)


@functools.cache
def measured(model: str) -> tuple[Measured, ...]:
    """Recipes of a model by its class, from mild to strong."""
    held: dict[str, list[dict[str, Any]]] = json.loads(FILE.read_text(encoding="utf-8"))
    made = [
        Measured(
            methods=tuple((name, json.dumps(plan)) for name, plan in each["methods"]),
            **{name: value for name, value in each.items() if name != "methods"},
        )
        for each in held.get(model, ())
    ]
    return tuple(sorted(made, key=lambda each: each.speed))


def choose(model: str, speed: float | None) -> Measured:
    """The recommended recipe, or the mildest one that reaches a speed.

    Raises:
        ValueError: for a model without recipes, and for a speed that none reaches.
    """
    known = measured(model)
    if not known:
        raise ValueError(
            f"no recipe was measured for {model}; choose methods yourself: pipe.transform(...), "
            f"docs/diffusion.md says which a model takes"
        )
    if speed is None:
        return next((each for each in known if each.recommended), known[0])
    for each in known:
        if each.speed >= speed:
            return each
    speeds = ", ".join(f"{each.speed:.2f}" for each in known)
    raise ValueError(f"no recipe of {model} is {speed:g} times as fast; there are {speeds}")
