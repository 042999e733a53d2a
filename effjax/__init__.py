"""effjax: efficient generative inference in JAX.

A model is a pure function (`Forward`), an efficiency method is a transform of it, and everything a
method decides ahead of time is a plan. Names below load when they are first used: `import effjax`
is quick and touches no device.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Forward": "forward",
    "Guidance": "context",
    "chain": "transform",
    "functional": "forward",
    "identity": "transform",
    "load": "recipe",
    "pipeline": "pipelines",
    "save": "recipe",
}
_MODULES = ("capture", "cost", "generate", "metrics", "samplers", "testing")


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"effjax.{_PUBLIC[name]}"), name)
    elif name in _MODULES:
        value = importlib.import_module(f"effjax.{name}")
    else:
        raise AttributeError(f"module 'effjax' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_MODULES])
