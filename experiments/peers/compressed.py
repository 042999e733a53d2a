"""Programs of the tiny DiT against its dense one: DiTFastAttn, and W8A8 on top.

At 64 tokens and a width of 128 there is little to save: what layers keep is copied where strategies
branch, and masks cut what XLA fuses of attention. W8A8 rotates the inputs of every layer; with
`fold=True` q, k and v share one rotation, which this does not measure.
"""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp

import effjax
from effjax.bundled import demo
from effjax.methods import dit_fast_attn, vidit_q
from effjax.samplers import Sampler, sample_keys
from effjax.transform import Pair
from experiments.peers.comparison import Row, timed

TITLES = {"compressed": "DiTFastAttn", "quantized": "DiTFastAttn and W8A8"}
AT_MOST = {"compressed": 0.95, "quantized": 1.1}
THRESHOLD = 0.15  # of the search


def compressed(
    dense: Pair, sampler: Sampler, key: jax.Array, threshold: float = THRESHOLD
) -> dict[str, Pair]:
    """The model, the model with a searched plan, and that with values of 8 bits."""
    plan = dit_fast_attn.search(
        *dense,
        sampler,
        jnp.asarray(demo.labels_for(8)),
        key=jax.random.fold_in(key, 1),
        threshold=threshold,
    )
    fast = dit_fast_attn.transform(plan)(*dense)

    rounded = vidit_q.uniform(8, 8)
    largest = vidit_q.calibrate(
        rounded, *dense, sampler, jnp.asarray(demo.labels_for(8)), key=jax.random.fold_in(key, 2)
    )
    quantized = vidit_q.transform(rounded, largest)(*fast)
    return {"dense": dense, "compressed": fast, "quantized": quantized}


def rows(quick: bool) -> Iterator[Row]:
    steps, images, repeats = (3, 2, 1) if quick else (20, demo.CHUNK, 5)
    pipe = effjax.pipeline(demo.MODEL, dtype="float32")
    sampler = pipe.sampler(num_inference_steps=steps, guidance_scale=demo.GUIDANCE)
    key = jax.random.key(0)
    pairs = compressed((pipe.forward, pipe.params), sampler, key)
    inputs = jnp.asarray(demo.labels_for(images)), sample_keys(key, images)
    program = jax.jit(sampler)
    calls = {name: lambda pair=pair: program(*pair, *inputs) for name, pair in pairs.items()}
    for name, title in TITLES.items():
        yield timed(
            f"{images} images of the tiny DiT in {steps} steps, {title}",
            {title: calls[name], "dense": calls["dense"]},
            repeats=repeats,
            at_most=AT_MOST[name],
        )
