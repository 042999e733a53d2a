"""The tiny models of glyphs as sequences: what their logs claim, what their contexts are worth."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax
from effjax.autoregression import codes_of, logits_of, teacher_forced
from effjax.bundled import glyphs, judge
from effjax.layers.scales import token_starts
from effjax.metrics import psnr
from effjax.models.vqvae import averaged, quantizer_of
from experiments import (
    train_distilled,
    train_distilled_llamagen,
    train_ecar,
    train_llamagen,
    train_var,
    train_vq,
    train_vqvae,
)

DRAWN = {
    train_var: (0.9, {}),
    train_llamagen: (0.85, {"temperature": 0.7}),
    train_ecar: (0.9, {"guidance_scale": train_ecar.GUIDANCE}),
    train_distilled: (0.85, {"num_inference_steps": 1}),
    train_distilled_llamagen: (0.85, {"num_inference_steps": 1}),
}
"""How many images are read as their class at least, and how they are drawn."""

LABELS, KEY = np.arange(32), jax.random.key(3)


def named(script):
    return script.__name__.partition("train_")[2]


@functools.cache
def pipe_of(folder):
    return effjax.pipeline(folder, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def reader():
    return judge.load()


def nats_of(logits, tokens):
    return float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens)))


def seen(pipe, count=32):
    """Labels and tokens of images of the world."""
    images, labels = glyphs.batch(np.random.default_rng(7), count)
    return jnp.asarray(labels), pipe.encode((images + 1) / 2)


@pytest.mark.parametrize("script", [train_vqvae, train_vq, *DRAWN], ids=named)
def test_the_gates_of_the_logs(script):
    gate = train_distilled if script is train_distilled_llamagen else script
    gate = {train_vq: train_vqvae, train_llamagen: train_var}.get(script, gate)
    assert gate.passes(json.loads((script.WEIGHTS / "log.json").read_text())["judged"])


@pytest.mark.parametrize(
    ("script", "codes"),
    [
        (train_ecar, train_vq),
        (train_distilled_llamagen, train_vq),
        (train_distilled, train_vqvae),
    ],
    ids=named,
)
def test_copies_of_codes_are_the_same_files(script, codes):
    for file in sorted(codes.WEIGHTS.iterdir()):
        assert (script.WEIGHTS / "vae" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize("script", [train_var, train_llamagen], ids=named)
def test_tokens_of_faces_that_were_never_seen(script):
    pipe = pipe_of(script.WEIGHTS)
    images, _ = glyphs.batch(np.random.default_rng(8), 32, glyphs.HELD_OUT_FONTS)
    again = pipe.decode(pipe.latents(pipe.encode((images + 1) / 2)))
    assert psnr(jnp.asarray(images), again) >= 22


@pytest.mark.parametrize("script", DRAWN, ids=named)
def test_images_are_read_as_their_class(script, reader):
    (least, options), pipe = DRAWN[script], pipe_of(script.WEIGHTS)
    images = pipe(LABELS, key=KEY, output_type="np", progress=False, **options)
    assert judge.accuracy(reader, 2 * images - 1, LABELS) >= least


def test_what_a_scale_reads_matters():
    pipe = pipe_of(train_var.WEIGHTS)
    labels, tokens = seen(pipe)
    quantizer, sides = quantizer_of(*pipe.vae), pipe.patch_nums
    codes, starts = codes_of(quantizer, tokens, sides), token_starts(sides)

    @jax.jit
    def logits(codes):
        return pipe.forward(pipe.params, {}, codes, labels)[0]

    own = nats_of(logits(codes), tokens)
    assert own < 0.6 * np.log(train_vqvae.TINY.vocab_size)
    # The latents that a scale reads, of another image; and only what the last scale before it adds.
    assert own < nats_of(logits(jnp.roll(codes, 1, axis=0)), tokens)
    alone = [codes[:, : starts[1]]]
    for scale, side in enumerate(sides[1:]):
        vectors = quantizer.vectors(tokens[:, starts[scale] : starts[scale + 1]])
        grid = vectors.reshape(len(tokens), sides[scale], sides[scale], -1)
        nearest = jax.image.resize(
            grid, (len(tokens), sides[-1], sides[-1], grid.shape[-1]), "nearest"
        )
        alone.append(averaged(nearest, side))
    assert own < nats_of(logits(jnp.concatenate(alone, axis=1)), tokens)
    every = teacher_forced(pipe.forward, pipe.params, pipe.vae, tokens, labels)
    assert own == pytest.approx(nats_of(every, tokens), rel=1e-5)


def test_what_a_token_reads_matters():
    pipe = pipe_of(train_llamagen.WEIGHTS)
    labels, tokens = seen(pipe)

    @jax.jit
    def nats(read, labels):
        logits = logits_of(pipe.forward, pipe.params, read, labels)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return jnp.mean(losses, axis=0)

    own = nats(tokens, labels)
    assert jnp.mean(own) < 0.2 * np.log(train_vq.TINY.vocab_size)
    # Tokens before a place, of another image and in another order; and another class.
    mixed = jax.random.permutation(jax.random.key(0), tokens, axis=1, independent=False)
    for read in (jnp.roll(tokens, 1, axis=0), jnp.roll(tokens, 1, axis=1), mixed):
        assert 3 * jnp.mean(own) < jnp.mean(nats(read, labels))
    other = nats(tokens, (labels + 1) % len(glyphs.CLASSES))
    assert own[0] < other[0]
    assert jnp.mean(own) < jnp.mean(other)
    assert jnp.mean(own) == pytest.approx(nats_of(pipe.logits(tokens, labels), tokens), rel=1e-5)


def test_noise_between_stages_is_even_in_blocks(reader):
    pipe = pipe_of(train_ecar.WEIGHTS)
    loop = pipe.sampler(guidance_scale=train_ecar.GUIDANCE)
    white = dataclasses.replace(loop, gamma=0.0)
    run = jax.jit(lambda params: white(pipe.forward, params, jnp.asarray(LABELS), KEY))
    made = np.clip(pipe.decode(run(pipe.params)), -1, 1)
    assert judge.accuracy(reader, made, LABELS) < DRAWN[train_ecar][0] - 0.1


@pytest.mark.parametrize(
    ("model", "learned"),
    [(train_var, train_distilled), (train_llamagen, train_distilled_llamagen)],
    ids=named,
)
def test_a_second_call_makes_tokens_that_are_likelier_to_the_teacher(model, learned):
    teacher, student = pipe_of(model.WEIGHTS), pipe_of(learned.WEIGHTS)

    def nats(tokens, labels):
        return nats_of(teacher.logits(tokens, labels), tokens)

    labels, tokens = (np.asarray(each) for each in seen(teacher, 128))
    independent = tokens.copy()  # each place of another image of the class, where there is one
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        for place in range(tokens.shape[1]):
            independent[rows, place] = np.roll(tokens[rows, place], place)

    @jax.jit
    def likeliest(params, loop):
        every = dataclasses.replace(loop, split=len(loop.bounds) - 1)  # no vectors
        return every.sample(student.forward, params, jnp.asarray(LABELS), KEY)[1]

    one, two = (
        nats(likeliest(student.params, student.sampler(num_inference_steps=steps)), LABELS)
        for steps in (1, 2)
    )
    assert two < one < nats(independent, labels)
