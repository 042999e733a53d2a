"""Text encoders of pipelines: prompts to conditions, and those of the last prompts."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.buckets import by_parts
from effjax.context import PyTree
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.pipelines import arguments
from effjax.pipelines.base import BasePipeline
from effjax.pipelines.family import TextEncoder
from effjax.pipelines.loading import Components
from effjax.pipelines.recent import Recent
from effjax.transform import Pair

_REMEMBERED = 64  # conditions of prompts: 300 x 4096 values each
TOKENIZING = threading.Lock()  # tokenizers, which pipelines may share, are not for two threads


@dataclasses.dataclass(frozen=True, repr=False)
class OfPrompts(BasePipeline):
    """What pipelines of prompts share: text encoders, which make conditions of prompts.

    Attributes:
        text_encoder, text_encoder_2, text_encoder_3: forward and parameters of the text encoders
            that the family has; None for an optional one that is missing.
        tokenizer, tokenizer_2, tokenizer_3: tokenizers of transformers, one for each encoder.

    Raises:
        ValueError: for text encoders that are missing, or that the family does not have.
    """

    text_encoder: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer: Any = dataclasses.field(default=None, kw_only=True)
    text_encoder_2: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer_2: Any = dataclasses.field(default=None, kw_only=True)
    text_encoder_3: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer_3: Any = dataclasses.field(default=None, kw_only=True)

    _captions: Recent[tuple[str, ...], PyTree] = dataclasses.field(
        default_factory=lambda: Recent(_REMEMBERED), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        encoders = self.family.text_encoders
        known = {name for each in encoders for name in (each.name, each.tokenizer)}
        needed = {
            name for each in encoders if not each.optional for name in (each.name, each.tokenizer)
        }
        fields = [field.name for field in dataclasses.fields(OfPrompts)]
        given = {name for name in fields if name.startswith(("text_encoder", "tokenizer"))}
        given = {name for name in given if getattr(self, name) is not None}
        if missing := sorted(needed - given):
            raise ValueError(f"a {self.family.name} needs its {', '.join(missing)}")
        if unknown := sorted(given - known):
            raise ValueError(f"a {self.family.name} has no {', '.join(unknown)}")

    @staticmethod
    def encoders_of(found: Components, config: Any) -> dict[str, Any]:
        """Text encoders and tokenizers of a directory, by the names of the fields.

        Args:
            found: the components; its family has text encoders.
            config: of the model that reads what they make.

        Raises:
            ValueError: for those that are missing, or belong to another model.
        """
        family: Any = found.family
        shared: dict[str, Any] = {}
        encoders = [
            each for each in family.text_encoders if not each.optional or found.has(each.name)
        ]
        for each in encoders:
            found.require(each.name, each.tokenizer)
        for each in encoders:
            shared[each.name] = encoder = found.model(each.name)
            if each.channels is not None:
                width = getattr(encoder[0].config, "hidden_size", None)
                read = getattr(config, each.channels)
                if width != read:
                    raise ValueError(
                        f"the {each.name.replace('_', ' ')}, a {encoder[0].model.__name__}, gives "
                        f"{'none' if width is None else width} channels and the "
                        f"transformer reads {read}: they belong to different models"
                    )
            shared[each.tokenizer] = found.tokenizer(each.tokenizer, each.tokenizer)
        return shared

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt, padding included, for the text encoder that reads most."""
        lengths = self._lengths(None)
        return max(lengths[each.name] for each in self._encoders)

    @property
    def _encoders(self) -> list[TextEncoder]:
        """The family's, without those that are missing."""
        return [each for each in self.family.text_encoders if getattr(self, each.name) is not None]

    @property
    def _encoder_names(self) -> list[str]:
        return [each.name for each in self.family.text_encoders]

    def _lengths(self, asked: int | None) -> dict[str, int]:
        """Tokens of a prompt for each text encoder of the family.

        Raises:
            ValueError: for a number that no encoder takes.
        """
        encoders = self.family.text_encoders
        if asked is not None:
            most = max((each.longest or 0 for each in encoders), default=0)
            if arguments.count("max_sequence_length", asked) > most:
                raise ValueError(
                    f"max_sequence_length must be at most {most} tokens for a {self.family.name}, "
                    f"got {asked}"
                    if most
                    else f"a {self.family.name} takes no max_sequence_length; leave it out"
                )
        found = {}
        for each in encoders:
            tokenizer = getattr(self, each.tokenizer)
            own = each.max_length if tokenizer is None else tokenizer.model_max_length
            adjusts = asked is not None and each.longest is not None
            found[each.name] = asked if adjusts else min(own, each.max_length)
        return found

    def _encoded(self, rows: Sequence[tuple[str, ...]], lengths: Mapping[str, int]) -> PyTree:
        """Conditions of prompts: a text for each encoder of each row."""
        said = ",".join(map(str, lengths.values()))
        keys = [(*map(self.family.clean, row), said) for row in rows]
        found = self._captions.get(keys, lambda new: self._each(new, lengths))
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def _each(self, keys: Sequence[tuple[str, ...]], lengths: Mapping[str, int]) -> list[PyTree]:
        encoded = dict.fromkeys(self._encoder_names)
        cut, whole = set(), set()  # texts of which an encoder reads a part, and all
        for place, each in enumerate(self.family.text_encoders):
            if getattr(self, each.name) is not None:
                texts = [key[place] for key in keys]
                encoded[each.name], parts = self._read(each, texts, lengths[each.name])
                cut |= parts
                whole |= set(texts) - parts
        for text in cut - whole:
            warnings.warn(
                f"no text encoder reads the end of a prompt, which is cut: {text[:60]!r}...",
                stacklevel=2,
            )
        condition = self.family.condition(encoded, self.forward.config, lengths)
        leaves, structure = jax.tree.flatten(condition)
        return [structure.unflatten(each) for each in zip(*leaves, strict=True)]

    def _read(
        self, encoder: TextEncoder, prompts: Sequence[str], length: int
    ) -> tuple[PyTree, set[str]]:
        """What the condition takes from one text encoder, and which prompts were cut."""
        texts = [encoder.template.replace("{}", prompt) for prompt in prompts]
        tokenizer = getattr(self, encoder.tokenizer)
        options = {"padding": "max_length", "max_length": length}
        with TOKENIZING:
            read = tokenizer(texts, truncation=encoder.truncates, **options)
            full = [row for row, mask in enumerate(read["attention_mask"]) if all(mask)]
            whole = tokenizer([texts[row] for row in full], verbose=False) if full else None
        longest = max(range(len(texts)), key=lambda row: len(read["input_ids"][row]))
        if (tokens := len(read["input_ids"][longest])) > length:
            raise ValueError(
                f"a prompt has {tokens} tokens, this model reads {length}; shorten "
                f"{prompts[longest][:60]!r}..."
            )
        read_in_full = [] if whole is None else whole["input_ids"]
        cut = {prompts[row] for row, ids in zip(full, read_in_full) if len(ids) > length}
        ids = np.asarray(read["input_ids"], np.int32)
        mask = np.asarray(read["attention_mask"], bool)
        run = functools.partial(_read, encoder.read, encoder.masked, *getattr(self, encoder.name))
        return by_parts(run, self.buckets, ids, mask), cut


@functools.partial(Program, static_argnums=(0, 1))
def _read(
    read: Callable[[Any, jax.Array], PyTree],
    masked: bool,
    forward: Forward,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
) -> PyTree:
    inputs = (ids, mask) if masked else (ids,)
    return read(forward(params, {}, *inputs)[0], mask)
