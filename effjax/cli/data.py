"""What methods look at (`effjax.calibration`), made of options and a pipeline.

Each kind of data is one entry of `KINDS`: the options that it takes, and how it is made. Texts come
from a file, or else from `effjax.bundled.texts`: Python's own library, and questions about pass
keys (or, where the tokenizer has a token for every word, lookups) that were told long before.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np

from effjax.bundled import texts
from effjax.calibration import Adapters, Answers, Samples, Sequences, Trajectory
from effjax.cli.arguments import (
    COUNT,
    NATURAL,
    NUMBER,
    condition_arguments,
    drawing_arguments,
    sampler_arguments,
    text_arguments,
)
from effjax.cli.running import asked, settings
from effjax.fields import naming
from effjax.pipelines import TextPipeline
from effjax.pipelines.labels import OfClasses
from effjax.pipelines.next_token import TokenPipeline
from effjax.transform import Method, Pair


class Source:
    """A loaded pipeline with the options of its command."""

    def __init__(self, pipe: Any, arguments: argparse.Namespace):
        self.pipe = pipe
        self.arguments = arguments

    @property
    def pair(self) -> Pair:
        """Forward and parameters."""
        return self.pipe.forward, self.pipe.params

    @property
    def domain(self) -> str:
        """As a method's declaration names it."""
        return "language models" if isinstance(self.pipe, TextPipeline) else "images"

    def check(self, chosen: Method) -> None:
        """Raise ValueError for a method that is not for this model.

        What is for language models, and looks at no texts, is for models that predict codes one
        after the other too.
        """
        allowed = {"any", self.domain}
        if isinstance(self.pipe, TokenPipeline):
            allowed.add("language models")
        if chosen.domain not in allowed:
            raise ValueError(
                f"{chosen.name} is for {chosen.domain}; {self.arguments.source} is for "
                f"{self.domain}. See `effjax methods`."
            )

    @property
    def tokens(self) -> int | None:
        """Of a text, if that was asked."""
        return getattr(self.arguments, "tokens", None)

    def data(self, chosen: Method) -> Any:
        """What a method looks at; None if it looks at nothing but the model.

        Raises:
            ValueError: for a model that has no such data.
        """
        kinds = [KINDS[each] for each in chosen.data_kinds]
        if not kinds:
            return None
        own = [kind for kind in kinds if kind.domain in ("any", self.domain)]
        if not own:
            raise ValueError(
                f"{chosen.name} looks at {' or '.join(kind.about for kind in kinds)}, which are "
                f"for {' and '.join(kind.domain for kind in kinds)}; this is a pipeline for "
                f"{self.domain}"
            )
        self._check_unused(own[0], [kind for kind in kinds if kind is not own[0]])
        return own[0].make(self.pipe, self.arguments)

    def _check_unused(self, own: Kind, others: Sequence[Kind]) -> None:
        """Check that no option was given of data that this model does not have.

        Raises:
            ValueError: for one that was.
        """
        used = own.defaults()
        for kind in others:
            unused = {name: value for name, value in kind.defaults().items() if name not in used}
            given = [n for n, value in unused.items() if getattr(self.arguments, n) != value]
            if given:
                words = ", ".join(f"--{name}".replace("_", "-") for name in given)
                raise ValueError(
                    f"{words} is for {kind.domain}, and this is a pipeline for {self.domain}: "
                    f"leave it out"
                )


class Kind(NamedTuple):
    """How a kind of data is made.

    Attributes:
        about: what it is.
        domain: what has it.
        options: adds what it takes to a parser.
        make: (pipeline, arguments) -> the data.
        words: the options without which there is none, for examples.
    """

    about: str
    domain: str
    options: Callable[[Any], None]
    make: Callable[[Any, argparse.Namespace], Any]
    words: str = ""

    def defaults(self) -> dict[str, Any]:
        """Its options with their defaults."""
        parser = argparse.ArgumentParser(add_help=False)
        self.options(parser)
        return vars(parser.parse_args(self.words.split()))


def add_arguments(command: argparse.ArgumentParser, kinds: Sequence[type]) -> None:
    """Add the options that make some kinds of data."""
    for kind in (KINDS[each] for each in kinds):
        kind.options(command.add_argument_group(f"to look at: {kind.about}"))


def _seed_option(group: Any) -> None:
    with contextlib.suppress(argparse.ArgumentError):  # another kind of data has it
        group.add_argument("--seed", type=NATURAL, default=0, help="of all that is drawn")


def _trajectory_options(group: Any) -> None:
    sampler_arguments(group)
    condition_arguments(group, "to calibrate and search on")
    _seed_option(group)


def _trajectory(pipe: Any, arguments: argparse.Namespace) -> Trajectory:
    cond, uncond = pipe.conditions(asked(pipe, arguments, default=8))
    sampler = pipe.sampler(**settings(pipe, arguments))
    return Trajectory(sampler, cond, jax.random.key(arguments.seed), uncond)


def _samples_options(group: Any) -> None:
    drawing_arguments(group)
    _seed_option(group)


