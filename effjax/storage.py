"""Tensors on disk: safetensors files read and written one tensor at a time, complete or not at all.

Files are mapped, so a tensor is a view of the file and costs no memory of its own; the header is
checked first. (The safetensors package copies what it reads and wants all tensors to write any.)
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import glob
import json
import math
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike
from tqdm.auto import tqdm

Shape = tuple[int, ...]

DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}

FLOATS = tuple(map(np.dtype, (np.float32, ml_dtypes.bfloat16, np.float16)))  # of weights

_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 64
_PICKLES = (b"PK\x03\x04", *(bytes((0x80, protocol)) for protocol in range(2, 6)))


class Tensor(NamedTuple):
    """A tensor on disk; `read` gives it as a view of the file."""

    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: naming the file, if it cannot be read, is no JSON in UTF-8, has a key twice, or
            holds something other than an object.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} {stand_in(text[:64]) or f'is not valid JSON: {error}'}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object, whose keys are all different.

    Raises:
        ValueError: for anything else.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            raise ValueError(f"keys stand twice: {[key for key in found if counts[key] > 1]}")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got a {type(value).__name__}")
    return value


def stand_in(start: bytes) -> str | None:
    """What stands in the place of a file that begins so, if it is known not to be the file."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file; download it again"
    return None


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


def float_dtype(dtype: DTypeLike) -> np.dtype:
    """One of the dtypes that weights may have."""
    with contextlib.suppress(TypeError):
        if (found := np.dtype(dtype)) in FLOATS:
            return found
    raise ValueError(f"dtype must be one of {[str(d) for d in FLOATS]}, got {dtype!r}")


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Casts tensors while they are read, and collects the bad values that it meets.

    Attributes:
        check_finite: whether NaN and infinite values are bad.
        faults: what is wrong, by tensor name.
    """

    check_finite: bool = False
    faults: dict[str, str] = dataclasses.field(default_factory=dict)

    def look(self, name: str, values: np.ndarray) -> None:
        """Note values that are not finite, if that is asked for; codes are."""
        if self.check_finite and values.dtype.kind not in "biu":
            finite = np.isfinite(values)
            if count := finite.size - np.count_nonzero(finite):
                self.faults[name] = f"{count} of {finite.size} values are NaN or infinite"

    def cast(self, name: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """Values in an array of its own, of a dtype; note those that are beyond it."""
        self.look(name, values)
        with np.errstate(over="ignore", invalid="ignore"):
            converted = values.astype(dtype)  # in the order of the file, which is fast
        if converted.dtype != values.dtype:
            beyond = np.count_nonzero(np.isinf(converted)) - np.count_nonzero(np.isinf(values))
            if beyond:
                self.faults[name] = f"{beyond} values are beyond {converted.dtype}"
        return converted

    def raise_faults(self) -> None:
        """Report the tensors with bad values, once all have been read."""
        if self.faults:
            listed = "\n  ".join(f"{name}: {fault}" for name, fault in sorted(self.faults.items()))
            raise ValueError(
                f"the weights have bad values ({len(self.faults)} problems):\n  {listed}"
            )


_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Spec(NamedTuple):
    """Shape and dtype of a tensor that will be written."""

    shape: Shape
    dtype: np.dtype

    @property
    def bytes_(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name only when it is complete.

    Of two writers to one name the second one fails, with nothing written. What writers left that
    were killed is removed.

    Raises:
        ValueError: if something other than an empty directory has that name, and for directories
            that cannot be replaced.
    """
    path = _free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        try:
            if path.is_dir():
                path.rmdir()
            os.replace(partial, path)
        except OSError as error:
            if not path.exists():
                raise
            raise ValueError(
                f"{path} was written by another program meanwhile, and is left as it is; give "
                f"another name"
            ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Hold a directory until the descriptor is closed or this process ends.

    Returns:
        The descriptor; None if another process holds it, or where directories cannot be locked.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):  # no fcntl on Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(path: Path) -> None:
    """Remove what writers to this name left that were killed: no one holds it."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if (lock := _lock(partial)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _free(path: Path) -> Path:
    """Where a new directory goes, links followed; its name must be free."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; remove it, or give another name")
    if path.exists() and (path.is_mount() or path.samefile(os.curdir)):
        raise ValueError(
            f"{path} cannot be replaced, as it is a mount point or where this program runs; give "
            f"the name of a directory in it"
        )
    return path


def check_destination(path: Path) -> None:
    """Find out before long work whether `new_directory` can make this one; makes its parents.

    Raises:
        ValueError: if that name is taken, or nothing can be written there.
    """
    path = _free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; give another destination") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


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


def place(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """Put an array, which nothing else uses, where it belongs; each device gets its part only."""
    if sharding is None:
        array = jax.device_put(host)  # on CPUs this may be the same memory
    else:
        array = jax.make_array_from_callback(
            host.shape, sharding, lambda index: np.array(host[index])
        )
    return array.block_until_ready()  # `host` can go before the next tensor is read


def to_host(leaf: jax.Array | np.ndarray) -> np.ndarray:
    """One parameter on the host. np.asarray would keep its copy as long as the array lives."""
    if isinstance(leaf, np.ndarray):
        return leaf
    if not leaf.is_fully_addressable:
        raise ValueError("parameters on devices of other processes cannot be written from here")
    host = np.empty(leaf.shape, leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            host[shard.index] = np.asarray(shard.data)
    return host
