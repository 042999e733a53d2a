"""What a checkpoint says about generation: how tokens are drawn, and which of them end a text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters.hub import Folder

GENERATION = "generation_config.json"
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclasses.dataclass(frozen=True)
class GenerationSettings:
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

    eos_token_id: int | tuple[int, ...] | None = None
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    do_sample: bool | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str) -> GenerationSettings:
        """Those among the contents of a file; what it holds besides is not looked at.

        Raises:
            ValueError: for values of another type or out of range; it names `what` and all fields.
        """
        known: dict[str, Any] = {
            name: values[name] for name in _ALLOWED if values.get(name) is not None
        }
        wrong = [
            f"{name} must be {_ALLOWED[name][1]}, got {value!r}"
            for name, value in known.items()
            if not _ALLOWED[name][0](value)
        ]
        if wrong:
            raise ValueError(f"{what}: {'; '.join(wrong)}")
        known |= {name: float(known[name]) for name in _FLOATS if name in known}
        if isinstance(known.get("eos_token_id"), list):
            known["eos_token_id"] = tuple(known["eos_token_id"])
        return cls(**known)

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
    wanted = _ALLOWED if settings is None else TOKENS
    found = {name: config[name] for name in wanted if config.get(name) is not None}
    return found | (settings or {})


def _is_whole(value: Any, least: int | None = None) -> bool:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return whole and (least is None or value >= least)


def _is_number(value: Any, least: float, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and least <= value <= most


def _is_token(value: Any) -> bool:
    return _is_whole(value, 0)


_LARGEST = 1e30
_ALLOWED = {
    "eos_token_id": (
        lambda x: all(map(_is_token, x)) if isinstance(x, list) else _is_token(x),
        "a token or a list of tokens, whole numbers from 0 on",
    ),
    "bos_token_id": (_is_token, "a token, a whole number from 0 on"),
    "pad_token_id": (_is_whole, "a whole number"),
    "do_sample": (lambda x: isinstance(x, bool), "true or false"),
    "max_new_tokens": (lambda x: _is_whole(x, 1), "a whole number, at least 1"),
    "temperature": (
        lambda x: _is_number(x, 0.0, _LARGEST),
        "a finite number of 0 (greedy) or more",
    ),
    "top_k": (lambda x: _is_whole(x, 0), "a whole number of 0 (off) or more"),
    "top_p": (lambda x: _is_number(x, 0.0, 1.0), "a number from 0 to 1 (off)"),
    "min_p": (lambda x: _is_number(x, 0.0, 1.0), "a number from 0 (off) to 1"),
    "repetition_penalty": (
        lambda x: _is_number(x, 1 / _LARGEST, _LARGEST),
        "a number above 0 (1 is off), and finite",
    ),
}
_FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty")
