"""What students of Distilled Decoding save beside their teachers: calls, FLOPs and seconds.

    python -m experiments.distilled_speed

The tiny VAR and the tiny LlamaGen with guidance, and their students in one call and in two,
float32, up to the latents: the decoder is the same for all. Programs take turns on the same
threads. The goals are half of the FLOPs and 1.6 times the speed on VAR, 20 times on LlamaGen, in
one call.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np

import effjax
from effjax.cost import sampler_cost
from experiments import (
    report,
    train_distilled,
    train_distilled_llamagen,
    train_llamagen,
    train_var,
)
from experiments.recipes import turns

PAIRS = {
    "VAR": (train_var, train_distilled),
    "LlamaGen": (train_llamagen, train_distilled_llamagen),
}


def rows(name: str, batch: int, repeats: int) -> list[dict[str, Any]]:
    """The teacher and its student in one call and in two."""
    teacher, student = (
        effjax.pipeline(script.WEIGHTS, dtype="float32", progress=False) for script in PAIRS[name]
    )
    loops = {"the teacher": (teacher, teacher.sampler())}
    for calls in (1, 2):
        loops[f"its student, {calls} calls"] = student, student.sampler(num_inference_steps=calls)
    labels, key = np.arange(batch) * 5 % 36, jax.random.key(0)
    programs, flops = {}, {}
    for each, (pipe, loop) in loops.items():
        cond, _ = pipe.conditions(labels.tolist())
        run = jax.jit(lambda *given, loop=loop: loop(*given))
        programs[each] = lambda run=run, pipe=pipe, cond=cond: run(
            pipe.forward, pipe.params, cond, key
        )
        flops[each] = sampler_cost(loop, pipe.forward, pipe.params, cond).flops
    seconds = turns(programs, repeats)
    table = [
        {
            "model": f"tiny {name}",
            "batch": batch,
            "sampled by": each,
            "calls": loop.calls,
            "FLOPs of the teacher": round(flops[each] / flops["the teacher"], 3),
            "milliseconds per image": round(1000 * seconds[each] / batch, 2),
            "times faster": round(seconds["the teacher"] / seconds[each], 2),
        }
        for each, (_, loop) in loops.items()
    ]
    for row in table:
        print(row, flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="students beside their teachers")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    table = [
        row
        for name in PAIRS
        for batch in arguments.batches
        for row in rows(name, batch, arguments.repeats)
    ]
    report.write(
        "distilled_speed",
        title="Distilled Decoding: students beside their teachers",
        command="python -m experiments.distilled_speed",
        students=table,
    )


if __name__ == "__main__":
    main()
