"""ViDiT-Q: quantized diffusion transformers, with channels balanced before they are quantized.

Buys: weights of 4 or 8 bits and integer products where rounding to nearest fails, because some
channels of the inputs are much larger than others and a token's one scale must fit them all.

    x -> x m -> x m R -> quantized values of each token      m_c = max|W_c|^alpha / max|x_c|^(1 -
    alpha) W -> W / m -> R^T W / m -> quantized values, once        R = random signs, then a
    Hadamard matrix

The smoothing scale m takes away what is the same at every step; the rotation R spreads what is
left, which changes from step to step. Weights are asymmetric, one scale for a channel; inputs
symmetric, one scale for a token, taken at run time. Nothing is shared over the batch. A plan may
change at network calls ("timestep-aware"): each segment has its own smoothing scales, bits and
weights.

Static: the plan, hence bits, which layers are smoothed and rotated. Dynamic: scales of tokens.
Cost: as many products; weights take bits / 32 of float32's bytes for each segment, scales and zero
points; a rotation C = a b adds 2 C (a + b) FLOPs a token.

alpha here is that of the second code generation (0.99 for PixArt, 0.5665 for Open-Sora 1.2); the
first one's, and SmoothQuant's, is 1 - alpha. alpha = 0.5 without rotation is SmoothQuant.

Source: arXiv 2406.02540, sections 3.2 to 3.4.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import tqdm

from effjax import testing
from effjax.capture import Tap, tapped_call
from effjax.context import Context, PyTree
from effjax.fields import Count, Natural, OneOf, Share
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.folding import fits, fold, folds
from effjax.layers.linear import Linear
from effjax.loops import Carry
from effjax.quant import Activations, QTensor, Quantizer, quantize_matrix
from effjax.quant.hadamard import Rotation
from effjax.samplers import Sampler
from effjax.search.allocation import allocate, bit_budget, split_bits
from effjax.search.sensitivity import (
    Metric,
    Preparation,
    Rounding,
    fidelity,
    rounded_samples,
    sensitivity,
    sqnr,
)
from effjax.targets import target_modules
from effjax.transform import Method, Pair, Plan, Transform

NAME = "vidit_q"
FLOAT = 16  # bits that leave numbers as they are

# Coded by default: self-attention and feed-forward layers. Embeddings, modulations, projections of
# the text and the final layer stay floats, and so does cross-attention, whose keys and values come
# from the text (its first token is an outlier).
LAYERS = r"blocks\..*\.(attn|mlp)\..*"

Bits = Annotated[int, OneOf(2, 3, 4, 5, 6, 7, 8, FLOAT)]

# Pattern, weight bits, input bits, alpha (None for no smoothing scale), rotate.
Rule = tuple[str, Bits, Bits, Share | None, bool]
Calibration = Mapping[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class ViDiTQPlan(Plan):
    """Bits, smoothing scales and rotations of linear layers.

    Attributes:
        segments: (first network call, rules); one segment starting at 0 holds for all calls. A rule
            is (pattern, weight bits, input bits, alpha, rotate): the first pattern that matches the
            whole path of a layer decides; a layer without one stays as it is. Bits are 2 ... 8, or
            16 for floats; alpha None is no smoothing scale.
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
                _check(rule)

    @property
    def boundaries(self) -> tuple[int, ...]:
        """Network calls at which parameters change."""
        return tuple(start for start, _ in self.segments[1:])

    def rule(self, path: str, segment: int = 0) -> Rule | None:
        """What decides about the layer at a path; None if it stays as it is."""
        for rule in self.segments[segment][1]:
            if re.fullmatch(rule[0], path):
                return None if rule[1] == FLOAT else rule
        return None

    def describe(self) -> str:
        """Segments and rules, in the field's notation."""
        lines = []
        for start, rules in self.segments:
            written = "; ".join(
                f"{pattern}: W{w}A{a}"
                + ("" if alpha is None else f", alpha {alpha:g}")
                + (", rotated" if rotate else "")
                for pattern, w, a, alpha, rotate in rules
            )
            lines.append(f"from call {start}: {written or 'nothing'}")
        return "\n".join(lines)


