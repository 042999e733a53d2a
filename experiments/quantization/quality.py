"""What quantization costs on the bundled tiny models: paired images, dense and quantized.

    python -m experiments.quantization.quality --cache DIR

Every recipe at W8A8, W6A6, W4A8 and W4A4; masks and ranges are calibrated on eight samples that are
not judged. Then searched bits against the same bits everywhere, at equal bytes: the search scores
each layer on sixteen samples that are not judged either, once for both budgets. MixDQ's scores
feed-forward layers by SSIM and attention by SQNR, and tries ratios of their average bits.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import metrics
from effjax.cost import weight_bytes
from effjax.forward import flatten_params, nest_params
from effjax.methods.quantization import round_to_nearest, vidit_q
from effjax.quant import Activations, Quantizer, quantize_matrix
from effjax.search.sensitivity import Metric, sqnr
from effjax.transform import Pair
from experiments import report
from experiments.quantization.subjects import Subject, tiny_dit, tiny_pixart

ALPHA = 0.5  # where it is not swept
BITS = ((8, 8), (4, 8), (6, 6), (4, 4))
SUBJECTS = {"dit": tiny_dit, "pixart": tiny_pixart}


def static_tensor(subject: Subject, weights: int, inputs: int) -> Pair:
    """One calibrated range for all tokens and steps."""
    plan = round_to_nearest.uniform(weights, inputs)
    sampler, (forward, params) = subject.sampler, subject.pair
    cond, uncond = subject.calibration
    uncond = sampler.unconditional(forward, cond, uncond)
    carry = sampler.init(forward, params, cond, jax.random.key(1), uncond=uncond)
    step = jax.jit(sampler.step)
    batches = []
    for index in range(sampler.calls):
        batches.append(sampler.inputs(carry.x, cond, uncond, index))
        carry = step(forward, params, carry, cond, uncond, index)
    plan = round_to_nearest.calibrate(plan, forward, params, batches, guidance=sampler.joined)
    return round_to_nearest.transform(plan)(forward, params)


def token(subject: Subject, weights: int, inputs: int) -> Pair:
    """Each token's own range."""
    return round_to_nearest.transform(round_to_nearest.uniform(weights, inputs))(*subject.pair)


def qwix_ptq(subject: Subject, weights: int, inputs: int) -> Pair:
    """qwix's convention: symmetric weights too, and n + 1/2 levels."""
    forward, params = subject.pair
    flat = flatten_params(params)
    quantizer = functools.partial(Quantizer, levels="n+1/2")
    for path in round_to_nearest.uniform(weights, inputs).decided(forward, params):
        name = f"{path}.kernel"
        quantized = Activations(quantizer(inputs))
        flat[name] = quantize_matrix(flat[name], quantizer(weights), activations=quantized)
    return forward, nest_params(flat)


def calibrated(subject: Subject, plan: vidit_q.ViDiTQPlan) -> dict[str, jax.Array]:
    """Absolute maxima of inputs on the subject's calibration batch."""
    return vidit_q.calibrate(
        plan,
        *subject.pair,
        subject.sampler,
        subject.calibration[0],
        uncond=subject.calibration[1],
        key=jax.random.key(1),
        progress=False,
    )


def smooth_quant(subject: Subject, weights: int, inputs: int) -> Pair:
    """Masks alone, strength 1/2."""
    plan = vidit_q.smooth_quant(weights, inputs)
    return vidit_q.transform(plan, calibrated(subject, plan))(*subject.pair)


def rotation(subject: Subject, weights: int, inputs: int) -> Pair:
    """Rotations alone."""
    return vidit_q.transform(vidit_q.uniform(weights, inputs, alpha=None))(*subject.pair)


def both(subject: Subject, weights: int, inputs: int) -> Pair:
    """ViDiT-Q: masks with a swept alpha, then rotations."""
    plan = vidit_q.uniform(weights, inputs)
    calibration = calibrated(subject, plan)
    plan = vidit_q.best_alpha(
        plan,
        *subject.pair,
        subject.sampler,
        subject.calibration[0],
        uncond=subject.calibration[1],
        key=jax.random.key(1),
        calibration=calibration,
    )
    return vidit_q.transform(plan, calibration)(*subject.pair)


RECIPES: dict[str, Callable[[Subject, int, int], Pair]] = {
    "static tensor": static_tensor,
    "token": token,
    "qwix PTQ": qwix_ptq,
    "SmoothQuant": smooth_quant,
    "rotation": rotation,
    "ViDiT-Q": both,
}


def similarity(dense: jax.Array, other: jax.Array) -> jax.Array:
    """Mean SSIM of images."""
    return 1 - metrics.structural_dissimilarity(dense, other)


