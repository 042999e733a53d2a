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


def methods() -> Mapping[str, Method]:
    """Every method by name: the `METHOD` of each module of `effjax.methods.modules`.

    Raises:
        ValueError: for two methods of one name, or something else that is called METHOD.
    """
    return _methods()[0]


def module_of(name: str) -> str:
    """The module, or package, that declares the method of this name."""
    return _methods()[1][method(name).name]


@functools.cache
def _methods() -> tuple[Mapping[str, Method], Mapping[str, str]]:
    """Methods, and the modules that declare them."""
    found: dict[str, Method] = {}
    places: dict[str, str] = {}
    for module in effjax.methods.modules():
        declared = getattr(importlib.import_module(module), "METHOD", None)
        if declared is None:
            continue
        if not isinstance(declared, Method):
            raise ValueError(f"METHOD of {module} must be a Method, got {declared!r}")
        if declared.name in found:
            raise ValueError(
                f"two methods are named {declared.name!r}, in {places[declared.name]} and "
                f"{module}; rename one of them"
            )
        found[declared.name], places[declared.name] = declared, module
    return MappingProxyType(dict(sorted(found.items()))), MappingProxyType(places)


def clear() -> None:
    """Forget the methods, so that folders which are put on `effjax.methods.__path__` are seen."""
    importlib.invalidate_caches()
    _methods.cache_clear()


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
