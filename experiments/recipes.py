"""Recipes of `pipe.accelerate()`: how fast they are, and how near to the dense images.

    python -m experiments.recipes --write

Each recipe takes turns with the dense model and with the dense model in as many steps as cost the
same seconds. `--write` leaves the figures in effjax/pipelines/recipes.json too, in which recipes
that were measured by others (with their source) stay.
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
    "first block 0.1": [("fb_cache", {"threshold": 0.1, "order": 1})],
}
KEPT = ("one in two", "one in three")  # for `accelerate`: nothing as fast comes nearer
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


def rows(name: str, *, images: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Every recipe on one model."""
    pipe, cond, uncond, right = subject(name, images)
    keys = sample_keys(jax.random.key(0), images)

    def program(forward: Any, params: Any, calls: int) -> Callable[[], jax.Array]:
        sampler = pipe.sampler(num_inference_steps=calls, guidance_scale=demo.GUIDANCE)
        run = jax.jit(sampler)
        options = {} if uncond is None else {"uncond": uncond}
        return lambda: run(forward, params, cond, keys, **options)

    dense = program(pipe.forward, pipe.params, steps)
    found = []
    for title, methods in RECIPES.items():
        transforms = [method(each).transform(_plan(each, plan)) for each, plan in methods]
        fast = pipe.transform(*transforms)
        own = program(fast.forward, fast.params, steps)
        seconds = turns({"dense": dense, "own": own}, repeats)
        share = seconds["own"] / seconds["dense"]
        fewer = min(max(math.ceil(steps * share), 1), steps)
        short = program(pipe.forward, pipe.params, fewer)
        seconds = turns({"dense": dense, "own": own, "fewer": short}, repeats)
        pictures = {
            key: np.asarray(run())
            for key, run in {"dense": dense, "own": own, "fewer": short}.items()
        }

        def far(key: str, pictures: dict[str, np.ndarray] = pictures) -> float:
            return float(metrics.psnr(jnp.asarray(pictures["dense"]), jnp.asarray(pictures[key])))

        found.append(
            {
                "model": name,
                "recipe": title,
                "speed": round(seconds["dense"] / seconds["own"], 2),
                "psnr": round(far("own"), 1),
                "right": round(right(pictures["own"]), 4),
                "right_dense": round(right(pictures["dense"]), 4),
                "fewer_steps": fewer,
                "fewer_speed": round(seconds["dense"] / seconds["fewer"], 2),
                "fewer_psnr": round(far("fewer"), 1),
                "fewer_right": round(right(pictures["fewer"]), 4),
            }
        )
        print(found[-1], flush=True)
    return found


def _plan(name: str, fields: dict[str, Any]) -> Any:
    kind = method(name).plan
    return kind.from_dict({**kind().to_dict(), **fields})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--write", action="store_true", help="leave the figures")
    arguments = parser.parse_args()
    options = {name: getattr(arguments, name) for name in ("images", "steps", "repeats")}
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
        mine = [row for row in table if row["model"] == name and row["recipe"] in KEPT]
        held[name] = [
            {
                "methods": [
                    [each, _plan(each, plan).to_dict()] for each, plan in RECIPES[row["recipe"]]
                ],
                "speed": row["speed"],
                "psnr": row["psnr"],
                "measured": f"the tiny {name} on glyphs, {arguments.steps} steps, "
                f"{report.machine()}: {COMMAND}",
                "recommended": row["recipe"] == KEPT[0],
            }
            for row in mine
        ]
    write_json(FILE, held)


if __name__ == "__main__":
    main()
