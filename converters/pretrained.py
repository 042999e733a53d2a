"""Loading and saving models in the checkpoint layouts of PyTorch libraries."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding
from jax.typing import DTypeLike
from tqdm.auto import tqdm

from converters import quantization_config, quantized_export
from converters.family import Family, family_of_config
from converters.hub import resolve
from converters.names import Shape
from converters.weights import Leaf, open_weights
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.parallel import leaf_sharding
from effjax.quant import QTensor
from effjax.scanning import describe_runs, example_runs, unscanned, unstack_params
from effjax.storage import (
    FLOATS,
    Spec,
    new_directory,
    place,
    to_host,
    write_json,
    write_shards,
)

Placement = Sharding | Callable[[str, Shape], Sharding] | Mapping[str, Any] | None

SHARD_BYTES = 5_000_000_000


def from_pretrained(
    repo_or_dir: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    sharding: Placement = None,
    progress: bool = True,
    check_finite: bool = False,
    part: str | None = None,
) -> tuple[Forward, Params]:
    """Load one model and its parameters from PyTorch weights.

    For a whole pipeline with text encoders, tokenizer and VAE use `effjax.pipeline`. Tensors go one
    by one from the file to their place, so the host never holds a second copy. torch is needed for
    pickles only. Layers that the checkpoint holds quantized (`converters.quantized`) become
    quantized leaves, with the file's own quantized values.

    Args:
        repo_or_dir: hub repository ("owner/name"), file in one ("owner/name/file.pt"), directory in
            diffusers' layout, or weight file.
        subfolder: folder of the model in the repository or directory; "transformer" for a pipeline.
        variant: which of several sets of weights in a folder to load, such as "fp16" for
            "model.fp16.safetensors".
        revision: branch, tag or commit of the repository.
        dtype: float32, bfloat16 or float16 for all parameters. None keeps the stored dtypes.
            Quantized layers keep their quantized values.
        compute_dtype: dtype of the computation. None takes `dtype`; without that either, it takes
            the dtype in which most parameters are stored.
        token: token for private repositories; True for the one that was stored by logging in.
        cache_dir: folder of downloads.
        local_files_only: use what was downloaded before, and ask no server.
        sharding: where to put the parameters: one sharding for all, a function of path and shape,
            or shardings in the structure of the parameters; the default device if None.
        progress: show bars for what takes longer than a second.
        check_finite: refuse weights that are NaN or infinite.
        part: a further model that the same files hold, such as "vqmodel" of a Janus.

    Returns:
        The forward and its parameters.

    Raises:
        ValueError: if the checkpoint cannot be found, read, recognized or placed. The message lists
            everything that is wrong with the tensors.
        ImportError: for a pickle, if torch is not installed.
    """
    path = resolve(
        repo_or_dir,
        subfolder=subfolder,
        variant=variant,
        revision=revision,
        token=token,
        cache_dir=cache_dir,
        local_files_only=local_files_only,
        progress=progress,
    )
    weights = open_weights(
        path, dtype=dtype, compute_dtype=compute_dtype, check_finite=check_finite, part=part
    )
    placements = _placements(sharding, weights.leaves)
    params = {}
    total = sum(map(_bytes, weights.leaves.values()))
    with tqdm(
        total=total, desc="loading", unit="B", unit_scale=True, delay=1, disable=not progress
    ) as bar:
        for name, placement in placements.items():
            params[name] = _place(weights.read(name), placement)
            bar.update(_bytes(weights.leaves[name]))
    weights.inspection.raise_faults()
    return weights.forward, nest_params(params)


def describe(
    repo_or_dir: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    **remote: Any,
) -> dict[str, Any]:
    """Describe a checkpoint by its configuration and the headers of its files. Nothing is loaded.

    Args:
        repo_or_dir, subfolder, variant: as in `from_pretrained`.
        remote: `revision`, `token`, `cache_dir`, `local_files_only`, as there.

    Returns:
        A dictionary with model, layout, config, parameters (how many the model has, without
        copies), dtype (of most of them), compute_dtype (in which they would be computed),
        weight_bytes (of the tensors as stored) and programs (how many its blocks are if equal ones
        are scanned, see `effjax.scanning`).
    """
    weights = open_weights(resolve(repo_or_dir, subfolder=subfolder, variant=variant, **remote))
    stored = [Spec(tensor.shape, tensor.dtype).bytes_ for tensor in weights.tensors.values()]
    return {
        "model": weights.forward.model.__name__,
        "layout": weights.layout,
        "config": dataclasses.asdict(weights.forward.config),
        "parameters": sum(math.prod(leaf.shape) for leaf in weights.leaves.values()),
        "dtype": weights.forward.config.param_dtype,
        "compute_dtype": weights.forward.config.dtype,
        "weight_bytes": sum(stored),
        "programs": describe_runs(example_runs(weights.forward, nest_params(weights.leaves))),
    }


def save_pretrained(
    forward: Forward,
    params: Params,
    dst: str | os.PathLike,
    *,
    max_shard_bytes: int = SHARD_BYTES,
    layout: str | None = None,
    progress: bool = True,
    finish: Callable[[Path], object] = lambda directory: None,
) -> dict[str, Any]:
    """Write a model as a checkpoint that PyTorch libraries read.

    The checkpoint is a directory with config.json and safetensors, which are sharded if they are
    large. A model that methods have patched has no such form; use `effjax.save` for it.

    Args:
        forward: the model without patches.
        params: its parameters: arrays of float32, bfloat16 or float16, and quantized leaves of 4 or
            8 bits without smoothing scale and rotation, which are written as compressed-tensors.
        dst: directory to make. It takes its name when it is complete.
        max_shard_bytes: largest size of a weight file.
        layout: which names the tensors get, one of this family's layouts; None for the usual one.
        progress: show a bar for what takes longer than a second.
        finish: function that is called with the directory before it takes its name, to add files.

    Returns:
        A dictionary of what was written: model, layout, files, parameters (as stored) and bytes.

    Raises:
        ValueError: for a compressed model, parameters that do not fit, or an occupied `dst`.
    """
    forward = unscanned(forward)
    if forward.patches or METHODS in params:
        raise ValueError("checkpoints of this layout hold no patches or methods; use effjax.save")
    forward.module(params)  # names every parameter that does not fit
    leaves = flatten_params(unstack_params(params))
    wrong = [
        f"{name}: {getattr(leaf, 'dtype', type(leaf).__name__)}"
        for name, leaf in leaves.items()
        if not isinstance(leaf, QTensor)
        and (not isinstance(leaf, jax.Array | np.ndarray) or leaf.dtype not in FLOATS)
    ]
    if wrong:
        raise ValueError(
            "these parameters are no arrays of float32, bfloat16 or float16 and no quantized "
            "leaves (use effjax.save for other compressed ones):\n  " + "\n  ".join(wrong)
        )
    return write_model(
        dst,
        family_of_config(forward.config),
        layout,
        forward.config,
        leaves,
        lambda name: jax.tree.map(to_host, leaves[name]),
        max_shard_bytes=max_shard_bytes,
        progress=progress,
        finish=finish,
    )


def write_model(
    dst: str | os.PathLike,
    family: Family,
    layout: str | None,
    config: Any,
    leaves: Mapping[str, Any],
    read: Callable[[str], Any],
    *,
    max_shard_bytes: int,
    progress: bool,
    finish: Callable[[Path], object] = lambda directory: None,
) -> dict[str, Any]:
    """Write parameters that `read` gives by path.

    `finish` may add to the directory, or still reject what was read, before it takes its name.
    """
    layout = layout or family.written_layout(config)
    if layout not in family.tables:
        raise ValueError(
            f"{family.class_name} has no layout {layout!r}; there are {sorted(family.tables)}"
        )
    table = family.tables[layout]
    binding = table.bind(leaves)
    shapes = binding.source_shapes({name: tuple(leaf.shape) for name, leaf in leaves.items()})
    quantized = any(isinstance(leaf, QTensor) for leaf in leaves.values())
    leaves, read = quantized_export.without_orders(leaves, read, config.param_dtype)
    read = functools.lru_cache(maxsize=1)(read)  # a stack is written matrix by matrix
    schemes = quantized_export.schemes(binding, leaves)
    specs: dict[str, Spec] = {}
    readers: dict[str, Callable[[], np.ndarray]] = {}
    for source, pieces in binding.sources.items():
        if source not in schemes:
            specs[source] = Spec(shapes[source], np.dtype(leaves[pieces[0].target].dtype))
            readers[source] = functools.partial(binding.assemble, source, read)
            continue
        for name, spec in schemes[source].written(shapes[source]).items():
            full = f"{source.removesuffix('weight')}{name}"
            specs[full] = spec
            readers[full] = functools.partial(schemes[source].assemble, name, pieces, read)
    dense = (leaf.dtype for leaf in leaves.values() if not isinstance(leaf, QTensor))
    common = next(dense, FLOATS[0])
    for buffer in table.buffers:
        if buffer.written:
            value = buffer.value(config).astype(common)
            specs[buffer.source] = Spec(value.shape, value.dtype)
            readers[buffer.source] = functools.partial(np.asarray, value)
    described = family.write_config(config)
    if "architectures" not in described:  # how transformers says it
        described = {"_class_name": family.class_name, **described}
    if quantized:
        described[quantization_config.KEY] = quantization_config.write_config(binding, schemes)
    with new_directory(Path(os.path.expanduser(dst))) as directory:
        files = write_shards(
            directory,
            table.stem,
            specs,
            lambda name: readers[name](),
            max_shard_bytes=max_shard_bytes,
            progress=progress,
        )
        write_json(directory / "config.json", described)
        finish(directory)
    computed = [specs[buffer.source].shape for buffer in table.buffers if buffer.written]
    return {
        "destination": str(dst),
        "model": family.class_name,
        "layout": layout,
        "files": files,
        "parameters": sum(map(math.prod, [*shapes.values(), *computed])),
        "bytes": sum(spec.bytes_ for spec in specs.values()),
    }


def _bytes(leaf: Leaf) -> int:
    return sum(math.prod(array.shape) * array.dtype.itemsize for array in jax.tree.leaves(leaf))


def _place(value: np.ndarray | QTensor, placement: Sharding | QTensor | None) -> Any:
    """Put an array, or all of a quantized leaf, where it belongs."""
    if isinstance(placement, QTensor):
        return jax.tree.map(place, value, placement)
    return jax.tree.map(functools.partial(place, sharding=placement), value)


def _placements(
    sharding: Placement, leaves: Mapping[str, Leaf]
) -> dict[str, Sharding | QTensor | None]:
    """A sharding for every parameter; those that do not fit are all named.

    One that cuts a quantized layer's matrix says where each of its parts goes.
    """
    if sharding is None:
        return dict.fromkeys(leaves)
    found: dict[str, Any]
    if isinstance(sharding, Sharding):
        found = dict.fromkeys(leaves, sharding)
    elif isinstance(sharding, Mapping):
        found = flatten_params(sharding)
    else:
        found = {name: sharding(name, leaf.shape) for name, leaf in leaves.items()}
    problems = [f"{name}: no such parameter" for name in found if name not in leaves]
    problems += [f"{name}: no sharding is given" for name in leaves if name not in found]
    for name in (name for name in leaves if name in found):
        if not isinstance(found[name], Sharding):
            problems.append(f"{name}: must be a jax.sharding.Sharding, got {found[name]!r}")
            continue
        try:
            found[name].shard_shape(leaves[name].shape)
            if isinstance(leaves[name], QTensor) and isinstance(found[name], NamedSharding):
                axes = (*found[name].spec, *[None] * leaves[name].ndim)[: leaves[name].ndim]
                found[name] = leaf_sharding(leaves[name], found[name].mesh, axes)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise ValueError("these shardings do not fit:\n  " + "\n  ".join(problems))
    return {name: found[name] for name in leaves}
