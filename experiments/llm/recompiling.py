"""What is compiled for shapes that were not there before: exact shapes against buckets.

    python -m experiments.llm.recompiling      (--quick: in a minute)

Texts of random lengths go through the bundled language model, one after the other, in a process
of their own for powers of two, and in several for exact shapes (`buckets=None`, which compiles for
every length): one process may not map the memory of so many programs. Programs are all that XLA
compiles meanwhile, small ones included; those of the network are counted beside them. Memory is the
resident set: what it grows by for a text after the first quarter of a process' texts.
Batches of images go through the bundled DiT, warm calls in turns. JAX's cache on disk is off.
Beside that, what XLA sets aside to score 4,096 tokens over the words of Qwen2.5.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import effjax
from effjax.buckets import POWERS, Buckets, bucket
from effjax.bundled import WEIGHTS
from effjax.cost import memory_of
from effjax.forward import abstract
from effjax.generate import decoding, generate, prefix_cache, scoring
from effjax.generate.prefix_cache import LEAST
from effjax.models.llama import Llama, LlamaConfig
from effjax.samplers import sampler
from experiments import report
from experiments.kernels.timing import best_seconds

COMPILED = "/jax/core/compile/backend_compile_duration"
MODES: dict[str, Buckets] = {"exact": None, "powers of two": POWERS}
EXACT_TEXTS = 25  # of one process


class Programs:
    """How many programs were compiled since the last look."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        self.count += event == COMPILED

    def new(self) -> int:
        """Programs since this was asked last."""
        count, self.count = self.count, 0
        return count


