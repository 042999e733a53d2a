"""Are LiteVAR's calibrated windows, its sharing and its floats better than simpler choices?

    python -m experiments.litevar_quality

On the tiny VAR of glyphs, guided. The error is the share of noise in the guided logits of the
tokens that the model as it is draws, a mean over images. Uniform windows have one half width, as a
share of the keys, that keeps no fewer pairs; random ones are the calibrated ones of other layers
and heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax.calibration import Trajectory
from effjax.forward import Forward, Params
from effjax.layers.scales import token_starts
from effjax.methods import litevar
from effjax.methods.attention.litevar.plan import LAYER_TYPES, LiteVARPlan
from effjax.methods.quantization.blocks import along
from experiments import report, train_var

IMAGES, SEEN = 36, 36  # judged, and those that are calibrated on
TAUS = (0.7, 0.9, 0.95, 0.99)
FIRST = 3


def setting(guidance: float | None = None) -> tuple[Any, Trajectory, Trajectory]:
    """The pipeline, samples to judge on, and others to calibrate on."""
    pipe = effjax.pipeline(train_var.WEIGHTS, dtype="float32", progress=False)
    loop = pipe.sampler(guidance_scale=guidance)
    judged, seen = (
        Trajectory(loop, jnp.arange(count, dtype=jnp.int32) % 36, jax.random.key(number))
        for number, count in enumerate((IMAGES, SEEN))
    )
    return pipe, judged, seen


class Errors:
    """The share of noise in a model's guided logits, and in those that are not guided."""

    def __init__(self, pipe: Any, data: Trajectory):
        self.loop: Any = data.sampler
        self.starts = token_starts(pipe.patch_nums)
        (self.inputs,) = along(pipe.forward, pipe.params, data)
        self.raw = self._raw(pipe.forward, pipe.params)
        self.dense = self._guided(self.raw)

    def _raw(self, forward: Forward, params: Params) -> jax.Array:
        run = jax.jit(lambda params: forward(params, {}, *self.inputs, guidance=self.loop.joined))
        return run(params)[0]

    def _guided(self, raw: jax.Array) -> jax.Array:
        parts = [
            self.loop.guide(raw[:, start:stop], scale)
            for scale, (start, stop) in enumerate(pairwise(self.starts))
        ]
        return jnp.concatenate(parts, axis=1)

    def _noise(self, other: jax.Array) -> float:
        noise, signal = (
            jnp.sum(jnp.square(x), axis=(1, 2)) for x in (other - self.dense, self.dense)
        )
        return float(jnp.mean(noise / signal))

    def of(self, pipe: Any, plan: LiteVARPlan) -> float:
        forward, params = litevar.transform(plan)(pipe.forward, pipe.params)
        return self._noise(self._guided(self._raw(forward, params)))

    @property
    def unguided(self) -> float:
        return self._noise(self.raw[: len(self.dense)])


def windows_of(plan: LiteVARPlan, change: Callable[[np.ndarray, int], np.ndarray]) -> LiteVARPlan:
    """The plan with other half widths; `change` gets those of a pair, and how many keys it has."""
    windows = []
    for query, key, widths in plan.windows:
        own = change(np.asarray(widths), plan.patch_nums[key] ** 2)
        windows.append((query, key, tuple(map(tuple, own.tolist()))))
    return dataclasses.replace(plan, windows=tuple(windows))


def uniform_of(plan: LiteVARPlan) -> LiteVARPlan:
    """Equal windows that keep as many pairs or more."""
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        found = windows_of(plan, lambda own, keys, w=middle: own * 0 + max(1, round(w * keys)))
        low, high = (low, middle) if found.kept >= plan.kept else (middle, high)
    return windows_of(plan, lambda own, keys: own * 0 + max(1, round(high * keys)))


def random_of(plan: LiteVARPlan, seed: int) -> LiteVARPlan:
    """The windows of each pair of scales, exchanged between layers and heads."""
    rng = np.random.default_rng(seed)
    return windows_of(plan, lambda own, keys: rng.permutation(own.reshape(-1)).reshape(own.shape))


def of_windows() -> list[dict[str, Any]]:
    """Errors of calibrated windows, of uniform and of random ones."""
    pipe, judged, seen = setting()
    errors, table = Errors(pipe, judged), []
    for tau in TAUS:
        goals = litevar.Goals(tau=tau, first=FIRST, share="none", attention_bits=16, bits="w16a16")
        plan = litevar.search(goals, pipe.forward, pipe.params, seen, progress=False)
        uniform = uniform_of(plan)
        table.append(
            {
                "tau": tau,
                "kept pairs": round(plan.kept, 4),
                "calibrated": errors.of(pipe, plan),
                "kept by uniform windows": round(uniform.kept, 4),
                "uniform": errors.of(pipe, uniform),
                "random, mean of 3": float(
                    np.mean([errors.of(pipe, random_of(plan, i)) for i in range(3)])
                ),
            }
        )
        print(table[-1], flush=True)
    return table


def of_sharing() -> list[dict[str, Any]]:
    """Errors of shared attention beside that of no guidance, at two strengths of guidance."""
    table = []
    for guidance in (1.5, 4.0):
        pipe, judged, _ = setting(guidance)
        errors, config = Errors(pipe, judged), pipe.forward.config
        sizes = {"layers": config.num_layers, "heads": config.num_heads}
        row: dict[str, Any] = {"guidance": guidance}
        for share in ("map", "output"):
            plan = litevar.uniform(pipe.patch_nums, **sizes, share=share)
            row[f"shared {share}"] = errors.of(pipe, plan)
        row["no guidance"] = errors.unguided
        table.append(row)
        print(row, flush=True)
    return table


def of_bits() -> list[dict[str, Any]]:
    """Errors of few bits in one type of layers, and of floats in the feed-forward outputs."""
    pipe, judged, _ = setting()
    errors, table = Errors(pipe, judged), []
    config = pipe.forward.config
    sizes = {"layers": config.num_layers, "heads": config.num_heads, "share": "none"}
    cases = {f"W4A4 in {role} alone": ((f"role:{role}", 4, 4),) for role in LAYER_TYPES}
    for bits in (6, 4):
        cases[f"W{bits}A{bits}"] = litevar.mixed_precision(bits, bits, floats=())
        cases[f"W{bits}A{bits}, feed-forward outputs in floats"] = litevar.mixed_precision(
            bits, bits
        )
    for name, rules in cases.items():
        plan = litevar.uniform(pipe.patch_nums, **sizes, rules=rules)
        table.append({"bits": name, "error": errors.of(pipe, plan)})
        print(table[-1], flush=True)
    return table


def main() -> None:
    report.write(
        "litevar_quality",
        title="LiteVAR on the tiny VAR: what its choices are worth",
        command="python -m experiments.litevar_quality",
        windows=of_windows(),
        sharing=of_sharing(),
        bits=of_bits(),
    )


if __name__ == "__main__":
    main()
