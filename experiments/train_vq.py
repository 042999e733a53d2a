"""Train a tiny VQ model on glyphs: the tokenizer of the tiny LlamaGen.

    python -m experiments.train_vq --checkpoints DIR

As `experiments.train_vqvae`, with one map of codes of unit length (arXiv 2406.06525, section 3.1).
Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from effjax.bundled import glyphs
from effjax.forward import Forward, Params
from effjax.models import vq_model
from effjax.models.vq_model import VQModel, VQModelConfig, quantizer_of
from experiments import train_vqvae
from experiments.train_vqvae import Quantized, distances, errors

WEIGHTS = Path(__file__).parent / "weights" / "llamagen_glyphs" / "vae"

TINY = VQModelConfig(
    in_channels=1,
    out_channels=1,
    latent_channels=8,
    encoder_channels=64,
    vocab_size=256,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    norm_groups=8,
)
GRID = glyphs.SIDE // TINY.downscale


def quantized(forward: Forward, params: Params, latents: jax.Array) -> Quantized:
    """Latents of unit length, and the codes nearest to them."""
    quantizer = quantizer_of(forward, params)
    unit = latents / jnp.maximum(jnp.linalg.norm(latents, axis=-1, keepdims=True), 1e-6)
    made = quantizer.vectors(quantizer.encode(latents)).reshape(latents.shape)
    far = distances(quantizer.codes(), jax.lax.stop_gradient(unit))
    return Quantized(unit, made, errors(unit, made), jnp.mean(far))


def coded(forward: Forward, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens of images, and the latents that they stand for."""
    tokens = vq_model.encode(forward, params, images)
    return tokens, vq_model.latents_of(forward, params, tokens, (GRID, GRID))


def main(argv: list[str] | None = None) -> int:
    return train_vqvae.command(
        "experiments.train_vq",
        argv,
        about=__doc__.splitlines()[0],
        model=VQModel,
        config=TINY,
        quantized=quantized,
        coded=coded,
        output=WEIGHTS,
    )


if __name__ == "__main__":
    sys.exit(main())
