"""What a process pays before its first result: anew, with a compilation cache, from executables.

    python -m experiments.warm_start      (--quick: tiny models)

The shapes of DiT-XL/2 (two guided steps of one image, 32 x 32 latents) and Qwen2.5-0.5B (64 tokens
are read, 8 follow), float32, random weights. Every row is a process of its own. What it pays is its
first call less a later one: tracing, compiling and loading.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax import executables
from effjax.forward import Params, abstract
from effjax.generate import generate
from effjax.models.dit import DiT, DiTConfig
from effjax.models.llama import Llama, LlamaConfig
from effjax.samplers import DDIM, Sampler
from experiments import report

MODELS = ("DiT-XL/2", "Qwen2.5-0.5B")
STARTS = ("first process", "compilation cache", "executables", "executables and cache")


def weights(shapes: Params) -> Params:
    """Parameters whose values repeat: a billion of them in a second."""
    block = np.random.default_rng(0).standard_normal(65_537, np.float32) * 0.02
    return jax.tree.map(lambda leaf: jax.device_put(np.resize(block, leaf.shape)), shapes)


def images(quick: bool) -> Callable[[], Any]:
    small: dict[str, Any] = {"num_layers": 2, "num_heads": 2, "head_dim": 8, "sample_size": 8}
    config = DiTConfig.preset("DiT-XL/2") if not quick else DiTConfig(**small)
    forward, shapes = abstract(DiT, config)
    sampler, labels = Sampler(DDIM(steps=2), 4.0), jnp.asarray([0], jnp.int32)
    key = jax.random.key(0)
    return partial(sampler.stepwise, forward, weights(shapes), labels, key, progress=False)


def texts(quick: bool) -> Callable[[], Any]:
    shape: dict[str, Any] = {
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_layers": 24,
        "num_heads": 14,
        "num_kv_heads": 2,
        "head_dim": 64,
        "max_positions": 32_768,
        "rope_theta": 1e6,
        "qkv_bias": True,
        "tied": True,
    }
    if quick:
        shape |= {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_layers": 2,
            "num_heads": 4,
        }
    forward, shapes = abstract(Llama, LlamaConfig(**shape))
    prompt = np.arange(64, dtype=np.int32)[None]
    return partial(generate, forward, weights(shapes), prompt, max_new_tokens=8)


def child(model: str, start: str, folder: Path, quick: bool) -> None:
    """One process: print the seconds of its first call and of the faster of two later ones."""
    own = folder / model.replace("/", "-")
    if start in ("compilation cache", "executables and cache", "first process"):
        effjax.compilation_cache(own / ("both" if "executables" in start else "alone"))
    work = (images if model == MODELS[0] else texts)(quick)
    if start == "save":
        began = time.perf_counter()
        with executables.record() as calls:
            work()
        executables.save(own, calls)
        print(json.dumps([time.perf_counter() - began, 0.0]))
        return
    seconds = []
    for _ in range(3):
        began = time.perf_counter()  # loading is part of what the first call takes
        if start.startswith("executables") and not seconds:
            loaded = executables.load(own)
        with loaded.using() if start.startswith("executables") else contextlib.nullcontext():
            jax.block_until_ready(work())
        seconds.append(time.perf_counter() - began)
    print(json.dumps([seconds[0], min(seconds[1:])]))


def run(model: str, start: str, folder: Path, quick: bool) -> dict[str, Any]:
    """A row of the table, measured by a process of its own."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "experiments.warm_start", "--child", model, start, str(folder)]
    out = subprocess.check_output([*command, *(["--quick"] if quick else [])], text=True)
    first, later = json.loads(out.splitlines()[-1])
    return {
        "model": f"{model}, made tiny" if quick else model,
        "process": start,
        "first_call_seconds": first,
        "later_call_seconds": later,
        "start_seconds": first - later,
        "process_seconds": time.perf_counter() - began,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny models")
    parser.add_argument("--child", nargs=3, metavar=("MODEL", "START", "FOLDER"))
    arguments = parser.parse_args(argv)
    if arguments.child:
        model, start, folder = arguments.child
        child(model, start, Path(folder), arguments.quick)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            run(model, "save", Path(folder), arguments.quick)
            for start in STARTS:
                if start == "executables and cache":
                    run(model, start, Path(folder), arguments.quick)  # fills the cache
                rows.append(run(model, start, Path(folder), arguments.quick))
                first = next(row for row in rows if row["model"] == rows[-1]["model"])
                rows[-1]["ratio"] = rows[-1]["start_seconds"] / first["start_seconds"]
    command = "python -m experiments.warm_start" + (" --quick" if arguments.quick else "")
    report.write("warm_start", title="Warm starts", command=command, processes=rows)
    print(report.markdown(rows))


if __name__ == "__main__":
    main()
