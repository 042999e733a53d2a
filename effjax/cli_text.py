"""The commands of `effjax` on language models: search, quantize, compress and bench.

Texts to calibrate and judge on come from a file, or else from `effjax.bundled.texts`: Python's own
library, and questions about pass keys (or, where the tokenizer has a token for every word, lookups)
that were told long before.
"""

from __future__ import annotations

import argparse
import collections
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.bundled import texts
from effjax.bundled.retrieval import right
from effjax.cli import told_if_lost
from effjax.cli_bench import side_by_side
from effjax.cost import state_bytes, weight_bytes
from effjax.fields import naming
from effjax.generate import Reading, generate, perplexity, prefill, score, text_bytes
from effjax.models.llama import Llama
from effjax.pipelines import TextPipeline
from effjax.pipelines.reference import Reference
from effjax.transform import Method, Pair, Plan

Figures = tuple[dict[str, Any], str]


def world(
    pipe: TextPipeline, file: Path | None, length: int, *, held_out: bool = False
) -> texts.World:
    """What texts of a length are cut from: a file, or the library's part that is (not) held out.

    Raises:
        ValueError: for a file that is shorter than a text, or holds something else.
    """
    if file is None:
        return texts.World.of(pipe.tokenizer, held_out=held_out)
    with naming(file):
        text = file.read_text(encoding="utf-8")
    found = texts.World(pipe.tokenizer, texts.encode(pipe.tokenizer, text))
    if len(found.text) <= length:
        raise ValueError(
            f"{file} has {len(found.text)} tokens, texts of {length} cannot be cut from it; give a "
            f"longer file, or shorter texts"
        )
    return found


def passages(source: texts.World, length: int, count: int, *, seed: int) -> np.ndarray:
    """Texts int32[count, length]."""
    rng = np.random.default_rng((seed, length))
    return np.stack([source.passage(rng, length).tokens for _ in range(count)])


def questions(source: texts.World, length: int, count: int, *, seed: int) -> list[texts.Document]:
    """Texts whose answers stand far back."""
    rng = np.random.default_rng((seed, length))
    make = source.lookup if source.has_words else source.passkey
    options: dict[str, Any] = {"questions": 8} if source.has_words else {}
    return [make(rng, length, **options) for _ in range(count)]


