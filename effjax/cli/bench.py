"""`effjax bench`: a compressed pipeline and what it was made of, side by side."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from converters.hub import open_folder
from effjax.autoregression import Collaborative, FewStep, NextScale
from effjax.bundled.retrieval import right
from effjax.cli.data import passages, questions, world
from effjax.cli.running import asked, decoder, load, settings
from effjax.cost import memory_of, sampler_cost, state_bytes, weight_bytes
from effjax.generate import Reading, generate, perplexity, prefill, score
from effjax.metrics import psnr
from effjax.pipelines import NextScalePipeline, TextPipeline
from effjax.pipelines.base import BasePipeline
from effjax.pipelines.reference import Reference, reference
from effjax.pipelines.summary import Watch, summarize
from effjax.scanning import describe_runs, example_runs
from effjax.transform import Pair

Figures = tuple[dict[str, Any], str]


def run(arguments: argparse.Namespace) -> Figures:
    """Compare a compressed pipeline with its dense model.

    Raises:
        ValueError: for a pipeline that is not compressed.
    """
    pipe = load(arguments)
    refined = isinstance(pipe, NextScalePipeline) and pipe.refiner is not None
    if not (pipe.forward.recipe or refined):
        raise ValueError(
            f"{arguments.source} is not compressed, there is nothing to compare. Make a compressed "
            f"model with `effjax search`, `effjax apply` or `effjax fit`."
        )
    compared = reference(pipe, arguments.reference)
    if isinstance(pipe, TextPipeline):
        return texts(pipe, compared, arguments)
    some = asked(pipe, arguments, default=1, texts=[""])[:1]
    return images(pipe, compared, some, settings(pipe, arguments), arguments)


def images(
    pipe: Any,
    reference: Reference,
    wanted: Sequence[str],
    options: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> Figures:
    """Alternate the two programs, so that what else the machine does hits both.

    Args:
        pipe: the compressed pipeline.
        reference: what it is compared with.
        wanted: one label or prompt.
        options: of its sampler.
        arguments: source, batch, repeats and seed.
    """
    sampler: Any = pipe.sampler(**options)
    cond, null = pipe.conditions(list(wanted) * arguments.batch)
    key = jax.random.key(arguments.seed)
    pairs: dict[str, Pair] = {
        reference.kind: reference.pair,
        "compressed": (pipe.forward, pipe.params),
    }
    # What it was made of may be another kind of model, which is sampled in another way.
    dense = pipe.with_model(*reference.pair)
    alone = sampler.alone if type(dense) is type(pipe) else dense.sampler()
    loops = {reference.kind: alone, "compressed": sampler}
    unconds = {name: null if loop.guided else None for name, loop in loops.items()}
    given: dict[str, tuple] = dict(pairs)
    # The models that a loop holds are arguments: their weights are no part of the program.
    holds = isinstance(sampler, NextScale | FewStep)
    if holds:
        given = {name: (jax.tree.leaves(loop), *pairs[name]) for name, loop in loops.items()}
    figures: dict[str, Any] = {}
    programs = {}
    for name, pair in pairs.items():
        loop, uncond, began = loops[name], unconds[name], time.perf_counter()
        run = jax.jit(partial(_sampled, jax.tree.structure(loop)) if holds else loop)
        programs[name] = run.lower(*given[name], cond, key, uncond=uncond).compile()
        compiled = time.perf_counter() - began
        cost = sampler_cost(loop, *pair, cond, uncond=uncond)
        models = [pair, loop.refiner] if isinstance(loop, Collaborative) else [pair]
        figures[name] = {
            "compile_seconds": compiled,
            "block_programs": sum(len(example_runs(*model)) for model in models),
            "weight_bytes": sum(weight_bytes(model[1]) for model in models),
            "peak_bytes": memory_of(programs[name])["peak_bytes"],
            "flops": cost.flops,
            "attention_flops": cost.scope("attention").flops,
            "seconds": float("inf"),
        }
    samples = {}
    for _ in range(arguments.repeats + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            made = program(*given[name], cond, key, uncond=unconds[name])
            samples[name] = jax.block_until_ready(made)
            seconds = time.perf_counter() - began
            figures[name]["seconds"] = min(figures[name]["seconds"], seconds)
    distance = float(psnr(*(pipe.decode(samples[name]) for name in pairs)))
    figures[f"psnr_to_{reference.kind}"] = distance
    folder = open_folder(arguments.source, revision=arguments.revision)
    saved = folder.saved_model(pipe.family.model, weights=False)
    files = [] if saved is None else [file for file in saved.iterdir() if file.is_file()]
    figures["disk_bytes"] = sum(file.stat().st_size for file in files)
    lines = side_by_side(figures, reference)
    lines.append(f"{'disk_bytes':26}{'':14}{figures['disk_bytes']:>14.4g}")
    lines += block_programs(pipe)
    if pipe.forward.patches:
        watch = Watch()
        options = {"uncond": unconds["compressed"], "progress": False, "watch": watch}
        sampler.stepwise(*pairs["compressed"], cond, key, **options)
        said = summarize(watch, *pairs["compressed"])
        figures |= {"skipped": said.skipped, "cache_bytes": said.cache_bytes}
        lines += str(said).splitlines()
    lines.append(f"PSNR of its images to those of {reference.sentence()}: {distance:.1f} dB")
    return figures, "\n".join(lines)


def _sampled(loop: Any, leaves: Sequence[jax.Array], *inputs: Any, uncond: Any) -> Any:
    return jax.tree.unflatten(loop, leaves)(*inputs, uncond=uncond)


def texts(pipe: TextPipeline, reference: Reference, arguments: argparse.Namespace) -> Figures:
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
            "block_programs": len(example_runs(*pair)),
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
            generate(*pair, prefix=prefix, max_new_tokens=new, decoder=decoder(arguments))
            done = time.perf_counter()
            if round_:
                speeds = {
                    "prefill_tokens_per_second": prompts.size / (read - began),
                    "decode_tokens_per_second": len(prompts) * new / (done - read),
                }
                own = figures[name]
                own.update({key: max(own[key], value) for key, value in speeds.items()})
    return figures, "\n".join([*side_by_side(figures, reference), *block_programs(pipe)])


def block_programs(pipe: BasePipeline) -> list[str]:
    """How many programs the compressed blocks need if equal ones are scanned, and why."""
    said = describe_runs(example_runs(pipe.forward, pipe.params))
    return [f"if blocks are scanned: {said}"] if said else []


def _kv_bytes(pair: Pair, length: int, new: int) -> int:
    """Of the cache of one text."""
    tokens = jnp.zeros((1, length + new), jnp.int32)
    return state_bytes(Reading(length, new).init(*pair, tokens).state)


def _perplexity(pair: Pair, tokens: np.ndarray) -> float:
    """Of the last quarter of texts, which goes through the cache."""
    context = tokens.shape[1] * 3 // 4
    return perplexity(score(*pair, tokens, context=context)[:, context:])


def side_by_side(figures: dict[str, Any], reference: Reference) -> list[str]:
    """Add the ratios and what was compared with to the figures; return the table of both."""
    kind = reference.kind
    first, second = figures[kind], figures["compressed"]
    ratios = {name: second[name] / first[name] if first[name] else math.nan for name in first}
    figures["ratio"] = ratios
    figures["reference"] = {
        "kind": kind,
        "model": reference.model,
        **({"reason": reference.reason} if reference.reason else {}),
    }
    against = [] if kind == "dense" else [f"against {reference.sentence()}"]
    return [
        *against,
        f"{'':26}{kind:>14}{'compressed':>14}{'ratio':>9}",
        *(
            f"{name:26}{first[name]:>14.4g}{second[name]:>14.4g}{ratios[name]:>9.3f}"
            for name in first
        ),
    ]
