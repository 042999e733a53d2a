"""What methods look at to search, calibrate, train or read: a declaration names one of these.

A command makes the data that a method declares (`Method.data`) from its options; a program makes it
from whatever it has:

    data = Trajectory(sampler, labels, key=jax.random.key(0))
    plan = METHOD.search(METHOD.goals(threshold=0.1), forward, params, data)

Sequences are drawn when they are wanted, so that a method says itself how long they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from effjax.context import PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """Samples of a model, call by call.

    Attributes:
        sampler: the loop that calls the model.
        cond: conditions of a small batch.
        key: of the noise.
        uncond: the unconditional counterpart, None where the model has a null condition.
    """

    sampler: Any
    cond: PyTree
    key: jax.Array
    uncond: PyTree = None


@dataclasses.dataclass(frozen=True, eq=False)
class Sequences:
    """Sequences of tokens, as long and as many as a method wants.

    Attributes:
        draw: (tokens, count, seed) -> int32[count, tokens]; other seeds give other sequences.
        tokens: of a sequence that is calibrated or trained on.
        count: how many are calibrated on.
        seed: of those.
    """

    draw: Callable[[int, int, int], np.ndarray]
    tokens: int = 512
    count: int = 8
    seed: int = 0

    def calibration(self) -> np.ndarray:
        """The sequences to calibrate on, int32[count, tokens]."""
        return self.draw(self.tokens, self.count, self.seed)

    def batches(self, rows: int) -> Callable[[int], Iterator[np.ndarray]]:
        """What `effjax.training.train` takes: batches int32[rows, tokens] from a step on.

        None of them is the one that is calibrated on.
        """

        def start(step: int) -> Iterator[np.ndarray]:
            while True:
                yield self.draw(self.tokens, rows, ((self.seed + 1) << 20) + step)
                step += 1

        return start


@dataclasses.dataclass(frozen=True, eq=False)
class Answers:
    """Sequences whose answers count, and depend on what stands far before them.

    Attributes:
        draw: (tokens, count, seed) -> tokens int32[count, tokens] and how much predicting each of
            them counts, float32[count, tokens].
        count: how many of each length.
        seed: of the first of them.
    """

    draw: Callable[[int, int, int], tuple[np.ndarray, np.ndarray]]
    count: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Adapters:
    """Changes of layers that were trained elsewhere, each the product of two factors.

    Attributes:
        factors: (down [I, r], up [r, O]) by path of the layer, by a name for each adapter.
        scales: of each adapter; 1 where none is given.
    """

    factors: Mapping[str, Mapping[str, tuple[Any, Any]]]
    scales: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Samples:
    """Samples of a model, as many as a method wants.

    Attributes:
        sampler: the loop that calls the model.
        conditions: (count, number) -> conditions of a batch; other numbers give others.
        seed: of all that is drawn.
    """

    sampler: Any
    conditions: Callable[[int, int], PyTree]
    seed: int = 0