def resident() -> float:
    """Memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def read_texts(mode: str, own: range, longest: int, most_new: int) -> dict[str, Any]:
    """Continue texts of random tokens and lengths, each once: those of these numbers."""
    pipe = effjax.pipeline(WEIGHTS / "llama_texts", compute_dtype="float32", progress=False)
    limit = pipe.forward.config.max_length
    rng = np.random.default_rng(0)
    programs, made, memory = Programs(), [], []
    began = time.perf_counter()
    for number in range(own.stop):
        new = int(rng.integers(1, most_new + 1))
        length = min(int(rng.integers(1, longest + 1)), limit - new)
        prompt = rng.integers(3, pipe.forward.config.vocab_size, length)
        if number not in own:
            continue
        out = generate(pipe.forward, pipe.params, [prompt], max_new_tokens=new, buckets=MODES[mode])
        made.append(out.tokens[0].tolist())
        memory.append(resident())
    seconds = time.perf_counter() - began
    quarter = len(own) // 4
    network = prefix_cache._read_first._cache_size() + decoding._decode._cache_size()
    return {
        "tokens": made,
        "row": {
            "shapes": mode,
            "texts": len(own),
            "programs": programs.new(),
            "of_the_network": network,
            "seconds": seconds,
            "MiB_more_a_text": (memory[-1] - memory[quarter]) / max(len(own) - 1 - quarter, 1),
        },
    }


def texts(count: int, longest: int, most_new: int) -> report.Rows:
    """Both modes, in processes of their own."""
    found = {}
    for mode in MODES:
        each = EXACT_TEXTS if mode == "exact" else count
        parts = [
            _in_a_process(mode, range(first, min(first + each, count)), longest, most_new)
            for first in range(0, count, each)
        ]
        row: dict[str, Any] = {"shapes": mode}
        for name in ("texts", "programs", "of_the_network", "seconds"):
            row[name] = sum(part["row"][name] for part in parts)
        row["MiB_more_a_text"] = max(part["row"]["MiB_more_a_text"] for part in parts)
        found[mode] = {"tokens": [made for part in parts for made in part["tokens"]], "row": row}
        print(report.markdown([row]), flush=True)
    exact, rounded = found.values()
    equal = np.mean([a == b for a, b in zip(exact["tokens"], rounded["tokens"])])
    for each in found.values():
        each["row"]["seconds_of_exact"] = each["row"]["seconds"] / exact["row"]["seconds"]
        each["row"]["equal_texts"] = float(equal)
    return [exact["row"], rounded["row"]]


def _in_a_process(mode: str, own: range, longest: int, most_new: int) -> dict[str, Any]:
    options = ["--child", mode, "--first", str(own.start), "--texts", str(own.stop)]
    options += ["--longest", str(longest), "--new", str(most_new)]
    command = [sys.executable, "-m", "experiments.llm.recompiling", *options]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def images(most: int, steps: int, repeats: int) -> tuple[report.Rows, report.Rows]:
    """Programs of batches 1 ... most, and seconds of their warm calls, in turns."""
    pipe = effjax.pipeline(WEIGHTS / "dit_glyphs", compute_dtype="float32", progress=False)
    options = {"num_inference_steps": steps, "progress": False, "output_type": "np"}
    programs, counts, made = Programs(), [], {}

    def run(mode: str, batch: int) -> Any:
        labels = [index % pipe.forward.config.num_classes for index in range(batch)]
        return own[mode](labels, key=jax.random.key(0), **options)

    own = {mode: dataclasses.replace(pipe, buckets=buckets) for mode, buckets in MODES.items()}
    for mode in MODES:
        jax.clear_caches()
        programs.new()
        began = time.perf_counter()
        made[mode] = [run(mode, batch) for batch in range(1, most + 1)]
        row = {"shapes": mode, "batches": f"1 ... {most}", "programs": programs.new()}
        row["of_the_network"] = sampler._compiled_step._cache_size()
        counts.append({**row, "seconds": time.perf_counter() - began})
    exact, rounded = made.values()
    rows = []
    for batch in range(1, most + 1):
        calls = {mode: lambda mode=mode, batch=batch: run(mode, batch) for mode in MODES}
        seconds = best_seconds(calls, repeats)
        rows.append(
            {
                "images": batch,
                "exact_seconds": seconds["exact"],
                "seconds": seconds["powers of two"],
                "ratio": seconds["powers of two"] / seconds["exact"],
                "largest_difference": float(np.abs(exact[batch - 1] - rounded[batch - 1]).max()),
            }
        )
        print(report.markdown(rows[-1:]), flush=True)
    return counts, rows


def padding(longest: tuple[int, ...]) -> report.Rows:
    """Tokens, and pairs of tokens, that are computed for each that there is: from 64 tokens on."""
    rows = []
    for most in longest:
        lengths = np.arange(1, most + 1)
        padded = np.array([bucket(int(length), POWERS, least=LEAST) for length in lengths])
        beyond = lengths > LEAST
        rows.append(
            {
                "lengths": f"1 ... {most}",
                "mean_tokens": float(padded.sum() / lengths.sum()),
                "worst_tokens": float((padded / lengths)[beyond].max()),
                "mean_pairs": float((padded**2).sum() / (lengths**2).sum()),
                "worst_pairs": float(((padded / lengths) ** 2)[beyond].max()),
            }
        )
    return rows


def scores() -> report.Rows:
    """Temporary memory of scoring a text, nearly all of it logits, and what all logits take."""
    rows, tokens, words = [], jax.ShapeDtypeStruct((1, 4096), np.int32), 151_936
    for dtype in ("float32", "bfloat16"):
        config = LlamaConfig(
            vocab_size=words,
            hidden_size=64,
            intermediate_size=64,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=64,
            tied=True,
            dtype=dtype,
            param_dtype=dtype,
        )
        forward, params = abstract(Llama, config)
        program = scoring._score.lower(forward, params, {}, tokens, tokens, 4096).compile()
        rows.append(
            {
                "dtype": dtype,
                "tokens": 4096,
                "words": words,
                "temporary_GiB": memory_of(program)["temp_bytes"] / 2**30,
                "all_logits_GiB": 4096 * words * 4 / 2**30,
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few texts and images, to try it")
    parser.add_argument("--texts", type=int, default=100)
    parser.add_argument("--longest", type=int, default=1000, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="the most new tokens")
    parser.add_argument("--images", type=int, default=8, help="the largest batch")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--child", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    sizes = (given.texts, given.longest, given.new)
    if given.child:
        own = range(given.first, given.texts)
        print(json.dumps(read_texts(given.child, own, given.longest, given.new)))
        return
    if given.quick:
        sizes, given.images, given.steps, given.repeats = (3, 60, 4), 3, 2, 1
    changed = [
        f"--{name} {value}"
        for name, value in vars(given).items()
        if value != parser.get_default(name) and name != "quick"
    ]
    options = " --quick" if given.quick else "".join(f" {each}" for each in changed)
    of_texts = texts(*sizes)
    on_disk = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        programs, batches = images(given.images, given.steps, given.repeats)
    finally:
        jax.config.update("jax_enable_compilation_cache", on_disk)
    report.write(
        "llm_recompiling",
        title="Shapes that were not there before: exact, and rounded up to powers of two",
        command=f"python -m experiments.llm.recompiling{options}",
        texts=of_texts,
        batches_of_images=programs,
        warm_calls=batches,
        padding=padding((256, 1000, 4000, 16_000)),
        scores=scores(),
    )


if __name__ == "__main__":
    main()
