"""Methods by family: each is a module, or a package of several files, that has a `METHOD`.

`from effjax.methods import dit_fast_attn` finds the module in whatever family it lives, and imports
no other. Folders that are put on `effjax.methods.__path__` are further places of families.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from types import ModuleType


def modules() -> Iterator[str]:
    """Full names of the modules in all families; no family or module is imported."""
    for family in pkgutil.iter_modules(__path__, f"{__name__}."):
        spec = importlib.util.find_spec(family.name)
        folders = spec.submodule_search_locations if spec is not None else None
        for module in pkgutil.iter_modules(folders or (), f"{family.name}."):
            yield module.name


def __getattr__(name: str) -> ModuleType:
    found = [each for each in modules() if each.endswith(f".{name}")] if name[:1] != "_" else []
    if len(found) > 1:
        raise ImportError(f"several methods are called {name!r}: {', '.join(found)}; rename one")
    if not found:
        raise AttributeError(f"module 'effjax.methods' has no method {name!r}")
    return importlib.import_module(found[0])
