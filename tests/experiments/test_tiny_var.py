"""The tiny VAR of glyphs: what its log claims, and what its scales are worth."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import effjax
from effjax.autoregression import codes_of, teacher_forced
from effjax.bundled import glyphs, judge
from effjax.layers.scales import token_starts
from effjax.metrics import psnr
from effjax.models.vqvae import averaged, quantizer_of
from experiments import train_var, train_vqvae


@pytest.fixture(scope="module")
def pipe():
    return effjax.pipeline(train_var.WEIGHTS, dtype="float32", progress=False)


@pytest.fixture(scope="module")
def seen(pipe):
    """Images of the world, their labels and tokens."""
    images, labels = glyphs.batch(np.random.default_rng(7), 32)
    return images, jnp.asarray(labels), pipe.encode((images + 1) / 2)


def test_the_gates_of_the_logs():
    for script in (train_vqvae, train_var):
        log = json.loads((script.WEIGHTS / "log.json").read_text())
        assert script.passes(log["judged"])


def test_tokens_of_faces_that_were_never_seen(pipe):
    images, _ = glyphs.batch(np.random.default_rng(8), 32, glyphs.HELD_OUT_FONTS)
    again = pipe.decode(pipe.latents(pipe.encode((images + 1) / 2)))
    assert psnr(jnp.asarray(images), again) >= 22


def test_what_a_scale_reads_matters(pipe, seen):
    _, labels, tokens = seen
    quantizer, sides = quantizer_of(*pipe.vae), pipe.patch_nums
    codes, starts = codes_of(quantizer, tokens, sides), token_starts(sides)

    @jax.jit
    def nats(codes):
        logits, _ = pipe.forward(pipe.params, {}, codes, labels)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))

    own = nats(codes)
    assert own < 0.6 * np.log(train_vqvae.TINY.vocab_size)
    # The latents that a scale reads, of another image; and only what the last scale before it adds.
    assert own < nats(jnp.roll(codes, 1, axis=0))
    alone = [codes[:, : starts[1]]]
    for scale, side in enumerate(sides[1:]):
        vectors = quantizer.vectors(tokens[:, starts[scale] : starts[scale + 1]])
        grid = vectors.reshape(len(tokens), sides[scale], sides[scale], -1)
        nearest = jax.image.resize(
            grid, (len(tokens), sides[-1], sides[-1], grid.shape[-1]), "nearest"
        )
        alone.append(averaged(nearest, side))
    assert own < nats(jnp.concatenate(alone, axis=1))
    every = teacher_forced(pipe.forward, pipe.params, pipe.vae, tokens, labels)
    assert own == pytest.approx(
        float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(every, tokens))), rel=1e-5
    )


def test_images_are_read_as_their_class(pipe):
    labels = np.arange(36)
    images = pipe(labels, key=jax.random.key(3), output_type="np", progress=False)
    assert judge.accuracy(judge.load(), 2 * images - 1, labels) >= 0.9
