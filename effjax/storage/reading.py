"""Reading safetensors: a file's header is checked first, and its tensors are views of the file."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effjax.storage.json_files import parse_json, read_json, stand_in
from effjax.storage.tensors import DTYPES, Shape

_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 64
_PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


class Tensor(NamedTuple):
    """A tensor on disk; `read` gives it as a view of the file."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, after its header has been checked.

    Raises:
        ValueError: if the file is truncated, corrupt, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64)
        length = int.from_bytes(start[:8], "little")
        # The first bytes are a length, and may be anything. A header begins with a brace.
        headed = length <= _MAX_HEADER_BYTES and start[8:9] in (b"{", b"")
        if not headed and start.startswith(_PICKLES):
            raise ValueError(
                f"{path} is a pickle, not safetensors. If you trust where it comes from, give it "
                f"the suffix .pt, and torch will read its tensors."
            )
        if not headed and (other := stand_in(start)):
            raise ValueError(f"{path} {other}")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise ValueError(
                f"{path} is truncated or no safetensors file: {size} bytes, of which the header "
                f"would take {length + 8}. Download it again."
            )
        file.seek(8)
        header = file.read(length)
    try:
        entries, data_bytes = _parse_header(header)
    except ValueError as error:
        raise ValueError(f"{path} has a corrupt safetensors header: {error}") from None
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


def metadata(path: Path) -> dict[str, str]:
    """What a safetensors file that was opened says beside its tensors."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    held = parse_json(header).get("__metadata__") or {}
    return {str(name): str(value) for name, value in held.items()}


_Entry = tuple[np.dtype, Shape, int]


def _parse_header(header: bytes) -> tuple[dict[str, _Entry], int]:
    """Dtype, shape and offset by name, and the size of all tensors, which must leave no gaps."""
    entries: dict[str, _Entry] = {}
    spans = []
    for name, entry in parse_json(header).items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape, begin, end = _parse_entry(entry)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from None
        entries[name] = (dtype, shape, begin)
        spans.append((begin, end, name))
    spans.sort()
    end = 0
    for begin, after, name in spans:
        if begin != end:
            raise ValueError(
                f"its tensors overlap or leave gaps: {name} begins at {begin}, must at {end}"
            )
        end = after
    return entries, end


def _parse_entry(entry: Any) -> tuple[np.dtype, Shape, int, int]:
    """Dtype, shape, begin and end of one tensor."""
    if not isinstance(entry, dict):
        raise ValueError(f"must be an object, got {entry!r:.80}")
    held = {}
    for field, length in (("shape", None), ("data_offsets", 2)):
        numbers = held[field] = entry.get(field)
        if (
            not isinstance(numbers, list)
            or len(numbers) > _MAX_AXES
            or len(numbers) != (len(numbers) if length is None else length)
            or not all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        ):
            count = f"up to {_MAX_AXES}" if length is None else length
            raise ValueError(
                f"must have {count} integers from 0 on as {field}, got {numbers!r:.80}"
            )
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"has the unknown dtype {dtype!r:.80}; there are {', '.join(DTYPES)}")
    shape, (begin, end) = held["shape"], held["data_offsets"]
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise ValueError(f"of shape {shape} has {end - begin} bytes, must have {wanted}")
    return DTYPES[dtype], tuple(shape), begin, end


def _view(data: np.ndarray, begin: int, dtype: np.dtype, shape: Shape) -> np.ndarray:
    end = begin + math.prod(shape) * dtype.itemsize
    return data[begin:end].view(dtype).reshape(shape)


def open_shards(
    index: Path, open_shard: Callable[[Path], dict[str, Tensor]] = open_safetensors
) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists, which must agree with it."""
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
        held = open_shard(index.parent / shard)
        problems += [f"{name} stands in {shard} and in another" for name in held if name in tensors]
        absent = [name for name, file in files.items() if file == shard and name not in held]
        problems += [f"{name} is not in {shard}" for name in absent]
        tensors |= held
    if problems:
        raise ValueError(f"{index} does not agree with its shards:\n  " + "\n  ".join(problems))
    return tensors


def is_index(name: str) -> bool:
    """Whether a file of this name is an index, such as "model.safetensors.index.fp16.json"."""
    return re.search(r"\.index(\.[^./]+)*\.json$", name) is not None


def index_files(path: Path) -> dict[str, str]:
    """File name by tensor name, from the index of a sharded checkpoint."""
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise ValueError(f"{path} lists no tensors: it has no weight_map")
    wrong = {name: file for name, file in files.items() if not _is_shard(file)}
    if wrong:
        listed = ", ".join(f"{name}: {file!r:.80}" for name, file in [*wrong.items()][:5])
        raise ValueError(
            f"{path} lists files that are not beside it; weight_map must give the name of a "
            f"weight file for each tensor, and gives {listed}"
        )
    return files


def _is_shard(file: Any) -> bool:
    """Whether this may be the name of a weight file in the folder of its index."""
    return isinstance(file, str) and Path(file).name == file and not file.endswith(".json")
