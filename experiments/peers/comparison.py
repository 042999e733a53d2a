"""One row: the ratio of two programs, or of bytes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax

from experiments.kernels.timing import best_seconds

Row = dict[str, Any]

HAS_TORCH = all(map(importlib.util.find_spec, ("torch", "diffusers", "transformers")))


def torch_device() -> str:
    """Where torch runs: beside JAX, if it can."""
    import torch

    beside = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return "cuda" if beside else "cpu"


def timed(
    what: str,
    programs: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    at_most: float | None = None,
) -> Row:
    """Time the first program against the second; the ratio is aimed to be `at_most` so much."""
    (own, other) = programs
    seconds = best_seconds(programs, repeats)
    return {
        "what": what,
        "measured": own,
        "against": other,
        "ratio": seconds[own] / seconds[other],
        "at_most": at_most,
        "seconds": seconds[own],
    }


def extra_memory(what: str, program: jax.stages.Wrapped, *operands: Any, at_most: float) -> Row:
    """Temporary bytes of a program as a share of its first operand's."""
    stats = program.lower(*operands).compile().memory_analysis()
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(operands[0]))
    return {
        "what": what,
        "measured": "temporaries",
        "against": "weights",
        "ratio": stats.temp_size_in_bytes / held,
        "at_most": at_most,
        "seconds": None,
    }
