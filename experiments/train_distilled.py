"""Distill the tiny VAR of glyphs into one or two calls (Distilled Decoding, arXiv 2412.17153).

    python -m experiments.train_distilled --checkpoints DIR

The teacher makes pairs of noise and tokens, then a student is trained on them:
`effjax.methods.distilled_decoding`. `experiments.train_var` comes first. Pairs and checkpoints are
kept in the folder; a second run resumes. The student is written with weights of 8 bits.

What is judged beside one call and two: the teacher with the flow map; a teacher's scales between
the two calls; tokens that are drawn independently of each other, each from its own distribution
given the class; two calls with other noise in the second one. "nats_per_token" are the teacher's,
of the tokens that a student finds likeliest; "as_the_map" is the share of them that are the
teacher's.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import effjax
from effjax.autoregression.few_step import quantizer_of
from effjax.bundled import glyphs
from effjax.calibration import Samples
from effjax.forward import Forward, Params
from effjax.methods import distilled_decoding, round_to_nearest
from effjax.methods.distillation.distilled_decoding import DistilledPlan, Fitting
from effjax.models.distilled_var import DistilledVAR
from effjax.samplers import sample_keys
from experiments import classes, train_var, training

WEIGHTS = train_var.WEIGHTS.parent / "distilled_var_glyphs"
PLAN = DistilledPlan(starts=(0, 3), split=3, solver_steps=24, noise_std=0.04)  # that of the codes
PART = 64  # images that are judged together


def data_of(teacher: Any, guidance: float, seed: int) -> Samples:
    """The teacher's samples of all classes."""

    def labels(count: int, number: int) -> jax.Array:
        rng = np.random.default_rng((seed, number))
        return jnp.asarray(rng.integers(0, len(glyphs.CLASSES), count), jnp.int32)

    return Samples(teacher.sampler(guidance_scale=guidance), labels, seed)


def export(path: Path, teacher: Path, forward: Forward, params: Params) -> None:
    """Write the student as a pipeline with its codes, weights of 8 bits, replacing an older one."""
    roles = "qkv|out|up|down" + ("|modulation" if forward.model is DistilledVAR else "")
    rules = ((f"role:{roles}", 8, 16),)
    packed = round_to_nearest.transform(round_to_nearest.RoundToNearestPlan(rules))
    small = packed(forward, training.bfloat16(params))
    classes.export(path, f"{forward.model.__name__}Pipeline", small, teacher / "vae")


