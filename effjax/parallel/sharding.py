"""Where parameters lie on a mesh: rules by role or path, so that models carry no annotations.

    mesh = device_mesh(data=2, model=4)
    rules = tensor_parallel(forward)
    params = shard(params, mesh, rules)                          # what is there already
    places = shardings(forward.abstract_params(), mesh, rules)   # or straight from the file:
    forward, params = converters.from_pretrained(path, sharding=places)

    with jax.set_mesh(mesh):                                     # kernels need to know it
        out, _ = jax.jit(forward)(params, {}, *inputs)

A rule is a pattern and the mesh axes of an array's dimensions. `tensor_parallel` makes rules of the
roles of a model's layers; rules of your own go before them. A dimension that its axis does not
divide is kept whole on every device. The compiler finds the communication (GSPMD): tensor
parallelism needs one sum over devices after the attention and one after the feed-forward of every
block. It does not cut kernels: within `jax.set_mesh` each device runs them on its own rows and
heads (`pallas_kernels.on_mesh`); elsewhere a program with kernels for several devices is refused.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.context import PyTree
from effjax.forward import Forward, flatten_params, nest_params
from effjax.layers.linear import Linear
from effjax.quant import QTensor
from effjax.stacking import Range
from effjax.targets import Role

Axes = tuple[str | None, ...]
Rule = tuple[str, Axes]

# Layers that widen are cut by outputs, those that narrow by inputs, so that what is between them
# (heads, hidden channels) stays on its device. Modulations, a quarter of FLUX, are cut for their
# size, and by inputs: one sum of a row for each sample, which every device then has whole.
WIDE: tuple[Role, ...] = ("qkv", "cross_qkv", "up", "head")
NARROW: tuple[Role, ...] = ("out", "cross_out", "down", "modulation")

# Of states: keys, values and their scales [B, C, K, D] by rows and heads, in slots (`tokens`, by
# group of heads) and in windows; slots of one axis for all heads [B, N, D] (`flat`) and features
# [B, C, R] by rows.
CACHES: tuple[Rule, ...] = (
    (
        r".*\.core\.(tokens\.(\d+\.)?)?[kv](_open|_scale|_offset)?",
        ("data", None, "model", None),
    ),
    (
        r".*\.core\.(flat\.[kv](_scale|_offset)?|[kv]_features(_open)?)",
        ("data", None, None),
    ),
)


def device_mesh(devices: Sequence[Any] | None = None, **axes: int) -> Mesh:
    """Make a mesh of devices with named axes, such as `device_mesh(data=2, model=4)`.

    Args:
        devices: the devices; all of this process if None.
        axes: sizes of the axes by name. Their product must be the number of devices.

    Raises:
        ValueError: if the product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if not axes or math.prod(axes.values()) != len(devices):
        raise ValueError(
            f"a mesh of {axes} needs {math.prod(axes.values())} devices, there are {len(devices)}"
        )
    kinds = (AxisType.Auto,) * len(axes)  # explicit ones would have every reshape say where it goes
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices)


def tensor_parallel(forward: Forward) -> tuple[Rule, ...]:
    """Make rules for a model's parameters from the roles of its layers.

    Queries, keys, values, layers into hidden channels and heads are cut by their outputs on the
    axis "model". Layers out of attention and out of hidden channels and modulations are cut by
    their inputs, and the embedding of tokens by rows. The matrices of a stack (experts) are
    distributed along the axis "expert". All other arrays are whole on every device.

        params = shard(params, device_mesh(data=2, model=4), tensor_parallel(forward))
    """
    found: dict[Axes, list[str]] = {}

    def put(name: str, *axes: str | None) -> None:
        found.setdefault(axes, []).append(re.escape(name))

    for path, layer in forward.target_modules(forward.abstract_params(), Linear):
        assert isinstance(layer, Linear)
        stack = ("expert",) * (layer.kernel.get_value().ndim - 2)
        wide, narrow = layer.role in WIDE, layer.role in NARROW
        if stack or wide or narrow:
            put(f"{path}.kernel", *stack, "model" if narrow else None, "model" if wide else None)
        if layer.bias is not None and (stack or wide):
            put(f"{path}.bias", *stack, "model" if wide else None)
    return (
        *(("|".join(names), axes) for axes, names in found.items()),
        ("embed_tokens", ("model", None)),
        # CSKV: every head is rebuilt from all features
        (r"methods\.cskv\..*\.up_[kv]", (None, "model")),
    )


