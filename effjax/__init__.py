"""effjax: efficient generative inference in JAX.

A model is a pure function (`Forward`). An efficiency method is a transform of that function.
Everything that a method decides ahead of time is a plan.

    pipe = effjax.pipeline("facebook/DiT-XL-2-512")
    fast = pipe.transform(method.transform(plan))
    images = fast([207, 360], key=jax.random.key(0))
    fast.save("dit-fast")

Use `pipeline` for whole model directories, and `functional`, `save` and `load` for a single model.
The names of this package are loaded when they are first used. `import effjax` is therefore quick
and touches no device.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Forward": "forward",
    "Guidance": "guidance",
    "chain": "transform",
    "compilation_cache": "warm",
    "functional": "forward",
    "identity": "transform",
    "load": "recipe",
    "pipeline": "pipelines",
    "save": "recipe",
    "scan_blocks": "scanning",
}
_MODULES = ("capture", "cost", "generate", "metrics", "samplers", "testing")


def _refuse_shadows() -> None:
    """Packages that are installed beside this one must not be hidden by a user's own files."""
    beside = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    for name in ("converters", "pallas_kernels"):
        spec = importlib.util.find_spec(name)
        found = spec and (spec.origin or next(iter(spec.submodule_search_locations or ()), None))
        own = os.path.join(beside, name, "__init__.py")
        if found and os.path.realpath(found) != own:
            what = os.path.dirname(found) if os.path.basename(found) == "__init__.py" else found
            raise ImportError(
                f"effjax needs its own package {name!r}, {own}, but Python finds {found} first; "
                f"rename {what}, or take its folder from the front of sys.path",
                name=name,
                path=found,
            )


_refuse_shadows()


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
