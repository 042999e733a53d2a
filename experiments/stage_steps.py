"""Which steps by stage are nearest to many steps, beside as many in every stage?

    python -m experiments.stage_steps

The tiny ECAR, guided: PSNR of images to those of 16 steps in each stage, from the same noise. Each
row is the best of a grid at no more FLOPs than as many steps in every stage take.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

import effjax
from effjax.autoregression import search_steps
from experiments import report, train_ecar

GRID, REFERENCE = (1, 2, 4, 8), 16
IMAGES = 12


def rows() -> report.Rows:
    """The best of the grid for each budget, and the even choice that makes the budget."""
    pipe = effjax.pipeline(train_ecar.WEIGHTS, dtype="float32", progress=False)
    labels, key = jnp.arange(IMAGES, dtype=jnp.int32), jax.random.key(5)
    found = search_steps(
        pipe.sampler(guidance_scale=train_ecar.GUIDANCE, num_inference_steps=max(GRID)),
        pipe.forward,
        pipe.params,
        labels,
        key,
        grid=GRID,
        reference=REFERENCE,
        decode=pipe.decode,
    )
    table, known = [], {each.steps: each for each in found.candidates}
    for steps in GRID:
        even = known[(steps,) * len(found.best.steps)]
        best = found.within(even.flops)
        for name, each in (("even", even), ("searched", best)):
            table.append(
                {
                    "choice": name,
                    "steps": " + ".join(map(str, each.steps)),
                    "FLOPs": each.flops / found.budget,
                    "PSNR, dB": each.value,
                }
            )
    return table


def main() -> int:
    report.write(
        "stage_steps",
        title="Steps of ECAR's stages, searched and even",
        command="python -m experiments.stage_steps",
        steps=rows(),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
