"""Train a tiny SD3, with its three text encoders, on captioned glyphs by flow matching.

    python -m experiments.train_sd3 --checkpoints DIR

The image's stream starts from four blocks of the tiny PixArt, and T5 from its text encoder; the
text's stream and both CLIP encoders start at random. One combination of class, color and place in
eight is never trained on; the judge reads those back. Checkpoints are orbax; a second run resumes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import converters
from effjax.bundled import glyphs
from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.layers.embeddings import sincos_2d
from effjax.models.clip import CLIPText, CLIPTextConfig
from effjax.models.sd3 import SD3, SD3Config
from effjax.pipelines.families.sd3 import FAMILIES
from effjax.samplers import FlowMatchEuler
from effjax.storage import write_json
from effjax.training import train as train_params
from experiments import train_pixart, training
from experiments.train_pixart import LENGTH

WEIGHTS = Path(__file__).parent / "weights" / "sd3_glyphs"
GUIDANCE = 3.0  # of the judged images
FAMILY = FAMILIES[0]
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
BLOCKS = (0, 2, 3, 5)
"""Blocks of the tiny PixArt that the image's stream starts from."""

TINY = SD3Config(
    sample_size=glyphs.SIDE,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    num_layers=len(BLOCKS),
    num_heads=4,
    head_dim=32,
    caption_channels=64,  # of T5, and of both CLIPs side by side
    pooled_channels=64,
    max_grid=glyphs.SIDE // 4,
)
TINY_CLIP = CLIPTextConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    max_positions=LENGTH,
    end_token=0,  # set to the tokenizer's
    projection=32,
)


def tokenizers() -> dict[str, Any]:
    """Tokenizers by the names of their encoders."""
    clip = train_pixart.tokenizer(BEGIN, END)
    found = {"text_encoder": clip, "text_encoder_2": clip}
    return {**found, "text_encoder_3": train_pixart.tokenizer()}


def from_pixart(params: Params) -> Params:
    """Start the image's stream from the tiny PixArt.

    PixArt projects time once for all blocks and adds a table to it in each; a block of SD3 has a
    projection of its own, so the table joins its bias. The pooled text adds nothing at first.
    """
    _, given = converters.from_pretrained(
        train_pixart.WEIGHTS, subfolder="transformer", dtype="float32", progress=False
    )
    projection, blocks = given["time"]["proj"], {}
    for name, source in zip(params["blocks"], BLOCKS, strict=True):
        block, old = params["blocks"][name], given["blocks"][str(source)]
        modulation = {
            "kernel": projection["kernel"],
            "bias": projection["bias"] + old["scale_shift_table"].reshape(-1),
        }
        blocks[name] = {
            **block,
            "attn": {**block["attn"], "image": old["attn"]},
            "image": {"modulation": modulation, "mlp": old["mlp"]},
        }
    last = params["final"]["modulation"]
    final = {
        "modulation": {
            "kernel": jnp.zeros_like(last["kernel"]),
            "bias": given["final"]["scale_shift_table"].reshape(-1),
        },
        "proj": given["final"]["proj"],
    }
    side, patches = TINY.max_grid, train_pixart.TINY
    positions = sincos_2d(
        TINY.hidden_size, side, side, base=side, interpolation=patches.interpolation
    )
    pooled = params["pooled"]
    return {
        **params,
        "blocks": blocks,
        "final": final,
        "patch": given["patch"],
        "positions": jnp.asarray(positions),
        "time": given["time"]["embed"],
        "pooled": {**pooled, "fc2": jax.tree.map(jnp.zeros_like, pooled["fc2"])},
    }


