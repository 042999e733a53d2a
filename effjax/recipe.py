"""Save and load a compressed model: `config.json`, `model.safetensors`, `recipe.json`.

`recipe.json` lists methods with their plans. Loading runs these transforms on the *shapes* of the
base model's parameters; what comes out is the template that the tensors must fill. Leaves that were
quantized before the first method (`converters.from_pretrained`) are described in `recipe.json` too.

Values of quantized leaves stand in the file as streams of bits (`effjax.quant.disk`); the metadata
of the file says {"bits": b, "shape": [I, O]} under the tensor's name.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from effjax import fields, registry
from effjax.context import check_counts
from effjax.fields import Checked, naming
from effjax.forward import Forward, Params, abstract, flatten_params, nest_params
from effjax.quant import QTensor
from effjax.quant.disk import QValues
from effjax.scanning import unscanned, unstack_params
from effjax.storage import (
    Inspection,
    Spec,
    Tensor,
    float_dtype,
    new_directory,
    open_safetensors,
    open_shards,
    place,
    read_json,
    to_host,
    write_json,
    write_shards,
)
from effjax.transform import Pair, on_shapes

CONFIG, RECIPE, STEM = "config.json", "recipe.json", "model"


def save(
    path: str | os.PathLike,
    forward: Forward,
    params: Params,
    *,
    max_shard_bytes: int = 5_000_000_000,
    progress: bool = True,
) -> None:
    """Save one model, with the methods that were applied to it, as a directory.

    The directory holds the configuration, the weights and the recipe of the methods; `load` reads
    it. It takes its name only when it is complete. To save a whole pipeline use its own `save`.

    Args:
        path: a directory that does not exist yet, or is empty.
        forward: the forward. Only transforms may have patched it, because other patches cannot be
            read back.
        params: its parameters.
        max_shard_bytes: largest size of a weight file; a file with a single tensor may be larger.
        progress: show a bar for what takes longer than a second.

    Raises:
        ValueError: if the path is taken, if the forward has patches that its recipe does not make,
            or if the parameters are not arrays, or not those that the recipe makes.
    """
    if forward.fixed_step is not None:
        raise ValueError("save the forward itself, not forward.at(step)")
    forward, params = unscanned(forward), unstack_params(params)
    base, _ = abstract(forward.model, forward.config)
    replayed, template = _replay(base, forward.recipe, {})
    if imported := _imported(template, params):
        replayed, template = _replay(base, forward.recipe, imported)
    if replayed != forward:
        raise ValueError(
            "this forward has patches that do not come from a method's transform, so a recipe "
            "could "
            "not bring them back. Save before adding them."
        )
    leaves = named_arrays(params)
    allowed = jax.Array | np.ndarray
    wrong = [
        name
        for name, leaf in leaves.items()
        if not all(isinstance(x, allowed) for x in jax.tree.leaves(_value(leaf)))
    ]
    if wrong:
        raise ValueError(f"these parameters are no arrays: {wrong}")
    specs = {name: _spec(leaf) for name, leaf in leaves.items()}
    _check(
        "the parameters do not fit the recipe, which could not bring them back",
        named_arrays(template),
        specs,
    )
    described: dict[str, Any] = {
        "steps": [{"method": name, "plan": plan.to_dict()} for name, plan in forward.recipe]
    }
    if imported:
        described["leaves"] = imported
    with new_directory(Path(os.path.expanduser(path))) as directory:
        config = {"model": forward.model.__name__, **dataclasses.asdict(forward.config)}
        write_json(directory / CONFIG, config)
        write_json(directory / RECIPE, described)
        write_shards(
            directory,
            STEM,
            specs,
            lambda name: _to_disk(leaves[name]),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
            notes={
                name: json.dumps({"bits": leaf.bits, "shape": leaf.shape})
                for name, leaf in leaves.items()
                if isinstance(leaf, QValues)
            },
        )


def load(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    sharding: jax.sharding.Sharding | None = None,
    progress: bool = True,
    check_finite: bool = False,
) -> Pair:
    """Load a model that `save` wrote.

    Args:
        path: the directory.
        dtype: float32, bfloat16 or float16 for all parameters that are floats. None keeps the saved
            dtypes. Quantized leaves keep their values, scales and other arrays.
        compute_dtype: dtype of the computation. None takes `dtype`, or the saved one if that is
            None too.
        sharding: where to put the parameters; the default device if None.
        progress: show a bar for what takes longer than a second.
        check_finite: refuse weights that are NaN or infinite.

    Returns:
        The forward, with all methods applied, and its parameters.

    Raises:
        ValueError: for a directory that is not a saved model, an unknown model or method, damaged
            files, missing, unexpected or misshapen tensors, and bad values. The message lists all
            of them.
    """
    directory = Path(os.path.expanduser(path))
    dtype = None if dtype is None else float_dtype(dtype)
    forward, template, tensors = _read(directory, dtype, compute_dtype)
    expected = named_arrays(template)
    given = {name: Spec(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    _check(f"{directory} does not fit its configuration", expected, given)
    leaves = []
    plain, inspection = _plain(template), Inspection(check_finite)
    total = sum(given[name].bytes_ for name in expected)
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, delay=1, disable=not progress
    ) as bar:
        for name, leaf in expected.items():
            stored = tensors[name].read()
            if isinstance(leaf, QValues):
                inspection.look(name, stored)
                host = leaf.from_disk(stored)
            else:
                cast = dtype if name in plain else None
                host = inspection.cast(name, stored, cast or stored.dtype)
            leaves.append(jax.tree.map(lambda array: place(array, sharding), host))
            bar.update(given[name].bytes_)
    inspection.raise_faults()
    return forward, jax.tree.unflatten(jax.tree.structure(_as_stored(template)), leaves)


def named_arrays(params: Params) -> dict[str, Any]:
    """Arrays by name as they are stored, those within a quantized leaf too.

    A leaf's quantized values are one `QValues` (`blocks.0.mlp.fc1.kernel.qvalue`).
    """
    paths, _ = jax.tree_util.tree_flatten_with_path(_as_stored(params))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def _plain(params: Params) -> set[str]:
    """Names of the arrays that are no part of a quantized leaf."""
    return {name for name, leaf in flatten_params(params).items() if not isinstance(leaf, QTensor)}


def _as_stored(params: Params) -> Params:
    def stored(leaf: Any) -> Any:
        if not isinstance(leaf, QTensor):
            return leaf
        return dataclasses.replace(
            leaf, qvalue=QValues(leaf.qvalue, (*leaf.leading, *leaf.matrix_shape), leaf.bits)
        )

    return jax.tree.map(stored, params, is_leaf=lambda leaf: isinstance(leaf, QTensor))


def _value(leaf: Any) -> Any:
    return leaf.value if isinstance(leaf, QValues) else leaf


def _spec(leaf: Any) -> Spec:
    if isinstance(leaf, QValues):
        return Spec(leaf.disk_shape, leaf.disk_dtype)
    return Spec(tuple(leaf.shape), np.dtype(leaf.dtype))


def _to_disk(leaf: Any) -> np.ndarray:
    host = jax.tree.map(to_host, _value(leaf))
    return dataclasses.replace(leaf, value=host).to_disk() if isinstance(leaf, QValues) else host


def describe(
    path: str | os.PathLike,
    *,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
) -> Pair:
    """The transformed forward of a saved model, and the shapes of its parameters; loads nothing.

    Args:
        path, dtype, compute_dtype: as in `load`.

    Raises:
        ValueError: as `load`, for what does not need the tensors' values.
    """
    forward, template, _ = _read(Path(os.path.expanduser(path)), dtype, compute_dtype)
    return forward, template


def _read(
    directory: Path, dtype: DTypeLike | None, compute_dtype: DTypeLike | None
) -> tuple[Forward, Params, dict[str, Tensor]]:
    """As `describe`, and the tensors of the files, whose headers are checked first."""
    if not (directory / RECIPE).is_file() or not (directory / CONFIG).is_file():
        raise ValueError(
            f"{directory} is no directory that effjax.save wrote: it lacks {CONFIG} or {RECIPE}. "
            f"For a PyTorch checkpoint use converters.from_pretrained."
        )
    config = read_json(directory / CONFIG)
    tensors = _open(directory)
    with naming(directory / CONFIG):
        model = registry.model(config.pop("model", None))
        held = fields.read(model.Config, config, model.Config.__name__)
        check_counts(config, model.counts, tensors)
    numerics = {}
    if dtype is not None:
        numerics["param_dtype"] = str(float_dtype(dtype))
    if (computed := compute_dtype or dtype) is not None:
        numerics["dtype"] = str(float_dtype(computed))
    described = fields.read(Recipe, read_json(directory / RECIPE), str(directory / RECIPE))
    with naming(directory / RECIPE):
        recipe = tuple(
            (step.method, registry.method(step.method).plan.from_dict(step.plan))
            for step in described.steps
        )
        base, _ = abstract(model, dataclasses.replace(held, **numerics))
        return *_replay(base, recipe, described.leaves), tensors


def _open(directory: Path) -> dict[str, Tensor]:
    index = directory / f"{STEM}.safetensors.index.json"
    single = directory / f"{STEM}.safetensors"
    if not index.is_file() and not single.is_file():
        raise ValueError(f"{directory} lacks {single.name}; copy the whole directory again")
    return open_shards(index) if index.is_file() else open_safetensors(single)


@dataclasses.dataclass(frozen=True)
class Step(Checked):
    """One method of a recipe.

    Attributes:
        method: its name.
        plan: fields of its plan.
    """

    method: str
    plan: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Recipe(Checked):
    """Contents of recipe.json.

    Attributes:
        steps: methods, in the order in which they were applied.
        leaves: descriptions of leaves that were quantized before the first of them, by path.
    """

    steps: tuple[Step, ...]
    leaves: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)


def _replay(
    base: Forward, recipe: tuple[tuple[str, Any], ...], imported: Mapping[str, Mapping[str, Any]]
) -> Pair:
    """Apply a recipe to a base model's forward and to the shapes of its parameters.

    Args:
        base, recipe: what to apply, and to what.
        imported: descriptions of the leaves that are quantized before, by path.

    Raises:
        ValueError: for descriptions of leaves that the model lacks, or of none.
    """
    transforms = [registry.method(name).transform(plan) for name, plan in recipe]
    flat = flatten_params(base.abstract_params())
    if unknown := sorted(set(imported) - set(flat)):
        raise ValueError(
            f"there are descriptions of leaves that {base.model.__name__} lacks: {unknown}"
        )
    for path, leaf in imported.items():
        with naming(path):
            flat[path] = QTensor.from_dict(leaf)
    return on_shapes(transforms, base, nest_params(flat))


def _imported(template: Params, params: Params) -> dict[str, dict[str, Any]]:
    """Descriptions of the quantized leaves that stand where the recipe leaves an array, by path."""
    expected, given = flatten_params(template), flatten_params(params)
    return {
        path: leaf.to_dict()
        for path, leaf in given.items()
        if isinstance(leaf, QTensor)
        and path in expected
        and not isinstance(expected[path], QTensor)
    }


def _check(what: str, expected: dict[str, Any], given: dict[str, Spec]) -> None:
    """Report tensors that are missing or unexpected, or of another shape or kind, all at once.

    Floats may be floats of any width, but for what is stored of quantized values.
    """
    problems = [f"missing: {name}" for name in expected if name not in given]
    for name, spec in given.items():
        if name not in expected:
            problems.append(f"unexpected: {name} {list(spec.shape)}")
            continue
        wanted = _spec(expected[name])
        if spec.shape != wanted.shape:
            problems.append(
                f"misshapen: {name} is {list(spec.shape)}, must be {list(wanted.shape)}"
            )
        elif spec.dtype != wanted.dtype and not (
            jnp.issubdtype(spec.dtype, jnp.floating) and jnp.issubdtype(wanted.dtype, jnp.floating)
        ):
            problems.append(f"mistyped: {name} is {spec.dtype}, must be {wanted.dtype}")
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"{what} ({len(problems)} problems):\n  {listed}")
