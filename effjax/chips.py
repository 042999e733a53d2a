"""TPUs that are not there: chips to compile for, ahead of time, with libtpu alone.

Importing this module sets what libtpu wants to see on a machine without a TPU, so import it before
JAX starts a backend. Nothing can be run on these chips.
"""

from __future__ import annotations

import math
import os
from functools import cache
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jax.sharding import SingleDeviceSharding

TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",  # a device is one of a chip's two
}


@cache
def chip(name: str) -> SingleDeviceSharding:
    """One chip, as the sharding of a program's arguments: it makes XLA compile for that chip.

    Args:
        name: a key of `TOPOLOGIES`.

    Raises:
        RuntimeError: if libtpu is not installed (the `tpu` extra).
    """
    return SingleDeviceSharding(_devices(TOPOLOGIES[name])[0])


@cache
def chips(name: str, number: int) -> tuple[Any, ...]:
    """Several chips, for a mesh to compile for: `device_mesh(chips("v5e", 8), model=8)`.

    Args:
        name: a key of `TOPOLOGIES`.
        number: of them, at most as many as one slice may have.

    Raises:
        ValueError: for another name, or a number below 1.
        RuntimeError: if libtpu is not installed (the `tpu` extra).
    """
    if name not in TOPOLOGIES or number < 1:
        raise ValueError(
            f"give at least 1 chip, of one of {sorted(TOPOLOGIES)}; got {number} of {name!r}"
        )
    generation, _, shape = TOPOLOGIES[name].partition(":")
    sides = [int(side) for side in shape.split("x")]  # of a host, the least there is
    while math.prod(sides) < number:
        sides[sides.index(min(sides[1::-1]))] *= 2
    return tuple(_devices(f"{generation}:{'x'.join(map(str, sides))}"))[:number]


@cache
def _devices(topology: str) -> list[Any]:
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