def train(
    config: SD3Config, *, steps: int, batch: int, seed: int, learning_rate: float, checkpoints: Path
) -> tuple[dict[str, tuple[Forward, Params]], dict]:
    """Train from the last checkpoint on; return the models, averaged, by component, and the log."""
    forward, params = functional(SD3(config, rngs=nnx.Rngs(seed)))
    readers = tokenizers()
    clip_config = {"end_token": readers["text_encoder"].eos_token_id}
    clip = CLIPTextConfig(**{**vars(TINY_CLIP), **clip_config})
    encoders: dict[str, Forward] = {}
    trained_params: dict[str, Params] = {"transformer": from_pixart(params)}
    for number, name in enumerate(("text_encoder", "text_encoder_2"), 1):
        module = CLIPText(clip, rngs=nnx.Rngs(seed + number))
        encoders[name], trained_params[name] = functional(module)
    encoders["text_encoder_3"], trained_params["text_encoder_3"] = converters.from_pretrained(
        train_pixart.WEIGHTS, subfolder="text_encoder", dtype="float32", progress=False
    )

    def tokens(captions: list[str]) -> dict[str, np.ndarray]:
        options = {"padding": "max_length", "max_length": LENGTH, "return_tensors": "np"}
        found = {}
        for name, reader in readers.items():
            found[name] = reader(captions, **options)["input_ids"].astype(np.int32)
        return found

    empty = tokens([""])

    def batches(start: int) -> Iterator[PyTree]:
        for images, captions in glyphs.captioned_batches(seed, batch, start=start):
            yield images, tokens(captions)

    def loss(params: Params, batch: PyTree, key: jax.Array) -> jax.Array:
        images, ids = batch

        def predict(mixed: jax.Array, times: jax.Array, dropped: jax.Array) -> jax.Array:
            encoded = {}
            for part in FAMILY.text_encoders:
                seen = jnp.where(dropped[:, None], empty[part.name], ids[part.name])
                out, _ = encoders[part.name](params[part.name], {}, seen)
                encoded[part.name] = part.read(out, seen)
            condition = FAMILY.condition(encoded, config, {})
            return forward(params["transformer"], {}, mixed, times, condition)[0]

        return training.flow_matching(images, key, predict)

    trained = train_params(
        loss,
        trained_params,
        batches,
        steps=steps,
        key=jax.random.key(seed),
        transform=training.optimizer(steps, learning_rate),
        checkpoints=checkpoints,
    )
    forwards = {"transformer": forward, **encoders}
    models = {name: (forwards[name], trained.average[name]) for name in forwards}
    return models, trained.log


def export(path: Path, models: dict[str, tuple[Forward, Params]]) -> None:
    """Write the models as a pipeline in the layouts of diffusers and transformers, bfloat16."""
    clip = ["transformers", "CLIPTextModelWithProjection"]
    classes = {
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "text_encoder": clip,
        "text_encoder_2": clip,
        "text_encoder_3": ["transformers", "T5EncoderModel"],
    }
    readers = tokenizers()
    names = {name: name.replace("text_encoder", "tokenizer") for name in readers}
    index = {
        "_class_name": FAMILY.name,
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        **classes,
        **{name: ["transformers", "PreTrainedTokenizerFast"] for name in names.values()},
        "vae": [None, None],
    }
    with training.replacing(path) as new:
        for name, (forward, params) in models.items():
            small, layout = training.bfloat16(params), classes[name][0]
            converters.save_pretrained(forward, small, new / name, layout=layout, progress=False)
        for name, reader in readers.items():
            train_pixart.save_tokenizer(reader, new / names[name])
        write_json(new / "model_index.json", index)
        (new / "scheduler").mkdir()
        schedule = FlowMatchEuler(steps=FAMILY.steps)
        write_json(new / "scheduler/scheduler_config.json", schedule.to_config())


def passes(figures: dict[str, Any]) -> bool:
    """The gate: letters, colors and places of unseen captions are right."""
    aligned = figures["alignment"]
    return aligned["class"] >= 0.9 and min(aligned["color"], aligned["place"]) >= 0.98


def main(argv: list[str] | None = None) -> int:
    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        models, log = train(TINY, **training.given(arguments))
        export(arguments.output, models)
        return log

    return training.command(
        "experiments.train_sd3",
        argv,
        about=__doc__.splitlines()[0],
        output=WEIGHTS,
        steps=5000,
        options=training.judged_images(guidance=GUIDANCE),
        make=make,
        evaluate=training.judging(train_pixart.evaluate),
        passes=passes,
    )


if __name__ == "__main__":
    sys.exit(main())
