"""Feed-forward layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.chunks import TokenParts
from effjax.layers.linear import Linear
from effjax.targets import Role

gelu_tanh = partial(jax.nn.gelu, approximate=True)


def quick_gelu(x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
    """x * sigmoid(1.702 x), CLIP's approximation of a GELU."""
    return x * jax.nn.sigmoid(jnp.asarray(1.702, x.dtype) * x)


# Models call these on float32 and round once, whatever they compute in.
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu_tanh": gelu_tanh,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "quick_gelu": quick_gelu,
    "silu": jax.nn.silu,
}


class FeedForward(TokenParts):
    """Base of feed-forward layers."""

    def whole(self, x: Float[Array, "*B C"]) -> Float[Array, "*B O"]:
        """Apply the layer to all tokens at once."""
        raise NotImplementedError

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B O"]:
        return self.by_tokens(self.whole, x, self)


class MLP(FeedForward):
    """Linear -> activation -> linear, on the last axis: hidden -> intermediate -> outputs.

    Args:
        activation: a key of `ACTIVATIONS`.
        outputs: `hidden_size` if None.
        roles: of its two layers.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        outputs: int | None = None,
        activation: str = "gelu_tanh",
        bias: bool = True,
        roles: tuple[Role, Role] = ("up", "down"),
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        options: dict[str, Any] = {"bias": bias, "param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = Linear(hidden_size, intermediate_size, role=roles[0], **options)
        self.fc2 = Linear(intermediate_size, outputs or hidden_size, role=roles[1], **options)

    def whole(self, x: Float[Array, "*B C"]) -> Float[Array, "*B O"]:
        inside = ACTIVATIONS[self.activation](self.fc1(x).astype(jnp.float32))
        return self.fc2(inside.astype(x.dtype))


class GatedMLP(FeedForward):
    """f(x W_gate) * (x W_up), then W_down (arXiv 2002.05202).

    Args:
        activation: f, a key of `ACTIVATIONS`; "gelu_tanh" makes it a GEGLU, "silu" a SwiGLU.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: str,
        bias: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"bias": bias, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = Linear(hidden_size, intermediate_size, role="up", **options)
        self.up = Linear(hidden_size, intermediate_size, role="up", **options)
        self.down = Linear(intermediate_size, hidden_size, role="down", **options)

    def inner(self, x: Float[Array, "B S C"]) -> Float[Array, "B S H"]:
        """f(x W_gate) * (x W_up), in float32."""
        gate, up = (layer(x).astype(jnp.float32) for layer in (self.gate, self.up))
        return ACTIVATIONS[self.activation](gate) * up

    def whole(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.down(self.inner(x).astype(x.dtype))
