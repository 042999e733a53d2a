"""Do LiteVAR's windows save the seconds of the pairs that they leave out?

    python -m experiments.scale_windows

Attention of VAR's scales at more tokens per side than the released models have, float32, with a
plan that keeps as many pairs as the paper's (0.2966), in windows that differ from head to head.
Dense attention and windows take turns; a program attends with all scales, or with the last one. The
goal is at most 1.6 times the kept share of dense attention's seconds, at four times as many tokens
per side. (Of the last scale's 4096 tokens; 3.2 times as many per side make it 2601.)
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import numpy as np

from effjax.layers.scales import ScaleCore, Scales, token_starts
from effjax.methods.attention.litevar import LiteVARPlan, windowed_pairs
from effjax.methods.attention.litevar.patch import WindowedCore
from effjax.models.var import PATCH_NUMS
from experiments import report
from experiments.recipes import turns

KEPT = 0.2966
GOAL = 1.6


def spread(sides: tuple[int, ...], heads: int, share: float) -> LiteVARPlan:
    """Windows of this share of a scale's keys; the last head's are four times the first one's."""
    factors = 2 ** np.linspace(-1, 1, heads)
    windows = []
    for query, key in windowed_pairs(len(sides)):
        widths = np.maximum(1, np.round(share * factors * sides[key] ** 2)).astype(int)
        windows.append((query, key, (tuple(widths.tolist()),)))
    return LiteVARPlan(sides, 1, heads, tuple(windows), "none")


def plan_for(sides: tuple[int, ...], heads: int, kept: float = KEPT) -> LiteVARPlan:
    """The plan that keeps so many pairs, nearly."""
    low, high = 0.0, 1.0
    for _ in range(16):
        middle = (low + high) / 2
        low, high = (low, middle) if spread(sides, heads, middle).kept > kept else (middle, high)
    return spread(sides, heads, low)


def rows(factor: float, heads: int, width: int, repeats: int) -> list[dict[str, Any]]:
    """Seconds of all scales and of the last one, dense and with windows."""
    sides = tuple(round(factor * side) for side in PATCH_NUMS[256])
    plan, starts = plan_for(sides, heads), token_starts(sides)
    cores = {
        "dense": ScaleCore(),
        "windows": WindowedCore(ScaleCore(), plan.rules_of_attention[0], 16, True),
    }
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (1, starts[-1], heads, width)) for key in keys)

    def attend(core: Any, first: int) -> Any:
        def run(q: jax.Array, k: jax.Array, v: jax.Array) -> list[jax.Array]:
            return [
                core(
                    q[:, starts[scale] : starts[scale + 1]],
                    k[:, : starts[scale + 1]],
                    v[:, : starts[scale + 1]],
                    Scales(sides, scale, scale + 1),
                )
                for scale in range(first, len(sides))
            ]

        return jax.jit(run)

    table = []
    for name, first in (("all scales", 0), ("the last scale", len(sides) - 1)):
        programs = {each: attend(core, first) for each, core in cores.items()}
        seconds = turns(
            {each: lambda run=run: run(q, k, v) for each, run in programs.items()}, repeats
        )
        dense = sum(
            side**2 * end for side, end in zip(sides[first:], starts[first + 1 :], strict=True)
        )
        kept, ratio = sum(plan.kept_pairs[first:]) / dense, seconds["windows"] / seconds["dense"]
        table.append(
            {
                "tokens of the last scale": sides[-1] ** 2,
                "attention of": name,
                "kept share": round(kept, 4),
                "dense seconds": round(seconds["dense"], 4),
                "windows seconds": round(seconds["windows"], 4),
                "windows / dense": round(ratio, 3),
                "over the kept share": round(ratio / kept, 2),
                "goal": GOAL,
            }
        )
        print(table[-1], flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="LiteVAR's windows beside dense attention")
    parser.add_argument("--factors", type=float, nargs="+", default=[3.2, 4.0])
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="256 pixels; no results are written")
    arguments = parser.parse_args()
    factors = [1.0] if arguments.quick else arguments.factors
    sizes = arguments.heads, arguments.width, arguments.repeats
    table = [row for factor in factors for row in rows(factor, *sizes)]
    if arguments.quick:
        return
    report.write(
        "scale_windows",
        title="LiteVAR: seconds of windows beside the pairs that they keep",
        command="python -m experiments.scale_windows",
        windows=table,
    )


if __name__ == "__main__":
    main()
