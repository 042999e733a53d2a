"""Methods, one file or folder each, by family. Each ends with its `METHOD` declaration.

`from effjax.methods import dit_fast_attn` finds the method in whatever family it lives.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_"):
        for module in pkgutil.walk_packages(__path__, __name__ + "."):
            _, _, within = module.name.removeprefix(f"{__name__}.").partition(".")
            if within == name:
                return importlib.import_module(module.name)
    raise AttributeError(f"module 'effjax.methods' has no method {name!r}")
