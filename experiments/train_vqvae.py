"""Train a tiny multi-scale VQVAE on glyphs: the tokenizer of the tiny VAR.

    python -m experiments.train_vqvae --checkpoints DIR

The loss is that of VAR's tokenizer without its perceptual and adversarial parts: the error of the
images, and of the latents after every scale (arXiv 2404.02905, section 3.2; arXiv 1711.00937). A
code that is used nowhere is pulled to the nearest vector of the batch, so that none dies. The faces
of Computer Modern are never trained on; the gate reads those. Checkpoints are orbax; a second run
resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import converters
from effjax.bundled import glyphs
from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.metrics import psnr
from effjax.models import vqvae
from effjax.models.vqvae import VQVAE, VQVAEConfig, averaged, quantizer_of
from experiments import classes, training

WEIGHTS = Path(__file__).parent / "weights" / "var_glyphs" / "vae"
PATCH_NUMS = (1, 2, 3, 4, 6, 8)
COMMITMENT, ALIVE = 0.25, 0.1  # weights of parts of the loss

TINY = VQVAEConfig(
    in_channels=1,
    out_channels=1,
    latent_channels=8,
    vocab_size=256,
    block_out_channels=(24, 48, 64),
    layers_per_block=1,
    norm_groups=8,
)


class Quantized(NamedTuple):
    """Latents, the codes nearest to them, and the losses of both.

    Attributes:
        latents: as the decoder would take them without codes.
        made: of codes.
        error: of codes, and the commitment of latents to them.
        distance: of every code from the nearest vector of the batch.
    """

    latents: jax.Array
    made: jax.Array
    error: jax.Array
    distance: jax.Array


def errors(latents: jax.Array, made: jax.Array) -> jax.Array:
    """The error of codes, and the commitment of latents to them."""
    goal, fixed = jax.lax.stop_gradient(latents), jax.lax.stop_gradient(made)
    return jnp.mean(jnp.square(made - goal)) + COMMITMENT * jnp.mean(jnp.square(latents - fixed))


def distances(codes: jax.Array, vectors: jax.Array) -> jax.Array:
    """Squared distance of every code from the nearest of vectors."""
    flat = vectors.reshape(-1, vectors.shape[-1])
    squares = jnp.sum(codes**2, 1)[:, None] - 2 * codes @ flat.T + jnp.sum(flat**2, 1)
    return jnp.min(squares, axis=1)


def quantized(forward: Forward, params: Params, latents: jax.Array) -> Quantized:
    """Latents as sums of codes, with the errors of all partial sums."""
    quantizer, goal = quantizer_of(forward, params), jax.lax.stop_gradient(latents)
    made, found, far = jnp.zeros_like(goal), [], []
    for scale, side in enumerate(PATCH_NUMS):
        vectors = averaged(goal - jax.lax.stop_gradient(made), side)
        tokens = quantizer.nearest(vectors)
        made = made + quantizer.enlarged(quantizer.vectors(tokens), scale, PATCH_NUMS)
        found.append(errors(latents, made))
        far.append(distances(quantizer.codes(), vectors))
    nearest = jnp.min(jnp.stack(far), axis=0)
    return Quantized(latents, made, jnp.mean(jnp.stack(found)), jnp.mean(nearest))


def train(
    model: Any,
    config: Any,
    quantized: Callable[[Forward, Params, jax.Array], Quantized],
    **options: Any,
) -> tuple[Forward, Params, dict]:
    """Train, see `classes.train`; return forward, averaged parameters and the log."""
    forward, params = functional(model(config, rngs=nnx.Rngs(options["seed"])))

    def loss(params: Params, batch: PyTree, key: jax.Array) -> jax.Array:
        images, _ = batch
        latents = forward(params, {}, None, images)[0].astype(jnp.float32)
        found = quantized(forward, params, latents)
        straight = found.latents + jax.lax.stop_gradient(found.made - found.latents)
        again = forward(params, {}, straight)[0]
        error = jnp.mean(jnp.square(again - images))
        return error + found.error + ALIVE * found.distance

    faces = (*glyphs.FONTS, *glyphs.JUDGE_FONTS)
    trained = classes.train(loss, params, faces=faces, **options)
    return forward, trained.average, trained.log


def export(path: Path, forward: Forward, params: Params) -> None:
    """Write the model in the released layout, bfloat16, replacing an older one."""
    with training.replacing(path) as new:
        small = training.bfloat16(params)
        converters.save_pretrained(forward, small, new, layout="original", progress=False)


def coded(forward: Forward, params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Tokens of images, and the latents that they stand for."""
    tokens = vqvae.encode(forward, params, images, PATCH_NUMS)
    return tokens, vqvae.latents_of(forward, params, tokens, PATCH_NUMS)


def evaluate(path: Path, coded: Any, *, images: int, seed: int) -> dict[str, Any]:
    """PSNR of images that are encoded to tokens and decoded, and how many codes they use."""
    forward, params = converters.from_pretrained(path, dtype="float32", progress=False)

    @jax.jit
    def again(params: Params, given: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, latents = coded(forward, params, given)
        return tokens, jnp.clip(forward(params, {}, latents)[0], -1, 1)

    figures: dict[str, Any] = {"images": images}
    for name, faces in (("seen", glyphs.FONTS), ("unseen", glyphs.HELD_OUT_FONTS)):
        given, _ = glyphs.batch(np.random.default_rng([seed, 1]), images, faces)
        tokens, made = again(params, given)
        figures[f"psnr_{name}"] = round(float(psnr(given, made)), 2)
        figures[f"codes_used_{name}"] = len(np.unique(tokens))
    return figures


def passes(figures: dict[str, Any]) -> bool:
    """The gate: faces that were never trained on come back."""
    return figures["psnr_unseen"] >= 22


def command(
    module: str,
    argv: list[str] | None,
    *,
    about: str,
    model: Any,
    config: Any,
    quantized: Any,
    coded: Any,
    output: Path,
) -> int:
    """The command line of a script that trains a tokenizer."""

    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        options = training.given(arguments)
        forward, params, log = train(model, config, quantized, **options)
        export(arguments.output, forward, params)
        return log

    def judge(arguments: argparse.Namespace) -> dict[str, Any]:
        return evaluate(arguments.output, coded, images=arguments.images, seed=arguments.seed)

    return training.command(
        module,
        argv,
        about=about,
        output=output,
        steps=2600,
        options={"batch": (32, "images of a batch"), "images": (512, "images to judge")},
        make=make,
        evaluate=judge,
        passes=passes,
    )


def main(argv: list[str] | None = None) -> int:
    return command(
        "experiments.train_vqvae",
        argv,
        about=__doc__.splitlines()[0],
        model=VQVAE,
        config=TINY,
        quantized=quantized,
        coded=coded,
        output=WEIGHTS,
    )


if __name__ == "__main__":
    sys.exit(main())