def _samples(pipe: Any, arguments: argparse.Namespace) -> Samples:
    loop = pipe.sampler(**settings(pipe, arguments))
    if not isinstance(pipe, OfClasses):
        raise ValueError("samples are drawn of all classes, and this pipeline takes prompts")
    classes = pipe.forward.config.num_classes

    def draw(count: int, number: int) -> Any:
        rng = np.random.default_rng((arguments.seed, number))
        return pipe.conditions(rng.integers(0, classes, count).tolist())[0]

    return Samples(loop, draw, arguments.seed)


def _sequences_options(group: Any) -> None:
    _answers_options(group)
    group.add_argument("--tokens", type=COUNT, default=512, help="of a text")


def _sequences(pipe: TextPipeline, arguments: argparse.Namespace) -> Sequences:
    source = world(pipe, arguments.texts, arguments.tokens)

    def draw(tokens: int, count: int, seed: int) -> np.ndarray:
        _check_length(source, arguments.texts, tokens)
        return passages(source, tokens, count, seed=seed)

    return Sequences(draw, arguments.tokens, arguments.samples, arguments.seed)


def _answers_options(group: Any) -> None:
    text_arguments(group)
    group.add_argument("--samples", type=COUNT, default=8, help="texts to calibrate on")
    _seed_option(group)


def _answers(pipe: TextPipeline, arguments: argparse.Namespace) -> Answers:
    source = world(pipe, arguments.texts, 0)

    def draw(tokens: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        _check_length(source, arguments.texts, tokens)
        rng = np.random.default_rng(seed)
        documents = questions(source, tokens, count, seed=seed)
        found = [source.filled(rng, document, tokens) for document in documents]
        weights = np.zeros((count, tokens), np.float32)
        for row, document in zip(weights, found, strict=True):
            row[document.answers] = 1
        return np.stack([document.tokens for document in found]), weights

    return Answers(draw, arguments.samples, arguments.seed)


def _adapters_options(group: Any) -> None:
    group.add_argument(
        "--file",
        action="append",
        required=True,
        help="of PEFT, diffusers, Kohya's scripts or ComfyUI, here or on the hub; may be repeated",
    )
    group.add_argument(
        "--scale", action="append", type=NUMBER, help="of each file, in their order; 1 without any"
    )


def _adapters(pipe: Any, arguments: argparse.Namespace) -> Adapters:
    from converters import load_lora

    files, scales = arguments.file, arguments.scale or []
    if scales and len(scales) != len(files):
        raise ValueError(
            f"give --scale once for each of the {len(files)} files, or not at all; got "
            f"{len(scales)}"
        )
    factors: dict[str, Any] = {}
    for file in files:
        name = re.sub(r"\W", "_", PurePath(file).stem)
        name = name if name.isidentifier() else f"_{name}"
        if name in factors:
            raise ValueError(f"two files are called {name}: give one of them another name")
        factors[name] = load_lora(file, pipe.forward, component=pipe.family.model)
    return Adapters(factors, dict(zip(factors, scales)))


KINDS = {
    Trajectory: Kind("trajectories of a sampler", "images", _trajectory_options, _trajectory),
    Samples: Kind("the model's own samples", "images", _samples_options, _samples),
    Sequences: Kind("texts", "language models", _sequences_options, _sequences),
    Adapters: Kind(
        "files of adapters", "any", _adapters_options, _adapters, " --file style.safetensors"
    ),
    Answers: Kind("texts with answers to questions", "language models", _answers_options, _answers),
}


def world(
    pipe: TextPipeline, file: Path | None, length: int, *, held_out: bool = False
) -> texts.World:
    """What texts of a length are cut from: a file, or the library's part that is (not) held out.

    Raises:
        ValueError: for a file that is shorter than a text, or holds something else.
    """
    if file is None:
        return texts.World.of(pipe.tokenizer, held_out=held_out)
    with naming(file):
        text = file.read_text(encoding="utf-8")
    found = texts.World(pipe.tokenizer, texts.encode(pipe.tokenizer, text))
    _check_length(found, file, length)
    return found


def _check_length(source: texts.World, file: Path | None, length: int) -> None:
    if len(source.text) <= length:
        raise ValueError(
            f"{file or 'the library'} has {len(source.text)} tokens, texts of {length} cannot be "
            f"cut from it; give a longer file, or shorter texts"
        )


def passages(source: texts.World, length: int, count: int, *, seed: int) -> np.ndarray:
    """Texts int32[count, length]."""
    rng = np.random.default_rng((seed, length))
    return np.stack([source.passage(rng, length).tokens for _ in range(count)])


def questions(source: texts.World, length: int, count: int, *, seed: int) -> list[texts.Document]:
    """Texts whose answers stand far back."""
    rng = np.random.default_rng((seed, length))
    make = source.lookup if source.has_words else source.passkey
    options: dict[str, Any] = {"questions": 8} if source.has_words else {}
    return [make(rng, length, **options) for _ in range(count)]
