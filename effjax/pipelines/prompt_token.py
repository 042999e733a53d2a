"""Pipelines of language models that draw images, and read prompts themselves: Janus."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.models.llamagen import Prompt
from effjax.pipelines import arguments
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.loading import Components
from effjax.pipelines.next_token import PromptedRaster
from effjax.pipelines.text_encoders import TOKENIZING

_COLUMNS = 16  # prompts are padded to a multiple, so that few programs are compiled


@dataclasses.dataclass(frozen=True, repr=False)
class PromptTokenPipeline(PromptedRaster):
    """A language model with codes of images (Janus), its tokenizer and the VQ model.

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
        config = self.forward.config
        if self.tokenizer is None:
            raise ValueError(f"a {self.family.name} needs its tokenizer")
        unknown = [
            name
            for name in ("bos_token", "boi_token", "pad_token")
            if getattr(config, name) is None
        ]
        if unknown:
            raise ValueError(
                f"the model does not know its {', '.join(unknown)}: put generation_config.json "
                f"beside its config.json, or set them in its configuration"
            )

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
        return cls(
            *found.model(family.model if saved else None),
            found.model(family.vae, part=None if saved else family.vae_part),
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
        return [*read["input_ids"], self.forward.config.boi_token]
