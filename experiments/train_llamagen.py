"""Train a tiny LlamaGen on class-labeled glyphs, on the tokens of the tiny VQ model.

    python -m experiments.train_llamagen --checkpoints DIR

Cross entropy of the next token (arXiv 2406.06525, section 3.2). `experiments.train_vq` comes first.
Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp

from effjax.autoregression import logits_of
from effjax.bundled import glyphs
from effjax.forward import Forward, Params
from effjax.models import vq_model
from effjax.models.llamagen import LlamaGen, LlamaGenConfig
from effjax.transform import Pair
from experiments import train_var, train_vq

WEIGHTS = train_vq.WEIGHTS.parent
WRONG = 0.1  # share of tokens that are replaced in training

TINY = LlamaGenConfig(
    grid=train_vq.GRID,
    num_layers=6,
    num_heads=4,
    head_dim=32,
    intermediate_size=352,
    vocab_size=train_vq.TINY.vocab_size,
    num_classes=len(glyphs.CLASSES),
)


def read(
    forward: Forward,
    params: Params,
    vae: Pair,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Tokens of images, and the logits of all of them in one call.

    Some of the tokens that are read are others: what is sampled later has errors too.
    """
    key_place, key_token = jax.random.split(key)
    tokens = vq_model.encode(*vae, images)
    wrong = jax.random.bernoulli(key_place, WRONG, tokens.shape)
    other = jax.random.randint(key_token, tokens.shape, 0, forward.config.vocab_size)
    return tokens, logits_of(forward, params, jnp.where(wrong, other, tokens), labels)


def main(argv: list[str] | None = None) -> int:
    return train_var.command(
        "experiments.train_llamagen",
        argv,
        about=__doc__.splitlines()[0],
        pipeline="LlamaGenPipeline",
        model=LlamaGen,
        config=TINY,
        read=read,
        vae=train_vq.WEIGHTS,
        guidance=2.0,
        temperature=0.7,
        steps=6500,
    )


if __name__ == "__main__":
    sys.exit(main())
