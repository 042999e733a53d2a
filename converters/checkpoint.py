"""Tensors of checkpoint files, read one at a time.

safetensors are read by `effjax.storage`. Pickles need torch, which reads their tensors without
running their code.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from effjax.storage import Tensor, is_index, open_safetensors, open_shards, stand_in

PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLES)


def open_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, or of all shards that an index lists.

    Args:
        path: `.safetensors`, `.pt`, `.pth`, `.bin`, `.ckpt`, or the index of a sharded one.

    Raises:
        ValueError: if a file is missing, truncated, corrupt, or not what its name says.
        ImportError: for a pickle, if torch is not installed.
    """
    if is_index(path.name):
        return open_shards(path, open_checkpoint)
    if path.name.endswith(".safetensors"):
        return open_safetensors(path)
    if path.name.endswith(PICKLES):
        return _open_pickle(path)
    refuse_gguf(str(path.parent), [path.name])
    raise ValueError(f"{path} is no weight file; their names end in {', '.join(SUFFIXES)}")


def refuse_gguf(folder: str, names: Iterable[str]) -> None:
    """Raise a ValueError that says what to do if GGUF is among the files of a folder."""
    for name in names:
        if name.endswith(".gguf"):
            raise ValueError(
                f"{name} in {folder} is GGUF, which is not read: load it with transformers' "
                f"from_pretrained(folder, gguf_file={name!r}), save_pretrained it as floats, and "
                f"give that directory"
            )


# Where scripts put weights: averaged ones first, as their authors sample with them.
_WRAPPERS = ("ema", "state_dict", "model", "module")


def _open_pickle(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        start = file.read(64)
    if other := stand_in(start):  # before torch is asked for, which would be no help
        raise ValueError(f"{path} {other}")
    try:
        import torch
    except ImportError:
        raise ImportError(
            f"{path} is a pickle, which only torch reads: install torch (a CPU build will do) or "
            f"use a safetensors file"
        ) from None
    zipped = start.startswith(b"PK\x03\x04")  # older files cannot be mapped, and are read whole
    try:
        # Training scripts keep their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # torch raises many kinds for bad files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"torch cannot read {path} as weights: {reason}") from error
    for key in _WRAPPERS:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping):
        raise ValueError(f"{path} holds a {type(held).__name__}, not tensors by name")
    tensors = {
        name: tensor
        for name, tensor in held.items()
        if isinstance(name, str) and isinstance(tensor, torch.Tensor)
    }
    if not tensors:
        raise ValueError(
            f"{path} holds no tensors by name, of its own or as its {', '.join(_WRAPPERS)}, but "
            f"{sorted(map(str, held))[:5]}. If the weights are somewhere within, write them alone: "
            f"torch.save(weights, path)"
        )
    found = {}
    for name, tensor in tensors.items():
        try:
            dtype = _array(tensor[:0] if tensor.ndim else tensor).dtype
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"{path}: {name} is a tensor of {tensor.dtype}, {tensor.layout}, on "
                f"{tensor.device}, which is no array; save it as dense floats"
            ) from error
        found[name] = Tensor(tuple(tensor.shape), dtype, functools.partial(_array, tensor))
    return found


def _array(tensor: Any) -> np.ndarray:
    """A torch tensor as a numpy view; numpy knows bfloat16 by another name."""
    import torch

    tensor = tensor.detach()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
