"""Bytes of full-size models at 16, 8 and 4 bits: closed form, counted, and compiled for a TPU.

    python -m experiments.quantization.sizes      (the last needs the `tpu` extra)

PixArt-Sigma-XL/2 at 1024 pixels and DiT-XL/2 at 512; all linear layers of the blocks but
modulations are quantized, inputs too. Weights are shapes: nothing is allocated, nothing runs.
    T5-XXL,
PixArt's text encoder, is counted beside them.
"""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from effjax.context import PyTree
from effjax.cost import compiled_memory, weight_bytes
from effjax.forward import Forward, Params, abstract
from effjax.methods.quantization import vidit_q
from effjax.models.dit import DiT, DiTConfig
from effjax.models.pixart import PixArt, PixArtConfig, PromptEmbeddings
from effjax.models.t5 import T5Config, T5Encoder
from effjax.transform import on_shapes
from experiments import report, tpu

LAYERS = r"blocks\..*\.(attn|cross|mlp)\..*"
BATCH = 2  # one guided image
BFLOAT16 = {"dtype": "bfloat16", "param_dtype": "bfloat16"}


def models(layers: int) -> dict[str, tuple[Forward, Params, tuple[PyTree, ...], int]]:
    """Forward, shapes of parameters and of inputs, number of weights that are quantized."""
    width, hidden = 1152, 4608

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((BATCH, *sizes), dtype)

    pixart = abstract(PixArt, PixArtConfig(num_layers=layers, **BFLOAT16))
    dit = abstract(DiT, DiTConfig.preset("DiT-XL/2", sample_size=64, num_layers=layers, **BFLOAT16))
    caption = PromptEmbeddings(shape(300, 4096), shape(300, dtype=bool))
    time = shape(dtype=jnp.float32)
    mlp = 2 * width * hidden
    return {
        "PixArt-Sigma-XL/2, 1024 pixels": (
            *pixart,
            (shape(128, 128, 4), time, caption),
            layers * (8 * width**2 + mlp),
        ),
        "DiT-XL/2, 512 pixels": (
            *dit,
            (shape(64, 64, 4), time, shape(dtype=jnp.int32)),
            layers * (4 * width**2 + mlp),
        ),
    }


def row(
    name: str, model: tuple[Forward, Params, tuple[PyTree, ...], int], bits: int, chip: str | None
) -> dict[str, Any]:
    """One model at one number of bits."""
    forward, params, inputs, quantized = model
    whole = weight_bytes(params)
    if bits < vidit_q.FLOAT:
        plan = vidit_q.uniform(bits, 8, layers=LAYERS)
        forward, params = on_shapes([vidit_q.transform(plan)], forward, params)
    counted = weight_bytes(params) - (whole - 2 * quantized)
    figures: dict[str, Any] = {
        "model": name,
        "bits": "bfloat16" if bits == vidit_q.FLOAT else f"W{bits}A8",
        "quantized_layers_closed_form_GB": quantized * bits / 8e9,
        "quantized_layers_counted_GB": counted / 1e9,
        "all_weights_GB": weight_bytes(params) / 1e9,
    }
    if chip is not None:
        call = jax.jit(lambda params, *inputs: forward(params, {}, *inputs)[0])
        memory = compiled_memory(call, *tpu.on_chip(chip, (params, *inputs)))
        figures |= {
            f"{chip}_arguments_GB": memory["argument_bytes"] / 1e9,
            f"{chip}_peak_GB": memory["peak_bytes"] / 1e9,
        }
    return figures


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--chip", choices=(*tpu.TOPOLOGIES, "none"), default="v5e")
    arguments = parser.parse_args(argv)
    chip = None if arguments.chip == "none" else arguments.chip
    rows = []
    for name, model in models(arguments.layers).items():
        for bits in (vidit_q.FLOAT, 8, 4):
            rows.append(row(name, model, bits, chip))
            print(report.markdown(rows[-1:]), flush=True)
    _, encoder = abstract(T5Encoder, T5Config(param_dtype="bfloat16"))
    report.write(
        "quantization_sizes",
        title="Bytes of quantized full-size models",
        command=f"python -m experiments.quantization.sizes --layers {arguments.layers} "
        f"--chip {arguments.chip}",
        one_network_call=rows,
        beside_them=[{"model": "T5-XXL encoder, bfloat16", "GB": weight_bytes(encoder) / 1e9}],
    )


if __name__ == "__main__":
    main()
