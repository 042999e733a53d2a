"""Train the bundled judge of glyphs, on real ones only.

python -m experiments.train_judge
"""

from __future__ import annotations

import argparse
import json
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array
from scipy import ndimage

from effjax.bundled import glyphs
from effjax.bundled.judge import WEIGHTS, Judge, accuracy, features, frechet, load, save
from effjax.compat import relaxed_promotion


def augment(rng: np.random.Generator, images: np.ndarray) -> np.ndarray:
    """Vary real glyphs [B, 32, 32, 1] as other faces and generators would.

    Shape, weight of the strokes, blur, contrast and noise: each has its own random strength per
    image, from nothing to mild.
    """
    side, knots = glyphs.SIDE, np.eye(4)
    spread = np.stack([np.interp(np.linspace(0, 3, side), range(4), knot) for knot in knots], 1)
    pulls = rng.uniform(-2.0, 2.0, (len(images), 2, 4, 4))  # pixels, at the knots of a rubber sheet
    sources = np.mgrid[:side, :side] + spread @ pulls @ spread.T  # [B, 2, row, column]
    bend = partial(ndimage.map_coordinates, order=1, cval=-1)
    images = np.stack(list(map(bend, images[..., 0], sources)))[..., None]

    def strength(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (len(images), 1, 1, 1)).astype(np.float32)

    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-1)
    near = np.stack([padded[:, y : y + side, x : x + side] for y in range(3) for x in range(3)])
    weight = strength(-0.4, 0.4)  # thinner or bolder strokes
    pole = np.where(weight > 0, near[1::2].max(0), near[1::2].min(0))
    images = images + np.abs(weight) * (pole - images)
    images = images + strength(0.0, 0.5) * (near.mean(0) - images)
    images = images * strength(0.75, 1.1) + strength(-0.1, 0.1)
    noise = rng.standard_normal(images.shape, dtype=np.float32)
    return images + strength(0.0, 0.2) * noise


def train(seed: int, steps: int, *, size: int = 128, rate: float = 2e-3) -> Judge:
    """Train on `glyphs.FONTS` and `glyphs.JUDGE_FONTS`, `size` images a step; print the loss."""
    graphdef, params = nnx.split(Judge(rngs=nnx.Rngs(seed)))
    schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 20, steps)
    optimizer = optax.adamw(schedule, weight_decay=0.02)

    def loss_of(params: nnx.State, images: Array, labels: Array) -> Array:
        logits = nnx.merge(graphdef, params)(images)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.05)
        return optax.softmax_cross_entropy(logits, targets).mean()

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: nnx.State, state: optax.OptState, images: Array, labels: Array):
        loss, gradient = jax.value_and_grad(loss_of)(params, images, labels)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng([seed, 0, 1])  # another stream than any batch has
    data = glyphs.batches(seed, size, fonts=glyphs.FONTS + glyphs.JUDGE_FONTS)
    with relaxed_promotion():
        state = optimizer.init(params)
        for index, (images, labels) in zip(range(1, steps + 1), data, strict=False):
            params, state, loss = step(params, state, augment(rng, images), labels)
            if index % 100 == 0 or index == steps:
                print(f"step {index:5d} of {steps}: loss {loss:.4f}", flush=True)
    return nnx.merge(graphdef, params)


def evaluate(judge: Judge, rng: np.random.Generator, *, size: int = 1024) -> dict:
    """Accuracy on world and held-out fonts, and the Frechet distance between two real halves."""

    def on(*fonts: str) -> float:
        return accuracy(judge, *glyphs.batch(rng, size, fonts))

    first, second = (features(judge, glyphs.batch(rng, size)[0]) for _ in range(2))
    return {
        "images_per_figure": size,
        "world_accuracy": on(*glyphs.FONTS),
        "held_out_accuracy": on(*glyphs.HELD_OUT_FONTS),
        "held_out_accuracy_by_font": {font: on(font) for font in glyphs.HELD_OUT_FONTS},
        "frechet_real_halves": frechet(first, second),
    }


def main() -> None:
    """Train, write weights and log, print the figures of the weights as they were written."""
    parser = argparse.ArgumentParser("python -m experiments.train_judge", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=WEIGHTS)
    options = parser.parse_args()
    start = time.perf_counter()
    save(train(options.seed, options.steps), options.output)
    seconds = round(time.perf_counter() - start, 1)
    judge = load(options.output)
    log = {
        "command": f"python -m experiments.train_judge --seed {options.seed} "
        f"--steps {options.steps}",
        "seed": options.seed,
        "steps": options.steps,
        "training_seconds": seconds,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(judge))),
        **evaluate(judge, np.random.default_rng([options.seed, 0, 2])),
    }
    text = json.dumps(log, indent=2) + "\n"
    (options.output / "log.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
