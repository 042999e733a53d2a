"""Train a tiny VAR on class-labeled glyphs, on the tokens of the tiny VQVAE.

    python -m experiments.train_var --checkpoints DIR

Teacher forcing: all tokens of all scales in one call, cross entropy (arXiv 2404.02905, section
3.2). `experiments.train_vqvae` comes first. Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm.auto import trange

import converters
import effjax
from effjax.autoregression import teacher_forced
from effjax.bundled import glyphs, judge
from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.models import vqvae
from effjax.models.var import VAR, VARConfig
from effjax.samplers import sample_keys
from effjax.storage import write_json
from effjax.training import train as train_params
from effjax.transform import Pair
from experiments import train_vqvae, training

WEIGHTS = train_vqvae.WEIGHTS.parent

TINY = VARConfig(
    patch_nums=train_vqvae.PATCH_NUMS,
    num_layers=4,
    num_heads=4,
    head_dim=32,
    intermediate_size=512,
    num_classes=len(glyphs.CLASSES),
    vocab_size=train_vqvae.TINY.vocab_size,
    code_channels=train_vqvae.TINY.latent_channels,
)


def read(
    forward: Forward,
    params: Params,
    vae: Pair,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens of images, and the logits of all of them in one call."""
    tokens = vqvae.encode(*vae, images, forward.config.patch_nums)
    return tokens, teacher_forced(forward, params, vae, tokens, labels)


def train(
    model: Any,
    config: Any,
    read: Callable[..., tuple[jax.Array, jax.Array]],
    vae: Pair,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float,
    checkpoints: Path,
) -> tuple[Forward, Params, dict]:
    """Train from the last checkpoint on; return forward, averaged parameters and the log."""
    forward, params = functional(model(config, rngs=nnx.Rngs(seed)))

    def loss(params: Params, batch: PyTree, key: jax.Array, codes: Params) -> jax.Array:
        images, labels = batch
        key_drop, key = jax.random.split(key)
        dropped = jax.random.bernoulli(key_drop, 0.1, labels.shape)
        seen = jnp.where(dropped, config.null_condition(labels), labels)
        tokens, logits = read(forward, params, (vae[0], codes), images, seen, key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    trained = train_params(
        loss,
        params,
        lambda start: glyphs.batches(seed, batch, start=start),
        steps=steps,
        key=jax.random.key(seed),
        transform=training.optimizer(steps, learning_rate),
        constants=(vae[1],),
        checkpoints=checkpoints,
    )
    return forward, trained.average, trained.log


def export(path: Path, name: str, forward: Forward, params: Params, vae: Path) -> None:
    """Write the model as a pipeline with its tokenizer, bfloat16, replacing an older one."""
    config = json.loads((vae / "config.json").read_text())
    index = {
        "_class_name": name,
        "id2label": {str(number): name for number, name in enumerate(glyphs.CLASSES)},
        "transformer": ["effjax", forward.model.__name__],
        "vae": ["effjax", config["_class_name"]],
    }
    with training.replacing(path) as new:
        small = training.bfloat16(params)
        converters.save_pretrained(forward, small, new / "transformer", progress=False)
        shutil.copytree(vae, new / "vae")
        write_json(new / "model_index.json", index)


def evaluate(
    path: Path, *, images: int, guidance: float, temperature: float, seed: int
) -> dict[str, Any]:
    """Judge images that the exported model draws."""
    pipe = effjax.pipeline(path, dtype="float32", progress=False)
    loop = pipe.sampler(guidance_scale=guidance, temperature=temperature)
    labels = (np.arange(images) % len(glyphs.CLASSES)).astype(np.int32)
    chunks, sample = [], jax.jit(loop)
    for first in trange(0, images, 32, desc="judging"):
        chunk = labels[first : first + 32]
        keys = sample_keys(jax.random.key(seed), len(chunk), first=first)
        chunks.append(np.asarray(pipe.decode(sample(pipe.forward, pipe.params, chunk, keys))))
    generated = np.clip(np.concatenate(chunks), -1, 1)
    reader = judge.load()
    halves = [glyphs.batch(np.random.default_rng([seed, i]), images) for i in range(2)]
    real = [judge.features(reader, half) for half, _ in halves]
    tokens = pipe.encode((halves[0][0] + 1) / 2)
    logits = pipe.logits(tokens, halves[0][1])
    entropies = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
    return {
        "images": images,
        "guidance": guidance,
        "temperature": temperature,
        "nats_per_token": round(float(jnp.mean(entropies)), 4),
        "judge_accuracy": judge.accuracy(reader, generated, labels),
        "frechet": judge.frechet(judge.features(reader, generated), real[0]),
        "frechet_real_halves": judge.frechet(*real),
    }


def passes(figures: dict[str, Any]) -> bool:
    """The gate: legible."""
    return figures["judge_accuracy"] >= 0.95


def command(
    module: str,
    argv: list[str] | None,
    *,
    about: str,
    pipeline: str,
    model: Any,
    config: Any,
    read: Callable[..., tuple[jax.Array, jax.Array]],
    vae: Path,
    guidance: float,
    temperature: float = 1.0,
    steps: int = 4500,
) -> int:
    """The command line of a script that trains a model of codes of classes."""

    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        tokenizer = converters.from_pretrained(vae, dtype="float32", progress=False)
        forward, params, log = train(
            *(model, config, read, tokenizer),
            steps=arguments.steps,
            batch=arguments.batch,
            seed=arguments.seed,
            learning_rate=arguments.learning_rate,
            checkpoints=arguments.checkpoints,
        )
        export(arguments.output, pipeline, forward, params, vae)
        return log

    def judged(arguments: argparse.Namespace) -> dict[str, Any]:
        return evaluate(
            arguments.output,
            images=arguments.images,
            guidance=arguments.guidance,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )

    return training.command(
        module,
        argv,
        about=about,
        output=vae.parent,
        steps=steps,
        options={
            **training.judged_images(guidance=guidance),
            "temperature": (temperature, "of the judged images"),
        },
        make=make,
        evaluate=judged,
        passes=passes,
    )


def main(argv: list[str] | None = None) -> int:
    return command(
        "experiments.train_var",
        argv,
        about=__doc__.splitlines()[0],
        pipeline="VARPipeline",
        model=VAR,
        config=TINY,
        read=read,
        vae=train_vqvae.WEIGHTS,
        guidance=1.5,
    )


if __name__ == "__main__":
    sys.exit(main())
