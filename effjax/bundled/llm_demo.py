"""The demo on the bundled tiny language model: converted, compressed, asked what it was told."""

from __future__ import annotations

import sys
from typing import Any

import jax.numpy as jnp
import numpy as np

import effjax
from effjax.bundled import WEIGHTS, texts
from effjax.bundled.retrieval import right
from effjax.cost import state_bytes, weight_bytes
from effjax.generate import Reading
from effjax.methods import cskv, round_to_nearest, snap_kv
from effjax.pipelines import TextPipeline

Rows = list[dict[str, Any]]

MODEL = WEIGHTS / "llama_texts"
LENGTH = 256  # tokens of a text with its questions


def run(*, seed: int = 0, documents: int = 16, length: int = LENGTH) -> Rows:
    """Load the checkpoint, compress it in several ways, and ask each model the same questions."""
    pipe = effjax.pipeline(MODEL, compute_dtype="float32", progress=False)
    world = texts.World.of(pipe.tokenizer, held_out=True, characters=200_000)
    rng = np.random.default_rng(seed)
    asked = [world.lookup(rng, length, questions=8) for _ in range(documents)]
    eight = round_to_nearest.transform(round_to_nearest.uniform(8, 8))
    low = cskv.CSKVPlan(0.15, 0.25)
    calibration = [np.stack([world.passage(rng, length).tokens for _ in range(4)])]
    magnitudes = cskv.magnitudes(pipe.forward, pipe.params, calibration)
    factors = cskv.factors(low, pipe.forward, pipe.params, magnitudes)
    models = {
        "as it is": pipe,
        "half of the prompt (snap_kv)": pipe.transform(
            snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, window=16))
        ),
        "a fifth of the channels (cskv)": pipe.transform(cskv.transform(low, factors)),
        "the same, and weights of 8 bits": pipe.transform(cskv.transform(low, factors), eight),
    }
    rows = []
    for name, model in models.items():
        pair = model.forward, model.params
        token = jnp.zeros((1, 1), jnp.int32)
        forward = Reading(asked[0].context, length - asked[0].context).ready(model.forward)
        weights = {key: leaf for key, leaf in model.params.items() if key != "methods"}
        rows.append(
            {
                "model": name,
                "weight_bytes": weight_bytes(weights),
                "cache_bytes": state_bytes(forward.init(model.params, token, token)),
                "answers_right_%": 100 * float(right(pair, asked).mean()),
                "says": answer(model, asked[0]),
            }
        )
        print(f"{len(rows)} of {len(models)}: {name}", file=sys.stderr)
    return rows


def answer(model: TextPipeline, document: texts.Document) -> str:
    """What the model says when its context is read once and then asked one question."""
    told, question = (
        model.tokenizer.decode(document.tokens[part])
        for part in (slice(0, document.context), slice(document.context, document.context + 2))
    )
    context = model.prefill(told, new=8)
    return f"{question} ->{model(question, prefix=context, max_new_tokens=1)}"


def table(rows: Rows) -> str:
    """Rows for a terminal."""
    dense: dict[str, Any] = rows[0]
    lines = [f"{'':34}{'weights':>12}{'cache':>12}{'right':>9}   says"]
    for row in rows:
        shares = (row[name] / dense[name] for name in ("weight_bytes", "cache_bytes"))
        lines.append(
            f"{row['model']:34}"
            + "".join(f"{share:>12.2f}" for share in shares)
            + f"{row['answers_right_%']:>8.1f}%   {row['says']}"
        )
    return "\n".join([*lines, "weights and cache: bytes, as shares of the first model's"])
