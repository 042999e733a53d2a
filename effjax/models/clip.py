"""CLIP's text encoder (arXiv 2103.00020): texts to one vector per token, and to one of the whole.

Parity target: transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`. Attention is causal,
so the end-of-text token has seen all of the text, and nothing of the padding behind it.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Natural, Positive
from effjax.layers.attention import BiasedAttentionCore, Projections
from effjax.layers.linear import Linear
from effjax.layers.mlp import MLP
from effjax.layers.norms import AffineLayerNorm
from effjax.layers.stack import Stack

OLD_END = 2  # what configurations say of models that end texts by their largest token


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig(Checked):
    """Shape and numerics of a CLIP text encoder; the defaults are ViT-L/14's.

    Attributes:
        vocab_size: number of token ids.
        width: channels of a token.
        hidden: channels inside an MLP.
        num_layers, num_heads: the width is divided among the heads.
        max_positions: the longest text in tokens.
        activation: of the MLPs: "gelu", or "quick_gelu", which is x * sigmoid(1.702 x).
        end_token: whose first place in a text stands for the whole text. 2, in configurations from
            before transformers 4.31, means the largest token instead.
        projection: channels of the vector of the whole text after a projection; None for none.
        norm_eps: epsilon of the norms.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    vocab_size: Count = 49408
    width: Count = 768
    hidden: Count = 3072
    num_layers: Count = 12
    num_heads: Count = 12
    max_positions: Count = 77
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    end_token: Natural = 49407
    projection: Count | None = None
    norm_eps: Positive = 1e-5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.width % self.num_heads:
            raise ValueError(
                f"width must be a multiple of num_heads; got {self.width} and {self.num_heads}"
            )


class EncodedText(NamedTuple):
    """What becomes of a text.

    Attributes:
        last: vectors [B, T, C] after all blocks and the last norm.
        pooled: vector [B, C] of the end-of-text token; [B, P] after a projection, if there is one.
        states: vectors [B, T, C] of the embedding and after each block, before the last norm:
            `states[-1 - n]` leaves out n blocks.
    """

    last: Float[Array, "B T C"]
    pooled: Float[Array, "B P"]
    states: tuple[Float[Array, "B T C"], ...]


class CLIPAttention(Projections):
    """Self-attention with biases."""

    def __init__(self, width: int, **options: Any):
        super().__init__(width, **options)
        self.core = BiasedAttentionCore()

    def __call__(
        self, x: Float[Array, "B T C"], bias: Float[Array, "#B 1 T T"]
    ) -> Float[Array, "B T C"]:
        q, k, v = (self.split(y) for y in (self.to_q(x), self.to_k(x), self.to_v(x)))
        with jax.named_scope("attention"):
            return self.merge(self.core(q, k, v, bias))


class CLIPBlock(nnx.Module):
    """Attention and MLP, each behind a layer norm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        width, dtype, eps = config.width, jnp.dtype(config.param_dtype), config.norm_eps
        self.norm1 = AffineLayerNorm(width, eps=eps, param_dtype=dtype)
        self.attn = CLIPAttention(
            width,
            heads=config.num_heads,
            head_dim=width // config.num_heads,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = AffineLayerNorm(width, eps=eps, param_dtype=dtype)
        self.mlp = MLP(
            width, config.hidden, activation=config.activation, param_dtype=dtype, rngs=rngs
        )

    def __call__(
        self, x: Float[Array, "B T C"], bias: Float[Array, "#B 1 T T"]
    ) -> Float[Array, "B T C"]:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class CLIPText(Model):
    """Token ids to vectors of the tokens and of the text."""

    Config = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        width, dtype = config.width, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)
        self.table = nnx.Param(init(rngs.params(), (config.vocab_size, width), dtype))
        self.positions = nnx.Param(init(rngs.params(), (config.max_positions, width), dtype))
        self.blocks = Stack([CLIPBlock(config, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = AffineLayerNorm(width, eps=config.norm_eps, param_dtype=dtype)
        self.proj = (
            None
            if config.projection is None
            else Linear(width, config.projection, bias=False, param_dtype=dtype, rngs=rngs)
        )

    def layout(self, ids: Array, *_: Any) -> Layout:
        return Layout(grid=(0, 0, 0), text=ids.shape[1])

    def __call__(
        self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> EncodedText:
        """Encode.

        Args:
            ids: tokens, 0 ... vocab_size - 1.
            mask: False for padding, which no token attends to. None for texts that are padded at
                their ends as the model was trained, as diffusers' pipelines give them.

        Returns:
            Vectors in `config.dtype`.

        Raises:
            ValueError: for texts that are longer than `config.max_positions`.
        """
        config, length = self.config, ids.shape[1]
        if length > config.max_positions:
            raise ValueError(
                f"texts of {length} tokens are longer than the {config.max_positions} that the "
                f"model was made for; cut them"
            )
        x = self.table.get_value()[ids].astype(config.dtype)
        x = x + self.positions.get_value()[:length].astype(config.dtype)
        seen = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None]
        bias = jnp.where(seen, 0.0, jnp.finfo(jnp.float32).min)
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1], bias))
        last = self.norm(states[-1])
        ends = ids if config.end_token == OLD_END else ids == config.end_token
        pooled = last[jnp.arange(ids.shape[0]), jnp.argmax(ends, axis=1)]
        return EncodedText(last, pooled if self.proj is None else self.proj(pooled), tuple(states))


MODEL = CLIPText