def shardings(tree: Mapping[str, Any], mesh: Mesh, rules: Sequence[Rule]) -> dict[str, Any]:
    """Make a sharding for every array of a tree of parameters or states.

    Args:
        tree: arrays, shapes and quantized leaves, by (nested) name.
        mesh: the devices. Axes that rules name and the mesh lacks are ignored.
        rules: pairs of a pattern and mesh axes. The first rule whose pattern matches the whole path
            of an array applies to it. An array without a rule is whole on every device. Stacked
            layers go by the rule of the first one.

    Returns:
        The tree with shardings in place of arrays.

    Raises:
        ValueError: if a rule has another number of axes than an array that it matches.
    """
    found = {}
    for path, leaf in flatten_params(tree).items():
        layers = Range.of(path)
        name = path if layers is None else layers.names[0]
        axes = next((axes for pattern, axes in rules if re.fullmatch(pattern, name)), None)
        if axes is not None and layers is not None:
            axes = (None, *axes)
        if axes is not None and len(axes) != len(leaf.shape):
            raise ValueError(
                f"a rule cuts {len(axes)} dimensions as {axes}, but {path} is {list(leaf.shape)}"
            )
        found[path] = leaf_sharding(leaf, mesh, axes or (None,) * len(leaf.shape))
    nested = any(isinstance(value, Mapping) for value in tree.values())
    return nest_params(found) if nested else found


def shard(tree: Mapping[str, Any], mesh: Mesh, rules: Sequence[Rule]) -> dict[str, Any]:
    """Put a tree of parameters or states on a mesh. The arguments are those of `shardings`."""
    return jax.device_put(dict(tree), shardings(tree, mesh, rules))


def leaf_sharding(leaf: Any, mesh: Mesh, axes: Axes) -> PyTree:
    """The sharding of one leaf, of each of its parts if it is quantized.

    A part of a quantized leaf is cut along the dimensions that it shares with the matrix: scales of
    groups along both, if there are enough groups; smoothing scales along the inputs. An order of
    inputs is whole everywhere. All parts of a stack are cut along its leading axes.

    Args:
        leaf: array, shape or `QTensor`.
        mesh: devices.
        axes: mesh axes of the leaf's dimensions.
    """
    if not isinstance(leaf, QTensor):
        return _fitting(leaf.shape, mesh, axes)
    leading, (*inner, outputs) = axes[: len(leaf.leading)], axes[len(leaf.leading) :]
    # A convolution is held as a matrix whose rows are places times inputs: those stay together.
    inputs = None if leaf.convolution else inner[0]
    of: dict[str, Axes] = {
        "scale": (*leading, inputs, outputs),
        "zero_point": (*leading, inputs, outputs),
        "perm": (*leading, None),  # names inputs of all devices
        "smoothing_scale": (*leading, inputs),
        "input_scale": leading,
        "input_zero_point": leading,
        "column_sums": (*leading, outputs),
    }
    parts: dict[str, Any] = {
        name: None if (part := getattr(leaf, name)) is None else _fitting(part.shape, mesh, axes)
        for name, axes in of.items()
    }
    parts["qvalue"] = jax.tree.map(
        lambda part: _fitting(part.shape, mesh, (*leading, inputs, outputs)), leaf.qvalue
    )
    return dataclasses.replace(leaf, **parts)


def _fitting(shape: Sequence[int], mesh: Mesh, axes: Axes) -> NamedSharding:
    """Cut along the axes that the mesh has and that divide their dimensions."""
    kept = [
        axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None
        for size, axis in zip(shape, axes, strict=True)
    ]
    return NamedSharding(mesh, PartitionSpec(*kept))
