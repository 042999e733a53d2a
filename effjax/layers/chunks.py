"""Layers on a part of the samples or tokens after the other, so that less is held at a time.

Results are those of all at once. Parts run in a `lax.scan`: nothing of two parts is held together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import PyTree, states
from effjax.guidance import SampleRows, current_guidance
from effjax.rows import on_rows
from effjax.stacking import current_stacks

Apply = Callable[..., PyTree]


def by_samples(
    apply: Apply, module: nnx.Module, most: int, x: PyTree, *conditioning: PyTree
) -> PyTree:
    """`apply(module, x, *conditioning)` for equal parts of the samples, with all their branches.

    States of the module are read and written in the rows of a part.

    Args:
        apply: gives tokens like x.
        module: what it calls; it may hold state.
        most: samples of a part, at most; the largest number that divides them is taken.
        x: tokens, one array [N, S, C] or a dictionary of streams.
        conditioning: trees of arrays, of which those with N rows are cut.

    Raises:
        ValueError: if rows cannot be told from tokens, as there are as many of both.
    """
    guidance = current_guidance()
    batch = jax.tree.leaves(x)[0].shape[0]
    samples = batch // (1 if guidance is None else len(guidance.branches))
    count = next(size for size in range(min(most, samples), 0, -1) if samples % size == 0)
    held = states(module)
    if count == samples or any(state.get_metadata("creating") for state in held.values()):
        return apply(module, x, *conditioning)
    tokens = sum(part.shape[1] for part in jax.tree.leaves(x))
    if batch == tokens:
        raise ValueError(
            f"a batch of {batch} rows cannot be cut into samples, as its sequences have {tokens} "
            f"tokens too: sample another number, or leave out samples="
        )
    graphdef, variables = nnx.split(module)
    stacks = current_stacks()

    def one(carry: tuple[PyTree, dict], start: Array) -> tuple[tuple[PyTree, dict], None]:
        x, values = carry
        rows = SampleRows(guidance, samples, start, count)

        def own(array: Any) -> Any:
            return rows.take(array) if array.ndim and len(array) == batch else array

        with stacks.inside(), on_rows(rows):
            copy = nnx.merge(graphdef, variables, copy=True)
            kept = states(copy)
            for path, value in values.items():
                kept[path].set_value(value)
            y = apply(copy, *jax.tree.map(own, (x, *conditioning)))
        x = jax.tree.map(rows.put, x, y)
        return (x, {path: kept[path].get_value() for path in values}), None

    values = {path: state.get_value() for path, state in held.items() if not state.empty}
    starts = jnp.arange(0, samples, count, dtype=jnp.int32)
    (x, values), _ = jax.lax.scan(one, (x, values), starts)
    for path, value in values.items():
        held[path].set_value(value)
    return x


class TokenParts(nnx.Module):
    """Base of modules with layers that work on every token by itself.

    Attributes:
        tokens: how many run through these layers together, at most; None for all.
    """

    tokens: int | None = None

    def by_tokens(
        self,
        apply: Callable[[Array], Array],
        x: Float[Array, "*B C"],
        *layers: nnx.Module,
    ) -> Float[Array, "*B O"]:
        """`apply(x)`, for parts of the tokens if so asked: the next to last axis.

        The last part begins earlier, where the tokens do not divide: some are computed twice.

        Args:
            apply: works on every token by itself.
            layers: what it calls, which must hold no state.

        Raises:
            ValueError: for layers that hold state, as that would see a part of the tokens.
        """
        if self.tokens is None or x.ndim < 3 or x.shape[-2] <= self.tokens:
            return apply(x)
        tokens = x.shape[-2]
        kept = [".".join(map(str, path)) for layer in layers for path in states(layer)]
        if kept:
            raise ValueError(
                f"parts of the tokens run through a {type(self).__name__} in which another patch "
                f"keeps state ({kept[0]}): leave out tokens=, or that patch"
            )
        parts = math.ceil(tokens / self.tokens)
        size = math.ceil(tokens / parts)
        starts = np.minimum(np.arange(parts) * size, tokens - size).astype(np.int32)

        def own(start: Any) -> Array:
            return apply(jax.lax.dynamic_slice_in_dim(x, start, size, -2))

        def one(out: Array, start: Array) -> tuple[Array, None]:
            return jax.lax.dynamic_update_slice_in_dim(out, own(start), start, -2), None

        shape = jax.eval_shape(own, starts[0])
        out = jnp.zeros((*x.shape[:-1], shape.shape[-1]), shape.dtype)
        return jax.lax.scan(one, out, jnp.asarray(starts))[0]
