"""The bundled tiny models as subjects: what they are asked for, and how their images are judged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import effjax
from effjax import metrics
from effjax.bundled import demo, glyphs, judge
from effjax.context import PyTree
from effjax.samplers import Sampler, sample_keys
from effjax.transform import Pair
from experiments import train_pixart

CHUNK = 32  # images that one program samples at a time


@dataclasses.dataclass(frozen=True)
class Subject:
    """A bundled model.

    Attributes:
        name: of the model.
        pair: forward and parameters.
        sampler: guided.
        conditions: (first, count) -> cond and uncond of the images first ... first + count - 1.
        calibration: cond and uncond of a small batch beside those that are judged.
        scored: those of the batch on which a search scores parts of the model.
        judged: images to figures of quality.
    """

    name: str
    pair: Pair
    sampler: Sampler
    conditions: Callable[[int, int], tuple[PyTree, PyTree]]
    calibration: tuple[PyTree, PyTree]
    scored: tuple[PyTree, PyTree]
    judged: Callable[[np.ndarray], dict[str, float]]

    def images(self, pair: Pair, count: int, *, seed: int = 0) -> np.ndarray:
        """Images of the standard conditions and noise, float32[count, H, W, C], in chunks."""
        run = jax.jit(self.sampler)
        parts = []
        for first in range(0, count, CHUNK):
            cond, uncond = self.conditions(first, CHUNK)
            keys = sample_keys(jax.random.key(seed), CHUNK, first=first)
            parts.append(np.asarray(run(*pair, cond, keys, uncond=uncond)))
        return np.concatenate(parts)[:count]

    def figures(self, images: np.ndarray, dense: np.ndarray) -> dict[str, float]:
        """Quality, and the distance to the dense images of the same noise."""
        far = images is not dense
        psnr = float(metrics.psnr(jnp.asarray(dense), jnp.asarray(images))) if far else np.inf
        return {**self.judged(images), "psnr_to_dense": psnr}


def tiny_dit(*, steps: int) -> Subject:
    """The class-conditional model: is the class right, and how far are real glyphs?"""
    pipe = effjax.pipeline(demo.MODEL, dtype="float32", progress=False)
    reader = judge.load()
    real = judge.features(reader, glyphs.batch(np.random.default_rng(0), 1024)[0])

    def judged(images: np.ndarray) -> dict[str, float]:
        return {
            "accuracy": judge.accuracy(reader, images, demo.labels_for(len(images))),
            "frechet": judge.frechet(judge.features(reader, images), real),
        }

    def conditions(first: int, count: int) -> tuple[PyTree, PyTree]:
        return jnp.asarray(demo.labels_for(first + count)[first:]), None

    return Subject(
        "tiny DiT",
        (pipe.forward, pipe.params),
        pipe.sampler(num_inference_steps=steps, guidance_scale=demo.GUIDANCE),
        conditions,
        (jnp.asarray(demo.labels_for(8)) * 4 + 1, None),
        (jnp.asarray(demo.labels_for(16)) * 2 + 1, None),
        judged,
    )


def tiny_pixart(*, steps: int, path: Path = train_pixart.WEIGHTS) -> Subject:
    """The text-to-image model on captions that it was not trained on: is what was asked shown?"""
    pipe = effjax.pipeline(path, dtype="float32", progress=False)
    reader = judge.load()
    _, things = train_pixart.unseen(4096, 0)
    captions = things.captions()

    def judged(images: np.ndarray) -> dict[str, float]:
        count = len(images)
        asked = glyphs.Things(things.labels[:count], things.colors[:count], things.places[:count])
        return judge.alignment(reader, images, asked)

    seen, more = (
        glyphs.captioned(np.random.default_rng(seed), count, held_out=False)[1]
        for seed, count in ((1, 8), (2, 16))
    )
    return Subject(
        "tiny PixArt",
        (pipe.forward, pipe.params),
        pipe.sampler(num_inference_steps=steps, guidance_scale=train_pixart.GUIDANCE),
        lambda first, count: pipe.conditions(captions[first : first + count]),
        pipe.conditions(seen),
        pipe.conditions(more),
        judged,
    )
