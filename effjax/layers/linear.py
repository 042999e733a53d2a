"""Affine maps on the last axis. All products of activations with weights go through `dot`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.quant import QTensor, qdot
from effjax.targets import Role
from pallas_kernels.float_matmul import matmul, matmul_transposed
from pallas_kernels.grouped_matmul import by_groups, grouped_matmul


def dot(x: Float[Array, "*B I"], weight: Float[Array, "*E I O"] | QTensor) -> Float[Array, "*B O"]:
    """Multiply activations by a weight leaf, an array or quantized, in the activations' dtype.

    A weight [*E, I, O] is a stack of matrices; x is [*E, ..., I], each part for its own matrix.
    """
    if isinstance(weight, QTensor):
        return qdot(x, weight)
    leading = weight.shape[:-2]
    if x.shape[:-1][: len(leading)] != leading:
        raise ValueError(
            f"inputs {list(x.shape)} do not fit a stack of matrices {list(weight.shape)}: they are "
            f"[*E, ..., I], each part for its own"
        )
    product = matmul
    for _ in leading:
        product = jax.vmap(product)
    return product(x, weight.astype(x.dtype))


def dot_grouped(
    x: Float[Array, "M I"], weight: Float[Array, "E I O"] | QTensor, group_sizes: Int[Array, " E"]
) -> Float[Array, "M O"]:
    """Multiply sorted rows, each by the matrix of its group, see `pallas_kernels.grouped_matmul`.

    A quantized stack is multiplied matrix by matrix, as `dot` would with the rows of its group.
    """
    if isinstance(weight, QTensor):
        return by_groups(qdot, x, weight, group_sizes, weight.shape[-1])
    return grouped_matmul(x, weight.astype(x.dtype), group_sizes)


def dot_transposed(x: Float[Array, "*B I"], table: Float[Array, "O I"]) -> Float[Array, "*B O"]:
    """Multiply activations by the rows of a table, such as an embedding that is the head too."""
    return matmul_transposed(x, table.astype(x.dtype))


XAVIER = nnx.initializers.xavier_uniform()


class Linear(nnx.Module):
    """y = x W + b, with W [in, out], or a stack of them.

    Args:
        role: what the layer is for; methods choose layers by it.
        stack: how many matrices there are, such as experts, each with a bias of its own: W is
            [stack, in, out] and x [stack, ..., in]. None for one matrix.
        init: initializer of W (Xavier uniform, as in DiT).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        role: Role,
        stack: int | None = None,
        bias: bool = True,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        init: nnx.Initializer = XAVIER,
        rngs: nnx.Rngs,
    ):
        self.role: Role = role
        leading = () if stack is None else (stack,)

        def kernel(key: Array) -> Array:
            return init(key, (in_features, out_features), jnp.dtype(param_dtype))

        key = rngs.params()
        made = kernel(key) if stack is None else jax.vmap(kernel)(jax.random.split(key, stack))
        self.kernel = nnx.Param(made)
        self.bias = nnx.Param(jnp.zeros((*leading, out_features), param_dtype)) if bias else None

    def __call__(self, x: Float[Array, "*B I"]) -> Float[Array, "*B O"]:
        y = dot(x, self.kernel.get_value())
        if self.bias is None:
            return y
        bias = self.bias.get_value().astype(x.dtype)
        if bias.ndim > 1:
            bias = bias.reshape(*bias.shape[:-1], *(1,) * (y.ndim - bias.ndim), bias.shape[-1])
        return y + bias
