"""Dense DiT-B/2 against diffusers on the same CPU, in one run; and the time of `import effjax`.

    python -m experiments.dense_speed

Random weights, 32 x 32 latents, batch 2, float32; the programs alternate, so that what else the
machine does hits both. Needs the `torch` extra.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import converters
from experiments import report


def import_seconds(repeats: int = 5) -> float:
    """Median wall time of `import effjax` in a fresh interpreter, without the interpreter's own."""

    def run(code: str) -> float:
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - began

    times = [run("import effjax") - run("pass") for _ in range(repeats)]
    return statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    import torch
    from diffusers import DiTTransformer2DModel

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=30)
    arguments = parser.parse_args(argv)

    torch.manual_seed(0)
    reference = DiTTransformer2DModel(
        num_attention_heads=12, attention_head_dim=64, num_layers=arguments.layers, sample_size=32
    ).eval()
    state = reference.state_dict()
    for name in state:  # trained checkpoints have equal embedders in all blocks
        _, _, tail = name.partition(".norm1.emb.")
        if tail:
            state[name] = state[f"transformer_blocks.0.norm1.emb.{tail}"]
    reference.load_state_dict(state)
    with tempfile.TemporaryDirectory() as folder:
        reference.save_pretrained(Path(folder) / "dit")
        forward, params = converters.from_pretrained(Path(folder) / "dit", progress=False)

    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 32, 32, 4)).astype(np.float32)
    t, labels = np.array([500.0, 500.0], np.float32), np.array([1, 1000], np.int32)
    theirs = (torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(labels).long())
    ours = jax.jit(lambda params, *inputs: forward(params, {}, *inputs)[0])
    inputs = (jnp.asarray(x), jnp.asarray(t), jnp.asarray(labels))

    def run_ours() -> np.ndarray:
        return np.asarray(ours(params, *inputs))

    @torch.inference_mode()
    def run_theirs() -> np.ndarray:
        return reference(*theirs).sample.numpy().transpose(0, 2, 3, 1)

    difference = float(np.abs(run_ours() - run_theirs()).max())
    seconds: dict[str, list[float]] = {"effjax": [], "diffusers": []}
    for _ in range(arguments.repeats):
        for name, run in (("effjax", run_ours), ("diffusers", run_theirs)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [
        {
            "model": f"DiT-B/2, {arguments.layers} layers, batch 2, float32",
            "effjax_seconds": medians["effjax"],
            "diffusers_seconds": medians["diffusers"],
            "ratio": medians["effjax"] / medians["diffusers"],
            "largest_difference": difference,
            "torch_threads": torch.get_num_threads(),
            "import_effjax_seconds": import_seconds(),
        }
    ]
    report.write(
        "dense_speed",
        title="Dense DiT-B/2 against diffusers",
        command=f"python -m experiments.dense_speed --layers {arguments.layers} "
        f"--repeats {arguments.repeats}",
        network_call=rows,
    )
    print(report.markdown(rows))


if __name__ == "__main__":
    main()
