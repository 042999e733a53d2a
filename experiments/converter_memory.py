"""Measure the host memory that loading a checkpoint takes.

    python -m experiments.converter_memory

A DiT of width 1152 is written as a float32 checkpoint of two shards, with random weights and
layers enough for the wanted size. Fresh processes load it, with and without a change of dtype,
while a thread samples their anonymous memory (RssAnon of /proc/self/status: the heap and the
arrays, not the pages of mapped files, which the system drops when it needs the room). Its growth
while loading must stay below 1.1 x the target arrays + 2 x the checkpoint's largest tensor.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path

import jax
import numpy as np

import converters
from converters.dit import FAMILY
from effjax.forward import abstract, flatten_params
from effjax.models.dit import DiT, DiTConfig
from effjax.storage import Spec, new_directory, write_json, write_shards
from experiments import report

DTYPES = ("float32", "bfloat16")
SAMPLE_SECONDS = 0.005


def config_of(bytes_: float) -> DiTConfig:
    """A DiT whose checkpoint in diffusers' layout has about this size."""
    small, large = (checkpoint_specs(DiTConfig(num_layers=n)) for n in (1, 2))
    first, second = (sum(s.bytes_ for s in specs.values()) for specs in (small, large))
    layers = 1 + round((bytes_ - first) / (second - first))
    if layers < 1:
        raise ValueError(f"the smallest model of this experiment has {first / 1e9:.2f} GB")
    return DiTConfig(num_layers=layers)


def shapes_of(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    _, params = abstract(DiT, config)
    return {path: tuple(leaf.shape) for path, leaf in flatten_params(params).items()}


def checkpoint_specs(config: DiTConfig) -> dict[str, Spec]:
    shapes = shapes_of(config)
    sources = FAMILY.tables["diffusers"].bind(shapes).source_shapes(shapes)
    return {name: Spec(shape, np.dtype(np.float32)) for name, shape in sources.items()}


def random_parameter(path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The same values for a path every time, so that copies agree and loading can be checked."""
    rng = np.random.default_rng(zlib.crc32(path.encode()))
    return rng.standard_normal(shape, dtype=np.float32)


def make_checkpoint(directory: Path, config: DiTConfig) -> dict[str, int]:
    """Write the checkpoint, tensor by tensor, into two shards; return its sizes."""
    shapes = shapes_of(config)
    table = FAMILY.tables["diffusers"]
    binding = table.bind(shapes)
    specs = checkpoint_specs(config)
    total = sum(spec.bytes_ for spec in specs.values())
    largest = max(spec.bytes_ for spec in specs.values())
    with new_directory(directory) as partial:
        files = write_shards(
            partial,
            table.stem,
            specs,
            lambda name: binding.assemble(name, lambda path: random_parameter(path, shapes[path])),
            max_shard_bytes=total // 2 + largest,
            progress=True,
        )
        write_json(
            partial / "config.json",
            {"_class_name": FAMILY.class_name, **FAMILY.write_config(config)},
        )
    return {
        "checkpoint_bytes": total,
        "largest_tensor_bytes": largest,
        "shards": len(files),
        "layers": config.num_layers,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
    }


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell RssAnon in /proc/self/status (Linux does)")


class Sampler(threading.Thread):
    """Highest anonymous memory until `stop`, and the longest time between two looks."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_bytes, self.samples, self.longest_gap_seconds = 0, 0, 0.0
        self._stopped = threading.Event()

    def run(self) -> None:
        last = time.perf_counter()
        while not self._stopped.wait(SAMPLE_SECONDS):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())
            self.samples += 1
            now = time.perf_counter()
            self.longest_gap_seconds, last = max(self.longest_gap_seconds, now - last), now

    def stop(self) -> None:
        self._stopped.set()
        self.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def load(directory: Path, dtype: str) -> dict[str, float | int | str]:
    """Load in this process and report its memory."""
    jax.block_until_ready(jax.numpy.zeros(()))  # the runtime's own memory belongs to the baseline
    baseline = anonymous_bytes()
    sampler = Sampler()
    sampler.start()
    _, params = converters.from_pretrained(directory, dtype=dtype, progress=False)
    sampler.stop()
    flat = flatten_params(params)
    for path in (*list(flat)[:3], "blocks.0.mlp.fc1.kernel", "label.embedding_table"):
        expected = random_parameter(path, flat[path].shape).astype(flat[path].dtype)
        np.testing.assert_array_equal(np.asarray(flat[path]), expected, err_msg=path)
    return {
        "dtype": dtype,
        "target_bytes": sum(leaf.nbytes for leaf in flat.values()),
        "baseline_bytes": baseline,
        "peak_bytes": sampler.peak_bytes,
        "samples": sampler.samples,
        "longest_gap_seconds": round(sampler.longest_gap_seconds, 4),
    }


def measure(directory: Path) -> list[dict]:
    rows = []
    for dtype in DTYPES:
        command = [sys.executable, "-m", "experiments.converter_memory"]
        done = subprocess.run(
            [*command, "--load", str(directory), "--dtype", dtype],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout))
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4.0, help="size of the checkpoint")
    parser.add_argument("--directory", type=Path, help="where to make it, for a while")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the processes do
    parser.add_argument("--dtype", choices=DTYPES, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(arguments.load, arguments.dtype)))
        return
    with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
        directory = Path(temporary) / "checkpoint"
        sizes = make_checkpoint(directory, config_of(arguments.gigabytes * 1e9))
        rows = measure(directory)
    for row in rows:
        row["growth_bytes"] = row["peak_bytes"] - row["baseline_bytes"]
        row["allowed_bytes"] = int(1.1 * row["target_bytes"] + 2 * sizes["largest_tensor_bytes"])
        row["growth_over_target"] = row["growth_bytes"] / row["target_bytes"]
    print(report.markdown(rows))
    excess = [row["dtype"] for row in rows if row["growth_bytes"] >= row["allowed_bytes"]]
    if excess:
        raise SystemExit(f"more memory than allowed: loading as {', '.join(excess)}")
    report.write(
        "converter_memory",
        title="Host memory while a checkpoint is loaded",
        command=f"python -m experiments.converter_memory --gigabytes {arguments.gigabytes}",
        checkpoint=[sizes],
        float32_checkpoint_loaded_as=rows,
    )


if __name__ == "__main__":
    main()
