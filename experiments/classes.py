"""What the scripts share that train models of classes of glyphs: batches, exports, judging."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import trange

import converters
import effjax
from effjax.bundled import glyphs, judge
from effjax.forward import Params
from effjax.samplers import sample_keys
from effjax.storage import write_json
from effjax.training import Trained
from effjax.training import train as train_params
from effjax.transform import Pair
from experiments import training

NAMES = {str(number): name for number, name in enumerate(glyphs.CLASSES)}
"""The classes, as model_index.json has them."""


def train(
    loss: Callable[..., jax.Array],
    params: Params,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float,
    checkpoints: Path,
    faces: tuple[str, ...] = glyphs.FONTS,
    **options: Any,
) -> Trained:
    """Train on batches of glyphs of these faces, from the last checkpoint on."""
    return train_params(
        loss,
        params,
        lambda start: glyphs.batches(seed, batch, fonts=faces, start=start),
        steps=steps,
        key=jax.random.key(seed),
        transform=training.optimizer(steps, learning_rate),
        checkpoints=checkpoints,
        **options,
    )


def some_dropped(config: Any, labels: jax.Array, key: jax.Array) -> jax.Array:
    """Labels, with the null condition in place of one in ten."""
    dropped = jax.random.bernoulli(key, 0.1, labels.shape)
    return jnp.where(dropped, config.null_condition(labels), labels)


def export(path: Path, name: str, pair: Pair, vae: Path, *, released: bool = False) -> None:
    """Write a model and its autoencoder as a pipeline, replacing an older one.

    Args:
        path: folder of the pipeline.
        name: its class, as model_index.json has it.
        pair: the model, as it is shipped.
        vae: folder of the autoencoder, whose files are copied as they are.
        released: write the model as its released files are, if it has any.
    """
    config = json.loads((vae / "config.json").read_text())
    index = {
        "_class_name": name,
        "id2label": NAMES,
        "transformer": ["effjax", pair[0].model.__name__],
        "vae": ["effjax", config["_class_name"]],
    }
    with training.replacing(path) as new:
        if released:
            converters.save_pretrained(*pair, new / "transformer", progress=False)
        else:
            effjax.save(new / "transformer", *pair, progress=False)
        shutil.copytree(vae, new / "vae")
        write_json(new / "model_index.json", index)


def sampled(loop: Any, pipe: Any, labels: np.ndarray, *, seed: int, part: int = 32) -> np.ndarray:
    """Images float32[B, H, W, 1] of labels, which a loop of a pipeline samples in parts."""
    run, made = jax.jit(loop), []
    for first in trange(0, len(labels), part, desc="judging"):
        chunk = labels[first : first + part]
        keys = sample_keys(jax.random.key(seed), len(chunk), first=first)
        made.append(np.asarray(pipe.decode(run(pipe.forward, pipe.params, chunk, keys))))
    return np.concatenate(made)


def labels_of(images: int) -> np.ndarray:
    """Labels int32[images] in turn."""
    return (np.arange(images) % len(glyphs.CLASSES)).astype(np.int32)


def judged(made: np.ndarray, labels: np.ndarray, *, seed: int) -> dict[str, float]:
    """How many images are read as their class, and how far they are from as many real ones."""
    own = judge.features(judge.load(), made)
    return {
        "judge_accuracy": judge.accuracy(judge.load(), made, labels),
        "frechet": judge.frechet(own, _real(len(made), seed)[0]),
    }


def real_halves(images: int, *, seed: int) -> float:
    """Distance of so many real images from as many others."""
    return judge.frechet(*_real(images, seed))


@functools.cache
def _real(images: int, seed: int) -> list[np.ndarray]:
    halves = [glyphs.batch(np.random.default_rng([seed, i]), images)[0] for i in range(2)]
    return [judge.features(judge.load(), half) for half in halves]
