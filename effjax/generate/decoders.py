"""Decoders by name, as command lines say them."""

from __future__ import annotations

from typing import Any

from effjax import fields
from effjax.generate.jacobi import JacobiDecoding

DECODERS = {"jacobi": JacobiDecoding}


def check_decoder(given: Any) -> None:
    """Raise ValueError for what is no decoder."""
    if not isinstance(given, tuple(DECODERS.values())):
        kinds = ", ".join(f"{kind.__name__}(...)" for kind in DECODERS.values())
        raise ValueError(
            f"a decoder is {kinds}, or what read_decoder makes of words such as "
            f'"{next(iter(DECODERS))}"; got {given!r}'
        )


def read_decoder(words: str) -> JacobiDecoding:
    """A decoder from its name and what differs from its defaults: "jacobi,window=8".

    Fields that are no numbers or words, such as a grid, cannot be said.

    Raises:
        ValueError: for another name, unknown fields, and values that do not fit.
    """
    name, *given = (word.strip() for word in words.split(","))
    if name not in DECODERS:
        raise ValueError(f"there is no decoder {name!r}; there are {', '.join(DECODERS)}")
    known = {key: kind for key, kind in fields.annotated(DECODERS[name]).items() if key != "grid"}
    values = {}
    for word in given:
        key, _, value = word.partition("=")
        if key not in known:
            raise ValueError(
                f"the decoder {name} has no field {key!r}: write {name},field=value with the "
                f"fields {', '.join(known)}"
            )
        values[key] = fields.spoken(known[key], value)
    return DECODERS[name](**values)
