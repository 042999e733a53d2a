"""How much each head needs each part of its attention map, measured on answers.

`influence` estimates what the loss of answers would be if a block of the map were masked, from one
gradient; `response_loss` is the loss of answers under a plan. A search needs both.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from tqdm.auto import tqdm

from effjax import capture
from effjax.forward import Forward, Params
from effjax.generate import generate
from effjax.layers.attention import CausalCore

# Tokens of a sequence int32[n, N], and how much predicting each of them counts, float32[n, N].
Samples = tuple[np.ndarray, np.ndarray]


def answered(forward: Forward, params: Params, prompts: Sequence[Any], *, new: int) -> Samples:
    """Make samples for a search: prompts with the model's own answers.

    The loss of a sample counts the tokens of its answer alone.

    Args:
        forward, params: the dense model.
        prompts: token ids, all of one length. Take long prompts that end with a question about
            something far back.
        new: number of tokens of an answer. Together with the prompt's it must be a multiple of the
            plan's block.

    Returns:
        Tokens int32[n, N] and weights float32[n, N], 1 for tokens of answers.

    Raises:
        ValueError: for prompts of several lengths.
    """
    lengths = sorted({len(prompt) for prompt in prompts})
    if len(lengths) != 1:
        raise ValueError(f"samples are of one length, prompts have {lengths} tokens")
    made = generate(forward, params, prompts, max_new_tokens=new)
    tokens = np.concatenate([np.asarray(prompts, np.int32), made.tokens], axis=1)
    weights = np.broadcast_to(np.arange(tokens.shape[1]) >= lengths[0], tokens.shape)
    return tokens, weights.astype(np.float32)


def influence(
    forward: Forward, params: Params, samples: Samples, *, block: int, progress: bool = True
) -> np.ndarray:
    """Estimate what masking each block of the attention maps would cost.

    The estimate is |E| of the formula in `effjax.methods.moa`, summed within each block and
    averaged over samples. A sample takes one forward and one backward pass.

    Args:
        forward, params: the dense model.
        samples: of one length, a multiple of the block.
        block: tokens of a block.
        progress: show a bar over samples.

    Returns:
        float64[layers, key heads, M, M] for blocks of queries and keys.

    Raises:
        ValueError: for a length that blocks do not divide.
    """
    tokens, weights = samples
    if tokens.shape[1] % block:
        raise ValueError(f"sequences of {tokens.shape[1]} tokens are no whole blocks of {block}")
    paths = [target.path for target in forward.target_modules(params, CausalCore)]
    total = 0.0
    for row in tqdm(range(len(tokens)), desc="influence", disable=not progress, leave=False):
        found = _influence(forward, params, tokens[row : row + 1], weights[row : row + 1], block)
        total = total + np.stack([np.asarray(found[path], np.float64) for path in paths])
    return np.asarray(total) / len(tokens)


@partial(jax.jit, static_argnums=4)
def _influence(
    forward: Forward, params: Params, tokens: Array, weights: Array, block: int
) -> dict[str, Array]:
    def loss(logits: Array) -> Array:
        return _loss(logits, tokens, weights)

    options: Any = {"kind": CausalCore}
    gradients = capture.gradients(forward, params, loss, (tokens,), **options)
    q, k, v, out = (
        capture.tap(forward, params, (tokens,), what=what, **options)
        for what in ("input", "input1", "input2", "output")
    )
    cores: Any = {
        target.path: target.module for target in forward.target_modules(params, CausalCore)
    }
    turns = jnp.arange(tokens.shape[1])[None]
    return {
        path: _blocks(
            core.rotary(q[path], turns)[0],
            core.rotary(k[path], turns)[0],
            v[path][0],
            out[path][0],
            gradients[path][0],
            block,
        )
        for path, core in cores.items()
    }


def _blocks(
    q: Float[Array, "S H D"],
    k: Float[Array, "S K D"],
    v: Float[Array, "S K D"],
    out: Float[Array, "S H D"],
    gradient: Float[Array, "S H D"],
    block: int,
) -> Float[Array, "K M M"]:
    """|E| summed over blocks, one block of queries after the other."""
    columns, kv_heads, width = k.shape
    q, k, v, out, gradient = (x.astype(jnp.float32) for x in (q, k, v, out, gradient))
    group = q.shape[1] // kv_heads

    def rows(start: Array) -> Array:
        own_q, own_out, own_gradient = (
            jax.lax.dynamic_slice_in_dim(x, start, block).reshape(block, kv_heads, group, -1)
            for x in (q, out, gradient)
        )
        row = start + jnp.arange(block)[:, None]
        seen = (jnp.arange(columns) <= row)[None, None]
        logits = jnp.einsum("skgd,tkd->kgst", own_q, k) * width**-0.5
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        slopes = jnp.einsum("skgd,tkd->kgst", own_gradient, v)
        mean = jnp.einsum("skgd,skgd->kgs", own_gradient, own_out)[..., None]
        masked = weights * (mean - slopes) / (1 - weights + jnp.finfo(jnp.float32).eps)
        # The first row has one element, and nothing to take its weight.
        masked = jnp.where(row[None, None] == 0, -weights * slopes, masked)
        sums = jnp.where(seen, jnp.abs(masked), 0.0).reshape(kv_heads, group, block, -1, block)
        return jnp.max(jnp.sum(sums, axis=(2, 4)), axis=1)

    return jax.lax.map(rows, jnp.arange(0, columns, block)).swapaxes(0, 1)


def response_loss(forward: Forward, params: Params, samples: Samples) -> float:
    """Weighted mean of the negative log-likelihoods of sequences, read under a plan's mask."""
    tokens, weights = samples
    losses = [
        float(_response_loss(forward, params, tokens[row : row + 1], weights[row : row + 1]))
        for row in range(len(tokens))
    ]
    return float(np.mean(losses))


@jax.jit
def _response_loss(forward: Forward, params: Params, tokens: Array, weights: Array) -> Array:
    forward = forward.with_cache_length(tokens.shape[1], 0)
    token = jnp.zeros((tokens.shape[0], 1), jnp.int32)
    state = forward.init(params, token, token)
    return _loss(forward(params, state, tokens)[0], tokens, weights)


def _loss(logits: Array, tokens: Array, weights: Array) -> Array:
    scores = jax.nn.log_softmax(logits[:, :-1].astype(jnp.float32), axis=-1)
    scores = jnp.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    counted = weights[:, 1:].astype(jnp.float32)
    return -jnp.sum(scores * counted) / jnp.maximum(jnp.sum(counted), 1e-9)
