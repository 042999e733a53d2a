"""Where balancing pays: outliers of trained activations, and errors of single layers.

    python -m experiments.quantization.layers

For every quantized layer of the bundled tiny models, and of the same DiT with outlier channels
planted in its modulations (its function is not changed, the next matrix takes them back): the
largest channel over the median one, and the mean relative error of the layer's output at W4A8 on
inputs from the middle of the trajectory, by recipe. Layers are grouped by their outliers.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.capture import tap
from effjax.forward import flatten_params, nest_params
from effjax.layers.folding import fold, folds
from effjax.layers.linear import Linear
from effjax.methods.quantization import vidit_q
from effjax.quant import Activations, Quantizer, qdot, quantize_matrix
from effjax.quant.hadamard import Rotation
from effjax.transform import Pair
from experiments import report
from experiments.quantization.quality import ALPHA, calibrated
from experiments.quantization.subjects import Subject, tiny_dit, tiny_pixart

RECIPES = ("static tensor", "token", "scaling", "rotation", "both")
OUTLIERS = ((0.0, 3.0), (3.0, 10.0), (10.0, np.inf))


def planted(pair: Pair, *, channels: int = 4, factor: float = 30.0, seed: int = 0) -> Pair:
    """The same function with outliers: modulated norms scale some channels, matrices undo it."""
    forward, params = pair
    flat = flatten_params(params)
    rng = np.random.default_rng(seed)
    for where in folds(forward.target_modules(params)):
        if where.kind == "adaln":
            scale = np.ones(forward.config.hidden_size, np.float32)
            scale[rng.choice(scale.size, channels, replace=False)] = factor
            flat = fold(flat, where, jnp.asarray(scale))
            for reader in where.readers:
                flat[f"{reader}.kernel"] = flat[f"{reader}.kernel"] / scale[:, None]
    return forward, nest_params(flat)


def errors(x: jax.Array, w: jax.Array, absmax: jax.Array) -> dict[str, float]:
    """Relative error of the output by recipe at W4A8."""
    token = Activations(Quantizer(8))
    smoothing_scale, rotation = vidit_q.balance(w, absmax, ALPHA), Rotation(w.shape[0])
    prepared: Mapping[str, dict[str, Any]] = {
        "static tensor": {
            "activations": Activations(Quantizer(8, symmetric=False), dynamic=False),
            "input_range": (-jnp.max(absmax), jnp.max(absmax)),
        },
        "token": {"activations": token},
        "scaling": {"activations": token, "smoothing_scale": smoothing_scale},
        "rotation": {"activations": token, "rotation": rotation},
        "both": {"activations": token, "smoothing_scale": smoothing_scale, "rotation": rotation},
    }
    exact = jnp.matmul(x, w)
    found = {}
    for name, options in prepared.items():
        out = qdot(x, quantize_matrix(w, Quantizer(4, symmetric=False), **options))
        found[name] = float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))
    return found


def rows(subject: Subject) -> list[dict[str, Any]]:
    """The layers of a subject, grouped by their outliers."""
    absmax = calibrated(subject, vidit_q.uniform(8))
    sampler, (forward, params) = subject.sampler, subject.pair
    cond, uncond = subject.calibration
    uncond = sampler.unconditional(forward, cond, uncond)
    carry = sampler.init(forward, params, cond, jax.random.key(1), uncond=uncond)
    middle = sampler.calls // 2
    carry = jax.jit(lambda c: sampler.run(forward, params, c, cond, uncond, stop=middle))(carry)
    inputs = sampler.inputs(carry.x, cond, uncond, middle)
    seen = jax.jit(
        lambda params: tap(
            forward,
            params,
            inputs,
            kind=Linear,
            pattern="|".join(map(re.escape, absmax)),
            what="input",
            guidance=sampler.joined,
        )
    )(params)
    layers = []
    for path, x in seen.items():
        channels = absmax[path][0]
        ratio = float(jnp.max(channels) / jnp.median(channels))
        own = errors(x.reshape(-1, x.shape[-1]), flatten_params(params)[f"{path}.kernel"], channels)
        layers.append((ratio, own))
    found = []
    for low, high in OUTLIERS:
        group = [(ratio, own) for ratio, own in layers if low <= ratio < high]
        if not group:
            continue
        row: dict[str, Any] = {
            "subject": subject.name,
            "largest_over_median_channel": f"{low:g} ... {high:g}",
            "layers": len(group),
            **{name: float(np.mean([own[name] for _, own in group])) for name in RECIPES},
            "layers_where_both_is_best": sum(own["both"] <= min(own.values()) for _, own in group),
        }
        found.append(row)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    arguments = parser.parse_args(argv)
    dit = tiny_dit(steps=arguments.steps)
    subjects = [
        dit,
        dataclasses.replace(dit, name="tiny DiT, outliers planted", pair=planted(dit.pair)),
        tiny_pixart(steps=arguments.steps),
    ]
    table: list[dict[str, Any]] = []
    for subject in subjects:
        table += rows(subject)
        print(report.markdown(table), flush=True)
    report.write(
        "quantization_layers",
        title="Quantized layers by their outliers, W4A8",
        command=f"python -m experiments.quantization.layers --steps {arguments.steps}",
        mean_relative_error_of_outputs=table,
    )


if __name__ == "__main__":
    main()
