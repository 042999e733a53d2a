"""A checkpoint seen as the parameters of a model: everything is checked first, then read singly."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from converters import quantization_config
from converters.checkpoint import open_checkpoint
from converters.family import Family, family_of_json, family_of_names
from converters.names import LAYOUTS, Binding, Buffer, Piece, Shape, Table
from converters.quantization_config import Quantization
from converters.quantized import Layer
from effjax.fields import naming
from effjax.forward import Forward, abstract, flatten_params
from effjax.quant import QTensor
from effjax.storage import FLOATS, Inspection, Tensor, float_dtype, read_json

Leaf = jax.ShapeDtypeStruct | QTensor


@dataclasses.dataclass(frozen=True)
class Weights:
    """Parameters by path, read from a checkpoint one at a time.

    Attributes:
        family, layout: what the checkpoint was recognized as.
        forward: the model, without parameters.
        leaves: shapes and dtypes of the parameters as they are read, by path; a `QTensor` of them
            for a quantized layer.
        tensors: of the checkpoint, by name.
        layers: those that are quantized, by the name of the tensor in whose place they stand.
        inspection: what casts parameters, and collects their bad values.
    """

    family: Family
    layout: str
    forward: Forward
    leaves: dict[str, Leaf]
    tensors: dict[str, Tensor]
    layers: dict[str, Layer]
    binding: Binding
    inspection: Inspection

    def read(self, path: str) -> np.ndarray | QTensor:
        """A parameter, in arrays of its own."""
        pieces, leaf = self.binding.targets[path], self.leaves[path]
        if pieces[0].place is None:
            return self._matrix(pieces[0], leaf)
        one = jax.tree.map(lambda part: jax.ShapeDtypeStruct(part.shape[1:], part.dtype), leaf)
        stack = jax.tree.map(lambda part: np.empty(part.shape, part.dtype), leaf)
        for piece in pieces:
            parts = jax.tree.leaves(self._matrix(piece, one))
            for whole, part in zip(jax.tree.leaves(stack), parts, strict=True):
                whole[piece.place] = part
        return stack

    def _matrix(self, piece: Piece, leaf: Leaf) -> np.ndarray | QTensor:
        """A parameter that is one tensor or a part of it, or one matrix of a stack."""
        path = piece.target
        if isinstance(leaf, QTensor):
            layer = self.layers[piece.source]
            if piece.axis or piece.stop - piece.start > 1:
                raise ValueError(
                    f"{layer.name} is quantized as one matrix, of which {path} is a part that "
                    f"cannot be cut from its packed values; load the model in floats"
                )
            value = layer.read(leaf.shape, piece.start, piece.parts)
            self.inspection.look(f"{layer.name}.{layer.scheme.layout.scale}", value.scale)
            if value.block is not None:
                self.inspection.look(f"{layer.name}.{layer.scheme.layout.qvalues}", value.qvalue)
            return value
        value = piece.read(self.tensors[piece.source].read())
        return self.inspection.cast(piece.source, value, leaf.dtype)


def open_weights(
    path: Path,
    *,
    dtype: DTypeLike | None = None,
    compute_dtype: DTypeLike | None = None,
    check_finite: bool = False,
    part: str | None = None,
) -> Weights:
    """Recognize a checkpoint and check that it holds one model, completely.

    Args:
        path: weight file or index; a config.json beside it is read, if there is one.
        dtype: of the parameters, but for those that a model has in one of their own; as stored if
            None.
        compute_dtype: of the computation; that of `dtype` if None, and that of most parameters if
            that is None too.
        check_finite: collect tensors with NaN or infinite values while reading.
        part: a further model in the files, see `Family.parts`.

    Raises:
        ValueError: for a configuration that no converter knows, and for missing, unexpected and
            misshapen tensors, other dtypes, and copies that differ, all listed at once.
    """
    tensors = open_checkpoint(path)
    quantization = _quantization(path)
    with naming(path):
        layers = {} if quantization is None else quantization.layers(tensors)
    layers = {f"{name}.weight": layer for name, layer in layers.items()}
    within = {f"{layer.name}.{part}" for layer in layers.values() for part in layer.tensors}
    dense = {name: tensor for name, tensor in tensors.items() if name not in within}
    family, layout, config = _identify(path, dense, layers, part)
    if family.beyond is not None:
        more = family.beyond(config)
        dense = {name: each for name, each in dense.items() if not name.startswith(more)}
        layers = {name: each for name, each in layers.items() if not name.startswith(more)}
    dtype = None if dtype is None else float_dtype(dtype)
    counts = dict.fromkeys(FLOATS, 0)
    for tensor in dense.values():
        if tensor.dtype in counts:
            counts[tensor.dtype] += math.prod(tensor.shape)
    stored = dtype or max(counts, key=lambda each: counts[each])
    numerics = {"param_dtype": str(stored), "dtype": str(float_dtype(compute_dtype or stored))}
    forward, params = abstract(family.model, dataclasses.replace(config, **numerics))
    made = flatten_params(params)
    shapes = {name: tuple(leaf.shape) for name, leaf in made.items()}
    table = family.tables[layout]
    binding = table.bind(shapes, held={*dense, *layers})
    _raise(
        _problems(table, binding, shapes, config, dense, layers),
        f"{path} does not fit {family.class_name} as its configuration describes it",
    )
    leaves: dict[str, Leaf] = {}
    for name, pieces in binding.targets.items():
        source = pieces[0].source
        if any(each.source in layers for each in pieces):
            leaves[name] = _quantized(pieces, layers, shapes[name])
        else:
            # What a model computes in a dtype of its own, such as a router, stays in it.
            own = made[name].dtype if made[name].dtype != stored else dtype
            leaves[name] = jax.ShapeDtypeStruct(shapes[name], own or dense[source].dtype)
    inspection = Inspection(check_finite)
    return Weights(family, layout, forward, leaves, tensors, layers, binding, inspection)


def _quantized(pieces: tuple[Piece, ...], layers: Mapping[str, Layer], shape: Shape) -> QTensor:
    """The shapes of a quantized leaf, which may be a stack of layers.

    Raises:
        ValueError: for a stack of layers that are quantized in several ways.
    """
    if pieces[0].place is None:
        return layers[pieces[0].source].leaf(shape)
    own = [
        layers[each.source].leaf(shape[1:]) if each.source in layers else None for each in pieces
    ]
    assert any(own)
    other = [each.source for each, leaf in zip(pieces, own) if leaf != own[0]]
    if other:
        raise ValueError(
            f"{other[0]} is quantized in another way than {pieces[0].source}: both are matrices of "
            f"one stack, {pieces[0].target}, which has one way for all"
        )
    count = len(pieces)
    return jax.tree.map(lambda part: jax.ShapeDtypeStruct((count, *part.shape), part.dtype), own[0])


def _quantization(path: Path) -> Quantization | None:
    """What the config.json beside a weight file says of quantized layers, if there are any."""
    config_path = path.with_name("config.json")
    config = read_json(config_path) if config_path.is_file() else {}
    if not config.get(quantization_config.KEY):
        return None
    try:
        return quantization_config.read_config(config[quantization_config.KEY])
    except ValueError as error:
        raise ValueError(f"{config_path}: {error}") from error


def _identify(
    path: Path, tensors: Mapping[str, Tensor], layers: Mapping[str, Layer], part: str | None
) -> tuple[Family, str, Any]:
    """Family, layout and configuration, from config.json or from the tensors alone."""
    names = [*tensors, *layers]
    config_path = path.with_name("config.json")
    if config_path.is_file():
        config = read_json(config_path)
        with naming(config_path):
            family = family_of_json(config).part(part)
            for file in family.beside:
                if (found := path.with_name(file)).is_file():
                    config = {**read_json(found), **config}
            layout = family.layout(names)
            family.check_counts(config, layout, names)
            return family, layout, family.read_config(config)
    family = family_of_names(names).part(part)
    layout = family.layout(names)
    infer = family.tables[layout].infer
    if infer is None:
        raise ValueError(
            f"{path} has no config.json beside it, and {family.class_name}'s {layout} layout does "
            f"not tell the configuration; put it there"
        )
    try:
        config = infer({name: tensor.shape for name, tensor in tensors.items()})
    except (KeyError, IndexError, ZeroDivisionError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else "its shapes are not a model's"
        raise ValueError(f"cannot infer the configuration of {path}: {reason}") from None
    return family, layout, config


def _problems(
    table: Table,
    binding: Binding,
    shapes: Mapping[str, Shape],
    config: Any,
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Layer],
) -> list[tuple[str, str]]:
    """What keeps these tensors and quantized layers from being the model's: (name, fault)."""
    expected = binding.source_shapes(shapes)
    buffers = {buffer.source: buffer for buffer in table.buffers}
    problems = []
    for name, shape in expected.items():
        if name in layers:
            if name in tensors:
                problems.append((name, "stands beside the tensors of a quantized layer"))
            if binding.sources[name][0].layout is LAYOUTS["linear"]:
                problems += layers[name].problems(shape)
            else:
                problems.append((name, "quantized, which only linear layers can be"))
            continue
        if name not in tensors:
            problems.append((name, f"missing, must be {list(shape)}"))
            continue
        given, dtype, _ = tensors[name]
        if given != shape:
            problems.append((name, f"misshapen, is {list(given)}, must be {list(shape)}"))
        if dtype not in FLOATS:
            problems.append((name, f"of dtype {dtype}, must be float32, bfloat16 or float16"))
    for name, tensor in tensors.items():
        if name in buffers:
            if not _computed(tensor, buffers[name], config):
                problems.append((name, "differs from what the model computes in its place"))
        elif not (name in expected or name in binding.aliases or table.ignores(name)):
            layer = layers.get(f"{name.removesuffix('.bias')}.weight")
            if layer is None or not name.endswith(".bias"):
                problems.append((name, "unexpected"))
            elif np.any(tensor.read()):  # writers of GPTQ give every layer one, mostly of zeros
                problems.append((name, "unexpected, and not all zero"))
    problems += [
        (f"{layers[name].name}.{part}", "unexpected")
        for name in layers
        if name not in expected
        for part in layers[name].tensors
    ]
    if problems:
        return problems

    def held(piece: Piece) -> dict[str, np.ndarray]:
        if piece.source in layers:
            parts = layers[piece.source].tensors
            return {part: tensor.read() for part, tensor in parts.items()}
        return {"": piece.read(tensors[piece.source].read())}

    def same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
        return one.keys() == two.keys() and all(_same_bits(one[part], two[part]) for part in one)

    for first, *copies in binding.targets.values():
        if first.place is not None:
            continue
        value = held(first) if copies else {}
        problems += [
            (copy.source, f"differs from its copy {first.source}")
            for copy in copies
            if not same(value, held(copy))
        ]
    problems += [
        (alias, f"differs from its copy {name}")
        for alias, name in binding.aliases.items()
        if alias in tensors and not _same_bits(tensors[alias].read(), tensors[name].read())
    ]
    return problems


def _computed(tensor: Tensor, buffer: Buffer, config: Any) -> bool:
    """Whether a tensor is what the model computes in its place."""
    if tensor.shape != buffer.shape(config) or tensor.dtype not in FLOATS:
        return False
    # tolerance: the buffer may have been rounded to bfloat16
    return bool(np.allclose(tensor.read().astype(np.float32), buffer.value(config), atol=5e-3))


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    return a.dtype == b.dtype and bool(np.array_equal(a.view(bits), b.view(bits)))


def _raise(faults: Iterable[tuple[str, str]], what: str) -> None:
    listed = [f"{name}: {fault}" for name, fault in sorted(faults)]
    if listed:
        raise ValueError(f"{what} ({len(listed)} problems):\n  " + "\n  ".join(listed))
