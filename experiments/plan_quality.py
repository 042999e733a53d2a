"""What plans cost in quality on the bundled tiny DiT: paired images, dense against compressed.

    python -m experiments.plan_quality

First table: searched plans from weak to strong; judge accuracy with its 95 % interval, Frechet
distance to real glyphs, PSNR to the dense images of the same noise. Second table: at equal executed
attention FLOPs, the mixed plan against plans that were searched with one technique alone, and
against the same search with one threshold for all layers. What is searched and sampled is kept in
`--cache` and not made again.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax import metrics
from effjax.bundled import demo, glyphs, judge
from effjax.cost import sampler_cost
from effjax.methods.attention import dit_fast_attn
from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan, Strategy
from effjax.samplers import Sampler, sample_keys
from experiments import report
from experiments.peers.compressed import THRESHOLD

# Searches that the mixed one is compared with: their options.
OTHERS: dict[str, dict[str, Any]] = {
    "AST only": {"candidates": (Strategy.AST,)},
    "window only": {"candidates": (Strategy.WARS,)},
    "sharing over halves only": {"candidates": (Strategy.FULL_ASC,)},
    "mixed, flat threshold": {"graded": False},
}


class Bench:
    """The tiny DiT with its sampler, and the dense images that everything is compared with."""

    def __init__(self, *, steps: int, guidance: float, cache: Path, seed: int = 0):
        pipe = effjax.pipeline(demo.MODEL, dtype="float32", progress=False)
        self.pair = (pipe.forward, pipe.params)
        self.sampler: Sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=guidance)
        self.key = jax.random.key(seed)
        self.cache = cache
        self.reader = judge.load()
        real, _ = glyphs.batch(np.random.default_rng(seed), 1024)
        self.real = judge.features(self.reader, real)

    def search(self, threshold: float, **options: Any) -> DiTFastAttnPlan:
        """A plan from eight labels, as the demo searches it."""
        name = f"{threshold}_{self.sampler}_{sorted(options.items())}"
        path = self.cache / f"plan_{_digest(name)}.json"
        if not path.exists():
            plan = dit_fast_attn.search(
                *self.pair,
                self.sampler,
                jnp.asarray(demo.labels_for(8)),
                key=jax.random.fold_in(self.key, 1),
                threshold=threshold,
                **options,
            )
            self.cache.mkdir(parents=True, exist_ok=True)
            path.write_text(plan.to_json())
        return DiTFastAttnPlan.from_json(path.read_text())

    def kept(self, plan: DiTFastAttnPlan) -> float:
        """Executed attention FLOPs as a share of the dense ones."""
        columns = list(zip(zip(*plan.strategies), zip(*plan.need)))
        patched, params = dit_fast_attn.transform(plan)(*self.pair)
        label = jnp.zeros(1, jnp.int32)
        sparse = sampler_cost(self.sampler, patched, params, label, distinct=columns.__getitem__)
        dense = sampler_cost(self.sampler, *self.pair, label, distinct=lambda step: 0)
        return sparse.scope("attention").flops / dense.scope("attention").flops

    def images(self, plan: DiTFastAttnPlan | None, count: int) -> np.ndarray:
        """Images of the standard labels and noise, float32[count, 32, 32, 1], in chunks."""
        forward, params = self.pair
        if plan is not None:
            forward, params = dit_fast_attn.transform(plan)(forward, params)
        name = "dense" if plan is None else _digest(plan.to_json())
        path = self.cache / f"{name}_{self.sampler.calls}_{self.sampler.guidance}_{count}.npy"
        if path.exists():
            return np.load(path)
        labels = demo.labels_for(count)
        run = jax.jit(self.sampler)
        parts = []
        for first in range(0, count, demo.CHUNK):
            chunk = labels[first : first + demo.CHUNK]
            keys = sample_keys(self.key, len(chunk), first=first)
            parts.append(np.asarray(run(forward, params, chunk, keys)))
        self.cache.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(parts))
        return np.load(path)

    def row(self, name: str, plan: DiTFastAttnPlan | None, count: int) -> dict[str, Any]:
        """One line of a table."""
        images, dense = self.images(plan, count), self.images(None, count)
        labels = demo.labels_for(count)
        correct = int((judge.predict(self.reader, images) == labels).sum())
        low, high = judge.wilson_interval(correct, count)
        return {
            "plan": name,
            "attention_kept": 1.0 if plan is None else self.kept(plan),
            "images": count,
            "accuracy": correct / count,
            "interval": f"{low:.3f} ... {high:.3f}",
            "frechet": judge.frechet(judge.features(self.reader, images), self.real),
            "psnr_to_dense": float("inf")
            if plan is None
            else float(metrics.psnr(jnp.asarray(dense), jnp.asarray(images))),
        }

    def match(self, target: float, rounds: int = 6, **options: Any) -> DiTFastAttnPlan:
        """Bisect the threshold until a search keeps the target share; nearest plan found."""
        low, high, found = 0.05, 2.0, []
        for _ in range(rounds):
            middle = (low * high) ** 0.5
            plan = self.search(middle, **options)
            kept = self.kept(plan)
            found.append((abs(kept - target), plan))
            low, high = (middle, high) if kept > target else (low, middle)
            if found[-1][0] < 0.02:
                break
        return min(found, key=lambda each: each[0])[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1024, help="of the first table")
    parser.add_argument("--matched-images", type=int, default=256, help="of the second table")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=demo.GUIDANCE)
    parser.add_argument("--thresholds", default="0.1,0.15,0.2,0.3")
    parser.add_argument("--matched-threshold", type=float, default=THRESHOLD)
    parser.add_argument("--cache", type=Path, required=True, help="folder of finished parts")
    parser.add_argument("--skip-matched", action="store_true")
    arguments = parser.parse_args(argv)
    bench = Bench(steps=arguments.steps, guidance=arguments.guidance, cache=arguments.cache)

    command = (
        f"--images {arguments.images} --matched-images {arguments.matched_images} "
        f"--steps {arguments.steps} --guidance {arguments.guidance} "
        f"--thresholds {arguments.thresholds} --matched-threshold {arguments.matched_threshold}"
    )
    tables: dict[str, list[dict[str, Any]]] = {}

    def add(table: str, name: str, plan: DiTFastAttnPlan | None, count: int) -> None:
        """Finish a row and write what there is."""
        tables.setdefault(table, []).append(bench.row(name, plan, count))
        print(report.markdown(tables[table]), flush=True)
        report.write(
            "plan_quality",
            title="Compressed against dense on the tiny DiT",
            command=f"python -m experiments.plan_quality --cache DIR {command}",
            **tables,
        )

    add("searched_plans", "dense", None, arguments.images)
    for threshold in map(float, arguments.thresholds.split(",")):
        add("searched_plans", f"threshold {threshold}", bench.search(threshold), arguments.images)
    if arguments.skip_matched:
        return
    mixed = bench.search(arguments.matched_threshold)
    target = bench.kept(mixed)
    matched = "other_searches_at_equal_executed_attention_FLOPs"
    add(matched, "mixed", mixed, arguments.matched_images)
    for name, options in OTHERS.items():
        add(matched, name, bench.match(target, **options), arguments.matched_images)


if __name__ == "__main__":
    main()