# MixDQ: what layers that make the content lose is seen in SSIM, what others lose in SQNR.
MIXDQ = {"role:up|down": similarity, "role:qkv|out": sqnr}
RATIOS = tuple(np.linspace(0.46, 1.36, 10))  # of the content's average bits to the others'


def measured(subject: Subject, groups: Mapping[str, Metric] | None = None) -> vidit_q.Sensitivities:
    """How final samples suffer from each layer's bits."""
    return vidit_q.sensitivities(
        *subject.pair,
        subject.sampler,
        subject.scored[0],
        uncond=subject.scored[1],
        key=jax.random.key(1),
        candidates=(3, 4, 5, 6, 8),
        calibration=calibrated(subject, vidit_q.uniform(8)),
        alpha=ALPHA,
        groups=groups,
        by_layer=True,
    )


def searched(
    subject: Subject,
    measure: Callable[[], vidit_q.Sensitivities],
    average: float,
    ratios: Sequence[float] | None = None,
) -> Pair:
    """Bits by layer."""
    plan = measure().plan(average, ratios=ratios)
    return vidit_q.transform(plan, calibrated(subject, plan))(*subject.pair)


def everywhere(subject: Subject, bits: int) -> Pair:
    """The same bits in every layer, otherwise as `searched`."""
    plan = vidit_q.uniform(bits, alpha=ALPHA)
    return vidit_q.transform(plan, calibrated(subject, plan))(*subject.pair)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--subjects", default="dit,pixart")
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--paired", type=int, default=1024, help="of dense and ViDiT-Q W8A8")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cache", type=Path, required=True, help="folder of finished rows")
    arguments = parser.parse_args(argv)
    arguments.cache.mkdir(parents=True, exist_ok=True)
    for name in arguments.subjects.split(","):
        _run(name, arguments)


def _run(name: str, arguments: argparse.Namespace) -> None:
    subject = SUBJECTS[name](steps=arguments.steps)
    dense_images: dict[int, np.ndarray] = {}
    tables: dict[str, list[dict[str, Any]]] = {}

    def dense(count: int) -> np.ndarray:
        if count not in dense_images:
            path = arguments.cache / f"{name}_dense_{count}_{arguments.steps}.npy"
            if not path.exists():
                np.save(path, subject.images(subject.pair, count))
            dense_images[count] = np.load(path)
        return dense_images[count]

    def add(table: str, row: dict[str, Any], count: int, make: Callable[[], Pair]) -> None:
        """Finish a row, keep it, and write what there is."""
        digest = hashlib.sha256(f"{name}{table}{row}{count}{arguments.steps}".encode()).hexdigest()
        path = arguments.cache / f"{digest[:16]}.json"
        if not path.exists():
            pair = make()
            images = dense(count) if pair is subject.pair else subject.images(pair, count)
            figures = subject.figures(images, dense(count))
            size = {"weight_bytes": weight_bytes(pair[1]), "images": count}
            path.write_text(json.dumps(row | size | figures))
        tables.setdefault(table, []).append(json.loads(path.read_text()))
        print(report.markdown(tables[table][-1:]), flush=True)
        report.write(
            f"quantization_quality_{name}",
            title=f"Quantized {subject.name}: quality",
            command=f"python -m experiments.quantization.quality --cache DIR --subjects {name} "
            f"--images {arguments.images} --paired {arguments.paired} --steps {arguments.steps}",
            **tables,
        )

    def quantized(recipe: str, weights: int, inputs: int) -> Callable[[], Pair]:
        return lambda: RECIPES[recipe](subject, weights, inputs)

    many, some = arguments.paired, arguments.images
    add("recipes", {"recipe": "dense", "bits": "float32"}, some, lambda: subject.pair)
    for weights, inputs in BITS:
        for recipe in RECIPES:
            row = {"recipe": recipe, "bits": f"W{weights}A{inputs}"}
            add("recipes", row, some, quantized(recipe, weights, inputs))
    table = "searched_bits_at_equal_bytes_inputs_of_8_bits"
    measure = functools.cache(functools.partial(measured, subject))
    mixed = functools.cache(functools.partial(measured, subject, MIXDQ))
    for bits in (4, 5):
        row = {"plan": f"{bits} bits everywhere"}
        add(table, row, some, functools.partial(everywhere, subject, bits))
        row = {"plan": f"searched by layer, {bits} bits on average"}
        add(table, row, some, functools.partial(searched, subject, measure, float(bits)))
        row = {"plan": f"MixDQ by layer, {bits} bits on average"}
        add(table, row, some, functools.partial(searched, subject, mixed, float(bits), RATIOS))
    table = "W8A8_on_many_paired_images"
    add(table, {"recipe": "dense"}, many, lambda: subject.pair)
    add(table, {"recipe": "ViDiT-Q W8A8"}, many, quantized("ViDiT-Q", 8, 8))


if __name__ == "__main__":
    main()
