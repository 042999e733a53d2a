"""Compile one sampling step of the full-size DiT-XL/2-512 for TPUs, ahead of time, without a TPU.

    python -m experiments.tpu_compile      (needs the `tpu` extra)

Dense and compressed step (the synthetic plan of `experiments.plan_speed`, the step traced, so every
layer branches over its strategies), bfloat16, guided batch of 2 x 4. It shows that the programs
compile and fit, and what memory they take on each chip; it times nothing.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from effjax.cost import compiled_memory
from effjax.forward import abstract
from effjax.methods.attention.dit_fast_attn import transform
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, Sampler
from experiments import report, tpu
from experiments.plan_speed import synthetic_plan


def compile_step(chip: str, *, layers: int, batch: int, compressed: bool) -> dict[str, Any]:
    """Compile one step for one chip and report its memory in GiB."""
    config = DiTConfig.preset(
        "DiT-XL/2", sample_size=64, num_layers=layers, dtype="bfloat16", param_dtype="bfloat16"
    )
    forward, params = abstract(DiT, config)
    sampler = Sampler(DDIM(steps=50), guidance=4.0)
    if compressed:
        plan = synthetic_plan(layers, sampler.calls, config.tokens)
        forward, params = transform(plan)(forward, params)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    carry = jax.eval_shape(
        lambda params, labels: sampler.init(forward, params, labels, jax.random.key(0)),
        params,
        labels,
    )

    def step(params, state, x, memory, labels, step):
        uncond = sampler.unconditional(forward, labels)
        before = carry._replace(x=x, memory=memory, state=state, keys=None)
        after = sampler.step(forward, params, before, labels, uncond, step)
        return after.x, after.memory, after.state

    index = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = tpu.on_chip(chip, (params, carry.state, carry.x, carry.memory, labels, index))
    memory = compiled_memory(jax.jit(step, donate_argnums=(1, 2, 3)), *arguments)
    gib = {f"{name.removesuffix('_bytes')}_GiB": value / 2**30 for name, value in memory.items()}
    return {"chip": chip, "step": "compressed" if compressed else "dense", **gib}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--batch", type=int, default=4, help="images; the network sees twice that")
    parser.add_argument("--chips", default=",".join(tpu.CHIPS))
    arguments = parser.parse_args(argv)
    rows = []
    for chip in arguments.chips.split(","):
        for compressed in (False, True):
            rows.append(
                compile_step(
                    chip, layers=arguments.layers, batch=arguments.batch, compressed=compressed
                )
            )
            print(report.markdown(rows[-1:]), flush=True)
            report.write(
                "tpu_compile",
                title="DiT-XL/2-512 compiled ahead of time for TPUs",
                command=f"python -m experiments.tpu_compile --layers {arguments.layers} "
                f"--batch {arguments.batch}",
                one_sampling_step=rows,
            )


if __name__ == "__main__":
    main()
