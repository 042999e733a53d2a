"""`effjax bench` on pipelines of images, and what it shares with language models."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from converters.hub import open_folder
from effjax.cost import memory_of, sampler_cost, weight_bytes
from effjax.metrics import psnr
from effjax.pipelines import ClassConditionalPipeline, TextToImagePipeline
from effjax.pipelines.reference import Reference

Figures = tuple[dict[str, Any], str]


def bench(
    pipe: ClassConditionalPipeline | TextToImagePipeline,
    reference: Reference,
    asked: Sequence[str],
    settings: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> Figures:
    """Alternate the two programs, so that what else the machine does hits both.

    Args:
        pipe: the compressed pipeline.
        reference: what it is compared with.
        asked: one label or prompt.
        settings: of its sampler.
        arguments: source, batch, repeats and seed.
    """
    sampler = pipe.sampler(**settings)
    cond, uncond = pipe.conditions(list(asked) * arguments.batch)
    uncond = uncond if sampler.guided else None
    key = jax.random.key(arguments.seed)
    pairs = {reference.kind: reference.pair, "compressed": (pipe.forward, pipe.params)}
    figures: dict[str, Any] = {}
    programs = {}
    for name, pair in pairs.items():
        began = time.perf_counter()
        programs[name] = jax.jit(sampler).lower(*pair, cond, key, uncond=uncond).compile()
        compiled = time.perf_counter() - began
        cost = sampler_cost(sampler, *pair, cond, uncond=uncond)
        figures[name] = {
            "compile_seconds": compiled,
            "weight_bytes": weight_bytes(pair[1]),
            "peak_bytes": memory_of(programs[name])["peak_bytes"],
            "flops": cost.flops,
            "attention_flops": cost.scope("attention").flops,
            "seconds": float("inf"),
        }
    samples = {}
    for _ in range(arguments.repeats + 1):
        for name, program in programs.items():
            began = time.perf_counter()
            samples[name] = jax.block_until_ready(program(*pairs[name], cond, key, uncond=uncond))
            seconds = time.perf_counter() - began
            figures[name]["seconds"] = min(figures[name]["seconds"], seconds)
    images = (pipe.decode(samples[name]) for name in pairs)
    distance = float(psnr(*images))
    figures[f"psnr_to_{reference.kind}"] = distance
    folder = open_folder(arguments.source, revision=arguments.revision)
    saved = folder.saved_model("transformer", weights=False)
    files = [] if saved is None else [file for file in saved.iterdir() if file.is_file()]
    figures["disk_bytes"] = sum(file.stat().st_size for file in files)
    lines = side_by_side(figures, reference)
    lines.append(f"{'disk_bytes':26}{'':14}{figures['disk_bytes']:>14.4g}")
    lines.append(f"PSNR of its images to those of {reference.sentence()}: {distance:.1f} dB")
    return figures, "\n".join(lines)


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
