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
from effjax.layers.attention import BiasedAttention
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
        hidden_size: channels of a token.
        intermediate_size: channels inside an MLP.
        num_layers, num_heads: hidden_size is divided among the heads.
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
    hidden_size: Count = 768
    intermediate_size: Count = 3072
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
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads; got {self.hidden_size} and "
                f"{self.num_heads}"
            )


class EncodedText(NamedTuple):
    """The vectors of a text, as the encoder returns them.

    Attributes:
        last: vectors [B, T, C] after all blocks and the last norm.
        pooled: vector [B, C] of the end-of-text token; [B, P] after a projection, if there is one.
        states: vectors [B, T, C] of the embedding and after each block, before the last norm:
            `states[-1 - n]` leaves out n blocks.
    """

    last: Float[Array, "B T C"]
    pooled: Float[Array, "B P"]
    states: tuple[Float[Array, "B T C"], ...]


class CLIPBlock(nnx.Module):
    """Attention and MLP, each behind a layer norm."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        hidden_size, dtype, eps = config.hidden_size, jnp.dtype(config.param_dtype), config.norm_eps
        self.norm1 = AffineLayerNorm(hidden_size, eps=eps, param_dtype=dtype)
        self.attn = BiasedAttention(
            hidden_size,
            heads=config.num_heads,
            head_dim=hidden_size // config.num_heads,
            param_dtype=dtype,
            rngs=rngs,
        )
        self.norm2 = AffineLayerNorm(hidden_size, eps=eps, param_dtype=dtype)
        self.mlp = MLP(
            hidden_size,
            config.intermediate_size,
            activation=config.activation,
            param_dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B T C"], bias: Float[Array, "#B 1 T T"]
    ) -> Float[Array, "B T C"]:
        x = x + self.attn(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class CLIPText(Model):
    """The network: computes vectors of the tokens and of the whole text from token ids."""

    Config = CLIPTextConfig

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs):
        self.config = config
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Param(init(rngs.params(), (config.vocab_size, hidden_size), dtype))
        self.positions = nnx.Param(init(rngs.params(), (config.max_positions, hidden_size), dtype))
        blocks = [CLIPBlock(config, rngs=rngs) for _ in range(config.num_layers)]
        self.blocks = Stack(blocks, scans=False)  # all their outputs are returned
        self.norm = AffineLayerNorm(hidden_size, eps=config.norm_eps, param_dtype=dtype)
        self.proj = (
            None
            if config.projection is None
            else Linear(
                hidden_size,
                config.projection,
                role="head",
                bias=False,
                param_dtype=dtype,
                rngs=rngs,
            )
        )

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return jax.ShapeDtypeStruct((2, 8), jnp.int32), jax.ShapeDtypeStruct((2, 8), bool)

    def layout(self, ids: Array, *_: Any) -> Layout:
        return Layout(grid=(0, 0, 0), text=ids.shape[1])

    def __call__(
        self, ids: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None
    ) -> EncodedText:
        """Encode texts.

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
        x = self.embed_tokens.get_value()[ids].astype(config.dtype)
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
