"""What callers give to a pipeline, checked before anything runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from effjax.fields import LARGEST

_NO_NUMBERS = (bool, np.bool_, str, bytes)


def listed(name: str, given: Any) -> list[Any]:
    """One value, or several, as a list.

    Raises:
        ValueError: if there are none.
    """
    try:
        values = [given] if isinstance(given, str | bytes | Mapping) else list(given)
    except TypeError:  # a number, an array without axes
        values = [given]
    if not values:
        raise ValueError(f"{name} is empty: nothing is asked for, give at least one")
    return values


def texts(name: str, given: Any) -> list[str]:
    """One text, or several, as a list.

    Raises:
        ValueError: if there are none, or what is given is no text.
    """
    values = listed(name, given)
    for value in values:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a text, or a sequence of texts; got {value!r}")
        check_characters(name, value)
    return values


def check_characters(name: str, text: str) -> None:
    """Raise ValueError for half a character, as Python makes of bytes that are no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has {text[error.start]!r} at {error.start}, which is half a character: was it "
            f"read from what is no UTF-8?"
        ) from None


def one_of(name: str, given: Any, allowed: Sequence[str]) -> None:
    """Raise ValueError for what is none of these texts."""
    if not isinstance(given, str) or given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {given!r}")


def callback(given: Any) -> None:
    """Raise ValueError for a `callback_on_step_end` that is neither None nor a function."""
    if not (given is None or callable(given)):
        raise ValueError(
            f"callback_on_step_end must be a function of a step and latents, got {given!r}"
        )


def count(name: str, given: Any) -> int:
    """A whole number of at least 1 that an int32 holds, Python's or numpy's.

    Raises:
        ValueError: for another number, a boolean or no number.
    """
    try:
        number = 0 if isinstance(given, _NO_NUMBERS) else operator.index(given)
    except TypeError:
        number = 0
    if not 1 <= number <= LARGEST:
        raise ValueError(f"{name} must be a whole number of at least 1, got {given!r}")
    return number


def scale(name: str, given: Any) -> float:
    """A finite number of at least 0.

    Raises:
        ValueError: for another number, a boolean or no number.
    """
    try:
        number = math.nan if isinstance(given, _NO_NUMBERS) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be a finite number of at least 0, got {given!r}")
    return number
