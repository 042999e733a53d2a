"""What the last call of a pipeline computed, kept and held quantized."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.cost import state_bytes, weight_bytes
from effjax.forward import Forward, Params, StateDict, flatten_params
from effjax.quant import QTensor
from effjax.stacking import Range

_DECISION = ".computes"  # name of the state in which a step cache says what it decided


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a call did; `print(summary)` says it in a few lines.

    Attributes:
        calls: network calls, one a step.
        computed: whether each call computed, by what methods leave out ("blocks", "attention"). A
            share where layers or heads differ, or parts of a batch that decided differently.
        cache_bytes: of all that was kept from one call to the next, for the whole batch.
        weight_bytes: of the parameters.
        bits: how many layers hold values of so many bits; 0 stands for floats.
        methods: that were applied, in order.
    """

    calls: int
    computed: Mapping[str, tuple[float, ...]]
    cache_bytes: int
    weight_bytes: int
    bits: Mapping[int, int]
    methods: tuple[str, ...]

    @property
    def skipped(self) -> dict[str, float]:
        """Share of all calls that was not computed, by what methods leave out."""
        return {name: 1 - float(np.mean(each)) for name, each in self.computed.items()}

    def __str__(self) -> str:
        lines = [f"{self.calls} network calls, methods: {', '.join(self.methods) or 'none'}"]
        for name, each in self.computed.items():
            drawn = "".join("#" if x == 1 else "." if x == 0 else "+" for x in each)
            lines.append(f"{name} computed in {round(sum(each), 2):g} of {self.calls}: {drawn}")
        lines.append(f"kept between calls: {self.cache_bytes / 2**20:.1f} MiB")
        held = ", ".join(
            f"{count} layers in {f'{bits} bits' if bits else 'floats'}"
            for bits, count in sorted(self.bits.items())
        )
        return "\n".join([*lines, f"weights: {self.weight_bytes / 2**20:.1f} MiB, {held}"])


class Watch:
    """Takes down what step caches decide in a call; costs a copy of a scalar for each of them."""

    def __init__(self) -> None:
        self.decided: list[list[jax.Array]] = []
        self.cache_bytes = 0

    def __call__(self, step: int, states: Sequence[StateDict]) -> None:
        if not step:
            self.cache_bytes = sum(map(state_bytes, states))
        named = [[jnp.copy(x) for n, x in s.items() if n.endswith(_DECISION)] for s in states]
        self.decided.append([x for each in named for x in each])


def summarize(watch: Watch, forward: Forward, params: Params) -> Summary:
    """What a call did that was watched."""
    calls = len(watch.decided)
    computed: dict[str, tuple[float, ...]] = {}
    for _, plan in forward.recipe:
        computed |= {name: tuple(map(float, mask)) for name, mask in plan.computed(calls).items()}
    if watch.decided and watch.decided[0]:
        values = np.array(jax.device_get(watch.decided), float)
        computed["blocks"] = tuple(values.mean(axis=1).tolist())
    return Summary(
        calls,
        computed,
        watch.cache_bytes,
        weight_bytes(params),
        _bits(params),
        tuple(name for name, _ in forward.recipe),
    )


def _bits(params: Params) -> dict[int, int]:
    """How many kernels hold values of so many bits; a stack of layers counts each."""
    found: Counter[int] = Counter()
    for name, leaf in flatten_params(params).items():
        if name.endswith("kernel"):
            span = Range.of(name)
            layers: Any = 1 if span is None else span.stop - span.start
            found[leaf.bits if isinstance(leaf, QTensor) else 0] += layers
    return dict(found)
