"""Bits of weights by block and group of layers, or by layer, from the sensitivity of samples."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from effjax.context import PyTree
from effjax.forward import Forward, Params, flatten_params
from effjax.layers.linear import Linear
from effjax.layers.stack import Stack
from effjax.methods.quantization.vidit_q.calibration import Calibration, calibrate
from effjax.methods.quantization.vidit_q.leaves import balance
from effjax.methods.quantization.vidit_q.plan import ViDiTQPlan
from effjax.quant import FLOAT
from effjax.quant.hadamard import Rotation
from effjax.samplers import Sampler
from effjax.search.allocation import allocate, bit_budget, split_bits
from effjax.search.sensitivity import Metric, Preparation, fidelity, rounded_samples, sensitivity


def search(
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    average_bits: float,
    ratios: Sequence[float] | None = None,
    **options: Any,
) -> ViDiTQPlan:
    """Find weight bits for the attention and the feed-forward layers of every block.

    This is `sensitivities(...).plan(average_bits, ratios=ratios)`.

    Args:
        forward, params: the model, not quantized.
        sampler, cond, key: a small batch to score on.
        average_bits: of a weight, up to 0.02.
        ratios: see `Sensitivities.plan`.
        options: of `sensitivities`.

    Raises:
        ValueError: for a group without layers, or an average that no choice meets.
    """
    measured = sensitivities(forward, params, sampler, cond, key=key, **options)
    return measured.plan(average_bits, ratios=ratios)


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """How samples suffer when one part of a model is quantized: measured once, for any budget.

    Attributes:
        parts: layers that share bits, by the selector of the part's rule.
        groups: group of each part.
        metrics: by group.
        scores: float[parts, candidates], higher is better.
        sizes: weights of each part.
        candidates: bits of weights.
        sample: bits int32[layers, 2] to samples.
        inputs, alpha, rotate, seed: of the plans.
    """

    parts: Mapping[str, tuple[str, ...]]
    groups: tuple[str, ...]
    metrics: Mapping[str, Metric]
    scores: np.ndarray
    sizes: np.ndarray
    candidates: tuple[int, ...]
    sample: Callable[[np.ndarray], jax.Array]
    inputs: int
    alpha: float | None
    rotate: bool
    seed: int

    def plan(self, average_bits: float, *, ratios: Sequence[float] | None = None) -> ViDiTQPlan:
        """The plan whose scores sum to most, by an integer program.

        The groups of one metric share a program ("metric-decoupled": scores of different metrics
        are never added).

        Args:
            average_bits: of a weight, up to 0.02.
            ratios: average bits of the first of two groups over those of the second, to try, each
                group in a program of its own. The plan whose samples have the highest `fidelity`
                wins (MixDQ, arXiv 2405.17873, section 3.4).

        Raises:
            ValueError: for an average that no choice meets.
        """
        together: dict[Any, list[int]] = {}
        for group, metric in self.metrics.items():
            own = [i for i, other in enumerate(self.groups) if other == group]
            together.setdefault(group if ratios else metric, []).extend(own)
        shares = {own: int(self.sizes[indices].sum()) for own, indices in together.items()}
        choices = []
        for averages in _averages(average_bits, ratios, shares):
            try:
                chosen = np.zeros(len(self.parts), int)
                for own, indices in together.items():
                    budget = bit_budget(self.sizes[indices], self.candidates, averages[own])
                    chosen[indices] = allocate(self.scores[indices], [budget]).choice
            except ValueError:
                if ratios is None or len(ratios) == 1:
                    raise
                continue  # this ratio asks for more or fewer bits than there are
            choices.append(chosen)
        if not choices:
            raise ValueError(
                f"none of the ratios {tuple(ratios or ())} allows {average_bits} bits on average"
            )
        best = choices[0] if len(choices) == 1 else max(choices, key=self._fidelity)
        rules = tuple(
            (selector, self.candidates[choice], self.inputs, self.alpha, self.rotate)
            for selector, choice in zip(self.parts, best, strict=True)
        )
        return ViDiTQPlan(((0, rules),), seed=self.seed)

    def _fidelity(self, chosen: np.ndarray) -> float:
        """Of samples of the whole model with these candidates."""
        bits = [
            (self.candidates[choice], self.inputs)
            for paths, choice in zip(self.parts.values(), chosen, strict=True)
            for _ in paths
        ]
        quantized = np.array(bits, np.int32)
        return float(fidelity(self.sample(np.full_like(quantized, FLOAT)), self.sample(quantized)))


def sensitivities(
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    calibration: Calibration | None = None,
    candidates: Sequence[int] = (4, 6, 8),
    inputs: int = 8,
    alpha: float | None = 0.99,
    rotate: bool = True,
    groups: Mapping[str, Metric] | None = None,
    by_layer: bool = False,
    uncond: PyTree = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivities:
    """Score final samples with one part of the model quantized at a time, one compiled program.

    A part is the layers of one group in one block, or a single layer (ViDiT-Q, arXiv 2406.02540,
    section 3.4).

    Args:
        forward, params: the model, not quantized.
        sampler, cond, uncond, key: a small batch to score on; 16 samples tell layers apart where 8
            may not.
        calibration: from `calibrate` on `uniform(8, ...)`; made here if None and alpha is given.
        candidates: bits of weights to choose from.
        inputs: bits of inputs.
        alpha, rotate, seed: as in the plan.
        groups: metric by a group's selector; None scores `role:qkv|out` and `role:up|down` by
            `fidelity`. Give `role:cross_qkv|cross_out` a metric of text alignment to quantize
            cross-attention too.
        by_layer: score every layer by itself.
        progress: show a bar.

    Raises:
        ValueError: for a group without layers, or without those of a role that it names.
    """
    groups = dict(groups or {"role:qkv|out": fidelity, "role:up|down": fidelity})
    rules = tuple((group, 8, inputs, alpha, rotate) for group in groups)
    whole = ViDiTQPlan(((0, rules),), seed=seed)
    parts, group_of = _parts(whole, forward, params, by_layer=by_layer)
    paths = [path for part in parts.values() for path in part]
    if alpha is not None and calibration is None:
        calibration = calibrate(
            whole, forward, params, sampler, cond, key=key, uncond=uncond, progress=progress
        )
    flat = flatten_params(params)
    kernels = {path: flat[f"{path}.kernel"] for path in paths}
    preparations = {
        path: Preparation(
            balance(kernel, calibration[path][0], alpha)
            if alpha is not None and calibration is not None
            else None,
            Rotation(kernel.shape[-2], seed) if rotate else None,
        )
        for path, kernel in kernels.items()
    }
    sample = rounded_samples(
        forward, params, sampler, cond, key=key, preparations=preparations, uncond=uncond
    )
    scores = sensitivity(
        sample,
        paths,
        parts=list(parts.values()),
        candidates=[(bits, inputs) for bits in candidates],
        metrics=[groups[group] for group in group_of.values()],
        progress=progress,
    )
    return Sensitivities(
        parts=parts,
        groups=tuple(group_of.values()),
        metrics=groups,
        scores=scores,
        sizes=np.array([sum(kernels[path].size for path in part) for part in parts.values()]),
        candidates=tuple(candidates),
        sample=sample,
        inputs=inputs,
        alpha=alpha,
        rotate=rotate,
        seed=seed,
    )


def _parts(
    whole: ViDiTQPlan, forward: Forward, params: Params, *, by_layer: bool
) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Layers of each part and its group, by the selector of the part's rule."""
    targets = forward.target_modules(params)
    linear = [target.path for target in targets if isinstance(target.module, Linear)]
    blocks = [
        f"{target.path}.{place}"
        for target in targets
        if isinstance(target.module, Stack)
        for place in range(len(target.module))
    ]
    members: dict[tuple[str, str], list[str]] = {}
    for path, (rule,) in whole.decided(forward, params).items():
        assert rule is not None
        own = path
        if not by_layer:
            own = next((block for block in blocks if path.startswith(f"{block}.")), path)
        members.setdefault((own, rule[0]), []).append(path)
    selectors = {key: _selector(key[0], paths, linear) for key, paths in members.items()}
    parts = {selectors[key]: tuple(paths) for key, paths in members.items()}
    return parts, {selectors[key]: key[1] for key in members}


