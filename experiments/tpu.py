"""What is compiled for TPUs that are not there, see `effjax.chips`: import it before JAX starts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from effjax.chips import TOPOLOGIES as TOPOLOGIES  # sets what libtpu wants to see
from effjax.chips import chip as chip

# isort: split
import jax

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")  # those that every kernel compiles for


def on_chip(name: str, shapes):
    """A tree of arrays or shapes as shapes on one chip."""
    place = chip(name)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )


def in_processes(module: str, cases: Iterable[Any]) -> Iterator[dict[str, Any]]:
    """What `python -m module --one CASE` prints last, as JSON: memory is given back after each."""
    from experiments import report

    for case in cases:
        command = [sys.executable, "-m", module, "--one", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-2000:]}")
        row = json.loads(done.stdout.splitlines()[-1])
        print(report.markdown([row]).splitlines()[-1], flush=True)
        yield row