def _check(rule: Rule) -> None:
    pattern, weights, inputs, _, _ = rule
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    if weights == FLOAT and inputs != FLOAT:
        raise ValueError(
            f"rule {rule!r} quantizes the inputs of float weights; quantize the weights too, or "
            "leave both "
            f"at {FLOAT}"
        )


def uniform(
    weights: int,
    inputs: int = 8,
    *,
    alpha: float | None = 0.99,
    rotate: bool = True,
    layers: str = LAYERS,
    seed: int = 0,
    fold: bool = False,
) -> ViDiTQPlan:
    """The plan that gives all layers these bits; see `ViDiTQPlan` for the arguments."""
    rules = ((layers, weights, inputs, alpha, rotate),)
    return ViDiTQPlan(((0, rules),), seed=seed, fold=fold)


def smooth_quant(weights: int = 8, inputs: int = 8, *, strength: float = 0.5) -> ViDiTQPlan:
    """SmoothQuant (arXiv 2211.10438): scales alone; strength is its alpha, the inputs' exponent."""
    return uniform(weights, inputs, alpha=1 - strength, rotate=False)


def pixart_sigma(weights: int = 4) -> ViDiTQPlan:
    """The released plans for PixArt-Sigma's 28 blocks: W4A8 with 8 bits where it hurts, or W8A8.

    W4A8 has weights of 8 bits in the first and the last block and in all feed-forward layers. W8A8
    leaves the keys and values of cross-attention floats. alpha is 0.99, all quantized layers
    rotate.

    Raises:
        ValueError: for other bits than 4 and 8.
    """
    if weights == 8:
        return uniform(8, 8, layers=r"blocks\..*\.(attn\..*|cross\.to_(q|out)|mlp\..*)")
    if weights != 4:
        raise ValueError(f"there are plans for weights of 4 and 8 bits, not {weights}")
    kept = r"blocks\.((0|27)\.(attn|cross)|.*\.mlp)\..*"
    rest = r"blocks\..*\.(attn|cross)\..*"
    return ViDiTQPlan(((0, ((kept, 8, 8, 0.99, True), (rest, 4, 8, 0.99, True))),))


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


