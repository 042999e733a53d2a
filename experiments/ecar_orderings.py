"""Are ECAR's stages better than a single one at equal FLOPs, and does its backbone's reading count?

    python -m experiments.ecar_orderings --checkpoints DIR

The tiny ECAR of `experiments.train_ecar`, and one of its sizes with a single stage, which is flow
matching by the same head, given the class. Both are trained for as many steps, from the same seed
and on the same batches; the single stage draws three times of a token where three stages draw two,
so that training costs the same FLOPs too.

Images are judged at equal FLOPs: the single stage takes the fewest steps that cost no less than
three stages do. "blind" is the shipped tiny ECAR whose backbone sees the class alone, in sampling;
it was not trained so. Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

import converters
import effjax
from effjax.context import Context
from effjax.cost import sampler_cost
from effjax.pipelines import NextStagePipeline
from effjax.targets import Wrapper, wrap
from experiments import classes, report, train_ecar, train_vq

STEPS, BATCH = 2700, 32  # as the tiny ECAR that is shipped
SETTINGS = ((2, 2.0), (4, 2.0), (8, 2.0), (4, 1.0))
"""Steps of each of three stages, and guidance of the last one."""
CHUNK = 64  # images that are sampled together


class _Blind(Wrapper):
    """Embeds tokens as nothing."""

    def __call__(self, x: Any) -> Any:
        return 0 * self.inner(x)


def class_alone(module: nnx.Module, context: Context) -> None:
    """Patch: the backbone of an ECAR does not see what the stages before have made."""
    wrap(module, "embed", _Blind)


MODELS = {
    "three stages": (train_ecar.TINY, 2),
    "one stage": (dataclasses.replace(train_ecar.TINY, num_stages=1), 3),
}
"""Configurations, and how many times of a token are drawn for a call of the backbone."""


def trained(name: str, folder: Path, **options: Any) -> tuple[NextStagePipeline, dict[str, Any]]:
    """A pipeline of one of the models, and what its training was."""
    vae = converters.from_pretrained(train_vq.WEIGHTS, dtype="float32", progress=False)
    config, draws = MODELS[name]
    own = folder / name.replace(" ", "_")
    forward, params, log = train_ecar.train(config, draws=draws, checkpoints=own, **options)
    said = {"model": name, "steps": options["steps"], "batch": options["batch"], "draws": draws}
    said["schedules"] = ", ".join(
        f"{run['steps']} steps from step {run['first_step']}" for run in log["runs"]
    )
    said["last loss"] = list(log["loss"].values())[-1]
    return NextStagePipeline(forward, params, vae=vae), said


def flops_of(pipe: NextStagePipeline, guidance: float) -> tuple[int, int]:
    """FLOPs of an image with one step in each stage, and those of a step more in each."""
    label = np.zeros(1, np.int32)
    one, two = (
        sampler_cost(
            pipe.sampler(num_inference_steps=steps, guidance_scale=guidance),
            pipe.forward,
            pipe.params,
            label,
        ).flops
        for steps in (1, 2)
    )
    return one, two - one


def rows(
    pipes: dict[str, NextStagePipeline],
    settings: tuple[tuple[int, float], ...],
    images: int,
    seed: int,
) -> report.Rows:
    """Each model's images at as many FLOPs as the first one takes, or a little more."""
    labels, table = classes.labels_of(images), []
    for count, guidance in settings:
        costs = {name: flops_of(pipe, guidance) for name, pipe in pipes.items()}
        one, more = next(iter(costs.values()))
        wanted = one + (count - 1) * more
        for name, pipe in pipes.items():
            one, more = costs[name]
            steps = max(1, 1 - (one - wanted) // more)
            loop = pipe.sampler(num_inference_steps=steps, guidance_scale=guidance)
            made = classes.sampled(loop, pipe, labels, seed=seed, part=CHUNK)
            judged = classes.judged(np.clip(made, -1, 1), labels, seed=seed)
            table.append(
                {
                    "model": name,
                    "guidance": guidance,
                    "steps of each stage": steps,
                    "MFLOPs": round((one + (steps - 1) * more) / 1e6, 1),
                    "judge accuracy": round(judged["judge_accuracy"], 4),
                    "Frechet distance": round(judged["frechet"], 3),
                }
            )
            print(table[-1], flush=True)
    return table


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="ECAR's orderings on a tiny model")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=STEPS, help="of training")
    parser.add_argument("--batch", type=int, default=BATCH, help="images of a step")
    parser.add_argument("--images", type=int, default=512, help="images to judge")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    logging.getLogger("absl").setLevel(logging.ERROR)
    options = {"steps": arguments.steps, "seed": arguments.seed}
    options |= {"batch": arguments.batch, "learning_rate": 2e-3}
    made = {name: trained(name, arguments.checkpoints, **options) for name in MODELS}
    pipes = {name: pipe for name, (pipe, _) in made.items()}
    shipped: Any = effjax.pipeline(train_ecar.WEIGHTS, dtype="float32", progress=False)
    blind = dataclasses.replace(shipped, forward=shipped.forward.patch(class_alone))
    others = {"shipped": shipped, "shipped, blind": blind}
    drawn = arguments.images, arguments.seed
    report.write(
        "ecar_orderings",
        title="ECAR's stages beside a single one at equal FLOPs",
        command=f"python -m experiments.ecar_orderings --checkpoints DIR --steps {arguments.steps}"
        f" --batch {arguments.batch} --images {arguments.images} --seed {arguments.seed}",
        training=[said for _, said in made.values()],
        images=rows(pipes, SETTINGS, *drawn) + rows(others, SETTINGS[1:2], *drawn),
        real=[{"Frechet distance": classes.real_halves(arguments.images, seed=arguments.seed)}],
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
