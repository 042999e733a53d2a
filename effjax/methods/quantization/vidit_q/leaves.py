"""What ViDiT-Q makes of a model: quantized leaves, smoothing scales folded where they can be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.context import Context
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.folding import check_untouched, fits, fold, folds
from effjax.layers.linear import Linear
from effjax.methods.quantization.rules import check_floats
from effjax.methods.quantization.vidit_q.calibration import Calibration, check_calibration
from effjax.methods.quantization.vidit_q.plan import NAME, Rule, ViDiTQPlan
from effjax.quant import FLOAT, Activations, QTensor, Quantizer, quantize_stack
from effjax.quant.hadamard import Rotation
from effjax.targets import TargetModule, target_modules
from effjax.transform import Pair, Transform


def transform(plan: ViDiTQPlan, calibration: Calibration | None = None) -> Transform:
    """Quantize a model's linear layers by the plan.

    Args:
        calibration: from `calibrate`, for plans with smoothing scales.

    Raises:
        ValueError: if a selector finds no layer, a layer is quantized already, or the calibration
            is missing or belongs to another model or plan.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        return _quantize(plan, calibration, forward, params)

    def shapes(forward: Forward, params: Params) -> Pair:
        flat = flatten_params(params)
        ones = {
            path: jnp.ones((len(plan.segments), *flat[f"{path}.kernel"].shape[:-1]))
            for path in plan.decided(forward, params)
        }
        return _quantize(plan, ones, forward, params)

    return Transform(NAME, plan, apply, shapes)


def _quantize(
    plan: ViDiTQPlan, calibration: Calibration | None, forward: Forward, params: Params
) -> Pair:
    flat = flatten_params({name: value for name, value in params.items() if name != METHODS})
    decided = plan.decided(forward, params)
    check_floats(params, decided)
    inputs_of = {path: flat[f"{path}.kernel"].shape[:-1] for path in decided}
    check_calibration(calibration, decided, inputs_of)
    learned = params.get(METHODS, {})
    folded: set[str] = set()
    if plan.fold and calibration is not None:
        for where in folds(forward.target_modules(params)):
            check_untouched(flatten_params(learned), where)
        first = {path: rules[0] for path, rules in decided.items()}
        flat, folded = _fold(first, calibration, forward.target_modules(params), flat)
    parts = []
    for segment in range(len(plan.segments)):
        part = {}
        for path, rules in decided.items():
            kernel, rule = flat[f"{path}.kernel"], rules[segment]
            if rule is not None:
                _, weights, inputs, alpha, rotate = rule
                smoothing_scale = None
                if alpha is not None and path not in folded:
                    assert calibration is not None
                    smoothing_scale = balance(kernel, calibration[path][segment], alpha)
                rotation = Rotation(kernel.shape[-2], plan.seed, plan.strict) if rotate else None
                kernel = quantize_stack(
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
    decided: Mapping[str, Rule | None],
    calibration: Calibration,
    targets: Sequence[TargetModule],
    flat: dict[str, Any],
) -> tuple[dict[str, Any], set[str]]:
    """Leaves with scales folded where that is possible, and the layers that need none any more."""
    done: set[str] = set()
    for where in folds(targets):
        rules = [decided.get(reader) for reader in where.readers]
        alphas = {None if rule is None else rule[3] for rule in rules}
        (alpha, *others) = alphas
        source = flat.get(f"{where.source}.kernel")
        if others or alpha is None or isinstance(source, QTensor) or not fits(flat, where):
            continue  # smoothing scales differ, or what makes the inputs holds values already
        # Of a stack that makes the inputs, each matrix has a scale; those of others share one.
        made = source.shape[:-2] if where.kind == "linear" and source is not None else ()
        kernels = [flat[f"{reader}.kernel"] for reader in where.readers]
        seen = [calibration[reader][0] for reader in where.readers]
        seen = [jnp.max(each, axis=tuple(range(len(made), each.ndim - 1))) for each in seen]
        beside = [jnp.moveaxis(kernel, -2, len(made)) for kernel in kernels]
        beside = [kernel.reshape(*made, kernel.shape[len(made)], -1) for kernel in beside]
        absmax = jnp.max(jnp.stack(seen), axis=0)
        smoothing_scale = balance(jnp.concatenate(beside, axis=-1), absmax, alpha)
        flat = fold(flat, where, smoothing_scale)
        for reader, kernel in zip(where.readers, kernels, strict=True):
            flat[f"{reader}.kernel"] = (kernel / smoothing_scale[..., None]).astype(kernel.dtype)
        done |= set(where.readers)
    return flat, done


def balance(kernel: jax.Array, absmax: jax.Array, alpha: float) -> jax.Array:
    """The smoothing scale of a layer, max|W_c|^alpha / max|x_c|^(1 - alpha) for each input c.

    Args:
        kernel: float[*E, I, O].
        absmax: float[*E, I]: magnitudes of the inputs' channels.

    Returns:
        float32[*E, I]; 1 where a channel's weights or inputs are all zero.
    """
    weights = jnp.max(jnp.abs(kernel.astype(jnp.float32)), axis=-1)
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
