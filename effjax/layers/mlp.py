"""Feed-forward layers."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.layers.linear import Linear

gelu_tanh = partial(jax.nn.gelu, approximate=True)


class MLP(nnx.Module):
    """Linear -> tanh-approximated GELU -> linear, on the last axis."""

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.fc1 = Linear(width, hidden, param_dtype=param_dtype, rngs=rngs)
        self.fc2 = Linear(hidden, width, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        return self.fc2(gelu_tanh(self.fc1(x)))
