"""Products of quantized numbers against products of floats on this machine, in one run.

    python -m experiments.quantization.speed      (the `torch` extra adds torch's int8 to a CPU)

The linear layers of PixArt-Sigma-XL: [tokens, 1152] x [1152, 1152 or 4608] and back. The programs
take turns. `prepared` smooths and rotates the inputs as ViDiT-Q does; all quantized programs take
the scales of tokens at run time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.quant import Activations, Quantizer, qdot, quantize_matrix
from effjax.quant.hadamard import Rotation
from experiments import report
from experiments.kernels.timing import best_seconds

SHAPES = ((1152, 1152), (1152, 4608), (4608, 1152))


def programs(tokens: int, inputs: int, outputs: int) -> dict[str, Callable[[], Any]]:
    """The same product in every way there is here."""
    rng = np.random.default_rng(0)
    x32 = rng.standard_normal((tokens, inputs), np.float32)
    w32 = rng.standard_normal((inputs, outputs), np.float32) / inputs**0.5
    x, w = jnp.asarray(x32), jnp.asarray(w32)
    smoothing_scale = jnp.exp(jnp.asarray(rng.standard_normal(inputs), jnp.float32) / 8)
    quantized = Activations(Quantizer(8))
    leaves = {
        "W8A8": quantize_matrix(w, Quantizer(8, symmetric=False), activations=quantized),
        "W4A8": quantize_matrix(w, Quantizer(4, symmetric=False), activations=quantized),
        "W8A8, prepared": quantize_matrix(
            w,
            Quantizer(8, symmetric=False),
            activations=quantized,
            smoothing_scale=smoothing_scale,
            rotation=Rotation(inputs),
        ),
    }
    dense, quantized = jax.jit(jnp.dot), jax.jit(qdot)
    half = (x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))
    found: dict[str, Callable[[], Any]] = {
        "float32": lambda: dense(x, w),
        "bfloat16": lambda: dense(*half),
        **{name: lambda leaf=leaf: quantized(half[0], leaf) for name, leaf in leaves.items()},
    }
    return found | (_torch(x32, w32) if jax.default_backend() == "cpu" else {})


def _torch(x: np.ndarray, w: np.ndarray) -> dict[str, Callable[[], Any]]:
    """torch's float32 layer and its int8 one with dynamic inputs; none without torch."""
    try:
        import torch
    except ImportError:
        return {}
    layer = torch.nn.Linear(*w.shape, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w.T))
    quantized = torch.ao.quantization.quantize_dynamic(
        torch.nn.Sequential(layer), {torch.nn.Linear}, dtype=torch.qint8
    )
    given = torch.tensor(x)

    def run(module: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.inference_mode():
                return module(given).numpy()

        return call

    return {"torch float32": run(layer), "torch int8": run(quantized)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", default="256,1024,4096", help="rows of the inputs")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    rows = []
    counts = [int(count) for count in arguments.tokens.split(",")]
    for tokens, (inputs, outputs) in itertools.product(counts, SHAPES):
        seconds = best_seconds(programs(tokens, inputs, outputs), arguments.repeats)
        for name, own in seconds.items():
            rows.append(
                {
                    "tokens": tokens,
                    "matrix": f"{inputs} x {outputs}",
                    "program": name,
                    "milliseconds": 1000 * own,
                    "speed_up_over_float32": seconds["float32"] / own,
                    "speed_up_over_bfloat16": seconds["bfloat16"] / own,
                }
            )
        print(report.markdown(rows[-len(seconds) :]), flush=True)
    report.write(
        f"quantization_speed_{jax.default_backend()}",
        title=f"Products of quantized values against products of floats ({jax.default_backend()})",
        command=f"python -m experiments.quantization.speed --tokens {arguments.tokens} "
        f"--repeats {arguments.repeats}",
        products=rows,
    )


if __name__ == "__main__":
    main()
