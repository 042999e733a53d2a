"""Models on several devices."""

from effjax.parallel.sharding import (
    CACHES,
    TENSOR_PARALLEL,
    Rule,
    device_mesh,
    leaf_sharding,
    shard,
    shardings,
)

__all__ = [
    "CACHES",
    "TENSOR_PARALLEL",
    "Rule",
    "device_mesh",
    "leaf_sharding",
    "shard",
    "shardings",
]
