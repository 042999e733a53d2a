"""Text pipelines: a language model with its tokenizer, from text to text."""

from __future__ import annotations

import dataclasses
import functools
import re
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import generate as generation
from effjax.generate import JacobiDecoding, PrefixCache, Streamer
from effjax.pipelines.arguments import check_characters
from effjax.pipelines.base import BasePipeline, runs_executables
from effjax.pipelines.loading import Components
from effjax.pipelines.settings import GENERATION, GenerationSettings, read_settings
from effjax.storage import write_json

Message = Mapping[str, Any]
Prompt = str | Sequence[Message]

_SAMPLING = tuple(field.name for field in dataclasses.fields(generation.Sampling))
# What transformers does itself with a chat, whatever its template reads.
_RENDERING = ("add_generation_prompt", "chat_template", "continue_final_message")
# A tokenizer that was saved with a length or padding is changed by the first call.
_TOKENIZERS = threading.Lock()


@dataclasses.dataclass(frozen=True, repr=False)
class TextPipeline(BasePipeline):
    """A language model that is ready to continue texts and to answer in chats.

    Call it with a text or with messages. Several threads may call it at the same time.

        pipe = effjax.pipeline("Qwen/Qwen2.5-0.5B-Instruct")
        answer = pipe([{"role": "user", "content": "Hello"}], max_new_tokens=64)

    Attributes:
        forward, params: the model, possibly transformed.
        tokenizer: a tokenizer of transformers. It may know more tokens than the model; texts must
            not contain these.
        settings: contents of its generation_config.json. They are the defaults for drawing tokens
            and for ending texts, see `effjax.pipelines.settings.GenerationSettings`.

    Raises:
        ValueError: for settings of another type or out of range, and for ends that are not tokens
            of the model.
    """

    tokenizer: Any
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    TASK = "text-generation"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.forward.config.vocab_size
        if wrong := [token for token in self._settings.ends if token >= known]:
            raise ValueError(
                f"{GENERATION}: eos_token_id {wrong} is no token of the model, which knows 0 ... "
                f"{known - 1}"
            )

    @classmethod
    def of(cls, found: Components) -> TextPipeline:
        """Load from components, which stand in one folder unless a pipeline's `save` wrote them."""
        model, tokenizer = found.family.model, *found.family.tokenizers
        saved = found.index is not None
        return cls(
            *found.model(model if saved else None),
            tokenizer=found.tokenizer(tokenizer, tokenizer if saved else None),
            settings=read_settings(found.folder),
            origin=found.origin,
            family=found.family,
        )

    @functools.cached_property
    def _settings(self) -> GenerationSettings:
        return GenerationSettings.of(self.settings, GENERATION)

    @runs_executables
    def __call__(
        self,
        prompt: Prompt | Sequence[Prompt],
        *,
        max_new_tokens: int | None = None,
        key: jax.Array | None = None,
        stop: str | Sequence[str] = (),
        streamer: Streamer | None = None,
        prefix: PrefixCache | None = None,
        decoder: JacobiDecoding | None = None,
        **options: Any,
    ) -> Any:
        """Continue a text, or answer in a chat.

        Args:
            prompt: a text; or messages, `[{"role": "user", "content": "..."}]`, which the
                tokenizer's chat template turns into a text; or a list of either. If the last
                message is the assistant's, it is continued.
            max_new_tokens: the most tokens to make. None takes the number of the settings, else
                128.
            key: PRNG key, `jax.random.key(seed)`. With a key tokens are drawn, as with
                `do_sample=True` in transformers. Without a key the most likely tokens are taken.
            stop: texts that end the answer. They are cut off with everything that follows. Write
                special tokens as they are ("<|im_end|>").
            streamer: an object that receives tokens as they are made, such as transformers'
                `TextStreamer`. It also receives the tokens of a stop.
            prefix: result of `prefill`; the prompts continue its text.
            decoder: how several tokens are found in one call, such as `JacobiDecoding(window=8)`;
                None finds one. The distribution of texts is the same.
            options: `temperature`, `top_k`, `top_p`, `min_p`, `repetition_penalty` of
                `effjax.generate.Sampling`; the defaults are those of the settings, else none. For
                chats also the arguments of transformers' `apply_chat_template`: `tools`,
                `documents`, `add_generation_prompt`, `continue_final_message`, `chat_template`, and
                all others that the template reads (`enable_thinking`).

        Returns:
            The new text, or a list of them.

        Raises:
            ValueError: as `effjax.generate.generate`, and as `encode`.
            TypeError: for options that neither this function nor the chat template takes.
        """
        prompts, several = _prompts(prompt)
        stops = _stops(stop)
        template = {name: value for name, value in options.items() if name not in _SAMPLING}
        rows = [self.encode(each, begins=prefix is None, **template) for each in prompts]
        if max_new_tokens is None:
            max_new_tokens = self._settings.max_new_tokens or 128
        out = generation.generate(
            self.forward,
            self.params,
            rows if any(rows) else None,  # nothing is between a prefix and its continuation
            max_new_tokens=max_new_tokens,
            eos=self.ends,
            key=key,
            streamer=streamer,
            stop=self._stop(stops) if stops else None,
            prefix=prefix,
            buckets=self.buckets,
            decoder=decoder,
            **self.sampling(options, drawn=key is not None),
        )
        texts = [self.decode(row, stops) for row in out.rows()]
        return texts if several else texts[0]

    @runs_executables
    def prefill(
        self, prompt: Prompt, *, new: int = 256, chunk: int | None = None, **template: Any
    ) -> PrefixCache:
        """Read a text once, for several prompts that continue it.

        Use it for a long context that several questions are about. A compressed cache compresses
        the text here, without knowing what will be asked. A prompt that continues the text gets no
        second token that begins texts: `pipe(question, prefix=pipe.prefill(text))` equals
        `pipe(text + question)`, if the tokenizer splits the two at their seam.

        Args:
            prompt: the beginning of all these texts, or the first messages of chats.
            new: how many tokens may follow, those of prompts and answers together.
            chunk: see `effjax.generate.prefill`.
            template: for messages, see `__call__`. No prompt for an answer is added unless you ask
                for it.

        Raises:
            ValueError: as `effjax.generate.prefill`, and as `encode`.
        """
        if not isinstance(prompt, str):
            template = {"add_generation_prompt": False, **template}
        rows = [self.encode(prompt, ends=False, **template)]
        options = {"chunk": chunk, "buckets": self.buckets}
        return generation.prefill(self.forward, self.params, rows, new=new, **options)

    def score(self, text: str | Sequence[str], **options: Any) -> list[np.ndarray]:
        """Compute the log-probability of every token but the first, for each text.

        Args:
            text: one or more texts.
            options: `context` of `effjax.generate.score`.

        Returns:
            An array float32[tokens - 1] for each text.
        """
        rows = [self.encode(each) for each in ([text] if isinstance(text, str) else text)]
        options = {"buckets": self.buckets, **options}
        scores = generation.score(self.forward, self.params, rows, **options)
        return [each[1 : len(row)] for each, row in zip(scores, rows, strict=True)]

    def perplexity(self, text: str | Sequence[str], **options: Any) -> float:
        """Compute perplexity: exp of the mean negative log-probability of the tokens of texts.

        Raises:
            ValueError: if none of the texts has a second token.
        """
        scores = np.concatenate(self.score(text, **options))
        if not scores.size:
            raise ValueError("texts of one token have nothing to predict; give longer ones")
        return float(np.exp(-scores.mean()))

    def encode(
        self, prompt: Prompt, *, begins: bool = True, ends: bool = True, **template: Any
    ) -> list[int]:
        """Turn a text, or the messages of a chat, into tokens.

        The tokens include those that the tokenizer puts around a text. For a text without tokens,
        the result is the token that begins texts.

        Args:
            prompt: the text or the messages.
            begins: whether to include the tokens that begin a text. A prompt that continues another
                text has none.
            ends: whether to include the tokens that the tokenizer puts behind a text. A text that
                will be continued has none.
            template: for messages, see `__call__`.

        Raises:
            ValueError: for tokens that the model does not know, for a text without tokens if no
                token begins texts, and for messages if there is no chat template or it cannot
                render them.
            TypeError: for options that the chat template does not read.
        """
        if not isinstance(prompt, str):
            tokens = self._chat(prompt, template)
            if not begins and tokens[:1] == [self.tokenizer.bos_token_id]:
                tokens = tokens[1:]
        elif template:
            raise _unknown(template, "chats take what the tokenizer's template reads")
        else:
            found = self._tokens(prompt, return_special_tokens_mask=True)
            added = found["special_tokens_mask"]
            inner = [place for place, own in enumerate(added) if not own] or [len(added)]
            start, stop = 0 if begins else inner[0], None if ends else inner[-1] + 1
            tokens = list(found["input_ids"])[start:stop]
        if not tokens and begins:
            tokens = [self._beginning(prompt)]
        known = self.forward.config.vocab_size
        if wrong := [token for token in tokens if token >= known]:
            name = self.tokenizer.convert_ids_to_tokens(wrong[0])
            raise ValueError(
                f"the text has the token {name!r} ({wrong[0]}), and the model knows 0 ... "
                f"{known - 1} only. Leave it out; or the tokenizer belongs to another model."
            )
        return tokens

    def _tokens(self, text: str, **options: Any) -> Any:
        check_characters("the text", text)
        with _TOKENIZERS:
            return self.tokenizer(text, **options)

    def _chat(self, messages: Sequence[Message], template: Mapping[str, Any]) -> list[int]:
        """Tokens of a chat, as the tokenizer's template writes it."""
        if not self.tokenizer.chat_template and "chat_template" not in template:
            raise ValueError("this model's tokenizer has no chat template: give a text")
        source = self.tokenizer.get_chat_template(
            template.get("chat_template"), template.get("tools")
        )
        names = [name for name in template if name not in _RENDERING]
        if unread := [name for name in names if not re.search(rf"\b{re.escape(name)}\b", source)]:
            raise _unknown(unread, "the chat template reads none of that name")
        answering = messages[-1].get("role") == "assistant"
        goes_on = template.get(
            "continue_final_message", answering and "add_generation_prompt" not in template
        )
        options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on}
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, **{**options, **template}
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise ValueError(f"the chat template cannot render this chat: {error}") from error
        return list(self._tokens(text, add_special_tokens=False)["input_ids"])

    def _beginning(self, prompt: Prompt) -> int:
        """The token that begins texts, for a prompt that has no tokens."""
        begin = self._settings.bos_token_id
        begin = self.tokenizer.bos_token_id if begin is None else begin
        if begin is None:
            raise ValueError(
                f"the prompt {prompt!r} has no tokens, and this model has none that begins texts; "
                f"give a text"
            )
        return begin

    def decode(self, tokens: Sequence[int], stop: Sequence[str] = ()) -> str:
        """The text of tokens, without special ones, up to the first of the texts in `stop`.

        Those are looked for in the text as it is written with its special tokens.
        """
        tokens = list(tokens)
        if stop:
            written = self._written(tokens)
            places = [place for place in (written.find(each) for each in stop) if place >= 0]
            if places:
                return self._before(tokens, written[: min(places)])
        return self._written(tokens, special=False)

    def _written(self, tokens: Sequence[int], *, special: bool = True) -> str:
        with _TOKENIZERS:
            return self.tokenizer.decode(tokens, skip_special_tokens=not special)

    def _before(self, tokens: list[int], text: str) -> str:
        """A text that begins what tokens write, without the special ones among them."""
        count = next(
            count
            for count in range(len(tokens) - 1, -1, -1)
            if text.startswith(self._written(tokens[:count]))
        )
        rest = text[len(self._written(tokens[:count])) :]
        added = self.tokenizer.added_tokens_decoder.get(tokens[count])
        in_special = added is not None and added.special  # the stop begins within its name
        return self._written(tokens[:count], special=False) + ("" if in_special else rest)

    @property
    def ends(self) -> list[int]:
        """Tokens that end a text: of the settings, else the tokenizer's, if the model knows it."""
        if "eos_token_id" in self.settings:
            return list(self._settings.ends)
        end = self.tokenizer.eos_token_id
        return [end] if end is not None and end < self.forward.config.vocab_size else []

    def _components(self, directory: Path) -> dict[str, Any]:
        write_json(directory / GENERATION, dict(self.settings))
        return super()._components(directory)

    def sampling(self, given: Mapping[str, Any], *, drawn: bool) -> dict[str, Any]:
        """What is given, else what the settings say; they draw only if there is a key."""
        usual = {name: getattr(self._settings, name) for name in _SAMPLING}
        if not drawn:
            usual = {"repetition_penalty": usual["repetition_penalty"]}
        elif usual["temperature"] is None:
            usual["temperature"] = 1.0
        asked = {name: given[name] for name in _SAMPLING if given.get(name) is not None}
        return {name: value for name, value in {**usual, **asked}.items() if value is not None}

    def _stop(self, texts: Sequence[str]) -> Callable[[list[int]], bool]:
        return lambda row: any(text in self._written(row) for text in texts)


def _unknown(names: Iterable[str], reason: str) -> TypeError:
    return TypeError(
        f"unknown options {', '.join(names)}; there are {', '.join(_SAMPLING)}, and {reason}"
    )


def _prompts(given: Any) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they are several: a list that is no chat."""
    one = isinstance(given, str) or _is_chat(given)
    prompts: list[Prompt] = [given] if one else list(given) if isinstance(given, Sequence) else []
    if not prompts or not all(isinstance(each, str) or _is_chat(each) for each in prompts):
        raise ValueError(
            'a prompt is a text, or a chat, [{"role": "user", "content": "..."}], or a list of one '
            f"or more of either; got {given!r}"
        )
    return prompts, not one


def _is_chat(given: Any) -> bool:
    """Whether these are one or more messages."""
    return (
        isinstance(given, Sequence)
        and len(given) > 0
        and all(isinstance(message, Mapping) for message in given)
    )


def _stops(given: str | Sequence[str]) -> list[str]:
    stops = [given] if isinstance(given, str) or not isinstance(given, Iterable) else list(given)
    if wrong := [each for each in stops if not isinstance(each, str) or not each]:
        raise ValueError(f"stop takes texts of one or more characters, got {wrong[0]!r}")
    return stops
