"""Which caches a forward has, and what they take."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from effjax.caches import Caches, DenseCache, KVCache, as_it_is
from effjax.caches.pressed import PressedCache
from effjax.caches.shared import SharedCache
from effjax.forward import Forward, Params, StateDict
from effjax.targets import canonical


def has_cache(forward: Forward) -> bool:
    """Whether a patch of the forward puts caches into it."""
    return any(getattr(patch, "caches", False) for patch in forward.patches)


def cached(forward: Forward) -> Forward:
    """Return the forward, with a dense cache if it has none."""
    return forward if has_cache(forward) else forward.patch(Caches(as_it_is))


def caches(forward: Forward, params: Params) -> dict[str, KVCache]:
    """The caches of a forward by target module, without their contents."""
    found: dict[str, KVCache] = {}

    def look(params: Params) -> None:
        token = jnp.zeros((1, 1), jnp.int32)
        for path, node in nnx.iter_graph(forward.patched(params, (token,))):
            if isinstance(node, KVCache):
                found[canonical(path)] = node

    jax.eval_shape(look, params)
    return found


# Jitted because shaping a state traces the whole model.
@partial(jax.jit, static_argnums=2)
def empty_state(forward: Forward, params: Params, batch: int) -> StateDict:
    """What the caches of a forward hold before anything was read."""
    token = jnp.zeros((batch, 1), jnp.int32)
    return forward.init(params, token, token)


def check_shortest(forward: Forward, tokens: int) -> None:
    """Raise ValueError if a cache has nothing for sequences of so few tokens."""
    for patch in forward.patches:
        if isinstance(patch, Caches):
            patch.check(tokens)


def check_rollback(forward: Forward, params: Params) -> None:
    """Raise ValueError if a cache of this room cannot forget the last of several tokens."""
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    leaves, structure = jax.tree.flatten(shapes)
    if unable := _without_rollback(forward, structure, tuple(leaves)):
        raise ValueError(
            f"{', '.join(unable)} cannot go back to a shorter sequence, as a decoder with drafts "
            f"does where one is rejected. Decode with decoder=None, or use a cache that keeps all "
            f"new tokens: the dense one, or one that drops tokens of the prompt only."
        )


@lru_cache(maxsize=64)  # shaping caches traces the whole model
def _without_rollback(forward: Forward, structure: Any, leaves: tuple) -> tuple[str, ...]:
    found = caches(forward, jax.tree.unflatten(structure, leaves)).values()
    able = {type(each).__name__: each.rollback and each.multi_token_append for each in found}
    return tuple(sorted(name for name, holds in able.items() if not holds))


class CacheBytes(NamedTuple):
    """Bytes of caches.

    Attributes:
        allocated: bytes of the arrays.
        useful: bytes of the slots that hold a token.
    """

    allocated: int
    useful: int


def sequence_bytes(forward: Forward, params: Params, tokens: int) -> CacheBytes:
    """Count the bytes that caches take for one prompt of so many tokens, and those it uses."""
    forward = cached(forward).with_cache_length(tokens, 0)
    sequence = jnp.zeros((1, tokens), jnp.int32)
    positions = jnp.arange(tokens)[None]

    @jax.jit  # of the model only what a cache chooses its tokens by is computed
    def shares(params: Params) -> dict[str, Array]:
        state = forward.init(params, sequence[:, :1], positions[:, :1])
        _, state = forward(params, state, sequence, positions, step=0)
        return filled(forward, params, state, jnp.full(1, tokens))

    state = jax.eval_shape(partial(empty_state, forward, batch=1), params)
    return total_bytes(state, shares(params))


@partial(jax.jit, static_argnums=0)
def filled(forward: Forward, params: Params, state: StateDict, lengths: Array) -> dict[str, Array]:
    """Share of each cache's slots that hold a token, by target module."""
    token = jnp.zeros((lengths.shape[0], 1), jnp.int32)
    module = forward.loaded(params, state, token, step=1)
    found = ((canonical(path), node) for path, node in nnx.iter_graph(module))
    return {path: node.filled(lengths) for path, node in found if isinstance(node, KVCache)}


def total_bytes(state: Mapping[str, Any], shares: Mapping[str, Array]) -> CacheBytes:
    """Bytes of a state's caches, of which shares of slots hold a token."""
    allocated, useful = 0, 0.0
    for path, share in shares.items():
        own = sum(
            leaf.size * leaf.dtype.itemsize
            for name, leaf in state.items()
            if name.startswith(f"{path}.")
        )
        allocated, useful = allocated + own, useful + own * float(share)
    return CacheBytes(allocated, round(useful))


def check_tokens_alone(forward: Forward, params: Params, state: StateDict, condition: int) -> None:
    """Check that a forward keeps keys and values alone from call to call.

    Args:
        forward: with its caches.
        state: that it begins with.
        condition: tokens that are read at once.

    Raises:
        ValueError: for methods that keep something else, which was another token's, and for those
            that drop tokens of a prompt where there is one.
    """
    held = caches(forward, params)
    methods = ", ".join(dict.fromkeys(name for name, _ in forward.recipe)) or "a patch"
    for name in state:
        if not any(name.startswith(f"{path}.") for path in held):
            raise ValueError(
                f"{methods} keeps what a call computed for the next one ({name}), but the next "
                f"call of this model is another token: this kind of method does not apply"
            )
    chosen = any(isinstance(patch, Caches) and patch.plan is not None for patch in forward.patches)
    if chosen and condition == 1 and all(_keeps_prompt(cache) for cache in held.values()):
        raise ValueError(
            f"{methods} drops tokens of a prompt, and the prompt of this model is one label: take "
            f"a method that drops or quantizes later tokens too, such as streaming_llm or kivi"
        )


def _keeps_prompt(cache: KVCache) -> bool:
    """Whether a cache holds a prompt of one token, and all that follow, as floats."""
    whole = isinstance(cache, DenseCache | PressedCache | SharedCache)
    return whole and not cache.tokens.quantized
