"""Attention whose heads have arrow windows, as shares of dense attention's time.

    python -m experiments.kernels.arrow        (for a GPU see experiments.kernels.gpu)

The heads of SD3 and of FLUX at 1,024 pixels (f = 8 of SD3 leaves out 75 % of the logits). Rows: all
heads dense, all with one window, all left out, and mixtures; widths of windows are data, or static.
`share_of_ideal` is (visible pairs / all pairs) x dense time / time. Programs alternate; times are
the best of each. `--quick` is small, and writes nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from experiments import report
from experiments.kernels.timing import best_seconds
from pallas_kernels.arrow_attention import arrow_attention
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Arrow, visible_pairs

FACTORS = 8, 16, 32  # windows of a part of the image
MODELS: dict[str, dict[str, Any]] = {
    "SD3": {"text": 333, "text_first": False, "width": 64},
    "FLUX": {"text": 512, "text_first": True, "width": 128},
}


def rows(model: str, image: int, heads: int, repeats: int, dtype: Any = jnp.float32) -> report.Rows:
    """One model's heads against its dense attention."""
    own = dict(MODELS[model])
    width, tokens = own.pop("width"), image + own["text"]
    noise = jax.random.split(jax.random.key(0), 4)
    q, k, v, kept = (jax.random.normal(key, (1, tokens, heads, width), dtype) for key in noise)
    windows = [image // (2 * factor) for factor in FACTORS]
    widths = (-1, 0, *windows[::-1])
    at_run_time = jax.jit(partial(arrow_attention, widths=widths, **own))
    mixed = [(-1, 0, *windows)[head % len(widths)] for head in range(heads)]
    half = [-1 if head % 2 else 0 for head in range(heads)]
    plans = {
        "dense": [-1] * heads,
        "kept": [0] * heads,
        "half dense, half kept": half,
        "all widths": mixed,
    } | {f"window, f = {f}": [w] * heads for f, w in zip(FACTORS, windows)}
    programs: dict[tuple[str, str], Callable[[], Any]] = {
        ("dense attention", ""): partial(jax.jit(dense_attention), q, k, v)
    }
    for name, plan in plans.items():
        data = jnp.asarray(plan)
        programs[name, "at run time"] = partial(at_run_time, q, k, v, data, kept=kept)
        static = jax.jit(partial(arrow_attention, window=tuple(plan), **own))
        programs[name, "static"] = partial(static, q, k, v, kept=kept)
    seconds = best_seconds(programs, repeats)
    dense = seconds["dense attention", ""]
    found = []
    for (name, known), taken in seconds.items():
        plan = plans.get(name, [-1] * heads)
        seen = sum(visible_pairs(Arrow(each, **own), tokens) for each in plan) / heads / tokens**2
        found.append(
            {
                "model": model,
                "tokens": tokens,
                "heads": name,
                "windows": known,
                "visible": seen,
                "of_dense": taken / dense,
                "share_of_ideal": seen * dense / taken,
            }
        )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=int, default=4096, help="image tokens")
    parser.add_argument("--heads", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="small sizes; no results are written")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.image, arguments.repeats = 256, 1
    table: report.Rows = []
    for model in MODELS:
        table += rows(model, arguments.image, arguments.heads, arguments.repeats)
    print(report.markdown(table), flush=True)
    if not arguments.quick:
        report.write(
            "kernels_arrow_cpu",
            title="Arrow windows by head, on a CPU",
            command=f"python -m experiments.kernels.arrow --image {arguments.image} "
            f"--heads {arguments.heads} --repeats {arguments.repeats}",
            shares_of_dense_attention=table,
        )


if __name__ == "__main__":
    main()
