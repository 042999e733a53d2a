"""`effjax compile`: the programs of a pipeline's calls, compiled ahead of time beside it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import executables
from effjax.generate import generate
from effjax.pipelines import Pipeline, TextPipeline

Figures = tuple[dict[str, Any], str]


def device(name: str) -> jax.sharding.Sharding | None:
    """The chip to compile for; None for this machine's first device.

    Raises:
        ValueError: if libtpu, which compiles for TPUs, is not installed.
    """
    if name == "host":
        return None
    if find_spec("libtpu") is None:
        raise ValueError(f"compiling for {name} needs libtpu: pip install 'effjax[tpu]'")
    from effjax.chips import chip

    return chip(name)


def compile_(
    pipe: Pipeline | TextPipeline, settings: Mapping[str, Any], arguments: argparse.Namespace
) -> Figures:
    """Go through the calls of a pipeline without computing them; compile what they run.

    Args:
        pipe: what to compile.
        settings: of a sampler, for pipelines of images.
        arguments: source, chip, batch, tokens, new, drawn.
    """
    place, key = device(arguments.chip), jax.random.key(0)
    with executables.record() as calls:
        if isinstance(pipe, TextPipeline):
            for length in arguments.tokens:
                generate(
                    pipe.forward,
                    pipe.params,
                    np.zeros((arguments.batch, length), np.int32),
                    max_new_tokens=arguments.new,
                    eos=pipe.ends,
                    key=key if arguments.drawn else None,
                    **pipe.sampling({}, drawn=arguments.drawn),
                )
        else:
            asked = [0 if hasattr(pipe, "names") else ""] * arguments.batch
            run: Any = pipe
            run(asked, key=key, progress=False, **settings)
    folder = executables.save(Path(arguments.source), calls, place)
    files = {path.name: path.stat().st_size for path in folder.glob("*.xla")}
    figures = {
        "folder": str(folder),
        "chip": arguments.chip,
        "programs": [call.program.name for call in calls],
        "bytes": sum(files.values()),
    }
    return figures, (
        f"{len(files)} programs, {figures['bytes']:,} bytes: {', '.join(figures['programs'])}\n"
        f"saved {folder}"
    )
