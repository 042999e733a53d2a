"""Chameleon and Anole: text and images as one sequence of tokens (arXiv 2405.09818, 2407.06135).

A Llama whose vocabulary holds the codes of a `VQModel` (512 x 512 pixels are 1024 of them), with
layer norms of the heads of queries and keys: scale and shift for each head. Larger models
(`swin_norm`) have the norms of a block behind attention and MLP, before what they made is added.

`image_ids` says which token each code is. transformers leaves images' tokens out of all outputs;
here logits are those of the head, and `effjax.autoregression.NextToken` draws among the codes. An
image of a prompt is guided away from one that follows no text, as by the released code.

Parity target: transformers' `ChameleonForConditionalGeneration`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.fields import Checked, Count, FloatName, Natural, Positive, Range
from effjax.layers.attention import Positions
from effjax.layers.folding import Fold
from effjax.layers.norms import HeadLayerNorm
from effjax.models.llama import Llama, LlamaBlock, LlamaConfig
from effjax.models.llamagen import Prompt, check_tokens, known_tokens

_TOKENS = ("bos_token", "sep_token", "boi_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class ChameleonConfig(Checked):
    """Shape and numerics of a Chameleon; the defaults are the 7B model.

    Attributes:
        vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads,
            max_positions, rope_theta, tied, norm_eps, dtype, param_dtype: as for `LlamaConfig`.
        attention_bias, mlp_bias: whether these layers have biases.
        swin_norm: norms stand behind attention and MLP (34B).
        image_ids: token of each code of an image, in the order of the codebook.
        image_placeholder: token that stands for an image in a prompt.
        grid: codes of a row and of a column of an image.
        bos_token, sep_token, boi_token, pad_token: tokens that begin a text, end what a user says,
            begin an image, and padding; None where they are not known. Images of prompts need them.
    """

    vocab_size: Count = 65536
    hidden_size: Count = 4096
    intermediate_size: Count = 11008
    num_layers: Count = 32
    num_heads: Count = 32
    num_kv_heads: Count = 32
    max_positions: Count = 4096
    rope_theta: Annotated[float, Range(1, above=True)] = 10_000.0
    attention_bias: bool = False
    mlp_bias: bool = False
    swin_norm: bool = False
    tied: bool = False
    image_ids: tuple[Natural, ...] = ()
    image_placeholder: Natural = 8711
    grid: Count = 32
    bos_token: Natural | None = None
    sep_token: Natural | None = None
    boi_token: Natural | None = None
    pad_token: Natural | None = None
    norm_eps: Positive = 1e-5
    dtype: FloatName = "float32"
    param_dtype: FloatName = "float32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got {self.hidden_size} and "
                f"{self.num_heads}"
            )
        known = len(set(self.image_ids)) == len(self.image_ids)
        if not known or max(self.image_ids, default=0) >= self.vocab_size:
            raise ValueError(
                f"image_ids must be different tokens 0 ... {self.vocab_size - 1}, one for each code"
            )
        check_tokens(self, _TOKENS)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def max_length(self) -> int:
        """The longest sequence in tokens."""
        return self.max_positions

    @property
    def image_tokens(self) -> int:
        """Codes of an image."""
        return self.grid**2

    @property
    def text_vocab_size(self) -> int:
        """Tokens of prompts: all."""
        return self.vocab_size

    @property
    def qkv_bias(self) -> bool:
        return self.attention_bias

    @property
    def decoder(self) -> LlamaConfig:
        """The configuration of the Llama that it is, but for its norms."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_positions=self.max_positions,
            rope_theta=self.rope_theta,
            qkv_bias=self.attention_bias,
            out_bias=self.attention_bias,
            mlp_bias=self.mlp_bias,
            tied=self.tied,
            norm_eps=self.norm_eps,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
        )

    def known_tokens(self) -> dict[str, int]:
        """The tokens of prompts that are no text, by the names of their fields.

        Raises:
            ValueError: for a model that does not know them.
        """
        return known_tokens(self, _TOKENS, "vocabulary_map of config.json")

    def framed(self, text: Sequence[int]) -> list[int]:
        """The tokens of a prompt: what begins a text, a tokenizer's, its end, an image's begin.

        Raises:
            ValueError: for a model that does not know its tokens, and a text with an image in it.
        """
        own = self.known_tokens()
        if self.image_placeholder in text:
            raise ValueError(
                f"a prompt has the token {self.image_placeholder}, which stands for an image, and "
                f"texts alone are read: leave it out"
            )
        begin = [] if [*text][:1] == [own["bos_token"]] else [own["bos_token"]]
        return [*begin, *text, own["sep_token"], own["boi_token"]]

    def null_condition(self, condition: Prompt) -> Prompt:
        """The unconditional input of classifier-free guidance: what begins a text and an image.

        Raises:
            ValueError: for a model that does not know its tokens.
        """
        own, (rows, columns) = self.known_tokens(), condition.tokens.shape
        last = jnp.asarray([own["bos_token"], own["boi_token"]], jnp.int32)
        if columns < len(last):
            raise ValueError("a prompt has what begins a text and an image: two tokens or more")
        before = (columns - len(last), 0)
        tokens = jnp.pad(last, before, constant_values=own["pad_token"])
        mask = jnp.pad(jnp.ones(len(last), bool), before)
        return Prompt(*(jnp.broadcast_to(each, (rows, columns)) for each in (tokens, mask)))


class SwinBlock(LlamaBlock):
    """Attention and gated MLP, each before an RMS norm."""

    folds = (
        Fold(("attn.to_out",), "attn.to_v", "linear"),  # without grouped keys
        Fold(("mlp.down",), "mlp.up", "linear"),
    )

    def __call__(
        self, x: Float[Array, "B S C"], positions: Positions | None
    ) -> Float[Array, "B S C"]:
        x = x + self.norm1(self.attn(x, positions))
        return x + self.norm2(self.mlp(x))


class Chameleon(Llama):
    """The network: computes the logits of the next token, of text or of an image."""

    Config: ClassVar[type] = ChameleonConfig

    @property
    def decoder(self) -> LlamaConfig:
        return self.config.decoder

    def block(self, layer: int, rngs: nnx.Rngs) -> LlamaBlock:
        config, dtype = self.decoder, jnp.dtype(self.config.param_dtype)
        queries, keys = (
            HeadLayerNorm(heads, config.head_dim, param_dtype=dtype)
            for heads in (config.num_heads, config.num_kv_heads)
        )
        kind = SwinBlock if self.config.swin_norm else LlamaBlock
        return kind(config, layer, norms=(queries, keys), rngs=rngs)


MODEL = Chameleon
