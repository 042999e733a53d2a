"""Methods, one file each, by family. Each file ends with its `METHOD` declaration.

`from effjax.methods import dit_fast_attn` finds the file in whatever family it lives.
"""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if not name.startswith("_"):
        for module in pkgutil.walk_packages(__path__, __name__ + "."):
            if module.name.rpartition(".")[2] == name:
                return importlib.import_module(module.name)
    raise AttributeError(f"module 'effjax.methods' has no method {name!r}")
