"""The table of pipeline classes: one file for each family, with its entries as `FAMILIES`."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from effjax.pipelines.family import TEXT, PipelineFamily


@functools.cache
def table() -> Mapping[str, PipelineFamily]:
    """Every entry of the modules of this folder, by the name of its class."""
    found: dict[str, PipelineFamily] = {}
    for module in pkgutil.iter_modules(__path__, f"{__name__}."):
        for family in importlib.import_module(module.name).FAMILIES:
            if family.name in found:
                raise ValueError(f"two entries are named {family.name!r}; rename one of them")
            found[family.name] = family
    return found


def check_names(components: Iterable[str]) -> None:
    """Check that some family knows each of these components.

    Raises:
        TypeError: if none does; these are keyword arguments.
    """
    known = dict.fromkeys(name for each in table().values() for name in each.replaceable)
    if unknown := [name for name in components if name not in known]:
        raise TypeError(
            f"effjax.pipeline got unknown arguments {', '.join(unknown)}; components that can be "
            f"given are {', '.join(known)}"
        )


def of_index(index: Mapping[str, Any], source: str) -> PipelineFamily:
    """The entry of the class that a model_index.json names.

    Raises:
        ValueError: if there is none; it names `source` and all that there are.
    """
    name = index.get("_class_name")
    if not isinstance(name, str):
        raise ValueError(f"{source}: model_index.json must say its _class_name, got {name!r}")
    if name not in table():
        raise ValueError(
            f"{source} is a {name}; pipelines that can be loaded are {', '.join(table())}"
        )
    return table()[name]


def of_architectures(config: Mapping[str, Any]) -> PipelineFamily:
    """The entry for a config.json of transformers; of language models if none names its class."""
    given = config.get("architectures")
    names = set(map(str, given)) if isinstance(given, list) else set()
    chosen = (each for each in table().values() if names.intersection(each.architectures))
    return next(chosen, table()[TEXT])


def of_model(model: str, pipeline: str | None = None) -> PipelineFamily | None:
    """The first entry whose model may have this class, of those that become this pipeline."""
    for family in table().values():
        if model in family.models and pipeline in (None, family.pipeline):
            return family
    return None