def evaluate(
    path: Path, weights: Path, plan: DistilledPlan, *, images: int, guidance: float, seed: int
) -> dict[str, Any]:
    """Judge images of the exported student, and the orderings of the paper."""
    teacher = effjax.pipeline(weights, dtype="float32", progress=False)
    forward, params = effjax.load(path / "transformer", dtype="float32", progress=False)
    given = teacher.sampler(guidance_scale=guidance)
    mapped = distilled_decoding.mapped_loop(plan, given)
    student: Any = distilled_decoding.student_loop(given, forward)
    labels = jnp.asarray(classes.labels_of(images))
    keys = sample_keys(jax.random.key(seed + 1), images)  # none that a pair was made with
    quantizer = quantizer_of(teacher.vae)

    def other_noise(loop: Any, params: Params, own: Params, labels: Any, keys: Any) -> Any:
        again = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
        carry = loop.init(forward, params, labels, keys)
        noise = loop.noise(again, forward.config.code_channels)
        x = loop.run(forward, params, carry._replace(memory=noise), labels).x
        return loop.latents(x), quantizer.nearest(x)

    def helped(loop: Any, params: Params, own: Params, labels: Any, keys: Any) -> Any:
        models = (forward, params), (teacher.forward, own)
        return loop.with_teacher(*models, given, labels, keys, start=loop.teacher_start(None))

    def alone(loop: Any, params: Params, own: Params, labels: Any, keys: Any) -> Any:
        return loop.sample(forward, params, labels, keys)

    def mapped_teacher(params: Params, own: Params, labels: Any, keys: Any) -> Any:
        return mapped.sample(teacher.forward, own, labels, keys)

    def sampled(way: Any) -> tuple[np.ndarray, np.ndarray]:
        """Latents and tokens of all images."""
        run = partial(jax.jit(way), params, teacher.params)
        parts = [run(labels[i : i + PART], keys[i : i + PART]) for i in range(0, images, PART)]
        x, tokens = (np.concatenate(each) for each in zip(*parts))
        return x, tokens

    def by_student(loop: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        ways = {
            "one_call": partial(alone, dataclasses.replace(loop, starts=(0,))),
            "two_calls": partial(alone, loop),
            "teacher_between": partial(helped, loop),
            "other_noise": partial(other_noise, loop),
        }
        return {name: sampled(way) for name, way in ways.items()}

    made = {"teacher": sampled(mapped_teacher)} | by_student(student)
    exact = made["teacher"][1]
    independent = _shuffled(exact, np.asarray(labels), seed)
    made["independent"] = np.asarray(teacher.latents(independent)), independent
    # Vectors stand for the whole law of a token: what is next to them need not be likely.
    likeliest = by_student(dataclasses.replace(student, split=len(student.bounds) - 1))
    tokens = {name: likeliest.get(name, each)[1] for name, each in made.items()}
    figures: dict[str, Any] = {"images": images, "guidance": guidance}
    for name, (x, _) in made.items():
        pixels = np.clip(np.asarray(teacher.decode(jnp.asarray(x))), -1, 1)
        figures[name] = {
            **classes.judged(pixels, np.asarray(labels), seed=seed),
            "nats_per_token": _nats(teacher, tokens[name], labels),
            "as_the_map": round(float(np.mean(tokens[name] == exact)), 4),
        }
    return figures


def _shuffled(tokens: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """Tokens of each place, exchanged between images of a class."""
    rng, mixed = np.random.default_rng(seed), tokens.copy()
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        for place in range(tokens.shape[1]):
            mixed[rows, place] = tokens[rng.permutation(rows), place]
    return mixed


def _nats(teacher: Any, tokens: np.ndarray, labels: jax.Array) -> float:
    """Mean over tokens of what they surprise the teacher, without guidance."""
    found = []
    for i in range(0, len(tokens), PART):
        own = jnp.asarray(tokens[i : i + PART], jnp.int32)
        logits = teacher.logits(own, np.asarray(labels[i : i + PART]))
        found.append(optax.softmax_cross_entropy_with_integer_labels(logits, own))
    return round(float(jnp.mean(jnp.concatenate(found))), 4)


def passes(figures: dict[str, Any]) -> bool:
    """The gate: legible."""
    one, two = (figures[name]["judge_accuracy"] for name in ("one_call", "two_calls"))
    return one >= 0.85 and two >= 0.92


def command(
    module: str,
    argv: list[str] | None,
    *,
    about: str,
    teacher: Path,
    plan: DistilledPlan,
    output: Path,
    guidance: float,
    weight: float,
) -> int:
    """The command line of a script that distills a model of codes of classes."""

    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        pipe = effjax.pipeline(teacher, dtype="float32", progress=False)
        pair = pipe.forward, pipe.params
        fitting = Fitting(
            **training.given(arguments, "pairs", "steps", "learning_rate", "batch", "weight"),
            distance="latents",
        )
        data = data_of(pipe, arguments.guidance, arguments.seed)
        folder = arguments.checkpoints
        learned, log = distilled_decoding.fit(plan, fitting, *pair, data, checkpoints=folder)
        export(arguments.output, teacher, *distilled_decoding.transform(plan, learned)(*pair))
        return log

    def judged(arguments: argparse.Namespace) -> dict[str, Any]:
        options = training.given(arguments, "images", "guidance", "seed")
        return evaluate(arguments.output, teacher, plan, **options)

    return training.command(
        module,
        argv,
        about=about,
        output=output,
        steps=4000,
        options={
            **training.judged_images(guidance=guidance),
            "pairs": (16_384, "pairs that the teacher makes"),
            "weight": (weight, "of the distance of latents, beside the cross entropy"),
        },
        make=make,
        evaluate=judged,
        passes=passes,
    )


def main(argv: list[str] | None = None) -> int:
    return command(
        "experiments.train_distilled",
        argv,
        about=__doc__.splitlines()[0],
        teacher=train_var.WEIGHTS,
        plan=PLAN,
        output=WEIGHTS,
        guidance=1.5,
        weight=1.0,
    )


if __name__ == "__main__":
    sys.exit(main())
