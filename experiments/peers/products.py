"""Products of one row and of many with a layer's matrix, as bfloat16 and as quantized values.

One row of float32 runs at the pace of memory, and unpacking four bits at that of arithmetic. Slower
yet were integer limbs of the row, products of groups in a batch, unrolled tiles, and loops of
bfloat16. On a GPU these take what starting a call takes: see `experiments.kernels.gpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from effjax.layers.linear import dot, dot_transposed
from effjax.quant import Activations, Quantizer, quantize_matrix
from experiments.peers.comparison import Row, timed

# Of float32's seconds, for one row.
AT_MOST = {"bfloat16": None, "W8A8": 0.8, "W4A16": 0.6}


def rows(quick: bool) -> Iterator[Row]:
    inputs, outputs, repeats = (128, 64, 1) if quick else (896, 4864, 30)
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.standard_normal((inputs, outputs), np.float32) / inputs**0.5)
    quantized = Activations(Quantizer(8))
    matrices = {
        "bfloat16": w.astype(jnp.bfloat16),
        "W8A8": quantize_matrix(w, Quantizer(8, symmetric=False), activations=quantized),
        "W4A16": quantize_matrix(w, Quantizer(4, symmetric=False), group_size=128, packed=True),
    }
    multiply = jax.jit(dot)
    for count in (1, 8) if quick else (1, 8, 512):
        x = jnp.asarray(rng.standard_normal((count, inputs), np.float32))
        for name, matrix in matrices.items():
            own = x.astype(jnp.bfloat16) if name == "bfloat16" else x
            yield timed(
                f"{count} x [{inputs}, {outputs}], {name}",
                {name: partial(multiply, own, matrix), "float32": partial(multiply, x, w)},
                repeats=repeats,
                at_most=AT_MOST[name] if count == 1 else None,
            )
    words = 512 if quick else 151_936
    table = jnp.asarray(rng.standard_normal((words, inputs), np.float32) / inputs**0.5)
    head, x = jax.jit(dot_transposed), jnp.ones((1, inputs))
    half = x.astype(jnp.bfloat16), table.astype(jnp.bfloat16)
    yield timed(
        f"1 x [{words}, {inputs}] transposed, bfloat16",
        {"bfloat16": partial(head, *half), "float32": partial(head, x, table)},
        repeats=1 if quick else 5,
    )
