"""Options of commands from the fields of dataclasses, and dataclasses from options."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Union

from effjax.fields import annotated, bare, describe, documented, parse

MISSING = dataclasses.MISSING


def add(command: argparse.ArgumentParser, part: str, kinds: Sequence[type]) -> None:
    """Add an option for every field of some dataclasses.

    Fields of one name share an option. An option that the command has already gets the part's name
    in front: --plan-seed.

    Args:
        command: the parser.
        part: how to call the group, and under what name `given` finds its values.
        kinds: the dataclasses.
    """
    group = command.add_argument_group(part)
    for name, held in fields(kinds).items():
        kind, field, about = held
        options: dict[str, Any] = {
            "dest": f"{part}:{name}",
            "default": argparse.SUPPRESS,
            "help": f"{about}{_default(field)}".replace("%", "%%"),
        }
        if bare(kind) is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": parse(kind), "metavar": name.upper()}
        words = name.replace("_", "-")
        try:
            group.add_argument(f"--{words}", **options)
        except argparse.ArgumentError:
            group.add_argument(f"--{part}-{words}", **options)


Field = tuple[Any, dataclasses.Field, str]


def fields(kinds: Sequence[type]) -> dict[str, Field]:
    """Annotation, field and description of the fields of dataclasses, by name."""
    found: dict[str, Field] = {}
    for kind in kinds:
        own, texts = annotated(kind), documented(kind)
        for field in dataclasses.fields(kind):
            if field.init:
                old = found.get(field.name)
                allowed = own[field.name]
                if old is not None and old[0] != allowed:
                    allowed = Union[old[0], allowed]  # noqa: UP007 - of values
                said = f"{texts.get(field.name, '').rstrip('.')}; {describe(allowed)}".lstrip("; ")
                found[field.name] = (allowed, field, said) if old is None else (allowed, *old[1:])
    return found


def _default(field: dataclasses.Field) -> str:
    return "" if field.default in (MISSING, None) else f" (default: {field.default})"


def given(arguments: argparse.Namespace, part: str) -> dict[str, Any]:
    """The fields of a part that were given, by name."""
    start = f"{part}:"
    held = vars(arguments).items()
    return {name.removeprefix(start): value for name, value in held if name.startswith(start)}


def make(kinds: Sequence[type], values: Mapping[str, Any]) -> Any:
    """The first of some dataclasses that has all fields that were given, and needs no others.

    Raises:
        ValueError: if there is none; the message says what each takes.
    """
    for kind in kinds:
        own = {field.name: field for field in dataclasses.fields(kind) if field.init}
        if set(values) <= set(own) and required(kind) <= set(values):
            return kind(**values)
    told = " or ".join(_usage(kind) for kind in kinds)
    got = ", ".join(map(option, values)) or "nothing"
    raise ValueError(f"give {told}; got {got}")


def required(kind: type) -> set[str]:
    """Fields without a default."""
    return {
        field.name
        for field in dataclasses.fields(kind)
        if field.init and field.default is MISSING and field.default_factory is MISSING
    }


def _usage(kind: type) -> str:
    needed = required(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    words = [option(name) if name in needed else f"[{option(name)}]" for name in names]
    return " ".join(words)


def option(name: str) -> str:
    """How a field is said."""
    return f"--{name.replace('_', '-')}"
