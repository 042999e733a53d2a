"""Train a tiny VAR on class-labeled glyphs, on the tokens of the tiny VQVAE.

    python -m experiments.train_var --checkpoints DIR

Teacher forcing: all tokens of all scales in one call, cross entropy (arXiv 2404.02905, section
3.2). `experiments.train_vqvae` comes first. Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import converters
import effjax
from effjax.autoregression import teacher_forced
from effjax.bundled import glyphs
from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.models import vqvae
from effjax.models.var import VAR, VARConfig
from effjax.transform import Pair
from experiments import classes, train_vqvae, training

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
    **options: Any,
) -> tuple[Forward, Params, dict]:
    """Train, see `classes.train`; return forward, averaged parameters and the log."""
    forward, params = functional(model(config, rngs=nnx.Rngs(options["seed"])))

    def loss(params: Params, batch: PyTree, key: jax.Array, codes: Params) -> jax.Array:
        images, labels = batch
        key_drop, key = jax.random.split(key)
        seen = classes.some_dropped(config, labels, key_drop)
        tokens, logits = read(forward, params, (vae[0], codes), images, seen, key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    trained = classes.train(loss, params, constants=(vae[1],), **options)
    return forward, trained.average, trained.log


def evaluate(
    path: Path, *, images: int, guidance: float, temperature: float, seed: int
) -> dict[str, Any]:
    """Judge images that the exported model draws."""
    pipe = effjax.pipeline(path, dtype="float32", progress=False)
    loop = pipe.sampler(guidance_scale=guidance, temperature=temperature)
    labels = classes.labels_of(images)
    made = np.clip(classes.sampled(loop, pipe, labels, seed=seed), -1, 1)
    real, own = glyphs.batch(np.random.default_rng([seed, 0]), images)
    tokens = pipe.encode((real + 1) / 2)
    entropies = optax.softmax_cross_entropy_with_integer_labels(pipe.logits(tokens, own), tokens)
    return {
        "images": images,
        "guidance": guidance,
        "temperature": temperature,
        "nats_per_token": round(float(jnp.mean(entropies)), 4),
        **classes.judged(made, labels, seed=seed),
        "frechet_real_halves": classes.real_halves(images, seed=seed),
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
        options = training.given(arguments)
        forward, params, log = train(model, config, read, tokenizer, **options)
        small = training.bfloat16(params)
        classes.export(arguments.output, pipeline, (forward, small), vae, released=True)
        return log

    def judged(arguments: argparse.Namespace) -> dict[str, Any]:
        options = training.given(arguments, "images", "guidance", "temperature", "seed")
        return evaluate(arguments.output, **options)

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
