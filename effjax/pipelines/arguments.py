"""What callers give to a pipeline, checked before anything runs."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from effjax.fields import LARGEST

_NO_NUMBERS = (bool, np.bool_, str, bytes)
_LARGEST_FLOAT = float(np.finfo(np.float32).max)


def listed(name: str, given: Any) -> list[Any]:
    """One value, or several, as a list.

    Raises:
        ValueError: if there are none, or they have no order.
    """
    if isinstance(given, set | frozenset):
        raise ValueError(
            f"{name} is a set, which has no order; give a list: {sorted(given, key=str)}"
        )
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


def count(name: str, given: Any, *, least: int = 1) -> int:
    """A whole number of at least 1, or `least`, that an int32 holds: Python's, numpy's or jax's.

    Raises:
        ValueError: for another number, a boolean or no number.
    """
    try:
        number = -1 if isinstance(given, _NO_NUMBERS) else operator.index(given)
    except TypeError:
        number = -1
    if not least <= number <= LARGEST:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {given!r}")
    return number


def flag(name: str, given: Any) -> bool:
    """True or False, Python's or numpy's.

    Raises:
        ValueError: for anything else, such as a text that says "no".
    """
    if not isinstance(given, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {given!r}")
    return bool(given)


def by_place(
    name: str, given: Any, count: int, places: str, read: Callable[[str, Any], Any]
) -> Any:
    """A number, or a tuple of one for each of so many places.

    Args:
        name: of the argument.
        given: a number, an array without axes, or a sequence or an array of numbers.
        count: how many places there are.
        places: what they are, for errors.
        read: checks a number.

    Raises:
        ValueError: for another number of them, and what `read` raises.
    """
    sequence = isinstance(given, Sequence) and not isinstance(given, str | bytes)
    if not sequence and not getattr(given, "ndim", 0):
        return read(name, given)
    if len(given) != count:
        raise ValueError(
            f"{name} is one number, or one for each of {count} {places}; got {given!r}"
        )
    return tuple(read(name, each) for each in given)


def scale(name: str, given: Any) -> float:
    """A number of at least 0 that is finite in float32.

    Raises:
        ValueError: for another number, a boolean or no number.
    """
    try:
        number = math.nan if isinstance(given, _NO_NUMBERS) else float(given)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 <= number <= _LARGEST_FLOAT:
        raise ValueError(f"{name} must be a finite number of at least 0, got {given!r}")
    return number
