"""Times of programs that take turns, so that what else a machine does hits all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def best_seconds(
    programs: Mapping[Any, Callable[[], Any]], repeats: int, *, calls: int = 1
) -> dict[Any, float]:
    """The best time of each program, warmed up; a pause of the machine counts for none of them.

    Args:
        programs: functions without arguments, whose results are waited for.
        repeats: rounds in which every program is timed once.
        calls: calls to a timing, so that starting a call on an accelerator is not what is measured.
    """
    for run in programs.values():
        jax.block_until_ready(run())
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(repeats):
        for name, run in programs.items():
            began = time.perf_counter()
            jax.block_until_ready([run() for _ in range(calls)][-1])
            best[name] = min(best[name], (time.perf_counter() - began) / calls)
    return best