def calibrate(
    plan: ViDiTQPlan,
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    uncond: PyTree = None,
    decay: float | None = None,
    progress: bool = True,
) -> dict[str, jax.Array]:
    """Absolute maxima of the inputs' channels along the model's own trajectory.

    Args:
        plan: whose layers and segments.
        forward, params: the model, not quantized.
        sampler: with the calls of the plan.
        cond, uncond, key: a small calibration batch (the paper takes 10 to 32 prompts).
        decay: None takes the maximum over samples and calls (second generation); a number averages
            over calls with it, each call giving the mean over samples of the maximum over tokens
            (first generation: 0.95).
        progress: show a bar over the calls.

    Returns:
        float32[segments, I] by path of a layer; `np.savez` keeps it.

    Raises:
        ValueError: if the plan matches no layer, or is made for another number of calls.
    """
    _check_calls(plan, sampler.calls)
    paths = _decided(plan, forward, params)
    patch = Tap(Linear, "|".join(map(re.escape, paths)), "input")

    def channels(x: jax.Array) -> jax.Array:
        absmax = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=tuple(range(1, x.ndim - 1)))
        return jnp.max(absmax, axis=0) if decay is None else jnp.mean(absmax, axis=0)

    def join(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.maximum(old, new) if decay is None else decay * old + (1 - decay) * new

    uncond = sampler.unconditional(forward, cond, uncond)

    @jax.jit
    def call(params: Params, carry: Carry, step: jax.Array) -> tuple[Carry, dict[str, jax.Array]]:
        inputs = sampler.inputs(carry.x, cond, uncond, step)
        raw, state, seen = tapped_call(
            forward, params, inputs, patch, state=carry.state, step=step, guidance=sampler.joined
        )
        out = sampler.guide(raw, carry.x.shape[-1])
        carry = sampler.update(carry._replace(state=state), out, step)
        return carry, {path: channels(x) for path, x in seen.items()}

    carry = jax.jit(lambda params: sampler.init(forward, params, cond, key, uncond=uncond))(params)
    found: list[dict[str, jax.Array]] = [{} for _ in plan.segments]
    for step in tqdm(range(sampler.calls), desc="calibration", disable=not progress, leave=False):
        carry, seen = call(params, carry, np.int32(step))
        own = found[sum(step >= boundary for boundary in plan.boundaries)]
        for path, new in seen.items():
            own[path] = new if path not in own else join(own[path], new)
    return {path: jnp.stack([own[path] for own in found]) for path in paths}


def transform(plan: ViDiTQPlan, calibration: Calibration | None = None) -> Transform:
    """Quantize a model's linear layers by the plan.

    Args:
        calibration: from `calibrate`, for plans with smoothing scales.

    Raises:
        ValueError: if a pattern decides no layer, a layer is quantized already, or the calibration
            is missing or belongs to another model or plan.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        return _quantize(plan, calibration, forward, params)

    def shapes(forward: Forward, params: Params) -> Pair:
        ones = {
            path: jnp.ones((len(plan.segments), flatten_params(params)[f"{path}.kernel"].shape[0]))
            for path in _decided(plan, forward, params)
        }
        return _quantize(plan, ones, forward, params)

    return Transform(METHOD.name, plan, apply, shapes)


def _quantize(
    plan: ViDiTQPlan, calibration: Calibration | None, forward: Forward, params: Params
) -> Pair:
    flat = flatten_params({name: value for name, value in params.items() if name != METHODS})
    paths = _decided(plan, forward, params)
    _check_calibration(plan, calibration, paths, {p: flat[f"{p}.kernel"].shape[0] for p in paths})
    for path in paths:
        if isinstance(flat[f"{path}.kernel"], QTensor):
            raise ValueError(f"{path} is quantized already; a layer can be quantized once")
    learned = params.get(METHODS, {})
    folded: set[str] = set()
    if plan.fold and calibration is not None:
        flat, folded = _fold(plan, calibration, forward, params, flat)
    parts = []
    for segment in range(len(plan.segments)):
        part = {}
        for path in paths:
            kernel, rule = flat[f"{path}.kernel"], plan.rule(path, segment)
            if rule is not None:
                _, weights, inputs, alpha, rotate = rule
                smoothing_scale = None
                if alpha is not None and path not in folded:
                    assert calibration is not None
                    smoothing_scale = balance(kernel, calibration[path][segment], alpha)
                rotation = Rotation(kernel.shape[0], plan.seed, plan.strict) if rotate else None
                kernel = quantize_matrix(
                    kernel,
                    Quantizer(weights, symmetric=False),
                    activations=None if inputs == FLOAT else Activations(Quantizer(inputs)),
                    smoothing_scale=smoothing_scale,
                    rotation=rotation,
                )
            part[path] = kernel
        parts.append(part)
    quantized = nest_params(flat | {f"{path}.kernel": leaf for path, leaf in parts[0].items()})
    if learned:
        quantized[METHODS] = learned
    if len(parts) == 1:
        return forward, quantized
    later = {str(segment): part for segment, part in enumerate(parts) if segment}
    quantized[METHODS] = {**learned, NAME: later}
    assert plan.calls is not None
    return forward.patch(Segments(plan.boundaries, plan.calls)), quantized


def _fold(
    plan: ViDiTQPlan,
    calibration: Calibration,
    forward: Forward,
    params: Params,
    flat: dict[str, Any],
) -> tuple[dict[str, Any], set[str]]:
    """Leaves with scales folded where that is possible, and the layers that need none any more."""
    done: set[str] = set()
    for where in folds(forward.target_modules(params)):
        rules = [plan.rule(reader) for reader in where.readers]
        alphas = {None if rule is None else rule[3] for rule in rules}
        (alpha, *others) = alphas
        source = flat.get(f"{where.source}.kernel")
        if others or alpha is None or isinstance(source, QTensor) or not fits(flat, where):
            continue  # smoothing scales differ, or what makes the inputs holds values already
        kernels = [flat[f"{reader}.kernel"] for reader in where.readers]
        absmax = jnp.max(jnp.stack([calibration[reader][0] for reader in where.readers]), axis=0)
        smoothing_scale = balance(jnp.concatenate(kernels, axis=1), absmax, alpha)
        flat = fold(flat, where, smoothing_scale)
        for reader, kernel in zip(where.readers, kernels, strict=True):
            flat[f"{reader}.kernel"] = (kernel / smoothing_scale[:, None]).astype(kernel.dtype)
        done |= set(where.readers)
    return flat, done


def balance(kernel: jax.Array, absmax: jax.Array, alpha: float) -> jax.Array:
    """The scale float32[I] = max|W_c|^alpha / max|x_c|^(1 - alpha); 1 where either is zero.

    Args:
        kernel: float[I, O].
        absmax: float[I] magnitudes of the inputs' channels.
    """
    weights = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=1)
    usable = (weights > 0) & (absmax > 0)
    smoothing_scale = jnp.where(usable, weights, 1) ** alpha / jnp.where(usable, absmax, 1) ** (
        1 - alpha
    )
    return jnp.where(usable, smoothing_scale, 1.0)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Patch: later segments of the network calls use their own leaves.

    Attributes:
        boundaries: first call of every segment but the first; samplers scan between them.
        calls: of the sampler.
    """

    boundaries: tuple[int, ...]
    calls: int

    def __call__(self, module: nnx.Module, context: Context) -> None:
        segment = context.segment(self.boundaries)
        if segment:
            leaves = context.learned[NAME][str(segment)]
            for target in target_modules(module, Linear):
                if target.path in leaves:
                    assert isinstance(target.module, Linear)
                    target.module.kernel.set_value(leaves[target.path])


def best_alpha(
    plan: ViDiTQPlan,
    forward: Forward,
    params: Params,
    sampler: Sampler,
    cond: PyTree,
    *,
    key: jax.Array,
    calibration: Calibration,
    grid: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99),
    metric: Metric = sqnr,
    uncond: PyTree = None,
) -> ViDiTQPlan:
    """The plan with the alpha, of several, whose samples are best; one program is compiled.

    Args:
        plan: of one segment; the alpha of all its smoothed layers is replaced.
        forward, params: the model, not quantized.
        sampler, cond, uncond, key: what is sampled, always from the same noise.
        calibration: of the plan.
        grid: to try.
        metric: of dense samples and others, higher is better.

    Raises:
        ValueError: for a plan of several segments or without smoothing scales.
    """
    paths = [path for path in _decided(plan, forward, params) if _rule(plan, path)[3] is not None]
    if plan.boundaries or not paths:
        raise ValueError("alpha is swept on a plan of one segment with smoothed layers")
    flat = flatten_params(params)
    rules = {path: _rule(plan, path) for path in _decided(plan, forward, params)}

    @jax.jit
    def sample(
        params: Params, bits: jax.Array, smoothing_scales: Mapping[str, jax.Array]
    ) -> jax.Array:
        preparations = {
            path: Preparation(
                smoothing_scales.get(path),
                Rotation(flat[f"{path}.kernel"].shape[0], plan.seed, plan.strict)
                if rule[4]
                else None,
            )
            for path, rule in rules.items()
        }
        rounded = forward.patch(Rounding(bits, preparations))
        return sampler(rounded, params, cond, key, uncond=uncond)

    def smoothing_scales(alpha: float) -> dict[str, jax.Array]:
        return {p: balance(flat[f"{p}.kernel"], calibration[p][0], alpha) for p in paths}

    bits = jnp.asarray([rule[1:3] for rule in rules.values()], jnp.int32)
    dense = sample(params, jnp.full_like(bits, FLOAT), smoothing_scales(grid[0]))
    scores = [float(metric(dense, sample(params, bits, smoothing_scales(alpha)))) for alpha in grid]
    best = grid[int(np.argmax(scores))]
    swept = tuple(
        (pattern, w, a, None if alpha is None else best, rotate)
        for pattern, w, a, alpha, rotate in plan.segments[0][1]
    )
    return dataclasses.replace(plan, segments=((0, swept),))


