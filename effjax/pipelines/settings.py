"""What a checkpoint says about generation: how tokens are drawn, and which of them end a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from converters.hub import Folder
from effjax import fields
from effjax.fields import Checked, Count, Natural, NotNegative, Positive, Share

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class GenerationSettings(Checked):
    """The fields of generation_config.json that matter here; None leaves a step out.

    Names, and the numbers that mean "off", are transformers'.

    Attributes:
        eos_token_id: the token that ends a text, or several.
        bos_token_id: the token that begins one.
        pad_token_id: checked, but positions say what is padding.
        do_sample: checked, but a key says whether tokens are drawn.
        max_new_tokens: the most tokens to make.
        temperature, top_k, top_p, min_p, repetition_penalty: see `effjax.generate.Sampling`.
    """

    eos_token_id: Natural | tuple[Natural, ...] | None = None
    bos_token_id: Natural | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    max_new_tokens: Count | None = None
    temperature: NotNegative | None = None
    top_k: Natural | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repetition_penalty: Positive | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str) -> GenerationSettings:
        """Those among the contents of a file; what it holds besides is not looked at.

        Raises:
            ValueError: for values of another type or out of range; it names `what` and all fields.
        """
        return fields.read(cls, _said(values, _NAMES), what)

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end a text."""
        ends = self.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else ends


def read_settings(folder: Folder) -> dict[str, Any]:
    """The contents of a checkpoint's generation_config.json.

    Without that file they are what its config.json says about generation, as in transformers.
    Beside it, config.json is asked for the tokens of which that file says nothing.

    Raises:
        ValueError: for values of another type or out of range; it names the file and the fields.
    """

    def read(file: str) -> dict[str, Any] | None:
        if not folder.has(file):
            return None
        values = folder.read(file)
        GenerationSettings.of(values, f"{folder.source}, {file}")
        return values

    config, settings = read("config.json") or {}, read(GENERATION)
    return _said(config, _NAMES if settings is None else TOKENS) | (settings or {})


_NAMES = tuple(field.name for field in dataclasses.fields(GenerationSettings))


def _said(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in names if values.get(name) is not None}
