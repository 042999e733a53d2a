"""`effjax demo`, `info`, `convert` and `methods`."""

from __future__ import annotations

import argparse
from typing import Any

Figures = tuple[Any, str]


def demo(arguments: argparse.Namespace) -> Figures:
    """The bundled demos."""
    if arguments.llm:
        from effjax.bundled import llm_demo

        rows = llm_demo.run(seed=arguments.seed)
        return rows, llm_demo.table(rows)

    from effjax.bundled import demo

    report = demo.run(
        arguments.output,
        steps=arguments.steps,
        images=arguments.images,
        speed=arguments.speed,
        seed=arguments.seed,
    )
    return report, f"{demo.table(report)}\nimages, steps and report: {arguments.output}/"


def info(arguments: argparse.Namespace) -> Figures:
    """What a checkpoint, pipeline or saved model is."""
    from effjax.pipelines.description import describe, lines

    figures = describe(
        arguments.source,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
        revision=arguments.revision,
    )
    return figures, "\n".join(lines(figures))


def convert(arguments: argparse.Namespace) -> Figures:
    """Rewrite a checkpoint in the layout of diffusers or transformers."""
    import converters
    from converters.__main__ import lines

    figures = converters.convert(
        arguments.source,
        arguments.destination,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
        revision=arguments.revision,
        dtype=arguments.dtype,
        check_finite=arguments.check_finite,
    )
    return figures, "\n".join(lines(figures))


def methods(arguments: argparse.Namespace) -> Figures:
    """All methods, or one with its options and an example."""
    from effjax.cli import declarations
    from effjax.registry import method, methods

    if arguments.name is not None:
        chosen = method(arguments.name)
        return declarations.figures(chosen), declarations.text(chosen)
    found = {name: declarations.summary(each) for name, each in methods().items()}
    lines = [f"{name:20} {row['domain']:16} {row['paper']}" for name, row in found.items()]
    return found, "\n".join([*lines, "`effjax methods NAME` says more of one"])
