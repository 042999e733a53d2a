"""How the results of a program make a tree: in JSON, which is data and no code."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def shape_of(results: PyTree, given: Mapping[str, Any]) -> Any:
    """How results make a tree, as JSON; trees that an argument has too are said by its name."""

    def shape(value: PyTree) -> Any:
        if value is None:
            return None
        if isinstance(value, jax.Array):
            return {"kind": "key" if is_key(value) else "array", "of": None}
        if isinstance(value, dict):
            return {"kind": "dict", "of": {name: shape(value[name]) for name in sorted(value)}}
        if isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else _name(type(value))
            return {"kind": kind, "of": [shape(part) for part in value]}
        leaves, structure = jax.tree.flatten(value)
        for name, argument in given.items():
            if jax.tree.structure(argument) == structure:
                return {"kind": "given", "of": name, "leaves": [shape(leaf) for leaf in leaves]}
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            of = [shape(getattr(value, name)) for name in names]
            return {"kind": _name(type(value)), "of": of, "fields": names}
        raise ValueError(
            f"a program that returns a {type(value).__name__} cannot be saved, unless an argument "
            f"has the same structure"
        )

    return shape(results)


def built(
    described: Any, results: Iterator[jax.Array], given: Mapping[str, Any], impls: Collection[Any]
) -> PyTree:
    """A tree of results.

    Args:
        described: what `shape_of` said of it.
        results: its arrays, in order.
        given: arguments of the call, by name.
        impls: kinds of its PRNG keys, of which there may be one.
    """

    def make(node: Any) -> PyTree:
        if node is None:
            return None
        kind, of = node["kind"], node["of"]
        if kind == "array":
            return next(results)
        if kind == "key":
            (impl,) = impls
            return jax.random.wrap_key_data(next(results), impl=impl)
        if kind == "given":
            structure = jax.tree.structure(given[of])
            return structure.unflatten([make(leaf) for leaf in node["leaves"]])
        if kind == "dict":
            return {name: make(value) for name, value in of.items()}
        parts = [make(value) for value in of]
        if "fields" in node:
            return _own_type(kind)(**dict(zip(node["fields"], parts, strict=True)))
        return parts if kind == "list" else _own_type(kind)(*parts)

    return make(described)


def check_tree(node: Any, file: str) -> None:
    """Raise ValueError for what `shape_of` would not have said of a file's results."""
    if node is None:
        return
    if not isinstance(node, Mapping) or not isinstance(kind := node.get("kind"), str):
        raise ValueError(f"{file} returns no tree, but {node!r:.80}")
    if kind in ("array", "key"):
        return
    of = node.get("leaves" if kind == "given" else "of")
    if kind not in ("dict", "list", "given"):
        _own_type(kind)
    parts = list(of.values()) if isinstance(of, Mapping) and kind == "dict" else of
    if not isinstance(parts, list):
        raise ValueError(f"{file} returns no tree, but {node!r:.80}")
    for part in parts:
        check_tree(part, file)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of PRNG keys."""
    return jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)


def _name(kind: type) -> str:
    return "tuple" if kind is tuple else f"{kind.__module__}:{kind.__qualname__}"


def _own_type(name: str) -> Callable[..., Any]:
    """A named tuple or dataclass of this library.

    Raises:
        ValueError: for any other name.
    """
    if name == "tuple":
        return lambda *parts: parts
    module, _, qualified = name.partition(":")
    if module.split(".")[0] == "effjax":
        with contextlib.suppress(ImportError):
            found: Any = getattr(importlib.import_module(module), qualified, None)
            named = inspect.isclass(found) and issubclass(found, tuple)
            if (named and hasattr(found, "_fields")) or dataclasses.is_dataclass(found):
                return found
    raise ValueError(f"results cannot be a {name!r:.80}, which is no value of this library")
