"""What a compiled program depends on, in words that are equal in every process.

Its call: static values (models, patches, samplers) and the shapes of arguments; and its target:
versions, settings and the device.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import types
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax.forward import Forward
from effjax.warm import processor
from pallas_kernels.implementation import unnamed_implementation


def target(device: Any) -> dict[str, str]:
    """What all executables of a process depend on: versions, flags and the device."""
    found = {name: version(name) for name in ("jax", "jaxlib", "flax")}
    found |= {"effjax": _sources(), "platform": device.platform, "chip": device.device_kind}
    if device.platform == "cpu":
        known = processor()
        found["architecture"] = str(known["architecture"])
        found["instructions"] = " ".join(known["instructions"])
    elif device.platform == "tpu":
        found["libtpu"] = _libtpu()
    else:
        found["runtime"] = device.client.platform_version
    flags = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
    return found | {name: " ".join(sorted(os.environ.get(name, "").split())) for name in flags}


def settings() -> dict[str, str]:
    """What a trace depends on that no argument says."""
    names = ("jax_default_matmul_precision", "jax_default_prng_impl", "jax_enable_x64")
    found = {name: str(getattr(jax.config, name)) for name in names}
    return found | {"implementation": str(unnamed_implementation())}


def _libtpu() -> str:
    try:
        return version("libtpu")
    except PackageNotFoundError:
        return "unknown"


@functools.cache
def _sources() -> str:
    """A digest of the code that programs are traced from."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for package in ("effjax", "pallas_kernels"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def here() -> jax.sharding.SingleDeviceSharding:
    """This machine's first device."""
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def stable(value: Any) -> Any:
    """A static value as JSON that is equal in every process for equal values.

    Raises:
        ValueError: for what has no such description, such as a function within another.
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float | np.generic):
        return repr(value)
    if isinstance(value, np.dtype):
        return str(value)
    if isinstance(value, Forward):  # the rest of it follows from these
        names = ("model", "config", "patches", "fixed_step", "span", "cache_length")
        return {name: stable(getattr(value, name)) for name in names}
    if isinstance(value, np.ndarray):
        return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
    if isinstance(value, Mapping):
        return {str(key): stable(each) for key, each in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(map(json.dumps, map(stable, value)))
    if isinstance(value, tuple | list):
        return [stable(each) for each in value]
    if isinstance(value, functools.partial):
        return [stable(value.func), stable(value.args), stable(value.keywords)]
    if isinstance(value, type | types.FunctionType):
        if "<" not in value.__qualname__:
            return f"{value.__module__}.{value.__qualname__}"
    elif dataclasses.is_dataclass(value):
        fields = {
            each.name: stable(getattr(value, each.name)) for each in dataclasses.fields(value)
        }
        return {"type": stable(type(value)), **fields}
    raise ValueError(
        f"a program that depends on {value!r:.200} cannot be saved: it is no dataclass, function "
        f"of a module, number or text, so that another process could not tell that it is equal"
    )


def static_parts(tree: Any) -> Iterator[Any]:
    """What the nodes of a tree hold beside their children, but for dicts, lists and tuples."""
    held = tree.node_data()
    if held is not None and held[0] not in (dict, list, tuple, type(None)):
        yield [stable(held[0]), stable(held[1])]
    for child in tree.children():
        yield from static_parts(child)


def flat(name: str, value: Any) -> dict[str, str]:
    """Scalars by their path."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {
            path: word for key, each in items for path, word in flat(f"{name}.{key}", each).items()
        }
    return {name: json.dumps(value)}


def differences(own: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    """In which entries two descriptions differ; of lists of words, in which words."""
    found = []
    for name in (name for name in {**own, **other} if own.get(name) != other.get(name)):
        mine, theirs = own.get(name, "not there"), other.get(name, "not there")
        if " " in mine and " " in theirs and name in own and name in other:
            words, known = mine.split(), theirs.split()
            mine = " ".join(word for word in words if word not in known) or "less"
            theirs = " ".join(word for word in known if word not in words) or "less"
        found.append(f"{name} is {mine or 'empty':.80}, not {theirs or 'empty':.80}")
    return found


def kind(leaf: Any) -> str:
    """Shape and dtype of an argument, and where it is, if that is not one local device."""
    found = jax.typeof(leaf)
    weak = " (weak)" if found.weak_type else ""
    words = f"{found.dtype}[{','.join(map(str, found.shape))}]{weak}"
    if isinstance(leaf, jax.Array) and leaf.devices() != here().device_set:
        words += f" on {sorted(map(str, leaf.devices()))}"
    return words
