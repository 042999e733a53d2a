"""Compile one sampling step of the full-size DiT-XL/2-512 for TPUs, ahead of time, without a TPU.

    python -m experiments.tpu_compile      (needs libtpu: pip install effjax[tpu])

Dense and compressed step (the synthetic plan of `experiments.plan_speed`, the step traced, so every
layer branches over its strategies), bfloat16, guided batch of 2 x 4. It shows that the programs
compile and fit, and what memory they take on each chip; it times nothing but the compiler.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}


def environment() -> None:
    """What libtpu wants to see on a machine without TPUs; before JAX is imported."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def compile_step(topology: str, *, layers: int, batch: int, compressed: bool) -> dict[str, Any]:
    """Compile one step for one chip and report its memory in GiB."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from effjax.cost import compiled_memory
    from effjax.forward import abstract
    from effjax.methods.attention.dit_fast_attn import transform
    from effjax.models.dit import DiT, DiTConfig
    from effjax.samplers import DDIM, Sampler
    from experiments.plan_speed import synthetic_plan

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[topology])
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

    place = SingleDeviceSharding(devices.devices[0])
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        (params, carry.state, carry.x, carry.memory, labels, jax.ShapeDtypeStruct((), jnp.int32)),
    )
    began = time.perf_counter()
    memory = compiled_memory(jax.jit(step, donate_argnums=(1, 2, 3)), *arguments)
    gib = {f"{name.removesuffix('_bytes')}_GiB": value / 2**30 for name, value in memory.items()}
    return {
        "chip": topology,
        "step": "compressed" if compressed else "dense",
        **gib,
        "compile_seconds": time.perf_counter() - began,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--batch", type=int, default=4, help="images; the network sees twice that")
    parser.add_argument("--chips", default=",".join(TOPOLOGIES))
    arguments = parser.parse_args(argv)
    environment()
    from experiments import report

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
    print(report.markdown(rows))


if __name__ == "__main__":
    main()
