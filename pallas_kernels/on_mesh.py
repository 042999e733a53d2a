"""Kernels on several devices: each device runs them on its own rows and heads.

A compiler cannot cut a kernel. Within `jax.set_mesh(mesh)` an operation therefore runs its kernel
under `jax.shard_map`, with rows along the mesh axis "data" and heads along "model", as far as these
axes divide them. What an operation does not say how to cut, or a mesh without these axes, is left
to XLA's program, which the compiler cuts as it does everything else. The mesh's axes are of the
type Auto, as `effjax.parallel.device_mesh` makes them (`jax.make_mesh` has another default).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, PartitionSpec

PyTree = Any

AXES = {"b": "data", "h": "model"}  # of rows and of heads


class Cut(NamedTuple):
    """How an operation's arrays may be cut.

    Attributes:
        operands: a tree like the operands, or its upper part, of one letter for each dimension of
            the arrays below: "b" is cut by rows, "h" by heads, any other is whole: "bh.." for
            [B, H, S, D].
        results: the same of the results.
        whole: letters that are not cut here, because something static differs along them.
    """

    operands: PyTree
    results: PyTree
    whole: str = ""


def free_axes() -> dict[str, int]:
    """The axes of the mesh along which the compiler cuts arrays here, and their sizes."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return {}
    kinds = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in kinds if kind == AxisType.Auto}


def on_several_devices() -> bool:
    """Whether the compiler may cut arrays here."""
    return any(size > 1 for size in free_axes().values())


def by_device(cut: Cut | None, *operands: PyTree) -> Callable[[Callable], Callable] | None:
    """What makes a program of these operands run on each device of the mesh on its own part.

    Returns:
        The identity where arrays are on one device, or in parts already; None where nothing can be
        cut, so that a kernel would do all of the work on every device.
    """
    if not on_several_devices():
        return lambda program: program
    if cut is None:
        return None
    free = free_axes()
    sizes: dict[str, set[int]] = {}
    jax.tree.map(
        lambda letters, below: [
            sizes.setdefault(letter, set()).add(size)
            for leaf in jax.tree.leaves(below)
            for letter, size in zip(letters, leaf.shape, strict=True)
        ],
        cut.operands,
        operands,
    )
    axes = {
        letter: axis
        for letter, axis in AXES.items()
        if letter not in cut.whole
        and free.get(axis, 1) > 1
        and all(size % free[axis] == 0 for size in sizes.get(letter, ()))
    }
    if not axes:
        return None

    def spec(letters: str) -> PartitionSpec:
        return PartitionSpec(*(axes.get(letter) for letter in letters))

    return lambda program: jax.shard_map(
        program,
        in_specs=jax.tree.map(spec, cut.operands),
        out_specs=jax.tree.map(spec, cut.results),
        axis_names=set(free),  # a kernel wants all of them
        check_vma=False,
    )
