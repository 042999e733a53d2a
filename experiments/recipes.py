"""Recipes of `pipe.accelerate()`: how fast they are, and how near to the dense images.

    python -m experiments.recipes --write

Each recipe takes turns with the dense model and with the dense model in as many steps as cost the
same seconds. `--write` leaves the figures in effjax/pipelines/recipes.json too, in which recipes
that were measured by others (with their source) stay. The figures of the tiny DiT are those of
`effjax demo`.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax import metrics
from effjax.bundled import demo, judge
from effjax.pipelines.recipes import FILE
from effjax.registry import method
from effjax.samplers import sample_keys
from effjax.storage import write_json
from experiments import report, train_pixart, train_sd3

RECIPES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "two in three": [("even_steps", {"every": 2, "warmup": 7, "order": 1})],
    "one in two": [("even_steps", {"every": 2, "order": 1})],
    "one in three": [("even_steps", {"every": 3, "order": 1})],
}
RECOMMENDED = "one in two"
MODELS = {"DiT": demo.MODEL, "PixArt": train_pixart.WEIGHTS, "SD3": train_sd3.WEIGHTS}
COMMAND = "python -m experiments.recipes --write"


class Subject(NamedTuple):
    """A pipeline with conditions, and what says whether its images are right."""

    pipe: Any
    cond: Any
    uncond: Any
    right: Callable[[np.ndarray], float]


def subject(name: str, images: int) -> Subject:
    """A tiny model and conditions that it was not trained on (classes, for the DiT)."""
    pipe, reader = effjax.pipeline(MODELS[name], dtype="float32", progress=False), judge.load()
    if name == "DiT":
        labels = demo.labels_for(images)
        return Subject(pipe, jnp.asarray(labels), None, lambda x: judge.accuracy(reader, x, labels))
    _, things = train_pixart.unseen(images, 5)
    conditions = pipe.conditions(things.captions())
    cond, uncond = conditions
    return Subject(pipe, cond, uncond, lambda x: judge.alignment(reader, x, things)["all"])


def turns(programs: dict[str, Callable[[], jax.Array]], repeats: int) -> dict[str, float]:
    """Median seconds of programs that take turns, after one round that compiles."""
    spent: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(repeats + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program())
            if round_:
                spent[name].append(time.perf_counter() - began)
    return {name: statistics.median(each) for name, each in spent.items()}


def rows(name: str, *, images: int, batch: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Every recipe on one model: seconds of the first batch, pictures of all."""
    pipe, cond, uncond, right = subject(name, images)
    keys = sample_keys(jax.random.key(0), images)

    def program(forward: Any, params: Any, calls: int) -> Callable[[int], jax.Array]:
        sampler = pipe.sampler(num_inference_steps=calls, guidance_scale=demo.GUIDANCE)
        run = jax.jit(sampler)

        def make(first: int = 0) -> jax.Array:
            own = jax.tree.map(lambda leaf: leaf[first : first + batch], (cond, uncond, keys))
            options = {} if uncond is None else {"uncond": own[1]}
            return run(forward, params, own[0], own[2], **options)

        return make

    def pictures(make: Callable[[int], jax.Array]) -> np.ndarray:
        return np.concatenate([np.asarray(make(first)) for first in range(0, images, batch)])

    dense, found = program(pipe.forward, pipe.params, steps), []
    wanted = pictures(dense)

    def figures(make: Callable[[int], jax.Array]) -> tuple[float, float]:
        got = pictures(make)
        far = float(metrics.psnr(jnp.asarray(wanted), jnp.asarray(got)))
        return round(far, 1), round(right(got), 4)

    for title, methods in RECIPES.items():
        transforms = [method(each).transform(_plan(each, plan)) for each, plan in methods]
        fast = pipe.transform(*transforms)
        own = program(fast.forward, fast.params, steps)
        seconds = turns({"dense": lambda: dense(0), "own": lambda own=own: own(0)}, repeats)
        fewer = min(max(math.ceil(steps * seconds["own"] / seconds["dense"]), 1), steps)
        short = program(pipe.forward, pipe.params, fewer)
        programs = {"dense": dense, "own": own, "fewer": short}
        seconds = turns({key: lambda run=run: run(0) for key, run in programs.items()}, repeats)
        psnr, correct = figures(own)
        fewer_psnr, fewer_correct = figures(short)
        found.append(
            {
                "model": name,
                "recipe": title,
                "speed": round(seconds["dense"] / seconds["own"], 2),
                "psnr": psnr,
                "right": correct,
                "right_dense": round(right(wanted), 4),
                "fewer_steps": fewer,
                "fewer_speed": round(seconds["dense"] / seconds["fewer"], 2),
                "fewer_psnr": fewer_psnr,
                "fewer_right": fewer_correct,
            }
        )
        print(found[-1], flush=True)
    return found


def _plan(name: str, fields: dict[str, Any]) -> Any:
    kind = method(name).plan
    return kind.from_dict({**kind().to_dict(), **fields})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=32, help="to judge, whole batches")
    parser.add_argument("--batch", type=int, default=16, help="to time")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=["PixArt", "SD3"], choices=MODELS)
    parser.add_argument("--write", action="store_true", help="leave the figures")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("images", "batch", "steps", "repeats")}
    table = [row for name in arguments.models for row in rows(name, **options)]
    if not arguments.write:
        return
    report.write(
        "recipes",
        title="Recipes of `pipe.accelerate()` on tiny models",
        command=COMMAND,
        recipes=table,
    )
    held = json.loads(FILE.read_text())
    for name in arguments.models:
        mine = [row for row in table if row["model"] == name]
        held[name] = [
            {
                "methods": [
                    [each, _plan(each, plan).to_dict()] for each, plan in RECIPES[row["recipe"]]
                ],
                "speed": row["speed"],
                "psnr": row["psnr"],
                "measured": f"the tiny {name} on glyphs, {arguments.steps} steps, "
                f"{report.machine()}: {COMMAND}",
                "recommended": row["recipe"] == RECOMMENDED,
            }
            for row in mine
        ]
    write_json(FILE, held)


if __name__ == "__main__":
    main()
