"""What all programs of block-sparse attention take, heads first."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Heads(NamedTuple):
    """Operands; a pytree.

    Attributes:
        q: [B, H, S, D], float, or int8 values.
        k, v: [B, K, T, D] and [B, K, T, E]; v may be float8 or int8 values while k is not.
        segments: int32[B, S] and int32[B, T]; a query sees only keys of its own segment.
        scales: float32[B, H, S] and float32[B, K, T], what the quantized values of a query and of a
            key count; None for floats.
        by_row: int32[B, H, P], parameters of the mask's rule for every row and head; None for the
            rule's own.
    """

    q: Any
    k: Any
    v: Any
    segments: tuple[Array, Array] | None = None
    scales: tuple[Array, Array] | None = None
    by_row: Array | None = None

    @property
    def cut(self) -> bool:
        """Whether more may be masked, in any block, than lists know of."""
        return self.segments is not None or self.by_row is not None


def precision(dtype: Any) -> jax.lax.Precision | None:
    """That of products: float32 operands are multiplied as such, on accelerators too."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Arithmetic(NamedTuple):
    """How numbers are made of them; static.

    Attributes:
        scale: factor on the logits q k^T.
        out: name of the output's dtype.
        levels: largest quantized value of a probability, 127 for int8; None leaves them float.
        unit: what a block of keys is quantized in: the largest probability of each "query" or of
            the whole "tile" of queries and keys, or "one".
    """

    scale: float
    out: str
    levels: int | None = None
    unit: str = "query"
