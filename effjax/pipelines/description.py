"""What a model, a pipeline or a saved one is, from its configurations and its files' headers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any

import converters
from converters.hub import Folder, open_folder
from effjax import recipe
from effjax.cost import weight_bytes
from effjax.forward import parameter_count
from effjax.pipelines import families
from effjax.pipelines.base import INDEX, SCHEDULER
from effjax.pipelines.loading import Components
from effjax.scanning import describe_runs, example_runs


def describe(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    **remote: Any,
) -> dict[str, Any]:
    """What a model or a pipeline is; files of a repository are fetched, but nothing is loaded.

    Args:
        source: directory, weight file or hub repository, also of what was saved compressed.
        subfolder: describe one model of a pipeline.
        variant: of the weights, where a component has it.
        remote: `revision`, `token`, `cache_dir`, `local_files_only` of `effjax.pipeline`.

    Returns:
        Of a model: model, layout (of a checkpoint) or methods (of a saved one), config, parameters,
        dtype, compute_dtype, weight_bytes, programs (of its blocks, see `effjax.scanning`). Of a
        pipeline: pipeline (its class in the table),
        becomes (its class here), components by name (None for one that is missing), beside (whether
        tokenizers and processors are there, by name), scheduler, methods, parameters, weight_bytes,
        and origin if it is known.

    Raises:
        ValueError: for what cannot be found or read.
    """
    try:
        folder = open_folder(source, **remote)
    except ValueError:  # a file here or in a repository, or nothing
        options = {"subfolder": subfolder, "variant": variant, **remote}
        return converters.describe(source, **options)
    if subfolder is not None or not folder.has(INDEX):
        return _model(folder, subfolder, variant)
    index = folder.read(INDEX)
    family = families.of_index(index, str(source))
    found = Components(family, folder, index, {}, variant, {})
    components: dict[str, Any] = {}
    models = family.loaded_models
    if variant is not None and not any(map(found.has_variant, models)):
        raise ValueError(f"no component of {source} has a variant {variant!r}")
    for name in models:
        if found.has(name):
            own = variant if found.has_variant(name) else None
            file = found.file(name)
            components[name] = (
                _model(folder, name, own)
                if file is None
                else converters.describe(file, **folder.remote)
            )
        elif name in index:
            components[name] = None
    beside = {
        name: found.has(name)
        for name, kind in family.kinds.items()
        if kind in ("tokenizer", "processor")
    }
    held = [each for each in components.values() if each is not None]
    methods = (method for each in held for method in each.get("methods", ()))
    figures = {
        "pipeline": family.name,
        "becomes": family.pipeline,
        "components": components,
        "beside": beside,
        "methods": list(dict.fromkeys(methods)),
        "parameters": sum(each["parameters"] for each in held),
        "weight_bytes": sum(each["weight_bytes"] for each in held),
    }
    if folder.has(SCHEDULER):
        figures["scheduler"] = folder.read(SCHEDULER)
    if "origin" in index:
        figures["origin"] = index["origin"]
    return figures


def _model(folder: Folder, subfolder: str | None, variant: str | None) -> dict[str, Any]:
    saved = folder.saved_model(subfolder, weights=False)
    if saved is None:
        options = {"subfolder": subfolder, "variant": variant, **folder.remote}
        return converters.describe(folder.source, **options)
    forward, params = recipe.describe(saved)
    return {
        "model": forward.model.__name__,
        "methods": [name for name, _ in forward.recipe],
        "config": dataclasses.asdict(forward.config),
        "parameters": parameter_count(params),
        "dtype": forward.config.param_dtype,
        "compute_dtype": forward.config.dtype,
        "weight_bytes": weight_bytes(params),
        "programs": describe_runs(example_runs(forward, params)),
    }


def lines(figures: Mapping[str, Any]) -> Iterator[str]:
    """Figures of `describe` for people."""
    if "pipeline" not in figures:
        yield f"{'model':>14}: {_sentence(figures)}"
        for key in ("layout", "config"):
            if key in figures:
                yield f"{key:>14}: {figures[key]}"
        yield from _programs(figures)
        return
    yield f"{'pipeline':>14}: {figures['pipeline']}, becomes {figures['becomes']}"
    for name, model in figures["components"].items():
        yield f"{name:>14}: {'none' if model is None else _sentence(model)}"
        yield from _programs(model or {})
    for name, there in figures["beside"].items():
        yield f"{name:>14}: {'there' if there else 'none'}"
    if "scheduler" in figures:
        yield f"{'scheduler':>14}: {figures['scheduler'].get('_class_name')}"
    yield f"{'methods':>14}: {', '.join(figures['methods']) or 'none'}"
    yield f"{'weight_bytes':>14}: {figures['weight_bytes']:,}"
    if "origin" in figures:
        known = figures["origin"]
        at = f" at {known['revision']}" if "revision" in known else ""
        yield f"{'made of':>14}: {known['model']}{at}"


def _programs(figures: Mapping[str, Any]) -> Iterator[str]:
    for number, line in enumerate(figures.get("programs", "").splitlines()):
        yield f"{'' if number else 'if scanned':>14}: {line}"


def _sentence(figures: Mapping[str, Any]) -> str:
    methods = figures.get("methods")
    stored = " as stored" if "layout" in figures else ""  # some layouts hold copies
    return (
        f"{figures['model']}, {figures['parameters']:,} parameters {figures['dtype']}, computes in "
        f"{figures['compute_dtype']}, {figures['weight_bytes']:,} bytes{stored}"
        + (f", methods {', '.join(methods)}" if methods else "")
    )
