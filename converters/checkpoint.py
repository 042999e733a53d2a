"""Tensors of checkpoint files, read one at a time.

safetensors files are mapped, so a tensor is a view of the file and costs no memory of its own; the
header is checked first. Pickles need torch, which reads their tensors without running their code.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.names import Shape

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLES)

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}

_MAX_HEADER_BYTES = 100_000_000


class Tensor(NamedTuple):
    """A tensor on disk; `read` gives it as a view of the file."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, or of all shards that an index lists.

    Args:
        path: `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`, or the index of a sharded one.

    Raises:
        ValueError: if a file is missing, truncated, corrupt, or not what its name says.
        ImportError: for a pickle, if torch is not installed.
    """
    if path.name.endswith(".index.json"):
        return _open_shards(path)
    if path.name.endswith(".safetensors"):
        return _open_safetensors(path)
    if path.name.endswith(PICKLES):
        return _open_pickle(path)
    raise ValueError(f"{path} is no weight file; their names end in {', '.join(SUFFIXES)}")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(value).__name__}")
    return value


def index_files(path: Path) -> dict[str, str]:
    """File name by tensor name, from the index of a sharded checkpoint."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} lists no tensors: it has no weight_map")
    outside = sorted({str(file) for file in files.values() if Path(str(file)).name != file})
    if outside:
        raise ValueError(f"{path} lists files that are not beside it: {outside}")
    return files


def _open_shards(index: Path) -> dict[str, Tensor]:
    files = index_files(index)
    shards = sorted(set(files.values()))
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: "
            f"{', '.join(missing)}. Download or copy them again."
        )
    tensors: dict[str, Tensor] = {}
    problems = []
    for shard in shards:
        held = open_checkpoint(index.parent / shard)
        problems += [f"{name} stands in {shard} and in another" for name in held if name in tensors]
        absent = [name for name, file in files.items() if file == shard and name not in held]
        problems += [f"{name} is not in {shard}" for name in absent]
        tensors |= held
    if problems:
        raise ValueError(f"{index} does not agree with its shards:\n  " + "\n  ".join(problems))
    return tensors


def _open_safetensors(path: Path) -> dict[str, Tensor]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        if start.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
            raise ValueError(
                f"{path} is a pickle, not safetensors. If you trust where it comes from, give it "
                f"the suffix .pt, and torch will read its tensors."
            )
        if start.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a Git LFS pointer, not the file; run `git lfs pull`")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or no safetensors file: {size} bytes, of which the header "
                f"would take {length + 8}. Download it again."
            )
        file.seek(8)
        header = file.read(length)
    entries, data_bytes = _parse_header(path, header)
    if data_bytes != size - 8 - length:
        raise ValueError(
            f"{path} is truncated or corrupt: its header announces {data_bytes} bytes of tensors, "
            f"it holds {size - 8 - length}. Download it again."
        )
    mapped = np.memmap(path, np.uint8, mode="r", offset=8 + length) if data_bytes else b""
    data = np.asarray(mapped) if data_bytes else np.empty(0, np.uint8)
    return {
        name: Tensor(shape, dtype, functools.partial(_view, data, begin, dtype, shape))
        for name, (dtype, shape, begin) in entries.items()
    }


def _parse_header(path: Path, header: bytes) -> tuple[dict[str, tuple[np.dtype, Shape, int]], int]:
    """Dtype, shape and offset by name, and the size of all tensors, which must leave no gaps."""
    entries: dict[str, tuple[np.dtype, Shape, int]] = {}
    spans = []
    try:
        for name, entry in json.loads(header).items():
            if name == "__metadata__":
                continue
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            if min((0, *shape)) < 0 or end - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"{name} of shape {list(shape)} has {end - begin} bytes")
            entries[name] = (dtype, shape, begin)
            spans.append((begin, end))
        spans.sort()
        ends = [0, *(end for _, end in spans)]
        if ends[:-1] != [begin for begin, _ in spans]:
            raise ValueError("its tensors overlap or leave gaps")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        detail = f"unknown dtype or field {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} has a corrupt safetensors header: {detail}") from None
    return entries, ends[-1]


def _view(data: np.ndarray, begin: int, dtype: np.dtype, shape: Shape) -> np.ndarray:
    end = begin + math.prod(shape) * dtype.itemsize
    return data[begin:end].view(dtype).reshape(shape)


def _open_pickle(path: Path) -> dict[str, Tensor]:
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is a pickle, which only torch reads: install effjax[torch], or use a "
            f"safetensors file"
        ) from None
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # older files cannot be mapped, and are read whole
    try:
        # Training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many kinds for bad files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch cannot read {path} as weights: {reason}") from error
    for key in ("ema", "state_dict", "model"):  # averaged weights first, as their authors sample
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not tensors by name")
    tensors = {name: tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}
    return {
        name: Tensor(tuple(tensor.shape), _numpy_dtype(tensor), functools.partial(_array, tensor))
        for name, tensor in tensors.items()
    }


def _numpy_dtype(tensor: Any) -> np.dtype:
    return _array(tensor[:0] if tensor.ndim else tensor).dtype


def _array(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy view; numpy knows bfloat16 by another name."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
