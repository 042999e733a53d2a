"""What declarations of methods say, for people: `effjax methods NAME` and the pages of the docs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

from effjax.cli import options
from effjax.registry import module_of
from effjax.transform import Method


def summary(method: Method) -> dict[str, Any]:
    """What a list of methods says of one."""
    return {
        "paper": method.paper,
        "seams": list(method.seams),
        "domain": method.domain,
        "search": method.search is not None,
        "fit": method.fit is not None,
    }


def figures(method: Method) -> dict[str, Any]:
    """All that a declaration says, as JSON types."""
    return {
        **summary(method),
        "name": method.name,
        "systems": list(method.systems),
        "looks_at": looks_at(method),
        "options": {title: dict(_fields(kind)) for title, kind in parts(method)},
        "examples": examples(method),
    }


def about(method: Method) -> str:
    """What a method is: the docstring of its module."""
    return inspect.cleandoc(sys.modules[module_of(method.name)].__doc__ or "")


def looks_at(method: Method) -> str | None:
    """What its calibration, search and training take, besides the model."""
    from effjax.cli.data import KINDS

    return " or ".join(KINDS[kind].about for kind in method.data_kinds) or None


def parts(method: Method) -> Iterator[tuple[str, type]]:
    """The dataclasses that a declaration names, each under a title."""
    if method.read is not None:
        return  # files say its plan
    yield "plan", method.plan
    for shorthand in method.shorthands:
        yield f"plan, in short ({shorthand.__name__.lower()})", shorthand
    if method.goals is not None:
        yield "goals of a search", method.goals
    if method.fitting is not None:
        yield "training", method.fitting


def _fields(kind: type) -> Iterator[tuple[str, dict[str, Any]]]:
    needed = options.required(kind)
    for name, (_, field, said) in options.fields([kind]).items():
        default = {} if name in needed else {"default": field.default}
        yield name, {"about": said, **default}


def examples(method: Method) -> list[str]:
    """A command for each of what can be done with a method."""
    from effjax.cli.data import KINDS

    if method.read is not None and method.data is not None:
        return [f"effjax apply MODEL SMALLER {method.name}{KINDS[method.data_kinds[0]].words}"]
    said = next((kind for kind in (*method.shorthands, method.plan) if _speakable(kind)), None)
    plan = " --plan plan.json" if said is None else _words(said)
    found = [f"effjax apply MODEL SMALLER {method.name}{plan}"] if method.applies else []
    if method.goals is not None:
        found.append(f"effjax search MODEL SMALLER {method.name}{_words(method.goals)}")
    if method.fitting is not None:
        found.append(f"effjax fit MODEL SMALLER {method.name}{_words(method.fitting)}")
    return found


def _speakable(kind: type) -> bool:
    return not options.required(kind)


def _words(kind: type) -> str:
    """Options with their defaults, of the fields that have one that can be said."""
    words = []
    for name, (_, field, _) in options.fields([kind]).items():
        default = field.default
        if isinstance(default, bool) or default in (None, options.MISSING):
            continue
        value = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        if value:
            between = "=" if value.startswith("-") else " "  # a list is no negative number
            words.append(f" --{name.replace('_', '-')}{between}{value}")
    return "".join(words)


def text(method: Method) -> str:
    """What `effjax methods NAME` prints."""
    seen = looks_at(method)
    lines = [
        f"{method.name}: {method.paper}",
        f"changes {', '.join(method.seams)}; for {method.domain}"
        + ("" if seen is None else f"; looks at {seen}"),
        "",
        about(method),
    ]
    for title, kind in parts(method):
        lines += ["", f"{title}:"]
        for name, held in _fields(kind):
            ends = f" (default: {held['default']})" if "default" in held else " (needed)"
            lines.append(f"  --{name.replace('_', '-')}: {held['about']}{ends}")
    return "\n".join([*lines, "", "examples:", *(f"  {each}" for each in examples(method))])
