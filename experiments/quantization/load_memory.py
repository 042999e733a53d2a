"""Measure the host memory that loading a quantized model takes.

    python -m experiments.quantization.load_memory

A DiT of width 1152 with random weights is quantized and saved; fresh processes load it while a
thread samples their anonymous memory, as `experiments.converter_memory` does. Its growth must stay
below 1.1 x the arrays + 2 x the largest of them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

import effjax
from effjax import testing
from effjax.forward import abstract
from effjax.methods.quantization import vidit_q
from effjax.models.dit import DiT, DiTConfig
from experiments import report
from experiments.converter_memory import Sampler, anonymous_bytes

BITS = (8, 4)


def load(directory: Path) -> dict[str, Any]:
    """Load in this process and report its memory."""
    jax.block_until_ready(jax.numpy.zeros(()))  # the runtime's own memory belongs to the baseline
    baseline = anonymous_bytes()
    sampler = Sampler()
    sampler.start()
    _, params = effjax.load(directory, progress=False)
    jax.block_until_ready(params)
    sampler.stop()
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(params)]
    allowed = int(1.1 * sum(sizes) + 2 * max(sizes))
    growth = sampler.peak_bytes - baseline
    return {
        "target_bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "samples": sampler.samples,
        "growth_bytes": growth,
        "allowed_bytes": allowed,
        "growth_over_target": growth / sum(sizes),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--directory", type=Path, help="where to make it, for a while")
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)  # what the processes do
    arguments = parser.parse_args(argv)
    if arguments.load:
        print(json.dumps(load(arguments.load)))
        return
    forward, shapes = abstract(DiT, DiTConfig(num_layers=arguments.layers))
    params = testing.random_params(shapes)
    rows = []
    for bits in BITS:
        quantize = vidit_q.transform(vidit_q.uniform(bits, alpha=None))
        with tempfile.TemporaryDirectory(dir=arguments.directory) as temporary:
            path = Path(temporary) / "model"
            effjax.save(path, *quantize(forward, params))
            size = sum(file.stat().st_size for file in path.iterdir())
            done = subprocess.run(
                [sys.executable, "-m", "experiments.quantization.load_memory", "--load", path],
                stdout=subprocess.PIPE,
                text=True,
                check=True,
            )
        rows.append({"bits": f"W{bits}A8", "disk_bytes": size, **json.loads(done.stdout)})
    print(report.markdown(rows))
    excess = [row["bits"] for row in rows if row["growth_bytes"] >= row["allowed_bytes"]]
    if excess:
        raise SystemExit(f"more memory than allowed: loading {', '.join(excess)}")
    report.write(
        "quantization_load_memory",
        title="Host memory while a quantized model is loaded",
        command=f"python -m experiments.quantization.load_memory --layers {arguments.layers}",
        loaded=rows,
    )


if __name__ == "__main__":
    main()
