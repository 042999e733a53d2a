"""Speculative Jacobi decoding against plain decoding: calls, seconds, and where it wins.

    python -m experiments.jacobi_speed MODEL     a LlamaGen pipeline; a tiny random one if left out

For every window and kind of first draft it prints tokens per call, seconds per image and their
ratio to plain decoding, and t(W) / t(1), the time of a call of W tokens as a share of one's: it
wins where tokens per call are more. Programs take turns, so that what else the machine does hits
all of them; the fastest of `--repeats` counts. A batch takes the calls of its slowest row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from typing import Any

import jax
import numpy as np

import effjax
from effjax import testing
from effjax.autoregression import NextToken
from effjax.generate import JacobiDecoding
from effjax.pipelines import NextTokenPipeline


def decoders(windows: tuple[int, ...]) -> dict[str, JacobiDecoding]:
    """What is compared with plain decoding, by name."""
    published = JacobiDecoding(noise="call")
    found = {}
    for window in windows:
        for initial in ("random", "repeat_horizon"):
            decoder = JacobiDecoding(window=window, initial=initial)
            found[f"window {window}, {initial}"] = decoder
    last = windows[-1]
    return found | {
        f"window {last}, new noise in each call": dataclasses.replace(published, window=last),
        f"window {last}, plain Jacobi": dataclasses.replace(
            published, window=last, acceptance="equal"
        ),
    }


def measure(
    pipe: NextTokenPipeline,
    loop: NextToken,
    batch: int,
    windows: tuple[int, ...],
    repeats: int,
) -> list[dict[str, Any]]:
    """Rows of figures of one batch, plain decoding first."""
    labels = np.arange(batch) % pipe.forward.config.num_classes
    cond, key = pipe.conditions(labels.tolist())[0], jax.random.key(0)
    loops = {"plain": loop}
    for name, decoder in decoders(windows).items():
        loops[name] = dataclasses.replace(loop, decoder=decoder)
    run = jax.jit(lambda loop, params: loop.tokens(pipe.forward, params, cond, key))
    seconds, calls = dict.fromkeys(loops, float("inf")), {}
    for repeat in range(repeats + 1):  # the first one compiles
        for name, each in loops.items():
            began = time.perf_counter()
            _, taken = jax.block_until_ready(run(each, pipe.params))
            calls[name] = np.asarray(taken)
            if repeat:
                seconds[name] = min(seconds[name], time.perf_counter() - began)
    call = {name: seconds[name] / calls[name].max() for name in loops}
    return [
        {
            "batch": batch,
            "decoder": name,
            "calls": float(calls[name].mean()),
            "tokens_per_call": float(loop.calls / calls[name].mean()),
            "seconds_per_image": seconds[name] / batch,
            "times_faster": seconds["plain"] / seconds[name],
            "call_to_plain_call": call[name] / call["plain"],
        }
        for name in loops
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", nargs="?")
    parser.add_argument("--windows", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--json", help="file of results")
    arguments = parser.parse_args()
    if arguments.model is None:
        subject = testing.tiny_llamagen(grid=8)
        vae = testing.tiny_vq_model(vocab_size=subject.forward.config.vocab_size)
        pipe: Any = NextTokenPipeline(subject.forward, subject.params, vae)
    else:
        pipe = effjax.pipeline(arguments.model)
    loop = pipe.sampler(guidance_scale=arguments.guidance, top_k=arguments.top_k)
    rows = []
    for batch in arguments.batches:
        rows += measure(pipe, loop, batch, tuple(arguments.windows), arguments.repeats)
    print(
        f"{'decoder':40}{'batch':>6}{'calls':>8}{'tokens/call':>13}{'t(W)/t(1)':>11}{'faster':>8}"
    )
    for row in rows:
        print(
            f"{row['decoder']:40}{row['batch']:>6}{row['calls']:>8.1f}{row['tokens_per_call']:>13.2f}"
            f"{row['call_to_plain_call']:>11.2f}{row['times_faster']:>8.2f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
