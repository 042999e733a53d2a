"""Differences between library versions, and calls of other libraries that break strict promotion.

Everything version-dependent stands here, so that the rest of the library reads one way.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def relaxed_promotion() -> Iterator[None]:
    """Allow implicit dtype promotion around one call of another library that relies on it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# Primitives that call one inner jaxpr once, by the parameter that holds it.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vmap_call": "call",
    "checkpoint": "jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
}


def inner_jaxprs(equation: Any) -> list[Any]:
    """All jaxprs among the parameters of an equation."""
    values = [
        part
        for value in equation.params.values()
        for part in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    return [value for value in values if hasattr(getattr(value, "jaxpr", value), "eqns")]


def scope_names(equation: Any) -> tuple[str, ...]:
    """The `jax.named_scope`s of an equation in its jaxpr, without the transforms around them.

    "transpose(jvp(vmap(attention)))/softmax" gives ("attention", "softmax").
    """
    parts = str(equation.source_info.name_stack).split("/")
    names = (re.sub(r"^(?:\w+\()+|\)+$", "", part) for part in parts)
    return tuple(name for name in names if name)


def shard_count(equation: Any) -> int:
    """Number of devices on which a `shard_map` equation runs its jaxpr on different shards."""
    shape = dict(equation.params["mesh"].shape)
    axes = equation.params.get("newly_manual_axes", equation.params.get("manual_axes", shape))
    return math.prod(shape[axis] for axis in axes)


def kernel_name(equation: Any) -> str:
    """Name of the kernel of a `pallas_call` equation."""
    jaxpr = equation.params["jaxpr"]
    return equation.params.get("name") or jaxpr.debug_info.func_src_info


def use_compilation_cache(folder: Path) -> None:
    """Make a folder the persistent compilation cache, whatever was compiled or kept before."""
    from jax.experimental.compilation_cache import compilation_cache

    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
    compilation_cache.reset_cache()  # JAX looks at these settings once


@contextlib.contextmanager
def without_compilation_cache() -> Iterator[None]:
    """Compile anew: on CPUs, what comes out of the persistent cache cannot be serialized again."""
    from jax.experimental.compilation_cache import compilation_cache

    name = "jax_enable_compilation_cache"
    enabled = getattr(jax.config, name)
    jax.config.update(name, False)
    compilation_cache.reset_cache()  # JAX looks at these settings once
    try:
        yield
    finally:
        jax.config.update(name, enabled)
        compilation_cache.reset_cache()


def load_executable(data: bytes, device: Any) -> Any:
    """What `executable.serialize()` gave, ready to run on one device."""
    if device.platform == "gpu":  # brings the functions that Mosaic's kernels call
        with contextlib.suppress(ImportError):
            importlib.import_module("jax.experimental.mosaic.gpu")
    devices = jax.sharding.SingleDeviceSharding(device)._internal_device_list  # no public way
    return device.client.deserialize_executable(data, executable_devices=devices)


def execute(executable: Any, buffers: list[jax.Array]) -> list[jax.Array]:
    """Run a loaded executable on arrays of its device; those that it donates are gone."""
    results = executable.execute_sharded(buffers)
    return [parts[0] for parts in results.disassemble_into_single_device_arrays()]
