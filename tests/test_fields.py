import argparse
import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pytest

from effjax import fields
from effjax.fields import Checked, Count, Natural, Positive, Range, Share, parse, read
from effjax.registry import models


@dataclasses.dataclass(frozen=True)
class Inner(Checked):
    size: Count
    share: Share = 0.5


@dataclasses.dataclass(frozen=True)
class Outer(Checked):
    bits: Literal[4, 8] = 4
    count: Natural | None = None
    rate: Positive = 1.0
    log: Annotated[float, Range(infinite=True)] = -math.inf
    name: str = ""
    on: bool = False
    pairs: tuple[tuple[str, Count], ...] = ()
    inner: Inner | None = None
    several: tuple[Inner, ...] = ()
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)


RIGHT = [
    {"bits": 8},
    {"count": 0},
    {"count": None},
    {"rate": 3},
    {"rate": 1e-30},
    {"log": math.inf},
    {"on": True},
    {"pairs": (("a", 1), ("b", 2))},
    {"inner": Inner(1, 1)},
    {"several": (Inner(1), Inner(2))},
    {"more": {"a": [1]}},
]
WRONG = [
    ({"bits": 5}, "bits must be one of 4, 8, got 5"),
    ({"bits": 4.0}, "bits must be one of 4, 8, got 4.0"),
    ({"bits": True}, "bits must be"),
    ({"count": -1}, "count must be a whole number of at least 0 or none, got -1"),
    ({"count": 1.5}, "got 1.5"),
    ({"count": True}, "got True"),
    ({"count": 2**31}, "of at least 0 and at most 2147483647 or none, got 2147483648"),
    ({"rate": 0}, "rate must be a finite number above 0, got 0"),
    ({"rate": math.nan}, "got nan"),
    ({"rate": math.inf}, "got inf"),
    ({"rate": 10**400}, "got 1000"),
    ({"rate": "1"}, "got '1'"),
    ({"log": math.nan}, "log must be a number, got nan"),
    ({"name": None}, "name must be a text, got None"),
    ({"on": 1}, "on must be true or false, got 1"),
    ({"on": "false"}, "got 'false'"),
    ({"pairs": [("a", 1)]}, "pairs must be a list, each a list of 2"),
    ({"pairs": (("a", 1), ("b", 0))}, r"pairs\[1\]\[1\] must be a whole number of at least 1"),
    ({"pairs": (("a",),)}, r"pairs\[0\] must be a list of 2"),
    ({"inner": 3}, "inner must be Inner or none, got 3"),
    ({"more": {1: 2}}, "more has the key 1"),
]


NOWHERE = (object(), math.nan, [1], {1: 2}, b"x")  # no field of a plan or configuration holds one


@pytest.mark.parametrize("given", RIGHT, ids=str)
def test_values_that_fit_are_kept(given):
    made = Outer(**given)
    assert {name: getattr(made, name) for name in given} == given


@pytest.mark.parametrize(("given", "said"), WRONG, ids=str)
def test_values_that_do_not_fit_are_named(untyped, given, said):
    with pytest.raises(ValueError, match=said):
        Outer(**given)


@pytest.mark.parametrize("model", models().values(), ids=models())
def test_wrong_fields_of_configurations_are_named(untyped, model):
    for name, wrong in itertools.product(fields.annotated(model.Config), NOWHERE):
        with pytest.raises(ValueError, match=rf"{model.Config.__name__}: .*\b{name}\b"):
            model.Config(**{name: wrong})


def test_all_wrong_fields_are_named_at_once(untyped):
    with pytest.raises(ValueError, match=r"Outer: bits .*; count .*; name "):
        Outer(bits=1, count=-1, name=3)


def test_json_becomes_tuples_and_dataclasses():
    values = {"pairs": [["a", 1]], "inner": {"size": 2}, "several": [{"size": 3, "share": 1}]}
    wanted = Outer(pairs=(("a", 1),), inner=Inner(2), several=(Inner(3, 1),))
    assert read(Outer, values, "a file") == wanted


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], r"a file must be an object, got \[\]"),
        ({"bit": 4}, r"a file has missing fields \[\] and unknown fields \['bit'\]; the fields"),
        ({"inner": {}}, r"a file, inner has missing fields \['size'\]"),
        ({"inner": {"size": 0}}, r"a file, inner: size must be .* got 0"),
        ({"several": [{"size": 1}, {"size": "2"}]}, r"a file, several\[1\]: .* got '2'"),
        ({"bits": [4]}, r"a file: bits must be one of 4, 8, got \(4,\)"),
    ],
    ids=str,
)
def test_wrong_json_names_the_place(values, said):
    with pytest.raises(ValueError, match=said):
        read(Outer, values, "a file")


def test_words_of_a_command_line():
    assert parse(Count)("12") == 12
    assert parse(Positive)("1e-3") == 1e-3
    for kind, word in ((Count, "0"), (Count, "1.5"), (Count, "x"), (Positive, "nan"), (Share, "2")):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be .*, got '{word}'"):
            parse(kind)(word)


def test_long_values_are_cut():
    assert len(fields.short(list(range(1000)))) == 80


@pytest.mark.parametrize(
    ("kind", "word", "value"),
    [
        (str, "3", "3"),
        (Count, "3", 3),
        (float, "5e-5", 5e-5),
        (bool, "true", True),
        (Count | None, "none", None),
        (Count | None, "3", 3),
        (float | str, "x", "x"),
        (Literal[4, 8], "8", 8),
        (Literal["flat", "grouped"], "flat", "flat"),
        (tuple[Count, ...], "1,2, 3", (1, 2, 3)),
        (tuple[Count, ...], "[1, 2]", (1, 2)),
        (tuple[str, ...], "a,b", ("a", "b")),
        (
            tuple[tuple[int, tuple[tuple[str, float | None], ...]], ...],
            '[[0, [["a", 1], ["b", null]]]]',
            ((0, (("a", 1.0), ("b", None))),),
        ),
    ],
)
def test_words_say_values(kind, word, value):
    said = fields.parse(kind)(word)
    assert said == value
    assert type(said) is type(value)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (Count, "0"),
        (Count, "1.5"),
        (Count, "9" * 5000),
        (float, "nan"),
        (Literal[4, 8], "5"),
        (bool, "maybe"),
        (Count | None, "-1"),
        (tuple[Count, ...], "1,x"),
        (tuple[tuple[int, int], ...], "[" * 100_000),
        (tuple[tuple[int, int], ...], "[[1, 2, 3]]"),
    ],
)
def test_words_that_say_no_value_are_refused(kind, word):
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be .*, got"):
        fields.parse(kind)(word)


def test_docstrings_say_what_fields_are():
    @dataclasses.dataclass
    class Base:
        """A base.

        Attributes:
            one, two: numbers: a first
                and a second.
            three: another.

        Raises:
            ValueError: never.
        """

    @dataclasses.dataclass
    class Own(Base):
        """Its own.

        Attributes:
            three: said anew.
        """

    expected = dict.fromkeys(("one", "two"), "numbers: a first and a second.")
    found = fields.documented(Own)
    assert {name: found[name] for name in ("one", "two", "three")} == expected | {
        "three": "said anew."
    }
    assert "ValueError" not in found
