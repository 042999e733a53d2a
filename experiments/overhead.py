"""What the library itself costs around XLA's programs: tracing, compiling, dispatch, hashing.

    python -m experiments.overhead --before CHECKOUT

A tiny DiT is sampled under a DiTFastAttn plan, and a tiny Llama reads sequences. Both checkouts run
the same lines, in processes that take turns; figures are the medians over processes, of the fastest
repetition in each. Programs are so small that what is around them weighs most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from experiments import report

ROOT = Path(__file__).parent.parent

# What both checkouts must understand.
PROGRAM = """
import dataclasses, json, time
import jax, jax.numpy as jnp
from effjax import testing
from effjax.methods import dit_fast_attn
from effjax.methods.attention.dit_fast_attn import Strategy, uniform

def fastest(run, repeats):
    found = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        found.append(time.perf_counter() - begin)
    return min(found)

nothing = jax.jit(lambda *arguments: 0)
found = {}
dit = testing.tiny_dit(num_layers=4)
plan = uniform((Strategy.WARS, Strategy.AST), layers=4, calls=4, tokens=64)
llama = testing.tiny_llama(num_layers=4)
pairs = {
    "DiT, DiTFastAttn": (dit, dit_fast_attn.transform(plan)(dit.forward, dit.params)),
    "Llama": (llama, (llama.forward, llama.params)),
}
for name, (subject, (forward, params)) in pairs.items():
    arguments = forward, params, subject.cond, jax.random.key(0)
    begin = time.perf_counter()
    lowered = jax.jit(subject.sampler).lower(*arguments)
    traced = time.perf_counter()
    program = lowered.compile()
    compiled = time.perf_counter()
    jax.block_until_ready(program(*arguments))
    found[name] = {
        "trace_seconds": traced - begin,
        "compile_seconds": compiled - traced,
        "run_seconds": fastest(lambda: jax.block_until_ready(program(*arguments)), 300),
        # Of a program with these arguments that has nothing to do.
        "dispatch_microseconds": 1e6 * fastest(lambda: nothing(*arguments), 200),
        "hash_microseconds": 1e6 * fastest(lambda: hash(dataclasses.replace(forward)), 200),
        "flatten_microseconds": 1e6 * fastest(lambda: jax.tree.flatten(arguments), 200),
    }
print(json.dumps(found))
"""


def measured(checkout: Path) -> dict[str, dict[str, float]]:
    """The figures of one process in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment,
        cwd=checkout,
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path, required=True, help="another checkout of effjax")
    parser.add_argument("--processes", type=int, default=5, help="of each checkout")
    arguments = parser.parse_args(argv)
    places = {"before": arguments.before.resolve(), "now": ROOT}
    runs: dict[str, list[dict[str, dict[str, float]]]] = {name: [] for name in places}
    for _ in range(arguments.processes):
        for name, checkout in places.items():
            runs[name].append(measured(checkout))
    rows: report.Rows = []
    for program, figures in runs["now"][0].items():
        for figure in figures:
            before, now = (
                statistics.median(run[program][figure] for run in runs[name]) for name in places
            )
            rows.append(
                {"program": program, "figure": figure, "before": before, "now": now}
                | {"ratio": now / before}
            )
    print(report.markdown(rows))
    report.write(
        "overhead",
        title="What the library costs around its programs",
        command=f"python -m experiments.overhead --before CHECKOUT "
        f"--processes {arguments.processes}",
        now_and_before=rows,
    )


if __name__ == "__main__":
    main()
