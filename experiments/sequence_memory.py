"""Memory of whole loops of VAR-d30 and LlamaGen-XXL on a TPU, compiled ahead of time without one.

    python -m experiments.sequence_memory                         (needs the `tpu` extra)

All calls of an image of 256 pixels (LlamaGen-XXL: 384), guided, bfloat16, up to the latents, in
one program on one chip, blocks scanned. LiteVAR shares attention over guidance, as maps or as
outputs; its windows are the same in all layers. In CoDe, VAR-d16 makes the last two scales. It
times nothing. One case of VAR takes libtpu six minutes or more.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from experiments import report
from experiments.tpu import in_processes, on_chip

# isort: split
import jax
import jax.numpy as jnp

from effjax.autoregression import Collaborative, NextScale, NextToken
from effjax.cost import compiled_memory, cost, weight_bytes
from effjax.forward import abstract
from effjax.methods import litevar, round_to_nearest
from effjax.models.llamagen import LlamaGen, LlamaGenConfig
from effjax.models.var import VAR, VARConfig
from effjax.models.vq_model import VQModel, VQModelConfig
from effjax.models.vqvae import VQVAE, VQVAEConfig
from effjax.transform import on_shapes
from experiments.flux_memory import scanned

HALF: dict[str, Any] = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
WINDOW = 0.1  # half width as a share of a scale's keys

VARIANTS = {
    "VAR-d30": (
        "plain",
        "LiteVAR, maps",
        "LiteVAR, outputs",
        "LiteVAR, outputs and windows",
        "CoDe",
    ),
    "LlamaGen-XXL": ("plain", "W8A16"),
}
BATCHES = {"VAR-d30": (8,), "LlamaGen-XXL": (1, 8)}


def var(depth: str, variant: str) -> tuple[Any, Any]:
    """Forward and shapes of parameters of a VAR."""
    config = VARConfig.preset(depth, **HALF)
    transforms = []
    if variant.startswith("LiteVAR"):
        plan = litevar.uniform(
            config.patch_nums,
            layers=config.num_layers,
            heads=config.num_heads,
            window=WINDOW if "windows" in variant else None,
            share="map" if "maps" in variant else "output",
        )
        transforms.append(litevar.transform(plan))
    return on_shapes(transforms, *abstract(VAR, config))


def loop_of(model: str, variant: str) -> tuple[Any, Any, Any]:
    """The loop, and the model."""
    if model == "LlamaGen-XXL":
        config = LlamaGenConfig.preset("XXL", grid=24, **HALF)
        given = round_to_nearest.uniform(8, 16)
        transforms = [round_to_nearest.transform(given)] if variant == "W8A16" else []
        codes = VQModelConfig(param_dtype="bfloat16")
        vae = abstract(VQModel, codes)
        return NextToken(vae, (24, 24), guidance=2.0), *on_shapes(
            transforms, *abstract(LlamaGen, config)
        )
    forward, params = var("d30", variant)
    vae = abstract(VQVAE, VQVAEConfig(param_dtype="bfloat16"))
    options = {"guidance": 1.5, "top_k": 900, "top_p": 0.96}
    if variant == "CoDe":
        refiner = scanned(*var("d16", "plain"))
        return (
            Collaborative(
                vae, forward.config.patch_nums, refiner=refiner, draft_scales=8, **options
            ),
            forward,
            params,
        )
    return NextScale(vae, forward.config.patch_nums, **options), forward, params


def compile_one(model: str, variant: str, batch: int, chip: str) -> dict[str, Any]:
    """Compile a loop for a chip; memory in MiB and GiB, FLOPs of the chip's program."""
    loop, forward, params = loop_of(model, variant)
    weights = weight_bytes(params) + (weight_bytes(loop.refiner[1]) if variant == "CoDe" else 0)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    forward, params = scanned(forward, params)

    def run(loop: Any, params: Any, labels: Any, key: Any) -> Any:
        return loop.sample(forward, params, labels, key)

    given = jax.eval_shape(lambda *each: (*each, jax.random.key(0)), loop, params, labels)
    flops = cost(run, *given, platform="tpu").flops  # a refiner's weights are arguments too
    memory = compiled_memory(run, *on_chip(chip, given))
    return {
        "model": model,
        "variant": variant,
        "chip": chip,
        "images": batch,
        "weights_GiB": weights / 2**30,
        "arguments_GiB": memory["argument_bytes"] / 2**30,
        "temp_GiB": memory["temp_bytes"] / 2**30,
        "peak_GiB": memory["peak_bytes"] / 2**30,
        "TFLOP": flops / 1e12,
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chip", default="v5e")
    parser.add_argument("--models", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(compile_one(*json.loads(arguments.one))))
        return
    cases = (
        (model, variant, batch, arguments.chip)
        for model in arguments.models
        for batch in BATCHES[model]
        for variant in VARIANTS[model]
    )
    rows = list(in_processes("experiments.sequence_memory", cases))
    report.write(
        "sequence_memory",
        title="Loops of VAR-d30 and LlamaGen-XXL compiled ahead of time for TPUs",
        command="python -m experiments.sequence_memory",
        rows=rows,
    )


if __name__ == "__main__":
    main()
