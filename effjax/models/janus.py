"""Janus and Janus-Pro: images of prompts by a language model (arXiv 2410.13848, 2501.17811).

A Llama reads the tokens of a prompt and then the codes of a `VQModel`, row by row. Codes have an
embedding, and a head, of their own:

    x = [embedding(prompt) | mlp(code embedding(codes))]
    logits of the next code = mlp(llama(x))

Its positions count prompt and codes alike. The unconditional branch of guidance is the prompt with
all tokens but the first one and the one that begins an image replaced by padding, which is attended
to.

This is the path that makes images. Janus reads images by other parts (a vision tower with its
aligner), and writes texts with the language model's head; neither is here.

Parity target: transformers' `JanusForConditionalGeneration`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.fields import Count, Natural, Positive
from effjax.layers.mlp import MLP
from effjax.models.llama import LlamaConfig
from effjax.models.llamagen import Condition, ImageLlama, Prompt, check_tokens, known_tokens

_TOKENS = ("bos_token", "boi_token", "pad_token")


@dataclasses.dataclass(frozen=True)
class JanusConfig(LlamaConfig):
    """Shape and numerics of a Janus; the defaults are Janus-Pro-7B.

    The fields of a `LlamaConfig` are those of its language model, but for `vocab_size`.

    Attributes:
        vocab_size: codes of the `VQModel`.
        text_vocab_size: tokens of prompts.
        code_channels: of a code's embedding.
        grid: codes of a row and of a column of the image.
        bos_token, boi_token, pad_token: tokens that begin a text and an image, and padding; None
            where they are not known. Guidance needs them.
    """

    vocab_size: Count = 16384
    num_layers: Count = 30
    num_heads: Count = 32
    num_kv_heads: Count = 32
    max_positions: Count = 16384
    norm_eps: Positive = 1e-6
    text_vocab_size: Count = 102400
    code_channels: Count = 8
    grid: Count = 24
    bos_token: Natural | None = None
    boi_token: Natural | None = None
    pad_token: Natural | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tokens(self, _TOKENS)

    @property
    def image_tokens(self) -> int:
        """Codes of an image."""
        return self.grid**2

    @property
    def decoder(self) -> LlamaConfig:
        """The configuration of the language model, without its head."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(LlamaConfig)}
        return LlamaConfig(**{**own, "vocab_size": self.text_vocab_size, "tied": True})

    def known_tokens(self) -> dict[str, int]:
        """The tokens of prompts that are no text, by the names of their fields.

        Raises:
            ValueError: for a model that does not know them.
        """
        return known_tokens(self, _TOKENS, "generation_config.json beside config.json")

    def framed(self, text: Sequence[int]) -> list[int]:
        """The tokens of a prompt: those that a tokenizer makes, and the one that begins an image.

        Raises:
            ValueError: for a model that does not know its tokens.
        """
        return [*text, self.known_tokens()["boi_token"]]

    def null_condition(self, condition: Prompt) -> Prompt:
        """The unconditional input of classifier-free guidance: padding in place of the text.

        Raises:
            ValueError: for a model that does not know its tokens.
        """
        own, tokens = self.known_tokens(), condition.tokens
        stays = (tokens == own["bos_token"]) | (tokens == own["boi_token"])
        return condition._replace(tokens=jnp.where(stays, tokens, own["pad_token"]))


class Janus(ImageLlama):
    """The network: computes the logits of the next code from a prompt and codes."""

    Config: ClassVar[type] = JanusConfig

    def __init__(self, config: JanusConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        channels, hidden_size = config.code_channels, config.hidden_size
        numerics: dict[str, Any] = {"param_dtype": jnp.dtype(config.param_dtype), "rngs": rngs}
        init = nnx.initializers.normal(0.02)
        shape = (config.vocab_size, channels)
        self.embed_codes = nnx.Param(init(rngs.params(), shape, numerics["param_dtype"]))
        self.aligner = MLP(
            channels,
            hidden_size,
            outputs=hidden_size,
            activation="gelu",
            roles=("embedding", "embedding"),
            **numerics,
        )
        self.head = MLP(
            hidden_size,
            hidden_size,
            outputs=config.vocab_size,
            activation="gelu",
            roles=("head", "head"),
            **numerics,
        )

    @property
    def decoder(self) -> LlamaConfig:
        return self.config.decoder

    def embedded(self, condition: Condition) -> Float[Array, "B T C"]:
        if not isinstance(condition, Prompt):
            raise ValueError(
                f"this Janus is conditioned on a Prompt; got a {type(condition).__name__}"
            )
        return super().embed(condition.tokens)  # the language model's

    def embed(self, tokens: Int[Array, "B S"]) -> Float[Array, "B S C"]:
        return self.aligner(self.embed_codes.get_value()[tokens].astype(self.config.dtype))

    def logits(self, x: Float[Array, "B N C"]) -> Float[Array, "B N V"]:
        return self.head(x)


MODEL = Janus
