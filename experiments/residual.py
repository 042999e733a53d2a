"""Why DiTFastAttn keeps a residual beside its window, on the bundled tiny DiT.

    python -m experiments.residual

First table: the dense attention output moves more from step to step in its window part than in the
rest (dense - window), which is why the rest can be kept. Second table: plans of dense and window
calls alone, with the residual and without it, and how far their images are from the dense ones.
"""

from __future__ import annotations

import argparse
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import effjax
from effjax import metrics
from effjax.bundled import demo
from effjax.context import Context, State
from effjax.layers.attention import AttentionCore
from effjax.methods.attention import dit_fast_attn
from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan, Strategy
from effjax.targets import Wrapper, target_modules, wrap
from experiments import report
from pallas_kernels.block_mask import Band
from pallas_kernels.block_sparse_attention import block_sparse_attention


class Drift(Wrapper):
    """An attention core that sums how far its window output and its residual move per call."""

    def __init__(self, inner: nnx.Module, context: Context):
        super().__init__(inner)
        self.moved = nnx.data(jnp.asarray(context.step > 0, jnp.float32))
        self.last_window, self.last_residual = State(), State()
        self.window_drift, self.residual_drift = State(), State()

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        dense = self.inner(q, k, v)
        window = block_sparse_attention(q, k, v, Band(q.shape[1] // 8))
        for value, last, drift in (
            (window, self.last_window, self.window_drift),
            (dense - window, self.last_residual, self.residual_drift),
        ):
            distance = jnp.linalg.norm(value - last.read(value.shape, value.dtype))
            drift.write(drift.read((), jnp.float32) + self.moved * distance)
            last.write(value)
        return dense


def watch(module: nnx.Module, context: Context) -> None:
    """The patch that puts a `Drift` around every attention core."""
    for target in target_modules(module, AttentionCore):
        wrap(module, target.path, Drift, context)


class WithoutResidual(DiTFastAttnPlan):
    """A plan whose window calls add nothing: no dense call refreshes the residual, which is 0."""

    @cached_property
    def need(self) -> tuple[tuple[bool, ...], ...]:
        return tuple((False,) * self.calls for _ in self.strategies)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=72)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="2 images; no results are written")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.images, arguments.steps = 2, 4
    pipe = effjax.pipeline(demo.MODEL, dtype="float32", progress=False)
    sampler = pipe.sampler(num_inference_steps=arguments.steps, guidance_scale=demo.GUIDANCE)
    labels = demo.labels_for(arguments.images)
    key = jax.random.key(0)

    def last_state(forward: Any, params: Any) -> dict[str, jax.Array]:
        carry = sampler.init(forward, params, labels, key)
        return sampler.run(forward, params, carry, labels).state

    state = jax.jit(last_state)(pipe.forward.patch(watch), pipe.params)
    layers = [
        target.path for target in target_modules(pipe.forward.module(pipe.params), AttentionCore)
    ]
    drift = [
        {
            "layer": path,
            "window_drift": float(state[f"{path}.window_drift"]) / (sampler.calls - 1),
            "residual_drift": float(state[f"{path}.residual_drift"]) / (sampler.calls - 1),
        }
        for path in layers
    ]
    mean = {name: float(np.mean([row[name] for row in drift])) for name in list(drift[0])[1:]}
    drift.append({"layer": "mean", **mean})
    print(report.markdown(drift), flush=True)

    run = jax.jit(sampler)
    dense = run(pipe.forward, pipe.params, labels, key)
    rows = []
    for every in (2, 4, arguments.steps):
        pattern = (int(Strategy.WARS),) * (every - 1) + (int(Strategy.FULL),)
        shape = {
            "layers": len(layers),
            "calls": sampler.calls,
            "tokens": pipe.forward.config.tokens,
        }
        plan = dit_fast_attn.uniform(pattern, **shape)
        bare = WithoutResidual(strategies=plan.strategies, tokens=plan.tokens, window=plan.window)
        row: dict[str, Any] = {"dense_call": "first" if every == sampler.calls else f"1 in {every}"}
        for name, each in (("with", plan), ("without", bare)):
            patched = dit_fast_attn.transform(each)(pipe.forward, pipe.params)
            images = run(*patched, labels, key)
            row[f"relative_error_{name}"] = float(
                jnp.linalg.norm(images - dense) / jnp.linalg.norm(dense)
            )
            row[f"psnr_{name}"] = float(metrics.psnr(dense, images))
        rows.append(row)
        print(report.markdown(rows), flush=True)
    if arguments.quick:
        return
    report.write(
        "residual",
        title="The residual of window attention on the tiny DiT",
        command=f"python -m experiments.residual --images {arguments.images} "
        f"--steps {arguments.steps}",
        drift_of_the_attention_output_per_call=drift,
        images_with_and_without_the_residual=rows,
    )


if __name__ == "__main__":
    main()
