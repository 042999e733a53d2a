"""Train the bundled tiny language model, with its tokenizer.

    python -m experiments.train_llm --checkpoints DIR --steps 3900

The model that ships in `effjax/bundled/weights/llama_texts`: a Llama of 4 layers and 32 heads on
`effjax.bundled.texts`, at 128, then 512, then 1024 tokens. Checkpoints are orbax; a second run
resumes.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

import converters
import effjax
from effjax import bundled, generate
from effjax.bundled import texts
from effjax.forward import Forward, Params, abstract, flatten_params, nest_params
from effjax.models.llama import Llama, LlamaConfig
from effjax.storage import write_json
from effjax.testing import random_params
from effjax.training import train as train_params
from experiments import training

WEIGHTS = bundled.WEIGHTS / "llama_texts"

TINY = LlamaConfig(
    vocab_size=1536,
    hidden_size=128,
    intermediate_size=320,
    num_layers=4,
    num_heads=8,
    num_kv_heads=8,
    head_dim=32,
    max_positions=1024,
    rope_theta=1e6,
    tied=True,
)

# (share of the steps, tokens of a text, texts of a batch): what is far back is learned near first.
CURRICULUM = ((0.46, 32, 64), (0.13, 64, 32), (0.13, 128, 16), (0.15, 512, 8), (0.13, 1024, 4))

START, END, TURN = "<|start|>", "<|end|>", "<|turn|>"


def make_tokenizer() -> Any:
    """A byte-level BPE whose vocabulary holds the words of the tasks; digits stand alone."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY.vocab_size,
        special_tokens=[START, END, TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Each word as often as a frequent word of the library.
    words = [f" {word}" for word in texts.WORDS] * 4000
    verbs = ["put", "get", "copy", "paste"] * 4000
    tokenizer.train_from_iterator([texts.library()[:3_000_000], *words, *verbs], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=[TURN],
        model_max_length=TINY.max_positions,
        clean_up_tokenization_spaces=False,
    )


def stage(step: int, steps: int) -> tuple[int, int]:
    """Tokens of a text and texts of a batch at a training step."""
    done = 0.0
    for share, length, rows in CURRICULUM:
        done += share
        if step < round(done * steps):
            return length, rows
    return CURRICULUM[-1][1:]


def batches(world: texts.World, *, seed: int, steps: int, start: int) -> Iterator[Any]:
    """Batches from a step on; each is a function of the seed and its number."""
    for step in range(start, steps):
        rng, (length, rows) = np.random.default_rng((seed, step)), stage(step, steps)
        yield texts.batch([world.mixture(rng, length) for _ in range(rows)])


def initial(shapes: Params, *, seed: int) -> Params:
    """Where training starts.

    Embeddings are small and share a direction, so that heads can look for a place whatever token
    stands there, without biases; outputs of branches are small, so that a block begins near the
    identity.
    """
    params = flatten_params(random_params(shapes, seed=seed))
    for path, leaf in params.items():
        if path.endswith("scale"):
            params[path] = jnp.ones_like(leaf)
        elif path == "embed_tokens":
            common = np.random.default_rng(seed).standard_normal((1, leaf.shape[1]))
            params[path] = 0.1 * (leaf * leaf.shape[0] ** 0.5 + common.astype(leaf.dtype))
        else:
            params[path] = leaf * (0.2 if re.search("to_out|down", path) else 0.6)
    return nest_params(params)


def loss(
    forward: Forward, params: Params, tokens: Int[Array, "B S"], weights: Float[Array, "B S"]
) -> Float[Array, ""]:
    """Weighted mean of the negative log-likelihoods of the tokens, in nats."""
    logits, _ = forward(params, {}, tokens[:, :-1])
    scores = jax.nn.log_softmax(logits.astype(jnp.float32))
    scores = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(scores * weights[:, 1:]) / jnp.sum(weights[:, 1:])


def train(
    config: LlamaConfig,
    tokenizer: Any,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    checkpoints: Path,
) -> tuple[Forward, Params, dict[str, Any]]:
    """Train from the last checkpoint on; return averaged parameters and the log."""
    forward, shapes = abstract(Llama, config)
    world = texts.World.of(tokenizer)

    def weighted(params: Params, batch: Any, key: Key[Array, ""]) -> Float[Array, ""]:
        return loss(forward, params, *batch)

    trained = train_params(
        weighted,
        initial(shapes, seed=seed),
        lambda start: batches(world, seed=seed, steps=steps, start=start),
        steps=steps,
        key=jax.random.key(seed),
        transform=training.optimizer(steps, learning_rate, hold=0.5),
        checkpoints=checkpoints,
    )
    return forward, trained.average, trained.log


def export(path: Path, forward: Forward, params: Params, tokenizer: Any) -> None:
    """Write the model as transformers keeps it, bfloat16."""
    with training.replacing(path) as new:
        small = training.bfloat16(params)
        converters.save_pretrained(forward, small, new / "model", progress=False)
        for file in (new / "model").iterdir():
            file.rename(new / file.name)
        (new / "model").rmdir()
        tokenizer.save_pretrained(new)
        write_json(new / "generation_config.json", {"eos_token_id": tokenizer.eos_token_id})


def accuracy(
    forward: Forward, params: Params, documents: Sequence[texts.Document], *, rows: int = 8
) -> float:
    """Share of the answers in documents of one length that are the most likely tokens."""
    right = []
    for start in range(0, len(documents), rows):
        some = documents[start : start + rows]
        tokens, answers = (np.stack([each[i] for each in some]) for i in (0, 2))
        likely = _likely(forward, params, tokens, answers - 1)
        right.append(likely == np.take_along_axis(tokens, answers, axis=1))
    return float(np.mean(np.concatenate(right)))


@jax.jit
def _likely(forward: Forward, params: Params, tokens: Array, places: Array) -> Array:
    return jnp.argmax(forward(params, {}, tokens, None, places)[0], axis=-1)


LENGTHS = (128, 256, 512, 1024)


def evaluate(path: Path, *, retrievals: int, seed: int) -> dict[str, Any]:
    """What the exported model can do, by length, on documents of another seed and held-out text."""
    pipe = effjax.pipeline(path, compute_dtype="float32", progress=False)
    world = texts.World.of(pipe.tokenizer, held_out=True)
    figures: dict[str, Any] = {"retrievals": retrievals, "seed": seed}
    questions = 8
    for length in LENGTHS:
        rng = np.random.default_rng((seed, length))
        many = range(retrievals // questions)
        made = {
            "lookup": [world.lookup(rng, length, questions=questions) for _ in many],
            "passkey": [world.passkey(rng, length) for _ in many],
        }
        for task, documents in made.items():
            figures[f"{task} {length}"] = accuracy(pipe.forward, pipe.params, documents)
        passages = [world.passage(rng, length).tokens for _ in range(16)]
        scores = generate.score(pipe.forward, pipe.params, passages)
        figures[f"perplexity {length}"] = generate.perplexity(scores)
    return figures


def passes(figures: dict[str, Any]) -> bool:
    """Whether retrieval works at the lengths of the training."""
    lookups = [figures[f"lookup {length}"] for length in LENGTHS]
    return min(lookups) >= 0.95


def main(argv: list[str] | None = None) -> int:
    def make(arguments: argparse.Namespace) -> dict[str, Any]:
        tokenizer = make_tokenizer()
        forward, params, log = train(
            TINY,
            tokenizer,
            steps=arguments.steps,
            seed=arguments.seed,
            learning_rate=arguments.learning_rate,
            checkpoints=arguments.checkpoints,
        )
        export(arguments.output, forward, params, tokenizer)
        return log

    def judge(arguments: argparse.Namespace) -> dict[str, Any]:
        return evaluate(arguments.output, retrievals=arguments.retrievals, seed=arguments.seed + 1)

    return training.command(
        "experiments.train_llm",
        argv,
        about=__doc__.splitlines()[0],
        output=WEIGHTS,
        steps=3900,
        options={"retrievals": (512, "questions for each length")},
        make=make,
        evaluate=judge,
        passes=passes,
    )


if __name__ == "__main__":
    sys.exit(main())
