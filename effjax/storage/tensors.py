"""Tensors in memory: the dtypes that they may have, casting, and their place on devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax.typing import DTypeLike

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


class Spec(NamedTuple):
    """Shape and dtype of a tensor that will be written."""

    shape: Shape
    dtype: np.dtype

    @property
    def bytes_(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


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
        """Note values that are not finite, if asked; quantized ones are."""
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
