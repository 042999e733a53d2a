"""Writing safetensors: one tensor at a time, into one file or several with an index."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from effjax.storage.json_files import write_json
from effjax.storage.tensors import DTYPES, Spec

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_shards(
    directory: Path,
    stem: str,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    *,
    max_shard_bytes: int,
    progress: bool,
    notes: Mapping[str, str] | None = None,
) -> list[str]:
    """Write tensors into one safetensors file, or into several with an index.

    Args:
        specs: what will be written, by tensor name.
        read: gives one tensor; it is written before the next is asked for.
        max_shard_bytes: size of the tensors in one file; only a single tensor may be larger.
        notes: what readers must know of a tensor, by its name, for the metadata of its file.

    Returns:
        Names of the weight files.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    # Wide dtypes first, so that every tensor is aligned in its file.
    ordered = sorted(specs, key=lambda name: (-specs[name].dtype.itemsize, name))
    shards: list[list[str]] = [[]]
    filled = 0
    for name in ordered:
        if shards[-1] and filled + specs[name].bytes_ > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += specs[name].bytes_
    count = len(shards)
    numbers = [f"-{k:05d}-of-{count:05d}" for k in range(1, count + 1)] if count > 1 else [""]
    files = [f"{stem}{number}.safetensors" for number in numbers]
    total = sum(spec.bytes_ for spec in specs.values())
    with tqdm(
        total=total, desc="writing", unit="B", unit_scale=True, delay=1, disable=not progress
    ) as bar:
        for file, names in zip(files, shards):
            held = {name: specs[name] for name in names}
            said = {name: text for name, text in (notes or {}).items() if name in held}
            write_safetensors(directory / file, held, read, bar.update, said)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(directory / f"{stem}.safetensors.index.json", index)
    return files


def write_safetensors(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    written: Callable[[int], Any] = lambda bytes_: None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write one file in the order of `specs`, holding one tensor at a time."""
    metadata = {"format": "pt", **(notes or {})}  # readers ask for the format
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, spec in specs.items():
        begin, end = end, end + spec.bytes_
        header[name] = {
            "dtype": _NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)  # tensors begin where vector instructions like it
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            array = read(name)
            if (array.shape, array.dtype) != spec:
                raise ValueError(
                    f"{name} was announced as {spec.dtype}{list(spec.shape)} and is "
                    f"{array.dtype}{list(array.shape)}"
                )
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            written(spec.bytes_)
