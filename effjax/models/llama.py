"""Llama and its relatives: decoder-only language models (arXiv 2302.13971, 2407.21783).

Pre-norm blocks of rotary grouped-query attention and a SwiGLU. The family differs in a few switches
of the configuration only:

    Llama 2, 3, Megrez   as they are; `rope_scaling` from Llama 3.1 on
    Mistral              `window`
    Qwen2, Qwen2.5       `qkv_bias`, sometimes `tied`
    Qwen3                `qk_norm`

Parity target: transformers' `LlamaForCausalLM`, `MistralForCausalLM`, `Qwen2ForCausalLM` and
`Qwen3ForCausalLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.context import Layout, Model
from effjax.fields import Checked, Count, FloatName, Positive, Range
from effjax.layers.attention import CausalAttention, Positions
from effjax.layers.folding import QKV, Fold
from effjax.layers.linear import Linear, dot_transposed
from effjax.layers.mlp import FeedForward, GatedMLP
from effjax.layers.norms import RMSNorm
from effjax.layers.rotary import Rotary, Scaling, frequencies, section_rows
from effjax.layers.stack import Stack
from effjax.layers.token_scores import token_scores


@dataclasses.dataclass(frozen=True)
class LlamaConfig(Checked):
    """Shape and numerics of a Llama; the defaults are Llama 2 7B.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: channels of a token.
        intermediate_size: channels inside an MLP.
        num_layers, num_heads, head_dim: num_heads * head_dim may differ from hidden_size.
        num_kv_heads: heads of keys and values, a divisor of num_heads.
        max_positions: the longest text the model was made for, in tokens; `max_length` counts in
            that its rotation may be stretched.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, see `effjax.layers.rotary.frequencies`.
        rope_sections: how many frequencies go by each row of positions (M-RoPE), () for one row,
            see `effjax.layers.rotary.Rotary`.
        rope_interleaved: whether those of the rows take turns.
        window: how many of the last tokens a token sees, None for all.
        window_layers: whether each layer has the window, () for all.
        qkv_bias, out_bias, mlp_bias: which linear layers have biases.
        qk_norm: RMS norms of the heads of queries and keys.
        tied: the head is the embedding.
        norm_eps: epsilon of the norms.
        dtype: dtype of the computation; norms and softmax are float32.
        param_dtype: dtype of new parameters.
    """

    vocab_size: Count = 32000
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_layers: Count = 32
    num_heads: Count = 32
    num_kv_heads: Count = 32
    head_dim: Count = 128
    max_positions: Count = 4096
    rope_theta: Annotated[float, Range(1, above=True)] = 10_000.0
    rope_scaling: Scaling = ()
    rope_sections: tuple[Count, ...] = ()
    rope_interleaved: bool = False
    window: Count | None = None
    window_layers: tuple[bool, ...] = ()
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    norm_eps: Positive = 1e-5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads; got {self.num_heads} and "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, got {self.head_dim}")
        if self.window_layers and len(self.window_layers) != self.num_layers:
            raise ValueError(
                f"window_layers must name all {self.num_layers} layers or none, got "
                f"{len(self.window_layers)}"
            )
        frequencies(self.head_dim, self.rope_theta, self.rope_scaling)
        section_rows(self.head_dim, self.rope_sections)

    @property
    def max_length(self) -> int:
        """The longest text in tokens: beyond `max_positions` where the rotation is stretched.

        Linear scaling and YaRN stretch the original length by their factor. Models that were made
        with a stretched rotation (Llama 3.1's) say the long one as `max_positions`.
        """
        options: dict[str, Any] = dict(self.rope_scaling)
        if options.get("rope_type") not in ("linear", "yarn"):
            return self.max_positions
        original = options.get("original_max_position_embeddings") or self.max_positions
        return max(self.max_positions, int(original * options["factor"]))

    def layer_window(self, layer: int) -> int | None:
        """The window of a layer."""
        return self.window if not self.window_layers or self.window_layers[layer] else None


ATTENTION_FOLDS = (
    Fold(QKV, "norm1", "norm"),
    Fold(("attn.to_out",), "attn.to_v", "linear"),  # without grouped keys
)


class LlamaBlock(nnx.Module):
    """Attention and gated MLP, each behind an RMS norm.

    Args:
        layer: its number, from 0.
        rotary: turns queries and keys; as the configuration says, if None.
        norms: of the heads of queries and keys, likewise.
    """

    folds: tuple[Fold, ...] = (
        *ATTENTION_FOLDS,
        Fold(("mlp.gate", "mlp.up"), "norm2", "norm"),
        Fold(("mlp.down",), "mlp.up", "linear"),
    )

    def __init__(
        self,
        config: LlamaConfig,
        layer: int,
        *,
        rotary: Rotary | None = None,
        norms: tuple[nnx.Module, nnx.Module] | None = None,
        rngs: nnx.Rngs,
    ):
        eps, dtype = config.norm_eps, jnp.dtype(config.param_dtype)
        self.norm1 = RMSNorm(config.hidden_size, eps=eps, param_dtype=dtype)
        self.attn = self.attention(config, layer, rotary=rotary, norms=norms, rngs=rngs)
        self.norm2 = RMSNorm(config.hidden_size, eps=eps, param_dtype=dtype)
        self.mlp = self.feed_forward(config, layer, rngs)

    def attention(
        self,
        config: Any,
        layer: int,
        *,
        rotary: Rotary | None,
        norms: tuple[nnx.Module, nnx.Module] | None,
        rngs: nnx.Rngs,
    ) -> Any:
        """A new attention."""
        eps, dtype = config.norm_eps, jnp.dtype(config.param_dtype)
        rotary = rotary or Rotary(
            config.head_dim,
            theta=config.rope_theta,
            scaling=config.rope_scaling,
            sections=config.rope_sections,
            interleaved=config.rope_interleaved,
        )
        return CausalAttention(
            config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            rotary=rotary,
            window=config.layer_window(layer),
            norm_eps=eps if config.qk_norm else None,
            norms=norms,
            bias=config.qkv_bias,
            out_bias=config.out_bias,
            param_dtype=dtype,
            rngs=rngs,
        )

    def feed_forward(self, config: Any, layer: int, rngs: nnx.Rngs) -> FeedForward:
        """A new feed-forward layer."""
        return GatedMLP(
            config.hidden_size,
            config.intermediate_size,
            activation="silu",
            bias=config.mlp_bias,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def __call__(
        self, x: Float[Array, "B S C"], positions: Positions | None
    ) -> Float[Array, "B S C"]:
        x = x + self.attn(self.norm1(x), positions)
        return x + self.mlp(self.norm2(x))


class Llama(Model):
    """The network: computes the logits of the next token from token ids.

    Models that are made of the same parts say in `decoder` what their configuration is to these,
    and in `block` what a layer is.
    """

    Config: ClassVar[type] = LlamaConfig

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        self.config = config
        config = self.decoder
        hidden_size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        init = nnx.initializers.normal(0.02)
        self.embed_tokens = nnx.Param(init(rngs.params(), (config.vocab_size, hidden_size), dtype))
        self.blocks = Stack([self.block(i, rngs) for i in range(config.num_layers)])
        self.norm = RMSNorm(hidden_size, eps=config.norm_eps, param_dtype=dtype)
        self.lm_head = (
            None
            if config.tied
            else Linear(
                hidden_size,
                config.vocab_size,
                role="head",
                bias=False,
                param_dtype=dtype,
                rngs=rngs,
            )
        )

    @property
    def decoder(self) -> LlamaConfig:
        """The configuration of the language model."""
        return self.config

    def block(self, layer: int, rngs: nnx.Rngs) -> LlamaBlock:
        """A new layer."""
        return LlamaBlock(self.decoder, layer, rngs=rngs)

    def example_inputs(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        return (jax.ShapeDtypeStruct((2, 8), jnp.int32),)

    def layout(self, tokens: Array | None, *others: Any) -> Layout:
        given = others[3] if tokens is None else tokens
        return Layout(grid=(0, 0, 0), text=given.shape[1])

    def valid_tokens(self, tokens: Array, positions: Array | None = None, *_: Any) -> Array | None:
        return None if positions is None else positions >= 0

    def __call__(
        self,
        tokens: Int[Array, "B S"] | None,
        positions: Positions | None = None,
        logits_to_keep: Int[Array, "B N"] | None = None,
        labels: Int[Array, "B N"] | None = None,
        inputs_embeds: Float[Array, "B S C"] | None = None,
    ) -> Float[Array, "B N V"] | Float[Array, "B N"]:
        """Run the network.

        Args:
            tokens: ids, 0 ... vocab_size - 1; None with `inputs_embeds`.
            positions: places of the tokens in their sequences, which rise along a row; -1 is
                padding, at any place. None for 0, 1, 2, ... in every row. With several rows
                [B, 1 + R, S] the first row has these places, and the others the numbers that tokens
                are rotated to: R is 1, or the number of `rope_sections`.
            logits_to_keep: columns whose logits are wanted; None for all. The head of a large
                vocabulary costs more than a layer, and generation needs one column.
            labels: tokens whose log-probabilities are wanted in place of logits, which are then
                never held all at once.
            inputs_embeds: embeddings to use in place of those of tokens.

        Returns:
            Logits [B, N, vocab_size] in `config.dtype`, or log-probabilities float32[B, N]; N = S
            if `logits_to_keep` is None. Those of padding mean nothing.

        Raises:
            ValueError: if tokens and `inputs_embeds` are both given, or neither.
        """
        if tokens is not None and inputs_embeds is None:
            x = self.embed(tokens)
        elif tokens is None and inputs_embeds is not None:
            x = inputs_embeds.astype(self.config.dtype)
        else:
            raise ValueError("a language model takes tokens or inputs_embeds, one of them")
        return self.outputs(self.blocks(x, positions), positions, logits_to_keep, labels)

    def outputs(
        self,
        x: Float[Array, "B S C"],
        positions: Positions | None,
        logits_to_keep: Int[Array, "B N"] | None,
        labels: Int[Array, "B N"] | None,
    ) -> Float[Array, "B N V"] | Float[Array, "B N"]:
        """What a call gives, from the last layer's tokens."""
        if logits_to_keep is not None:
            x = jnp.take_along_axis(x, logits_to_keep[:, :, None], axis=1)
        x = self.norm(x)
        if labels is None:
            return self.logits(x)
        vocabulary = self.config.vocab_size
        return token_scores(self.logits, x, labels, vocabulary=vocabulary)

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S C"]:
        """The embeddings of tokens."""
        return self.embed_tokens.get_value()[tokens].astype(self.config.dtype)

    def logits(self, x: Float[Array, "B N C"]) -> Float[Array, "B N V"]:
        """What the head makes of normed tokens."""
        if self.lm_head is None:
            return dot_transposed(x, self.embed_tokens.get_value())
        return self.lm_head(x)


MODEL = Llama