def _rule(plan: ViDiTQPlan, path: str) -> Rule:
    rule = plan.rule(path)
    assert rule is not None
    return rule


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
        parts: layers that share bits, by the pattern of the part's rule.
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
            (pattern, self.candidates[choice], self.inputs, self.alpha, self.rotate)
            for pattern, choice in zip(self.parts, best, strict=True)
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
        groups: metric by a group's name, the part of a path after the block; None scores attn and
            mlp by `fidelity`. Give cross a metric of text alignment to quantize cross-attention
            too.
        by_layer: score every layer by itself.
        progress: show a bar.

    Raises:
        ValueError: for a group without layers.
    """
    groups = dict(groups or {"attn": fidelity, "mlp": fidelity})
    within = re.compile(rf"(blocks\..*\.({'|'.join(map(re.escape, groups))}))\..*")
    whole = uniform(8, inputs, alpha=alpha, rotate=rotate, layers=within.pattern, seed=seed)
    parts: dict[str, list[str]] = {}
    group_of: dict[str, str] = {}
    for path in _decided(whole, forward, params):
        found = within.fullmatch(path)
        assert found is not None
        pattern = re.escape(path) if by_layer else re.escape(found[1]) + r"\..*"
        parts.setdefault(pattern, []).append(path)
        group_of[pattern] = found[2]
    if empty := [group for group in groups if group not in group_of.values()]:
        raise ValueError(
            f"there is no layer in the groups {empty}; there are {sorted(set(group_of.values()))}"
        )
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
            Rotation(kernel.shape[0], seed) if rotate else None,
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
        parts={pattern: tuple(part) for pattern, part in parts.items()},
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


def _decided(plan: ViDiTQPlan, forward: Forward, params: Params) -> list[str]:
    """Paths of the layers that some segment quantizes; every pattern must match a layer."""
    paths = [target.path for target in forward.target_modules(params, Linear)]
    for _, rules in plan.segments:
        for pattern, *_ in rules:
            if not any(re.fullmatch(pattern, path) for path in paths):
                raise ValueError(
                    f"the pattern {pattern!r} matches no linear layer; there are {paths}"
                )
    count = len(plan.segments)
    return [p for p in paths if any(plan.rule(p, s) is not None for s in range(count))]


def _check_calls(plan: ViDiTQPlan, calls: int) -> None:
    if plan.calls is not None and plan.calls != calls:
        raise ValueError(f"the plan is made for {plan.calls} network calls, not for {calls}")


def _check_calibration(
    plan: ViDiTQPlan,
    calibration: Calibration | None,
    paths: Sequence[str],
    widths: Mapping[str, int],
) -> None:
    count = len(plan.segments)
    smoothed = [
        path
        for path in paths
        if any(rule and rule[3] is not None for rule in (plan.rule(path, s) for s in range(count)))
    ]
    if not smoothed:
        return
    if calibration is None:
        raise ValueError(
            "the plan smooths channels by the absolute maxima of inputs: give "
            "transform(plan, calibrate(plan, ...)), or take alpha=None"
        )
    wrong = [
        f"{path} {'is missing' if path not in calibration else list(calibration[path].shape)}, "
        f"must be {[count, widths[path]]}"
        for path in smoothed
        if path not in calibration or calibration[path].shape != (count, widths[path])
    ]
    if wrong:
        raise ValueError(
            "the calibration belongs to another model or plan:\n  " + "\n  ".join(wrong)
        )


def _ladder(subject: testing.Subject) -> tuple[ViDiTQPlan, ...]:
    return tuple(uniform(bits, alpha=None) for bits in (8, 6, 4, 3))


METHOD = Method(
    name=NAME,
    paper="ViDiT-Q: Efficient and Accurate Quantization of Diffusion Transformers, "
    "arXiv 2406.02540",
    seams=("leaves",),
    plan=ViDiTQPlan,
    transform=transform,
    search=search,
    identity=lambda subject: uniform(FLOAT, FLOAT, alpha=None, rotate=False),
    ladder=_ladder,
    tiny=testing.tiny_dit,
    calibrate=calibrate,
)
