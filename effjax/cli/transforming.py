"""`effjax apply`, `search` and `fit`: a pipeline, changed by any method, is saved as another."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from effjax import storage
from effjax.cli import options
from effjax.cli.data import Source, add_arguments
from effjax.cli.running import load
from effjax.cost import weight_bytes
from effjax.fields import naming
from effjax.generate import sequence_bytes
from effjax.pipelines import TextPipeline
from effjax.registry import method
from effjax.transform import Method, Plan, Shorthand

Figures = tuple[dict[str, Any], str]
TOKENS = 512  # of the text whose cache is told


def add_options(command: argparse.ArgumentParser, verb: str, name: str) -> None:
    """Add what a command takes for a method: data, and fields of its dataclasses.

    Raises:
        ValueError: for a name of no method, or one that has no search, or is not trained.
    """
    try:
        chosen = method(name)
    except ValueError as error:
        raise ValueError(f"{error}; what a method takes stands behind its name") from None
    _check(chosen, verb)
    calibrates = chosen.calibrate is not None or chosen.read is not None
    if verb != "apply" or calibrates:
        add_arguments(command, chosen.data_kinds)
    if chosen.read is not None:
        return
    if verb == "search":
        assert chosen.goals is not None
        options.add(command, "goals", [chosen.goals])
        return
    command.add_argument("--plan", type=Path, help="a file of JSON, instead of its fields")
    if verb == "fit":
        assert chosen.fitting is not None
        options.add(command, "training", [chosen.fitting])
        command.add_argument("--checkpoints", type=Path, help="folder; a second run resumes")
    options.add(command, "plan", ways(chosen))


def ways(chosen: Method) -> list[type]:
    """The dataclasses that say a plan."""
    return [*chosen.shorthands, chosen.plan]


def _check(chosen: Method, verb: str) -> None:
    if verb == "search" and chosen.search is None:
        raise ValueError(f"{chosen.name} has no search; write its plan, and use `effjax apply`")
    if verb == "fit" and chosen.fit is None:
        raise ValueError(f"{chosen.name} is not trained; use `effjax apply`")
    if verb == "apply" and not chosen.applies:
        raise ValueError(f"{chosen.name} is nothing before it is trained; use `effjax fit`")


def apply(arguments: argparse.Namespace) -> Figures:
    """Apply a plan, with what the method learns without training, or what it reads."""
    chosen = method(arguments.method)
    if chosen.read is not None:
        source = _source(chosen, arguments)
        plan, learned = chosen.read(source.data(chosen))
        return _saved(chosen, plan, (learned,), source, arguments.destination)
    spoken = _spoken(chosen, arguments)
    source = _source(chosen, arguments)
    plan = _plan(spoken, source)
    if chosen.calibrate is None:
        return _saved(chosen, plan, (), source, arguments.destination)
    learned = chosen.calibrate(plan, *source.pair, source.data(chosen))
    return _saved(chosen, plan, (learned,), source, arguments.destination)


def search(arguments: argparse.Namespace) -> Figures:
    """Search a plan, and apply it."""
    chosen = method(arguments.method)
    assert chosen.search is not None
    assert chosen.goals is not None
    goals = options.make([chosen.goals], options.given(arguments, "goals"))
    source = _source(chosen, arguments)
    data = source.data(chosen)
    plan = chosen.search(goals, *source.pair, data)
    with _told_if_lost(plan):
        learned = ()
        if chosen.calibrate is not None:
            learned = (chosen.calibrate(plan, *source.pair, data),)
        return _saved(chosen, plan, learned, source, arguments.destination)


def fit(arguments: argparse.Namespace) -> Figures:
    """Train what a method learns, and apply its plan."""
    chosen = method(arguments.method)
    assert chosen.fit is not None
    assert chosen.fitting is not None
    training = options.make([chosen.fitting], options.given(arguments, "training"))
    spoken = _spoken(chosen, arguments)
    source = _source(chosen, arguments)
    plan, data = _plan(spoken, source), source.data(chosen)
    folder = arguments.checkpoints
    learned = chosen.fit(plan, training, *source.pair, data, checkpoints=folder)
    return _saved(chosen, plan, (learned,), source, arguments.destination)


def _spoken(chosen: Method, arguments: argparse.Namespace) -> Plan | Shorthand:
    """A plan, or what says one, from a file or from options."""
    values = options.given(arguments, "plan")
    if arguments.plan is None:
        return options.make(ways(chosen), values)
    if values:
        raise ValueError(
            f"--plan is a whole plan: leave out {', '.join(map(options.option, values))}"
        )
    with naming(arguments.plan):
        return chosen.plan.from_dict(storage.read_json(arguments.plan))


def _plan(spoken: Plan | Shorthand, source: Source) -> Plan:
    return spoken.plan(*source.pair) if isinstance(spoken, Shorthand) else spoken


def _source(chosen: Method, arguments: argparse.Namespace) -> Source:
    """The pipeline to change, once its destination is found good.

    Raises:
        ValueError: for a destination that is taken, or a model that the method is not for.
    """
    storage.check_destination(arguments.destination)
    source = Source(load(arguments), arguments)
    source.check(chosen)
    return source


@contextlib.contextmanager
def _told_if_lost(plan: Plan) -> Iterator[None]:
    """Print a plan that took a search, if what is to keep it fails."""
    try:
        yield
    except BaseException:
        print(
            f"the plan that was found, as its pipeline is not saved:\n{plan.to_json()}",
            file=sys.stderr,
        )
        raise


def _saved(
    chosen: Method, plan: Plan, learned: tuple, source: Source, destination: Path
) -> Figures:
    """Save the changed pipeline; say what its weights take, and the cache of a language model."""
    pipe = source.pipe
    small = pipe.transform(chosen.transform(plan, *learned))
    small.save(destination)
    before, after = weight_bytes(pipe.params), weight_bytes(small.params)
    figures = {
        "destination": str(destination),
        "plan": plan.to_dict(),
        "weight_bytes": after,
        "weight_bytes_before": before,
    }
    lines = [
        plan.describe(),
        f"{before:,} bytes of weights are {after:,} now ({after / before:.3f})",
    ]
    if isinstance(pipe, TextPipeline):
        tokens = min(source.tokens or TOKENS, pipe.forward.config.max_positions)
        dense, held = (sequence_bytes(each.forward, each.params, tokens) for each in (pipe, small))
        figures |= {
            "cache_tokens": tokens,
            "cache_bytes": held._asdict(),
            "cache_bytes_before": dense._asdict(),
        }
        lines.append(
            f"{dense.allocated:,} bytes of the cache of a text of {tokens} tokens are "
            f"{held.allocated:,} now, {held.useful:,} of them used"
        )
    return figures, "\n".join([*lines, f"saved {destination}"])
