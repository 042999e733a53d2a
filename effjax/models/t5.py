"""T5's encoder, version 1.1 (arXiv 1910.10683; gated GELU, arXiv 2002.05202): texts to vectors.

Parity target: transformers' `T5EncoderModel`. Positions enter as one table of relative biases,
which all layers share; logits are not scaled.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive
from effjax.layers.attention import BiasedAttention
from effjax.layers.folding import QKV, Fold
from effjax.layers.mlp import GatedMLP
from effjax.layers.norms import RMSNorm
from effjax.layers.stack import Stack


@dataclasses.dataclass(frozen=True)
class T5Config(Checked):
    """Shape and numerics of a T5 encoder; the defaults are T5 v1.1 XXL's.

    Attributes:
        vocab_size: number of token ids.
        hidden_size: channels of a token.
        intermediate_size: channels inside an MLP.
        num_layers, num_heads, head_dim: num_heads * head_dim may differ from hidden_size.
        buckets: of relative positions, half of them for each direction.
        max_distance: positions as far apart as this share the last bucket.
        norm_eps: epsilon of the norms.
        dtype: dtype of the computation; norms, softmax and the sum of the layers are float32.
        param_dtype: dtype of new parameters.
    """

    vocab_size: Count = 32128
    hidden_size: Count = 4096
    intermediate_size: Count = 10240
    num_layers: Count = 24
    num_heads: Count = 64
    head_dim: Count = 64
    buckets: Count = 32
    max_distance: Count = 128
    norm_eps: Positive = 1e-6
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"buckets must be a multiple of 4 and max_distance more than a quarter of it; got "
                f"buckets={self.buckets}, max_distance={self.max_distance}"
            )


class T5MLP(GatedMLP):
    """A GEGLU that outgrows float16: its two last products are float32 then, as in transformers."""

    def __call__(self, x: Float[Array, "B S C"]) -> Float[Array, "B S C"]:
        wide = jnp.float32 if x.dtype == jnp.float16 else x.dtype
        return self.down(self.inner(x).astype(wide))


class T5Block(nnx.Module):
    """Attention and gated MLP, each behind an RMS norm.

    The sum of the layers is float32: from layer to layer it grows out of float16's range.
    """

    folds = (
        Fold(QKV, "norm1", "norm"),
        Fold(("mlp.gate", "mlp.up"), "norm2", "norm"),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
        Fold(("mlp.down",), "mlp.up", "linear"),
    )

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        hidden_size, dtype, eps = config.hidden_size, config.param_dtype, config.norm_eps
        self.dtype = jnp.dtype(config.dtype)
        self.norm1 = RMSNorm(hidden_size, eps=eps, param_dtype=dtype)
        self.attn = BiasedAttention(
            hidden_size,
            scale=1.0,
            bias=False,
            heads=config.num_heads,
            head_dim=config.head_dim,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = RMSNorm(hidden_size, eps=eps, param_dtype=dtype)
        self.mlp = T5MLP(
            hidden_size,
            config.intermediate_size,
            activation="gelu_tanh",
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B S C"], bias: Float[Array, "B H S S"]
    ) -> Float[Array, "B S C"]:
        x = x + self.attn(self.norm1(x).astype(self.dtype), bias).astype(x.dtype)
        return x + self.mlp(self.norm2(x).astype(self.dtype)).astype(x.dtype)


class T5Encoder(Model):
    """The network: computes one vector for each token from token ids."""

    Config = T5Config

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(1.0)
        self.embed_tokens = nnx.Param(
            init(rngs.params(), (config.vocab_size, config.hidden_size), dtype)
        )
        self.positions = nnx.Param(init(rngs.params(), (config.buckets, config.num_heads), dtype))
        self.blocks = Stack([T5Block(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.hidden_size, eps=config.norm_eps, param_dtype=config.param_dtype)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)

    def layout(self, ids: Array, *_: Any) -> Layout:
        return Layout(grid=(0, 0, 0), text=ids.shape[1])

    def __call__(
        self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T C"]:
        """Encode texts.

        Args:
            ids: tokens, 0 ... vocab_size - 1.
            mask: False for padding, which no token attends to. None if all tokens count, padding
                too, as SD3 and FLUX were made.

        Returns:
            [B, T, width] in `config.dtype`; rows of padding hold values too.
        """
        config = self.config
        x = self.embed_tokens.get_value()[ids].astype(jnp.float32)
        buckets = relative_buckets(
            ids.shape[1], buckets=config.buckets, max_distance=config.max_distance
        )
        relative = self.positions.get_value()[buckets].astype(jnp.float32).transpose(2, 0, 1)
        lowest = jnp.finfo(jnp.float32).min
        bias = jnp.broadcast_to(relative, (ids.shape[0], *relative.shape))
        if mask is not None:
            bias = jnp.maximum(relative + jnp.where(mask, 0.0, lowest)[:, None, None], lowest)
        x = self.blocks(x, bias)
        return self.norm(x).astype(config.dtype)


def relative_buckets(length: int, *, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every pair of positions, int32 [query, key].

    One half of the buckets is for keys after the query. In each half, the first half counts
    distances singly, the second in logarithmic steps up to `max_distance`.
    """
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = buckets // 2, buckets // 4
    distance = np.abs(offset)
    # float32, as in transformers: bucket edges lie exactly on integers
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    steps = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + steps.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


MODEL = T5Encoder
