"""Weights of few bits on the bundled tiny language model: what rounding costs, and who loses least.

    python -m experiments.llm.weights

The same questions and held-out passages for every recipe, as in `experiments.llm.retrieval`. AWQ
and GPTQ see texts of the training part alone. A bit width counts the quantized values of attention
and feed-forward layers; bytes are those of all weights, in float32 where they have no quantized
values.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from typing import Any

import jax.numpy as jnp

from effjax.bundled.retrieval import right
from effjax.cost import weight_bytes
from effjax.methods.quantization import awq, gptq, round_to_nearest
from effjax.transform import Pair, identity
from experiments import report
from experiments.llm.retrieval import QUESTIONS, Subject, perplexity, token_batches

GROUP = 32  # inputs with a common scale, of 128 or 320
LENGTH = 512
BITS = (4, 3)  # of weights alone


def recipes(subject: Subject, texts: int) -> dict[tuple[str, str], Callable[..., Pair]]:
    """Transforms by (bits, recipe)."""
    inputs = [(jnp.asarray(each),) for each in islice(token_batches(subject.training), texts // 4)]
    found: dict[tuple[str, str], Callable[..., Pair]] = {
        ("float32", "dense"): identity,
        ("W8A8", "round to nearest"): round_to_nearest.transform(round_to_nearest.uniform(8, 8)),
    }
    for bits in BITS:
        grouped: dict[str, Any] = {"group_size": GROUP}
        nearest = round_to_nearest.uniform(bits, round_to_nearest.FLOAT, **grouped)
        found[f"W{bits}A16", "round to nearest"] = round_to_nearest.transform(nearest)
        scaled = awq.uniform(bits, **grouped)
        found[f"W{bits}A16", "AWQ"] = awq.transform(
            scaled, awq.fit(scaled, *subject.exact, inputs, progress=False)
        )
        for recipe, act_order in (("GPTQ", False), ("GPTQ, act_order", True)):
            spread = gptq.uniform(bits, **grouped, act_order=act_order)
            found[f"W{bits}A16", recipe] = gptq.transform(
                spread, gptq.fit(spread, *subject.exact, inputs, progress=False)
            )
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", type=int, default=64, help="with eight questions each")
    parser.add_argument("--passages", type=int, default=64, help="for the perplexity")
    parser.add_argument("--texts", type=int, default=64, help="that AWQ and GPTQ see")
    arguments = parser.parse_args(argv)
    subject = Subject.load()
    documents = subject.lookups(LENGTH, arguments.documents, seed=2)
    rows: report.Rows = []
    for (bits, recipe), transform in recipes(subject, arguments.texts).items():
        pair = transform(*subject.exact)
        rows.append(
            {
                "bits": bits,
                "recipe": recipe,
                "weight_bytes": weight_bytes(pair[1]),
                "questions": QUESTIONS * len(documents),
                "right_%": 100 * float(right(pair, documents).mean()),
                "perplexity": perplexity(pair, subject.world, LENGTH, arguments.passages),
            }
        )
        print(report.markdown(rows[-1:]), flush=True)
    report.write(
        "llm_weights",
        title="Weights of few bits on the tiny language model",
        command=f"python -m experiments.llm.weights --documents {arguments.documents} "
        f"--passages {arguments.passages} --texts {arguments.texts}",
        rows=rows,
    )


if __name__ == "__main__":
    main()
