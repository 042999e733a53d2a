"""Pipelines as commands load and ask them, `effjax sample` and `effjax generate`."""

from __future__ import annotations

import argparse
import contextlib
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
from PIL import Image

import effjax
from effjax.cli.arguments import SETTINGS
from effjax.generate import JacobiDecoding, read_decoder
from effjax.pipelines import NextScalePipeline, Pipeline, PromptPipeline, TextPipeline
from effjax.pipelines.labels import OfClasses

Figures = tuple[Any, str]


def load(arguments: argparse.Namespace) -> Any:
    """The pipeline of a command.

    Raises:
        ValueError: for a decoder that is none, before anything is read.
    """
    decoder(arguments)
    if arguments.cache:
        effjax.compilation_cache(arguments.cache)
    options: dict[str, Any] = {
        "dtype": arguments.dtype,
        "compute_dtype": arguments.compute_dtype,
        "check_finite": arguments.check_finite,
    }
    pipe = effjax.pipeline(
        arguments.source,
        variant=arguments.variant,
        revision=arguments.revision,
        executables=getattr(arguments, "executables", False),
        **options,
    )
    refiner = getattr(arguments, "refiner", None)
    if refiner is None:
        return pipe
    second = effjax.pipeline(refiner, **options)
    if not (isinstance(pipe, NextScalePipeline) and isinstance(second, NextScalePipeline)):
        raise ValueError(
            f"--refiner is for two models that predict maps of codes (VAR), got a "
            f"{type(pipe).__name__} and a {type(second).__name__}"
        )
    return pipe.with_refiner(second)


def sample(arguments: argparse.Namespace) -> Figures:
    """Generate images, as PNG files, or videos, as GIF files."""
    pipe = load(arguments)
    if isinstance(pipe, TextPipeline):
        raise ValueError(f"{arguments.source} is a language model; use `effjax generate`")
    wanted = asked(pipe, arguments)
    options = settings(pipe, arguments)
    if arguments.negative_prompt is not None:
        if not isinstance(pipe, PromptPipeline):
            what = "conditioned on classes" if isinstance(pipe, OfClasses) else "guided by no text"
            raise ValueError(f"this pipeline is {what}: leave out --negative-prompt")
        options["negative_prompt"] = arguments.negative_prompt
    changes = arguments.image is not None or arguments.strength is not None
    if changes and not isinstance(pipe, Pipeline):
        raise ValueError("this pipeline changes no images: leave out --image and --strength")
    if arguments.image is not None:
        options["image"] = _image(arguments.image)
    if arguments.strength is not None:
        options["strength"] = arguments.strength
    each = arguments.images_per_prompt
    key = jax.random.key(arguments.seed)
    run: Any = pipe
    with _folder(arguments.output):
        outputs = run(wanted, key=key, **{f"num_{pipe.MAKES}_per_prompt": each}, **options)
    files = []
    for number, output in enumerate(outputs):
        word = re.sub(r"\W+", "_", wanted[number // each])[:40]
        frames, end = (output, "gif") if isinstance(output, list) else ([output], "png")
        files.append(str(arguments.output / f"{number:03d}_{word}.{end}"))
        more = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
        frames[0].save(files[-1], **more)
    return {"files": files}, "\n".join(files)


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder for outputs; gone again if there are none, and it was not there before."""
    new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if new:
            with contextlib.suppress(OSError):  # others wrote to it
                path.rmdir()
        raise


def _image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError) as error:
        raise ValueError(f"--image {path} is no image that can be read: {error}") from None


def generate(arguments: argparse.Namespace) -> Figures:
    """Continue texts, or answer."""
    pipe = load(arguments)
    if not isinstance(pipe, TextPipeline):
        raise ValueError(f"{arguments.source} is no language model; use `effjax sample`")
    if arguments.temperature is not None and arguments.seed is None:
        raise ValueError("--temperature needs --seed: without one the likeliest tokens are taken")
    prompts = arguments.prompt
    chats: Any = [[{"role": "user", "content": each}] for each in prompts]
    sampling = {} if arguments.temperature is None else {"temperature": arguments.temperature}
    key = None if arguments.seed is None else jax.random.key(arguments.seed)
    inputs = chats if arguments.chat else prompts
    options = {"key": key, "decoder": decoder(arguments)}
    texts = pipe(inputs, max_new_tokens=arguments.max_new_tokens, **options, **sampling)
    figures = [
        {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
    ]
    return figures, "\n\n".join(f"{each['prompt']}{each['text']}" for each in figures)


def decoder(arguments: argparse.Namespace) -> JacobiDecoding | None:
    """The decoder that was asked for."""
    said = getattr(arguments, "decoder", None)  # commands that change models have none
    return None if said is None else read_decoder(said)


def asked(
    pipe: Any, arguments: argparse.Namespace, *, default: int = 0, texts: Sequence[str] = ()
) -> list[str]:
    """Prompts of a text-to-image pipeline, labels of another.

    If none are given: `texts`, or `default` of all classes.
    """
    takes_prompts = not isinstance(pipe, OfClasses)
    given, other = arguments.prompt, arguments.labels
    if not takes_prompts:
        given, other = other and _comma_separated(other), given
    if other:
        raise ValueError(
            "this pipeline is conditioned on "
            + ("texts: give --prompt" if takes_prompts else "classes: give --labels")
        )
    if not given and takes_prompts:
        given = list(texts)
    elif not given and default:
        classes = pipe.forward.config.num_classes
        given = [str(classes * i // default) for i in range(default)]
    if not given:
        raise ValueError(
            f"nothing is asked for: give {'--prompt' if takes_prompts else '--labels'}"
        )
    return given


def _comma_separated(values: str) -> list[str]:
    """Values that commas part; those that have commas themselves stand in double quotes."""
    rows = csv.reader(values.splitlines(), skipinitialspace=True)
    return [value.strip() for row in rows for value in row]


def settings(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of a pipeline's sampler, those that were given.

    Raises:
        ValueError: for options that this kind of pipeline does not take.
    """
    given = {name: getattr(arguments, option, None) for name, option in SETTINGS.items()}
    given["decoder"] = decoder(arguments)
    given = {name: value for name, value in given.items() if value is not None}
    wrong = [name for name in given if name not in pipe.SETTINGS]
    if wrong and set(wrong) <= {"height", "width"}:
        raise ValueError("this model makes images of one size: leave out --height and --width")
    if wrong:
        words, taken = (
            ", ".join(f"--{SETTINGS.get(name, name)}".replace("_", "-") for name in names)
            for names in (wrong, pipe.SETTINGS)
        )
        raise ValueError(
            f"a {type(pipe).__name__} takes no {words}: leave it out. It takes {taken}"
        )
    return given
