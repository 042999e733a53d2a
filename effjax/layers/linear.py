"""Affine maps on the last axis. All products of activations with weights go through `dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.quant import QTensor, qdot
from effjax.targets import Role
from pallas_kernels.float_matmul import matmul, matmul_transposed


def dot(x: Float[Array, "*B I"], weight: Float[Array, "I O"] | QTensor) -> Float[Array, "*B O"]:
    """Multiply activations by a weight leaf, an array or quantized, in the activations' dtype."""
    if isinstance(weight, QTensor):
        return qdot(x, weight)
    return matmul(x, weight.astype(x.dtype))


def dot_transposed(x: Float[Array, "*B I"], table: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """Multiply activations by the rows of a table, such as an embedding that is the head too."""
    return matmul_transposed(x, table.astype(x.dtype))


XAVIER = nnx.initializers.xavier_uniform()


class Linear(nnx.Module):
    """y = x W + b, with W [in, out].

    Args:
        role: what the layer is for; methods choose layers by it.
        init: initializer of W (Xavier uniform, as in DiT).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: Role,
        bias: bool = True,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        init: nnx.Initializer = XAVIER,
        rngs: nnx.Rngs,
    ):
        self.role: Role = role
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, jnp.dtype(param_dtype)))
        self.bias = nnx.Param(jnp.zeros((out_features,), param_dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = dot(x, self.kernel.get_value())
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)
