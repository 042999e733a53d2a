"""Dense attention of 16 heads of 64 against `jax.nn`'s, and on a CPU against torch's.

`experiments.kernels.gpu` compares with torch on a GPU. What XLA's products are worth decides: they
do not keep up with torch's on a Xeon that has units for matrices of bfloat16.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

from experiments.kernels.attention_cpu import HEADS, WIDTH, dense_programs
from experiments.peers.comparison import Row, timed


def rows(quick: bool) -> Iterator[Row]:
    for tokens in (64,) if quick else (1024, 4096):
        for dtype in (jnp.float32, jnp.bfloat16):
            keys = jax.random.split(jax.random.key(tokens), 3)
            shape = (1, tokens, HEADS, WIDTH)
            operands = tuple(jax.random.normal(key, shape).astype(dtype) for key in keys)
            programs = dense_programs(operands)
            for other in list(programs)[1:]:
                yield timed(
                    f"attention of {tokens} tokens, {jnp.dtype(dtype).name}",
                    {"effjax": programs["effjax"], other: programs[other]},
                    repeats=1 if quick else 5,
                    at_most=1.06 if other == "torch" else None,
                )