def search(pipe: TextPipeline, method: Method, arguments: argparse.Namespace) -> Figures:
    """Search spans on answers that stand far back; save the pipeline with them."""
    from effjax.methods import moa

    if method.name != moa.METHOD.name:
        raise ValueError(f"{method.name} is not searched on language models; moa is")
    lengths = arguments.lengths
    if len(lengths) < 2:
        raise ValueError(f"give two lengths or more, the last one to validate; got {lengths}")
    block = 64 if min(lengths) >= 2048 else 16
    if wrong := [length for length in lengths if length % block]:
        raise ValueError(f"lengths must be multiples of {block} tokens, got {wrong}")
    source, count = world(pipe, arguments.texts, lengths[-1]), arguments.samples

    def samples(length: int, seed: int) -> moa.Samples:
        rng, asked = np.random.default_rng(seed), questions(source, length, count, seed=seed)
        found = [source.filled(rng, document, length) for document in asked]
        weights = np.zeros((len(found), length), np.float32)
        for row, document in zip(weights, found, strict=True):
            row[document.answers] = 1
        return np.stack([document.tokens for document in found]), weights

    profiled, validated = lengths[:-1], lengths[-1]
    plan = moa.search(
        pipe.forward,
        pipe.params,
        {length: samples(length, 1) for length in profiled},
        validation=samples(validated, 2),
        density=arguments.density,
        extend=[validated],
        rules=moa.rule_grid(profiled, [validated], step=max(min(profiled) // 4, block)),
        block=block,
        sink=block,
        floor=2 * block,
    )
    with told_if_lost(plan):
        return _saved(pipe, method, plan, (), arguments.destination, tokens=validated)


def quantize(
    pipe: TextPipeline, method: Method, plan: Plan, arguments: argparse.Namespace
) -> Figures:
    """Quantize weights, calibrated on texts."""
    learned = ()
    if method.calibrate is not None:
        source = world(pipe, arguments.texts, arguments.tokens)
        tokens = passages(source, arguments.tokens, arguments.samples, seed=arguments.seed)
        pair = pipe.forward, pipe.params
        made = method.calibrate(plan, *pair, None, jnp.asarray(tokens), key=None, uncond=None)
        learned = (made,)
    return _saved(pipe, method, plan, learned, arguments.destination, tokens=arguments.tokens)


def compress(pipe: TextPipeline, method: Method, arguments: argparse.Namespace) -> Figures:
    """Give a model a smaller cache, trained if the method trains."""
    if not issubclass(method.tiny().forward.model, Llama) or "patches" not in method.seams:
        raise ValueError(f"{method.name} is no cache of a language model; see `effjax methods`")
    plan = method.plan.from_dict(_settings(arguments.set))
    learned = ()
    if method.calibrate is not None:
        learned = (_trained(pipe, plan, arguments),)
    return _saved(pipe, method, plan, learned, arguments.destination, tokens=arguments.tokens)


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """Fields of a plan, each given once."""
    pairs = [_setting(word) for word in words]
    counts = collections.Counter(name for name, _ in pairs)
    if several := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"--set gives {', '.join(several)} more than once")
    return dict(pairs)


def _setting(word: str) -> tuple[str, Any]:
    """NAME=VALUE; a value that is no JSON is a text."""
    name, equals, value = word.partition("=")
    if not name or not equals:
        raise ValueError(f"--set takes NAME=VALUE, such as ratio=0.5; got {word!r}")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def _trained(pipe: TextPipeline, plan: Any, arguments: argparse.Namespace) -> Any:
    from effjax.methods import cskv

    source = world(pipe, arguments.texts, arguments.tokens)
    pair = pipe.forward, pipe.params

    def batches(start: int) -> Any:
        step = start
        while True:
            yield passages(source, arguments.tokens, 4, seed=step)
            step += 1

    calibration = [passages(source, arguments.tokens, arguments.samples, seed=1 << 30)]
    start = cskv.factors(plan, *pair, cskv.magnitudes(*pair, calibration))
    if arguments.steps == 0:
        return start
    return cskv.fit(
        plan,
        *pair,
        start,
        batches,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        checkpoints=arguments.checkpoints,
    )[0]


def _saved(
    pipe: TextPipeline,
    method: Method,
    plan: Plan,
    learned: tuple,
    destination: Path,
    *,
    tokens: int,
) -> Figures:
    """Save the compressed pipeline, and say what it and the caches of a text of `tokens` take."""
    small = pipe.transform(method.transform(plan, *learned))
    tokens = min(tokens, pipe.forward.config.max_positions)
    dense, held = (text_bytes(each.forward, each.params, tokens) for each in (pipe, small))
    small.save(destination)
    before, after = weight_bytes(pipe.params), weight_bytes(small.params)
    figures = {
        "destination": str(destination),
        "plan": plan.to_dict(),
        "weight_bytes": after,
        "weight_bytes_before": before,
        "cache_tokens": tokens,
        "cache_bytes": held._asdict(),
        "cache_bytes_before": dense._asdict(),
    }
    return figures, (
        f"{plan.describe()}\n{before:,} bytes of weights are {after:,} now\n"
        f"{dense.allocated:,} bytes of the cache of a text of {tokens} tokens are "
        f"{held.allocated:,} now, {held.useful:,} of them used\nsaved {destination}"
    )


def bench(pipe: TextPipeline, reference: Reference, arguments: argparse.Namespace) -> Figures:
    """The compressed model and what it is compared with take turns."""
    length, new = arguments.tokens, arguments.new
    source = world(pipe, arguments.texts, length, held_out=True)
    pairs: dict[str, Pair] = {
        reference.kind: reference.pair,
        "compressed": (pipe.forward, pipe.params),
    }
    prompts = passages(source, length, arguments.batch, seed=arguments.seed)
    asked = questions(source, length, arguments.batch, seed=arguments.seed)
    figures: dict[str, Any] = {
        name: {
            "weight_bytes": weight_bytes(pair[1]),
            "kv_bytes": _kv_bytes(pair, length, new),
            "perplexity": _perplexity(pair, prompts),
            "answers_right": float(right(pair, asked).mean()),
            "prefill_tokens_per_second": 0.0,
            "decode_tokens_per_second": 0.0,
        }
        for name, pair in pairs.items()
    }
    for round_ in range(arguments.repeats + 1):  # the first one compiles
        for name, pair in pairs.items():
            began = time.perf_counter()
            prefix = prefill(*pair, prompts, new=new, buckets=None)
            jax.block_until_ready(prefix)
            read = time.perf_counter()
            generate(*pair, prefix=prefix, max_new_tokens=new)
            done = time.perf_counter()
            if round_:
                speeds = {
                    "prefill_tokens_per_second": prompts.size / (read - began),
                    "decode_tokens_per_second": len(prompts) * new / (done - read),
                }
                own = figures[name]
                own.update({key: max(own[key], value) for key, value in speeds.items()})
    return figures, "\n".join(side_by_side(figures, reference))


def _kv_bytes(pair: Pair, length: int, new: int) -> int:
    """Of the cache of one text."""
    tokens = jnp.zeros((1, length + new), jnp.int32)
    return state_bytes(Reading(length, new).init(*pair, tokens).state)


def _perplexity(pair: Pair, tokens: np.ndarray) -> float:
    """Of the last quarter of texts, which goes through the cache."""
    context = tokens.shape[1] * 3 // 4
    return perplexity(score(*pair, tokens, context=context)[:, context:])
