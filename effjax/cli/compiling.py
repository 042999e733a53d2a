"""`effjax compile`: the programs of a pipeline's calls, compiled ahead of time beside it."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import executables
from effjax.cli.running import decoder, load, settings
from effjax.generate import generate
from effjax.pipelines import TextPipeline

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


def run(arguments: argparse.Namespace) -> Figures:
    """Go through the calls of a pipeline without computing them; compile what they run.

    Raises:
        ValueError: if the pipeline is no directory.
    """
    if not Path(os.path.expanduser(arguments.source)).is_dir():
        raise ValueError(f"{arguments.source} is no directory, in which programs could be saved")
    if arguments.chip != "host":
        from effjax import chips  # noqa: F401  before JAX starts
    pipe = load(arguments)
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
                    decoder=decoder(arguments),
                    **pipe.sampling({}, drawn=arguments.drawn),
                )
        else:
            asked = [0 if hasattr(pipe, "names") else ""] * arguments.batch
            pipe(asked, key=key, progress=False, **settings(pipe, arguments))
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
