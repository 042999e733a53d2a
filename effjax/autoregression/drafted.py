"""Sampling several tokens of an image in a call: `NextToken` with a decoder.

The decoder's arithmetic is that of `effjax.generate.jacobi`. Branches of guidance get the same
drafts, which are judged by the guided laws.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.context import PyTree
from effjax.forward import Forward, Params, StateDict
from effjax.generate import Grid, JacobiDecoding, Sampling
from effjax.generate.decoders import check_decoder
from effjax.generate.installed import check_rollback
from effjax.generate.jacobi import Drawn, begin, decode
from effjax.generate.made import Made
from effjax.layers.attention import Positions
from effjax.loops import Carry
from effjax.models.llamagen import condition_tokens, positions_of


def on_grid(decoder: JacobiDecoding, grid: tuple[int, int]) -> JacobiDecoding:
    """A decoder for images of these rows and columns.

    Raises:
        ValueError: for what is no decoder, and for one of another grid.
    """
    check_decoder(decoder)
    height, width = grid
    own = Grid(width=width, height=height)
    if decoder.grid not in (None, own):
        raise ValueError(
            f"the model's images have {height} x {width} tokens and no structural ones; the "
            f"decoder is for {decoder.grid}. Leave out its grid."
        )
    return dataclasses.replace(decoder, grid=own).within(own.tokens)


def drafted(
    loop: Any,
    decoder: JacobiDecoding,
    forward: Forward,
    params: Params,
    carry: Carry,
    cond: PyTree,
    uncond: PyTree,
    *,
    limit: int | Array | None = None,
) -> Made:
    """Sample the tokens of images.

    Args:
        loop: a `NextToken`.
        decoder: how several tokens are found in a call.
        forward, params: the model.
        carry: as `loop.init` makes it.
        cond, uncond: conditions of both branches.
        limit: stop when every image has so many tokens; None for all.

    Raises:
        ValueError: for a cache that cannot go back, and as `on_grid`.
    """
    decoder, joined = on_grid(decoder, loop.grid), loop.joined
    condition, batch = condition_tokens(cond), carry.x.shape[0]
    ready = loop.cached(forward, condition)
    check_rollback(ready, params)
    sampling = Sampling(1.0 if loop.temperature is None else loop.temperature)
    sampling = dataclasses.replace(sampling, top_k=loop.top_k, top_p=loop.top_p)
    most, no_ends = jnp.int32(loop.calls), jnp.zeros(0, jnp.int32)
    drawn = Drawn(sampling, carry.keys, no_ends, most, loop.vae[0].config.vocab_size)
    before = _first(cond).reshape(batch, -1)[:, 0]

    def call(state: StateDict, tokens: Array, places: Array) -> tuple[Array, StateDict]:
        numbers = jnp.where(places < 0, -1, places - before[:, None])  # of the tokens
        tokens = tokens if loop.ids is None else loop.ids[tokens]
        positions = _positions(cond, numbers)
        if joined is not None:
            tokens = joined.duplicate(tokens)
            positions = joined.join({"cond": positions, "uncond": _positions(uncond, numbers)})
        raw, state = ready(params, state, tokens, positions, step=1, guidance=joined)
        return loop.output(raw, carry.x, numbers + 1), state

    out, _, state = loop.network(forward, params, carry.state, carry.x, cond, uncond, 0)
    made = Made(*map(jnp.asarray, Made.nothing(np.zeros(batch, bool), loop.calls)))
    made, drafts = begin(decoder, made, out[:, 0], None, drawn)
    options = {"before": before, "limit": most if limit is None else jnp.int32(limit)}
    return decode(decoder, call, state, made, drafts, drawn, **options)[1]


def _positions(cond: PyTree, numbers: Int[Array, "B W"]) -> Positions:
    """Positions of codes behind a condition, by their numbers; -1 for what is below 0."""
    first = _first(cond)
    numbers = numbers if first.ndim == 2 else numbers[:, None]
    return jnp.where(numbers < 0, -1, first + numbers)


def _first(cond: PyTree) -> Positions:
    """The position of the first code, for every row."""
    condition = condition_tokens(cond)
    return positions_of(cond, condition, 1, condition + 1)
