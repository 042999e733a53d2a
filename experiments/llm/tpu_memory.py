"""Memory of decoding with each kind of cache on a TPU, compiled ahead of time without one.

    python -m experiments.llm.tpu_memory      (needs the `tpu` extra)

One new token of one text under Llama 2 7B's architecture in bfloat16, all 32 layers; the cache is
given back in the memory it came in. "Caches" is what they hold by their shapes; arguments and
temporaries are the compiler's own numbers, padding and layouts included. It times nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.cost import compiled_memory, state_bytes, weight_bytes
from effjax.forward import abstract
from effjax.generate import cached
from effjax.methods import cskv, kivi, moa, streaming_llm
from effjax.models.llama import Llama, LlamaConfig
from effjax.transform import Transform, on_shapes
from experiments import report, tpu
from experiments.llm.decode import moa_plan


def kinds(layers: int) -> dict[str, tuple[Transform, ...]]:
    """What is applied, by the names of the rows."""
    one = moa_plan()
    spans = dataclasses.replace(one, alphas=one.alphas * layers, betas=one.betas * layers)
    half = streaming_llm.StreamingLLMPlan(ratio=0.5)
    return {
        "dense": (),
        "moa": (moa.transform(spans),),
        "moa, 4 bits": (moa.transform(dataclasses.replace(spans, bits=4)),),
        "streaming_llm, half": (streaming_llm.transform(half),),
        "kivi, 4 bits": (kivi.transform(kivi.KIVIPlan(4, 4)),),
        "cskv, 0.2": (cskv.transform(cskv.CSKVPlan(0.15, 0.25)),),
    }


def decoding(
    chip: str, transforms: Iterable[Transform], layers: int, tokens: int
) -> dict[str, Any]:
    """Compile one step for one chip; its memory in GiB."""
    config = LlamaConfig(
        num_layers=layers, max_positions=1 << 18, dtype="bfloat16", param_dtype="bfloat16"
    )
    forward, params = on_shapes(transforms, *abstract(Llama, config))
    forward = cached(forward).with_cache_length(tokens - 1, 1)
    token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    state = jax.eval_shape(lambda p: forward.init(p, token, token), params)

    def step(params: Any, state: Any, token: Any, positions: Any) -> Any:
        logits, state = forward(params, state, token, positions, step=1)
        return logits[:, -1], state

    arguments = tpu.on_chip(chip, (params, state, token, token))
    memory = compiled_memory(jax.jit(step, donate_argnums=1), *arguments)
    gib = {f"{name.removesuffix('_bytes')}_GiB": value / 2**30 for name, value in memory.items()}
    sizes = {"weights_GiB": weight_bytes(params), "caches_GiB": state_bytes(state)}
    return {**{name: value / 2**30 for name, value in sizes.items()}, **gib}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5p", choices=tpu.TOPOLOGIES)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192])
    arguments = parser.parse_args(argv)
    rows = []
    for tokens in arguments.lengths:
        for name, transforms in kinds(arguments.layers).items():
            found = decoding(arguments.chip, transforms, arguments.layers, tokens)
            rows.append({"tokens": tokens, "cache": name, **found})
            print(report.markdown(rows[-1:]), flush=True)
            report.write(
                "llm_tpu_memory",
                title="Memory of decoding with Llama 2 7B on a TPU, compiled ahead of time",
                command=f"python -m experiments.llm.tpu_memory --chip {arguments.chip} "
                f"--lengths {' '.join(map(str, arguments.lengths))}",
                rows=rows,
            )


if __name__ == "__main__":
    main()
