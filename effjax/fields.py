"""Dataclasses whose fields are checked against their annotations: types and ranges.

What a field may hold is written once, as its annotation:

    @dataclasses.dataclass(frozen=True)
    class KIVIPlan(Plan):
        key_bits: Literal[4, 8] = 4
        group: Count = 32

Plans, configurations of models and noise schedules inherit from `Checked`. `KIVIPlan(group=0)` is
then a ValueError: "KIVIPlan: group must be a whole number of at least 1, got 0". All wrong fields
are named in one error.

The other functions work from the same annotations:

    read        make a dataclass from a JSON object, such as a plan file
    parse       the `type=` of an argparse option
    documented  the help of an option, from the docstring of its dataclass
    describe    what an annotation allows, as a phrase for error messages

An annotation is int, float, bool, str, None, Any, a `Literal`, a union, a tuple, a mapping, a
class, or a number that is `Annotated` with a `Range` or with `OneOf`. The names `Count`, `Natural`,
`Positive`, `NotNegative` and `Share` below are the ranges that most fields need.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import re
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of numbers that a field takes.

    Use it in an annotation: `Annotated[float, Range(0, 1, below=True)]` is 0 <= x < 1.

    Attributes:
        low, high: the ends of the interval, which belong to it; None where it has no end.
        above: the low end does not belong to the interval.
        below: the high end does not belong to the interval.
        infinite: whether infinite numbers are allowed. NaN never is.
    """

    low: int | float | None = None
    high: int | float | None = None
    above: bool = False
    below: bool = False
    infinite: bool = False

    def holds(self, value: float) -> bool:
        """Whether the number lies in the interval."""
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        low = "" if self.low is None else f"{'above' if self.above else 'at least'} {self.low}"
        high = "" if self.high is None else f"{'below' if self.below else 'at most'} {self.high}"
        return " and ".join(end for end in (low, high) if end)


class OneOf:
    """A list of the whole numbers that a field takes: `Annotated[int, OneOf(4, 8, 16)]`."""

    infinite = False

    def __init__(self, *values: int):
        self.values = values

    def holds(self, value: float) -> bool:
        """Whether the number is in the list."""
        return value in self.values

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.values))}"


LARGEST = 2**31 - 1  # sizes and places are int32 on every device

Count = Annotated[int, Range(1, LARGEST)]
Natural = Annotated[int, Range(0, LARGEST)]
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
FloatName = Literal["float32", "bfloat16", "float16"]

_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Checked:
    """Base class of dataclasses whose fields are checked when an instance is made.

    A subclass that compares fields in a `__post_init__` of its own must call
    `super().__post_init__()` first. After that call all fields have the types of their annotations.

    Raises:
        ValueError: for fields that do not fit their annotations; all of them are named.
    """

    def __post_init__(self) -> None:
        found = [
            problem
            for name, kind in annotated(type(self)).items()
            for problem in problems(kind, getattr(self, name), name)
        ]
        if found:
            raise ValueError(f"{type(self).__name__}: {'; '.join(found)}")


@functools.cache
def annotated(kind: type) -> Mapping[str, Any]:
    """The annotation of each field of a dataclass that its constructor takes, by name."""
    hints = get_type_hints(kind, include_extras=True)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    return types.MappingProxyType({name: hints[name] for name in names})


def problems(kind: Any, value: Any, name: str) -> list[str]:
    """Compare a value with an annotation.

    Args:
        kind: the annotation; the docstring of this module lists what it may be.
        value: the value to check.
        name: the name of the value in the sentences.

    Returns:
        One sentence for each part of the value that does not fit, such as "rules[0][1] must be a
        whole number of at least 2, got 1"; an empty list if all of it fits.
    """
    kind, range_ = _parts(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(value, tuple):
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) == len(value):
            parts = enumerate(zip(kinds, value))
            return [text for i, part in parts for text in problems(*part, f"{name}[{i}]")]
    if origin is Mapping and isinstance(value, Mapping):
        keys = [f"{name} has the key {key!r}" for key in value if not _fits(inner[0], None, key)]
        parts = value.items()
        return keys + [
            text for k, part in parts for text in problems(inner[1], part, f"{name}.{k}")
        ]
    if origin in (Union, types.UnionType):
        found = [problems(each, value, name) for each in inner]
        if not all(found):
            return []
        # of an optional value, what is wrong with the value says more than that it is not None
        rest = [texts for each, texts in zip(inner, found) if each is not types.NoneType]
        if len(rest) == 1 and value is not None and isinstance(value, tuple):
            return rest[0]
    elif _fits(kind, range_, value):
        return []
    return [f"{name} must be {describe(_join(kind, range_), value)}, got {short(value)}"]


