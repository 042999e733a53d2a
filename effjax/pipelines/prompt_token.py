"""Pipelines of language models that draw images, and read prompts themselves: Janus, Chameleon.

A configuration says what such a model is: the tokens of a prompt (`framed`, `known_tokens`), how
many there are (`text_vocab_size`), and what guidance leads away from (`null_condition`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.autoregression import NextToken
from effjax.autoregression.next_token import ids_of
from effjax.models.llamagen import Prompt
from effjax.pipelines import arguments
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.loading import Components
from effjax.pipelines.next_token import PromptedRaster
from effjax.pipelines.text_encoders import TOKENIZING

_COLUMNS = 16  # prompts are padded to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True, repr=False)
class PromptTokenPipeline(PromptedRaster):
    """A language model with codes of images (Janus, Chameleon), its tokenizer and the VQ model.

    Call it with prompts.

        pipe = effjax.pipeline("deepseek-community/Janus-Pro-1B", dtype="bfloat16")
        images = pipe("a fox in the snow", key=jax.random.key(0))

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQ model.
        tokenizer: a tokenizer of transformers. If it has a chat template, a prompt is what a user
            says.

    Raises:
        ValueError: without a tokenizer, and for a model that does not know its tokens.
    """

    tokenizer: Any = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokenizer is None:
            raise ValueError(f"a {self.family.name} needs its tokenizer")
        self.forward.config.known_tokens()

    def loop(self, **options: Any) -> NextToken:
        return super().loop(ids=ids_of(self.forward.config), **options)

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt beside which there is room for an image."""
        return self.forward.config.max_length - self.forward.config.image_tokens

    def example_condition(self) -> Prompt:
        columns = min(_COLUMNS, self.max_tokens)
        tokens = jnp.full((1, columns), self.forward.config.boi_token, jnp.int32)
        return Prompt(tokens, jnp.ones(tokens.shape, bool))

    @classmethod
    def of(cls, found: Components) -> PromptTokenPipeline:
        """Load from components, which stand in one folder unless a pipeline's `save` wrote them.

        Raises:
            ValueError: for components that are missing or belong to different models.
        """
        family, saved = found.family, found.index is not None
        assert isinstance(family, CodesFamily)
        (name,) = family.tokenizers
        tokenizer = found.tokenizer(name, name if saved else None)
        if saved:
            found.require(family.model, family.vae)
        own: dict[str, Any] = (
            {} if saved else {"part": family.vae_part, "part_file": family.vae_file}
        )
        vae = found.model(family.vae, **own)
        return cls(
            *found.model(family.model if saved else None),
            vae,
            tokenizer=tokenizer,
            origin=found.origin,
            family=family,
        )

    def conditions(self, prompts: str | Sequence[str]) -> tuple[Prompt, None]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these prompts.

        Raises:
            ValueError: for what is no text, and prompts that leave no room for an image.
        """
        config, texts = self.forward.config, arguments.texts("prompt", prompts)
        with TOKENIZING:
            rows = [self._tokens(text) for text in texts]
        most = self.max_tokens
        for text, row in zip(texts, rows, strict=True):
            if len(row) > most:
                raise ValueError(
                    f"a prompt has {len(row)} tokens, and beside an image of {config.image_tokens} "
                    f"this model reads {most}; shorten {text[:60]!r}..."
                )
            if max(row) >= config.text_vocab_size:
                raise ValueError(
                    f"the tokenizer makes token {max(row)}, and the model knows 0 ... "
                    f"{config.text_vocab_size - 1}: they belong to different models"
                )
        longest = max(map(len, rows))
        columns = min(-(-longest // _COLUMNS) * _COLUMNS, most)
        tokens = np.full((len(rows), columns), config.pad_token, np.int32)
        mask = np.zeros(tokens.shape, bool)
        for number, row in enumerate(rows):
            tokens[number, columns - len(row) :] = row
            mask[number, columns - len(row) :] = True
        return Prompt(jnp.asarray(tokens), jnp.asarray(mask)), None

    def _tokens(self, text: str) -> list[int]:
        """The tokens of a prompt, up to and with the one that begins an image."""
        if getattr(self.tokenizer, "chat_template", None):
            said = [{"role": "user", "content": [{"type": "text", "text": text}]}]
            text = self.tokenizer.apply_chat_template(
                said, add_generation_prompt=True, tokenize=False
            )
        read = self.tokenizer(text, padding=False, truncation=False, verbose=False)
        return self.forward.config.framed(read["input_ids"])