def _selector(block: str, paths: Sequence[str], linear: Sequence[str]) -> str:
    """A regular expression for layers of a block: by the modules that hold no others, or by name.

    Args:
        block, paths: where the layers are, and what they are.
        linear: all linear layers of the model.
    """
    if list(paths) == [block]:
        return re.escape(block)
    names = [path.removeprefix(f"{block}.") for path in paths]
    holders = list(dict.fromkeys(name.partition(".")[0] for name in names))
    below = [path for path in linear if path.startswith(tuple(f"{block}.{h}." for h in holders))]
    alone = set(below) == set(paths)
    joined = "|".join(map(re.escape, holders if alone else names))
    return re.escape(block) + r"\." + (f"({joined})" if "|" in joined else joined) + r"\..*" * alone


def _averages(
    average: float, ratios: Sequence[float] | None, sizes: Mapping[Any, int]
) -> list[dict[Any, float]]:
    """Average bits by group for every ratio of the first group's to the second's."""
    if ratios is None:
        return [dict.fromkeys(sizes, average)]
    if len(sizes) != 2:
        raise ValueError(f"ratios are between two groups; there are {list(sizes)}")
    (first, a), (second, b) = sizes.items()
    found = (split_bits(average, ratio, a / b) for ratio in ratios)
    return [{first: one, second: two} for one, two in found]