def _parts(kind: Any) -> tuple[Any, Range | OneOf | None]:
    if get_origin(kind) is not Annotated:
        return kind, None
    kind, *notes = get_args(kind)
    return kind, next((note for note in notes if isinstance(note, Range | OneOf)), None)


def bare(kind: Any) -> Any:
    """An annotation without its `Range` or `OneOf`: int for `Count`."""
    return _parts(kind)[0]


def _join(kind: Any, range_: Range | OneOf | None) -> Any:
    return kind if range_ is None else Annotated[kind, range_]


def _fits(kind: Any, range_: Range | OneOf | None, value: Any) -> bool:
    if get_origin(kind) is Literal:
        return any(type(value) is type(each) and value == each for each in get_args(kind))
    if kind in (None, types.NoneType):
        return value is None
    if kind is int or kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else int):
            return False
        try:
            number = float(value)
        except OverflowError:  # a whole number of hundreds of digits
            return False
        finite = math.isfinite(number)
        allowed = finite or (range_ is not None and range_.infinite and not math.isnan(number))
        return allowed and (range_ is None or range_.holds(number))
    if kind is Any:
        return True
    kind = get_origin(kind) or kind
    if not isinstance(kind, type) or kind is tuple or kind is Mapping:
        return False
    return isinstance(value, kind)


