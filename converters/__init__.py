"""Read PyTorch checkpoints as effjax models, and write effjax models as PyTorch checkpoints.

    forward, params = converters.from_pretrained("facebook/DiT-XL-2-512")
    converters.save_pretrained(forward, params, "copy")

Each model family is one file of this folder, with a table of names that is read in both
directions; see `converters.dit`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from converters.conversion import convert
    from converters.lora import load_lora
    from converters.pretrained import describe, from_pretrained, save_pretrained

__all__ = ["convert", "describe", "from_pretrained", "load_lora", "save_pretrained"]

_MODULES = {"convert": "conversion", "load_lora": "lora"}


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import converters` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULES.get(name, "pretrained")
    return getattr(importlib.import_module(f"converters.{module}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
