"""Decoding from long contexts: bytes and time of each kind of cache, one layer of a 7B model.

    python -m experiments.llm.decode

One layer of Llama 2 7B's shape in float32, random weights, a cache that is filled with zeros up to
its length (reading 131,072 tokens takes too long on a CPU). The kinds take turns. MoA's 32 heads
have rules in the proportions of a published plan.
"""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from effjax.cost import state_bytes
from effjax.forward import Forward, Params, abstract
from effjax.generate import PrefixCache, cached, generate
from effjax.methods import cskv, kivi, moa, streaming_llm
from effjax.models.llama import Llama, LlamaConfig
from effjax.testing import random_params
from effjax.transform import identity
from experiments import report
from experiments.kernels.timing import best_seconds

SHAPE = LlamaConfig(vocab_size=64, num_layers=1, max_positions=1 << 18)
# (heads, alpha, beta) of 32, in the proportions of the published plan.
HEADS = (
    (9, 0.0, 0.125),
    (6, 0.0, 0.625),
    (5, 0.0, 0.75),
    (4, 0.0, 0.25),
    (3, 0.0, 0.875),
    (2, -1024.0, 1.0),
    (2, 0.0, 0.5),
    (1, 0.0, 0.375),
)


def moa_plan() -> moa.MoAPlan:
    """A layer with the shares of the published plan."""
    alphas, betas = zip(*[(alpha, beta) for count, alpha, beta in HEADS for _ in range(count)])
    return moa.MoAPlan((alphas,), (betas,))


def filled(forward: Forward, params: Params, length: int, new: int) -> PrefixCache:
    """A prefix cache whose text has `length` tokens, keys and values of zeros."""
    forward = cached(forward).with_cache_length(length, new)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    vocabulary = forward.config.vocab_size
    return PrefixCache(
        forward,
        forward.init(params, token, token),
        jnp.full((1,), length, jnp.int32),
        jnp.zeros((1, vocabulary)),
        jnp.zeros((1, vocabulary), bool),
        jnp.int32(length + new),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32_768, 131_072])
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    forward, shapes = abstract(Llama, SHAPE)
    base = random_params(shapes)
    low = cskv.CSKVPlan(0.15, 0.25)
    learned = cskv.factors(low, forward, base)
    kinds: dict[str, Any] = {
        "dense": identity,
        "moa": moa.transform(moa_plan()),
        "moa, 4 bits": moa.transform(dataclasses.replace(moa_plan(), bits=4)),
        "streaming_llm, half": streaming_llm.transform(streaming_llm.StreamingLLMPlan(ratio=0.5)),
        "kivi, 4 bits": kivi.transform(kivi.KIVIPlan(4, 4)),
        "cskv, 0.2": cskv.transform(low, learned),
    }
    rows = []
    for length in arguments.lengths:
        programs, held = {}, {}
        for name, transform in kinds.items():
            own, params = transform(forward, base)
            prefix = filled(own, params, length, arguments.new)
            held[name] = state_bytes(prefix.state)

            def run(
                own: Forward = own, params: Params = params, prefix: PrefixCache = prefix
            ) -> Any:
                new = arguments.new
                return generate(own, params, prefix=prefix, max_new_tokens=new).tokens

            programs[name] = run
        seconds = best_seconds(programs, arguments.repeats)
        for name, own_seconds in seconds.items():
            rows.append(
                {
                    "tokens": length,
                    "cache": name,
                    "bytes": held[name],
                    "bytes_of_dense": held[name] / held["dense"],
                    "milliseconds_a_token": 1000 * own_seconds / arguments.new,
                    "time_of_dense": own_seconds / seconds["dense"],
                }
            )
        print(report.markdown(rows[-len(kinds) :]), flush=True)
        report.write(
            f"llm_decode_{jax.default_backend()}",
            title="Decoding from long contexts, one layer of a 7B model",
            command=f"python -m experiments.llm.decode --lengths "
            f"{' '.join(map(str, arguments.lengths))} --new {arguments.new} "
            f"--repeats {arguments.repeats}",
            rows=rows,
        )


if __name__ == "__main__":
    main()