def describe(kind: Any, value: Any = None) -> str:
    """Say what an annotation allows, for messages: "a whole number of at least 1" for `Count`.

    Args:
        kind: the annotation.
        value: a value that does not fit. The largest int32 is mentioned only if the value is above
            it.
    """
    kind, range_ = _parts(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if isinstance(range_, OneOf):
        return str(range_)
    if origin is Literal:
        return ("one of " if len(inner) > 1 else "") + ", ".join(repr(each) for each in inner)
    if origin in (Union, types.UnionType):
        return " or ".join(
            "none" if each is types.NoneType else describe(each, value) for each in inner
        )
    if origin is tuple and inner[1:] == (...,):
        return f"a list, each {describe(inner[0])}"
    if origin is tuple:
        return f"a list of {len(inner)} ({', '.join(map(describe, inner))})"
    if origin is Mapping or kind is Mapping:
        return "an object"
    text = _NAMES.get(kind, getattr(kind, "__name__", str(kind)))
    if range_ is not None and range_.infinite:
        text = text.replace("finite ", "")
    ends = str(range_ or "")
    if ends.startswith("at"):
        ends = f"of {ends}"
    if not (type(value) is int and value > LARGEST):
        ends = ends.removesuffix(f" and at most {LARGEST}")
    return f"{text} {ends}".rstrip()


def same(one: Any, two: Any) -> bool:
    """Whether two JSON values are equal. Unlike in Python, 0 is not false and 1 is not true."""
    return one == two and isinstance(one, bool) == isinstance(two, bool)


def short(value: Any) -> str:
    """The `repr` of a value for messages, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read(kind: type[Made], values: Any, what: str) -> Made:
    """Make a dataclass from a JSON object.

    Lists become tuples. An object becomes a dataclass where the field is annotated with one.

    Args:
        kind: the dataclass.
        values: the parsed object.
        what: its name in messages, such as the file and the place in it.

    Raises:
        ValueError: if `values` is not an object, if fields are missing or unknown (all are named),
            or if values do not fit their annotations (all are named).
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{what} must be an object, got {short(values)}")
    given = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore
    unknown = sorted(str(name) for name in values if name not in given)
    nothing = dataclasses.MISSING
    missing = sorted(
        name
        for name, field in given.items()
        if name not in values and field.default is nothing and field.default_factory is nothing
    )
    if unknown or missing:
        raise ValueError(
            f"{what} has missing fields {missing} and unknown fields {unknown}; the fields are "
            f"{sorted(given)}"
        )
    kinds = annotated(kind)
    made = {
        name: from_json(kinds[name], value, f"{what}, {name}") for name, value in values.items()
    }
    wrong = [text for name, value in made.items() for text in problems(kinds[name], value, name)]
    if wrong:
        raise ValueError(f"{what}: {'; '.join(wrong)}")
    with naming(what):
        return kind(**made)


def from_json(kind: Any, value: Any, what: str = "") -> Any:
    """Convert a JSON value to the Python types of an annotation.

    Lists become tuples, objects become dataclasses, and whole numbers become floats, each where the
    annotation says so. A value that fits no part of the annotation is returned as it is, with
    tuples for its lists; `problems` then says what is wrong with it.

    Args:
        kind: the annotation.
        value: the parsed value.
        what: its name in the errors of dataclasses.
    """
    kind = bare(kind)
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [bare(each) for each in get_args(kind)]
        if type(value) not in kinds:
            kind = next((each for each in kinds if _becomes(each, value)), kind)
    if kind is float and type(value) is int and abs(value) <= 2**53:
        return float(value)
    if get_origin(kind) is tuple and isinstance(value, list):
        inner = get_args(kind)
        kinds = inner[:1] * len(value) if inner[1:] == (...,) else inner
        if len(kinds) == len(value):
            parts = enumerate(zip(kinds, value))
            return tuple(from_json(*part, f"{what}[{i}]") for i, part in parts)
    if _becomes(kind, value) and isinstance(value, Mapping):
        return read(kind, value, what)
    return tuples(value)


def _becomes(kind: Any, value: Any) -> bool:
    """Whether JSON says a value of this type by one of another."""
    if isinstance(value, list):
        return get_origin(kind) is tuple
    if isinstance(value, Mapping):
        return isinstance(kind, type) and dataclasses.is_dataclass(kind)
    return kind is float and type(value) is int


@contextlib.contextmanager
def naming(what: object) -> Iterator[None]:
    """A context in which the message of a ValueError gets a name in front.

    Use it around code that reads a file, so that its errors say which file they are about. A
    message that has the name already stays as it is.

    Args:
        what: the name, such as a path.
    """
    try:
        yield
    except ValueError as error:
        if str(what) in str(error):
            raise
        raise ValueError(f"{what}: {error}") from error


def tuples(value: Any) -> Any:
    """A JSON value with tuples in place of lists, at every depth, so that it can be hashed."""
    return tuple(tuples(item) for item in value) if isinstance(value, list) else value


def parse(kind: Any) -> Callable[[str], Any]:
    """Make the `type=` of an argparse option for a field with this annotation.

    On the command line numbers and texts are written as they are, None is "none", and a tuple is
    its parts with commas between them ("64,128,96"). Everything else is JSON.

    Returns:
        A function of the word that was given. It raises `argparse.ArgumentTypeError` for a word
        that is no value of the annotation.
    """

    def parsed(word: str) -> Any:
        value = spoken(kind, word)
        if problems(kind, value, "it"):
            raise argparse.ArgumentTypeError(f"must be {describe(kind, value)}, got {short(word)}")
        return value

    return parsed


def spoken(kind: Any, word: str) -> Any:
    """The value of an annotation that a word says, see `parse`; the word itself if it says none."""
    kind = bare(kind)
    origin, inner = get_origin(kind), get_args(kind)
    if kind is str:
        return word
    if kind is types.NoneType:
        return None if word.lower() == "none" else word
    if origin in (Union, types.UnionType):
        found = ((each, spoken(each, word)) for each in inner)
        return next((value for each, value in found if not problems(each, value, "")), word)
    if origin is Literal:
        return next((each for each in inner if str(each) == word), word)
    if origin is tuple and not word.lstrip().startswith("["):
        return tuple(spoken(inner[0], part.strip()) for part in word.split(","))
    try:
        return kind(word) if kind in (int, float) else from_json(kind, json.loads(word))
    except (ValueError, RecursionError):
        return word


@functools.cache
def documented(kind: type) -> Mapping[str, str]:
    """The descriptions of the fields of a dataclass, by name.

    They are read from the section `Attributes:` of its docstring and those of its base classes. The
    class itself wins where both describe a field.
    """
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, listed = inspect.cleandoc(base.__doc__ or "").partition("\nAttributes:\n")
        section = re.split(r"\n(?=\S)", listed)[0]
        for entry in re.split(r"\n(?=    \S)", f"\n{section}"):
            names, _, text = entry.partition(":")
            found |= {name.strip(): " ".join(text.split()) for name in names.split(",")}
    return types.MappingProxyType(found)
