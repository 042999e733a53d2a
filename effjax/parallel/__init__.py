"""Models on several devices."""

from effjax.parallel.sharding import (
    CACHES,
    Rule,
    device_mesh,
    leaf_sharding,
    shard,
    shardings,
    tensor_parallel,
)

__all__ = [
    "CACHES",
    "Rule",
    "device_mesh",
    "leaf_sharding",
    "shard",
    "shardings",
    "tensor_parallel",
]
