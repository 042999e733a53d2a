"""Every kernel compiled for GPUs that are not there: that it fits, not that it is right.

    make aot-gpu      (needs JAX's CUDA plugin and an assembler, and no CUDA, driver or GPU)

XLA compiles for the description of a GPU in place of one; Triton's and Mosaic's kernels become
machine code. What a multiprocessor's shared memory does not hold is an error here as it is there.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # libraries that only running needs

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

from experiments import report
from experiments.kernels.cases import ATTENTION, CASES, Case, int8_product, packed_product
from pallas_kernels.implementation import for_hopper

# Kind, multiprocessors, compute capability, and bytes: shared by a processor and by a program on
# it, of the second-level cache and of all memory.
GPUS = {
    "a100": ("NVIDIA A100-SXM4-40GB", 108, (8, 0), (167936, 166912, 41943040, 42949672960)),
    "h100": ("NVIDIA H100 80GB HBM3", 132, (9, 0), (233472, 232448, 52428800, 84978434048)),
}

# Many and few rows, and weights of all widths, of a layer of Llama 3.
PRODUCTS: dict[str, Case] = {
    f"W{bits}A16, {rows} rows": packed_product(rows, 4096, 14336, bits, 128, jnp.bfloat16)
    for bits in (2, 3, 4, 5, 8)
    for rows in (1, 4, 8, 64, 4096)
} | {f"W8A8, {rows} rows": int8_product(rows, 4096, 14336) for rows in (16, 128, 4096)}


def description(name: str) -> str:
    """A GPU in XLA's words (the text of a `GpuTargetConfigProto`)."""
    kind, processors, (major, minor), (shared, program, cache, memory) = GPUS[name]
    return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
          fpus_per_core: {128 if major > 8 else 64} core_count: {processors}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          shared_memory_per_block: 49152 shared_memory_per_core: {shared}
          shared_memory_per_block_optin: {program}
          l2_cache_size: {cache} device_memory_size: {memory}
          memory_bandwidth: 2000000000000 clock_rate_ghz: 1.5
          cuda_compute_capability {{ major: {major} minor: {minor} }}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
        device_description_str: "{kind}"
    """


def place(name: str) -> tuple[SingleDeviceSharding, AbstractMesh]:
    """A GPU as the sharding of arguments, and as what kernels are traced for."""
    topology = topologies.get_topology_desc(
        "1x1x1", platform="cuda", topology="1x1x1", target_config=description(name)
    )
    kind, processors, *_ = GPUS[name]
    device = AbstractDevice(kind, num_cores=processors, platform="cuda")
    return SingleDeviceSharding(topology.devices[0]), AbstractMesh((), (), abstract_device=device)


def rows(gpu: str, named: str = "") -> Iterator[dict[str, Any]]:
    """One kernel after the other whose name has a part; what fails is told of all of them."""
    sharding, mesh = place(gpu)
    with jax.sharding.use_abstract_mesh(mesh):
        cases: dict[str, Case] = CASES | PRODUCTS
        if for_hopper():
            cases |= {
                f"{name}, by Triton": (partial(function, implementation="pallas_gpu"), shapes)
                for name, (function, shapes) in ATTENTION.items()
            }
        for name, (function, shapes) in cases.items():
            if named not in name:
                continue
            began = time.perf_counter()
            row = {"gpu": gpu, "kernel": name, "temporary_MB": float("nan"), "failed": ""}
            try:
                row["temporary_MB"] = temporary(function, shapes, sharding) / 1e6
            except Exception as reason:
                row["failed"] = str(reason).splitlines()[0]
            yield row | {"seconds": time.perf_counter() - began}


def temporary(function: Callable[..., Any], shapes: Any, place: SingleDeviceSharding) -> int:
    """Compile a function of shapes; the bytes that it needs beside operands and results."""
    operands = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes
    )
    return jax.jit(function).lower(*operands).compile().memory_analysis().temp_size_in_bytes


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", default=",".join(GPUS))
    parser.add_argument("--kernels", default="", metavar="PART", help="of the names")
    arguments = parser.parse_args(argv)
    gpus = arguments.gpus.split(",")
    if unknown := set(gpus) - set(GPUS):
        parser.error(f"no GPU {', '.join(sorted(unknown))}; there are {', '.join(GPUS)}")
    found = []
    for gpu in gpus:
        try:
            for row in rows(gpu, arguments.kernels):
                found.append(row)
                print(report.markdown([row]).splitlines()[-1], flush=True)
        except NotImplementedError as reason:  # JAX knows no such platform
            raise SystemExit(
                f"JAX's CUDA plugin is not installed ({reason}): make aot-gpu"
            ) from None
    if failed := [f"{row['kernel']} ({row['gpu']})" for row in found if row["failed"]]:
        raise SystemExit(f"these kernels fail: {', '.join(failed)}")


if __name__ == "__main__":
    main()
