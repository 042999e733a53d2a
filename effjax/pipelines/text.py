"""Text pipelines: a language model with its tokenizer, from text to text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import generate as generation
from effjax import recipe
from effjax.generate import Session, Streamer
from effjax.pipelines.base import BasePipeline, entry
from effjax.storage import write_json

GENERATION = "generation_config.json"

Message = Mapping[str, str]
Prompt = str | Sequence[Message]


@dataclasses.dataclass(frozen=True, repr=False)
class TextPipeline(BasePipeline):
    """A language model, ready to continue texts and to answer in chats.

    Attributes:
        forward, params: the model, possibly transformed.
        tokenizer: of transformers.
        settings: contents of its generation_config.json: defaults of what is drawn and when a text
            ends.

    Raises:
        ValueError: for a tokenizer with more tokens than the model knows.
    """

    tokenizer: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    TASK = "text-generation"

    def __post_init__(self) -> None:
        known = self.forward.config.vocab_size
        if len(self.tokenizer) > known:
            raise ValueError(
                f"the tokenizer has {len(self.tokenizer)} tokens, the model knows {known}: they "
                f"belong to different models"
            )

    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        key: jax.Array | None = None,
        stop: str | Sequence[str] = (),
        streamer: Streamer | None = None,
        context: Session | None = None,
        **sampling: Any,
    ) -> Any:
        """Continue a text, or answer in a chat.

        Args:
            prompt: a text; or messages, `[{"role": "user", "content": "..."}]`, which the
                tokenizer's chat template turns into one; or a list of either.
            max_new_tokens: the most tokens to make; of the settings, else 128.
            key: PRNG key, `jax.random.key(seed)`; without one the most likely tokens are taken.
            stop: texts that end the answer, and are cut off with what follows.
            streamer: receives tokens as they are made, such as transformers' `TextStreamer`.
            context: what `compress` has read, which the prompts continue.
            sampling: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` of
                `effjax.generate.Sampling`; of the settings, else none.

        Returns:
            The new text, or a list of them.

        Raises:
            ValueError: as `effjax.generate.generate`.
        """
        prompts, several = _prompts(prompt)
        rows = [self.encode(each) for each in prompts]
        stops = [stop] if isinstance(stop, str) else list(stop)
        out = generation.generate(
            self.forward,
            self.params,
            rows,
            max_new_tokens=max_new_tokens or self.settings.get("max_new_tokens") or 128,
            eos=self.ends,
            key=key,
            streamer=streamer,
            stop=self._stop(stops) if stops else None,
            session=context,
            **self._sampling(sampling, drawn=key is not None),
        )
        texts = [self.decode(row, stops) for row in out.rows()]
        return texts if several else texts[0]

    def compress(self, text: str, *, new: int = 256, chunk: int | None = None) -> Session:
        """Read a text once, for several prompts that continue it.

        A compressed cache compresses it here, without knowing what will be asked.

        Args:
            text: the beginning of all those texts.
            new: how many tokens may follow, prompts and answers.
            chunk: see `effjax.generate.prefill`.
        """
        rows = [self.encode(text)]
        return generation.prefill(self.forward, self.params, rows, new=new, chunk=chunk)

    def score(self, text: str | Sequence[str], **options: Any) -> list[np.ndarray]:
        """Log-probability of every token but the first, for each text.

        Args:
            text: one or more.
            options: `context` of `effjax.generate.score`.
        """
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        scores = generation.score(self.forward, self.params, rows, **options)
        return [each[1 : len(row)] for each, row in zip(scores, rows, strict=True)]

    def perplexity(self, text: str | Sequence[str], **options: Any) -> float:
        """exp of the mean negative log-probability of the tokens of texts."""
        scores = np.concatenate(self.score(text, **options))
        return float(np.exp(-scores.mean()))

    def encode(self, prompt: Prompt) -> list[int]:
        """Tokens of a text, with those that the tokenizer puts around it, or of a chat.

        Raises:
            ValueError: for messages, if the tokenizer has no chat template.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt)["input_ids"])
        if not self.tokenizer.chat_template:
            raise ValueError("this model's tokenizer has no chat template: give a text")
        text = self.tokenizer.apply_chat_template(
            [dict(message) for message in prompt], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of tokens, without special ones, up to the first of the texts in `stop`."""
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        places = [place for place in (text.find(each) for each in stop) if place >= 0]
        return text[: min(places)] if places else text

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text: of the settings, else the tokenizer's."""
        ends = self.settings.get("eos_token_id", self.tokenizer.eos_token_id)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def _components(self, directory: Path) -> dict[str, Any]:
        write_json(directory / GENERATION, dict(self.settings))
        pair = self.forward, self.params
        recipe.save(directory / "model", *pair)
        self.tokenizer.save_pretrained(directory / "tokenizer")
        own = ["transformers", type(self.tokenizer).__name__]
        return {"model": entry(pair), "tokenizer": own}

    def _sampling(self, given: Mapping[str, Any], *, drawn: bool) -> dict[str, Any]:
        """What is given, else what the settings say; they draw only if there is a key."""
        names = [field.name for field in dataclasses.fields(generation.Sampling)]
        unknown = sorted(set(given) - set(names))
        if unknown:
            raise TypeError(f"unknown options {', '.join(unknown)}; there are {', '.join(names)}")
        usual = {name: self.settings.get(name) for name in names}
        if not drawn:
            usual = {"repetition_penalty": usual["repetition_penalty"]}
        elif usual["temperature"] is None:
            usual["temperature"] = 1.0
        return {name: value for name, value in {**usual, **given}.items() if value is not None}

    def _stop(self, texts: Sequence[str]) -> Callable[[list[int]], bool]:
        return lambda row: any(text in self.decode(row) for text in texts)


def _prompts(given: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they are several: a list that is no chat."""
    several = not isinstance(given, str) and not (len(given) and isinstance(given[0], Mapping))
    return (list(given) if several else [given]), several
