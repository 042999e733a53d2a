"""Train the bundled tiny PixArt, with its text encoder, on captioned glyphs by flow matching.

    python -m experiments.train_pixart --checkpoints DIR

The blocks start from those of the bundled class-conditional DiT. One combination of class, color
and place in eight is never trained on; the judge reads those back. Checkpoints are orbax; a second
run resumes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm.auto import trange
from transformers import PreTrainedTokenizerFast

import converters
import effjax
from effjax.bundled import glyphs, judge
from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.models.pixart import PixArt, PixArtConfig, PromptEmbeddings
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import TextToImagePipeline
from effjax.samplers import FlowMatchEuler, sample_keys
from effjax.storage import write_json
from effjax.training import train as train_params
from experiments import train_dit, training

WEIGHTS = Path(__file__).parent / "weights" / "pixart_glyphs"
GUIDANCE = 3.0  # of the judged images
LENGTH = 10
"""Tokens of a caption: the longest has eight words and an end."""

TINY = PixArtConfig(
    sample_size=glyphs.SIDE,
    patch_size=4,
    in_channels=3,
    out_channels=3,
    num_layers=6,
    num_heads=4,
    head_dim=32,
    caption_channels=64,
    interpolation=0.5,  # positions count in patches of the class-conditional model, half as large
)
TINY_T5 = T5Config(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    head_dim=16,
    max_distance=32,
)


def tokenizer(begin: str | None = None, end: str = "</s>") -> PreTrainedTokenizerFast:
    """One token per word, in lower case as PixArt reads captions.

    Args:
        begin: token in front of every text; None for none.
        end: token behind it. In a vocabulary with a beginning it is the last, as CLIP has it.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = " ".join((*glyphs.COLORS, *glyphs.PLACES, *glyphs.CLASSES, "a at the")).lower().split()
    first, last = (
        (["<pad>", end, "<unk>"], []) if begin is None else (["<pad>", "<unk>"], [begin, end])
    )
    vocabulary = [*first, *dict.fromkeys(words), *last]
    numbers = {word: number for number, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [each for each in (begin, end) if each is not None]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{begin or ''} $A {end}".strip(),
        special_tokens=[(each, numbers[each]) for each in ends],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token=begin,
        eos_token=end,
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a tokenizer with its class by the name that every version of transformers knows."""
    tokenizer.save_pretrained(path)
    described = path / "tokenizer_config.json"
    written = {
        **json.loads(described.read_text()),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(described, written)


def from_class_conditional(forward: Forward, params: Params) -> Params:
    """Start from the blocks of the bundled class-conditional model.

    Its blocks project time and class to their own shifts, scales and gates; here one projection is
    shared, the blocks' mean, and a table holds what each block adds to it at time 500 (as
    PixArt-alpha was made from DiT, arXiv 2310.00426, section 2.3). Cross-attention starts as zero.
    """
    dit, given = converters.from_pretrained(
        train_dit.WEIGHTS, subfolder="transformer", dtype="float32", progress=False
    )
    projections = [block["modulation"] for block in given["blocks"].values()]
    kernel, bias = (
        jnp.mean(jnp.stack([each[name] for each in projections]), axis=0)
        for name in ("kernel", "bias")
    )
    null = jnp.asarray([dit.config.num_classes], jnp.int32)
    module = dit.module(given)
    vector = nnx.silu(module.time(jnp.asarray([500.0])) + module.label(null))[0]
    blocks = {}
    for name, block in params["blocks"].items():
        source = given["blocks"][name]
        own = vector @ (source["modulation"]["kernel"] - kernel) + source["modulation"]["bias"]
        cross = {**block["cross"], "to_out": jax.tree.map(jnp.zeros_like, block["cross"]["to_out"])}
        blocks[name] = {
            "attn": source["attn"],
            "mlp": source["mlp"],
            "cross": cross,
            "scale_shift_table": (own - bias).reshape(6, -1),
        }
    time = {"embed": given["time"], "proj": {"kernel": kernel, "bias": bias}}
    return {**params, "blocks": blocks, "time": time}


def train(
    config: PixArtConfig,
    text: T5Config,
    *,
    steps: int,
    batch: int,
    seed: int,
    learning_rate: float,
    checkpoints: Path,
    warm: bool = True,
) -> tuple[tuple[Forward, Params], tuple[Forward, Params], dict]:
    """Train from the last checkpoint on; return the two models, averaged, and the log.

    Args:
        warm: start from the class-conditional model's blocks.
    """
    forward, params = functional(PixArt(config, rngs=nnx.Rngs(seed)))
    encoder, encoder_params = functional(T5Encoder(text, rngs=nnx.Rngs(seed + 1)))
    if warm:
        params = from_class_conditional(forward, params)
    reader = tokenizer()

    def tokens(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        read = reader(captions, padding="max_length", max_length=LENGTH, return_tensors="np")
        return read["input_ids"].astype(np.int32), read["attention_mask"].astype(bool)

    empty_ids, empty_mask = tokens([""])

    def batches(start: int) -> Iterator[PyTree]:
        for images, captions in glyphs.captioned_batches(seed, batch, start=start):
            yield (images, *tokens(captions))

    def loss(params: Params, batch: PyTree, key: jax.Array) -> jax.Array:
        images, ids, mask = batch

        def predict(mixed: jax.Array, times: jax.Array, dropped: jax.Array) -> jax.Array:
            seen = jnp.where(dropped[:, None], empty_ids, ids)
            seen_mask = jnp.where(dropped[:, None], empty_mask, mask)
            states, _ = encoder(params["text_encoder"], {}, seen, seen_mask)
            caption = PromptEmbeddings(states, seen_mask)
            return forward(params["transformer"], {}, mixed, times, caption)[0]

        return training.flow_matching(images, key, predict)

    trained = train_params(
        loss,
        {"transformer": params, "text_encoder": encoder_params},
        batches,
        steps=steps,
        key=jax.random.key(seed),
        transform=training.optimizer(steps, learning_rate),
        checkpoints=checkpoints,
    )
    average = trained.average
    return (
        (forward, average["transformer"]),
        (encoder, average["text_encoder"]),
        trained.log,
    )


def export(
    path: Path, transformer: tuple[Forward, Params], text_encoder: tuple[Forward, Params]
) -> None:
    """Write the models as a pipeline in the layouts of diffusers and transformers, bfloat16."""
    index = {
        "_class_name": "PixArtSigmaPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "PixArtTransformer2DModel"],
        "vae": [None, None],
    }
    with training.replacing(path) as new:
        for name, (forward, params) in {
            "transformer": transformer,
            "text_encoder": text_encoder,
        }.items():
            small = training.bfloat16(params)
            layout = {"transformer": "diffusers", "text_encoder": "transformers"}[name]
            converters.save_pretrained(forward, small, new / name, layout=layout, progress=False)
        save_tokenizer(tokenizer(), new / "tokenizer")
        write_json(new / "model_index.json", index)
        (new / "scheduler").mkdir()
        schedule = FlowMatchEuler(steps=20)
        write_json(new / "scheduler/scheduler_config.json", schedule.to_config())


def sample(
    pipe: TextToImagePipeline,
    things: glyphs.Things,
    *,
    steps: int,
    guidance: float,
    seed: int,
    chunk: int = 64,
) -> np.ndarray:
    """Images float32 [N, 32, 32, 3] of things, in one fused program of `chunk` at a time."""
    sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=guidance)
    program = jax.jit(sampler)
    captions, images = things.captions(), []
    for first in trange(0, len(captions), chunk, desc="sampling", leave=False):
        part = captions[first : first + chunk]
        padded = part + [""] * (chunk - len(part))
        keys = sample_keys(jax.random.key(seed), chunk, first=first)
        cond, uncond = pipe.conditions(padded)
        batch = program(
            pipe.forward,
            pipe.params,
            cond,
            keys,
            uncond=uncond if sampler.guided else None,
        )
        images.append(np.asarray(batch)[: len(part)])
    return np.concatenate(images)


def unseen(count: int, seed: int) -> tuple[np.ndarray, glyphs.Things]:
    """Real images of combinations that were not trained on, and what they show."""
    images, _, things = glyphs.captioned(np.random.default_rng([seed, 1]), count, held_out=True)
    return images, things


def evaluate(path: Path, *, images: int, steps: int, guidance: float, seed: int) -> dict[str, Any]:
    """Read back what images of unseen captions show, through the real conversion."""
    pipe = effjax.pipeline(path, dtype="float32", progress=False)
    real, things = unseen(images, seed)
    generated = sample(pipe, things, steps=steps, guidance=guidance, seed=seed)
    reader = judge.load()
    return {
        "images": images,
        "steps": steps,
        "guidance": guidance,
        "alignment": judge.alignment(reader, generated, things),
        "alignment_of_real_images": judge.alignment(reader, real, things),
    }


def passes(figures: dict[str, Any]) -> bool:
    """The gate: letters, colors and places of unseen captions are right."""
    aligned = figures["alignment"]
    return aligned["class"] >= 0.8 and aligned["color"] >= 0.95 and aligned["place"] >= 0.9


def main(argv: list[str] | None = None) -> int:
    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        transformer, text_encoder, log = train(TINY, TINY_T5, **training.given(arguments))
        export(arguments.output, transformer, text_encoder)
        return log

    return training.command(
        "experiments.train_pixart",
        argv,
        about=__doc__.splitlines()[0],
        output=WEIGHTS,
        steps=6000,
        options=training.judged_images(guidance=GUIDANCE),
        make=make,
        evaluate=training.judging(evaluate),
        passes=passes,
    )


if __name__ == "__main__":
    sys.exit(main())
