"""Find methods and models by importing their folders: adding one touches one file."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

import effjax.methods
import effjax.models
from effjax.context import Model
from effjax.transform import Method


@functools.cache
def methods() -> Mapping[str, Method]:
    """Every method by name: the `METHOD` of each module or folder below `effjax.methods`."""
    found: dict[str, Method] = {}
    for module in pkgutil.walk_packages(effjax.methods.__path__, "effjax.methods."):
        method = getattr(importlib.import_module(module.name), "METHOD", None)
        if method is None or found.get(method.name) is method:  # a folder's files may import it
            continue
        if method.name in found:
            raise ValueError(f"two methods are named {method.name!r}; rename one of them")
        found[method.name] = method
    return MappingProxyType(dict(sorted(found.items())))


def method(name: str) -> Method:
    """The method of this name.

    Raises:
        ValueError: if there is none; the message lists all.
    """
    try:
        return methods()[name]
    except KeyError:
        raise ValueError(f"no method {name!r}; there are {sorted(methods())}") from None


@functools.cache
def models() -> Mapping[str, type[Model]]:
    """Every model by class name: the `MODEL` of each module in `effjax.models`."""
    found = {}
    for module in pkgutil.iter_modules(effjax.models.__path__, "effjax.models."):
        model = importlib.import_module(module.name).MODEL
        found[model.__name__] = model
    return MappingProxyType(dict(sorted(found.items())))


def model(name: str) -> type[Model]:
    """The model of this class name.

    Raises:
        ValueError: if there is none; the message lists all.
    """
    try:
        return models()[name]
    except KeyError:
        raise ValueError(f"no model {name!r}; there are {sorted(models())}") from None
