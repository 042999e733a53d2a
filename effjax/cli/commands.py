"""The commands and their arguments; what they run is imported when they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import effjax
from effjax.cli.arguments import (
    COUNT,
    LENGTHS,
    NATURAL,
    NOT_NEGATIVE,
    Arguments,
    condition_arguments,
    decoder_argument,
    sampler_arguments,
    text_arguments,
)

_EXAMPLES = """examples:
  effjax demo                                       the whole story on the bundled model
  effjax info facebook/DiT-XL-2-512                 what a checkpoint is
  effjax methods                                    what can be done to a model
  effjax methods NAME                               ... its plan, options and an example
  effjax search MODEL SMALLER METHOD                search a plan, save the changed pipeline
  effjax apply MODEL SMALLER METHOD --plan plan.json   apply a plan, calibrate if it is needed
  effjax fit MODEL SMALLER METHOD --steps 400       train what the method learns
  effjax sample SMALLER --labels 207,360 -o images  generate images
  effjax generate MODEL --prompt "Once upon"        continue texts with a language model
  effjax compile SMALLER --batch 4                  save its programs, which start at once
  effjax bench SMALLER                              compressed against dense, side by side
"""

_CHIPS = ("host", "v4", "v5e", "v5p", "v6e", "tpu7x")
_DTYPES = ("float32", "bfloat16", "float16")
TRANSFORMING = ("apply", "search", "fit")  # commands with the options of a method


def read(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command; ends the process with a message for those that are none."""
    parser, commands = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command in TRANSFORMING:
        _add_options_of_method(commands[arguments.command], arguments)
        return parser.parse_args(argv)
    if rest:
        commands[arguments.command].error(f"unrecognized arguments: {' '.join(rest)}")
    return arguments


def _add_options_of_method(command: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    from effjax.cli import transforming

    try:
        transforming.add_options(command, arguments.command, arguments.method)
    except ValueError as error:
        command.error(str(error))


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, [], argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


class _HelpOnMethod(argparse.Action):
    """--help of a command with a method: shows the options of the method that stands before it."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        if getattr(namespace, "method", None) is not None:
            namespace.command = parser.prog.rpartition(" ")[2]
            _add_options_of_method(parser, namespace)
        parser.print_help()
        parser.exit()


Commands = dict[str, argparse.ArgumentParser]


def _parser() -> tuple[argparse.ArgumentParser, Commands]:
    parser = argparse.ArgumentParser(
        prog="effjax",
        description="Efficient generative inference in JAX.",
        epilog=_EXAMPLES,
        formatter_class=Help,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"effjax {effjax.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: str, about: str, **options: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=about,
            description=about,
            formatter_class=Help,
            allow_abbrev=False,
            **options,
        )
        command.add_argument("--json", action="store_true", help="print figures as JSON")
        command.set_defaults(run=run)
        return command

    _about_commands(add)
    for name, about in (
        ("apply", "apply a method's plan, calibrated if the method needs it, save the pipeline"),
        ("search", "search a plan, save the pipeline with it"),
        ("fit", "train what a method learns, save the pipeline with it"),
    ):
        command = add(name, f"transforming:{name}", about, add_help=False)
        command.epilog = f"see `effjax methods` for the methods, and for the options of one\n\
`effjax methods NAME` or `effjax {name} MODEL SMALLER NAME --help`"
        command.add_argument("-h", "--help", action=_HelpOnMethod, nargs=0, help="show this help")
        command.add_argument("source", help="pipeline directory or hub repository")
        command.add_argument("destination", type=Path, help="directory of the changed pipeline")
        command.add_argument("method", help="its options stand behind it")
        _loading_arguments(command)
    _running_commands(add)
    return parser, commands.choices


def _about_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    demo = add(
        "demo", "about:demo", "convert, accelerate, sample and compare on a bundled tiny model"
    )
    demo.add_argument("--llm", action="store_true", help="on the bundled tiny language model")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder of results")
    demo.add_argument("--steps", type=COUNT, default=20, help="denoising steps")
    demo.add_argument("--images", type=COUNT, default=128, help="images of each program")
    demo.add_argument("--speed", type=float, help="the mildest recipe that reached it")
    demo.add_argument("--seed", type=NATURAL, default=0, help="of noise and search")

    info = add("info", "about:info", "say what a checkpoint, pipeline or saved model is")
    info.add_argument("source", help="directory, weight file or hub repository")
    info.add_argument("--subfolder", help="of one model in it")
    _version_arguments(info)

    convert = add("convert", "about:convert", "rewrite a checkpoint for diffusers or transformers")
    convert.add_argument("source", help="directory, weight file or hub repository")
    convert.add_argument("destination", type=Path)
    convert.add_argument("--subfolder", help="of one model; else a pipeline is converted whole")
    convert.add_argument("--dtype", choices=_DTYPES, help="as stored if left out")
    _version_arguments(convert)
    convert.add_argument("--check-finite", action="store_true", help="reject NaN and infinity")

    methods = add("methods", "about:methods", "list the methods, or say what one is and takes")
    methods.add_argument("name", nargs="?", help="of a method")


def _running_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    sample = add("sample", "running:sample", "generate images")
    _pipeline_arguments(sample)
    condition_arguments(sample, "to generate")
    sample.add_argument("--negative-prompt", help="what to lead away from, of text to image")
    sample.add_argument("--image", type=Path, help="file of an image to change")
    sample.add_argument("--strength", type=float, help="share of the steps that change it")
    sample.add_argument("--images-per-prompt", type=COUNT, default=1, help="or per label")
    sample.add_argument("-o", "--output", type=Path, default=Path("images"))

    generate = add(
        "generate", "running:generate", "continue texts, or answer, with a language model"
    )
    generate.add_argument("source", help="language model: directory or hub repository")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--chat", action="store_true", help="prompts are a user's messages")
    generate.add_argument("--max-new-tokens", type=COUNT, help="the model's settings, else 128")
    generate.add_argument(
        "--seed", type=NATURAL, help="draw, with the model's settings; else greedy"
    )
    generate.add_argument("--temperature", type=NOT_NEGATIVE, help="with a seed; 0 is greedy")
    decoder_argument(generate)
    _loading_arguments(generate)
    _refiner_argument(sample)
    for command in (sample, generate):
        command.add_argument(
            "--executables", action="store_true", help="run what `effjax compile` saved in it"
        )

    compile_ = add("compile", "compiling:run", "compile a pipeline ahead of time, beside it")
    _pipeline_arguments(compile_)
    compile_.add_argument("--chip", choices=_CHIPS, default="host", help="what will run it")
    compile_.add_argument("--batch", type=COUNT, default=1, help="images or texts at a time")
    group = compile_.add_argument_group("language models")
    group.add_argument("--tokens", type=LENGTHS, default="64", help="of prompts, with commas")
    group.add_argument("--new", type=COUNT, default=128, help="the most that follow")
    group.add_argument("--drawn", action="store_true", help="with a seed; else greedy")

    bench = add(
        "bench", "bench:run", "run a compressed pipeline against its dense model, side by side"
    )
    _pipeline_arguments(bench)
    bench.add_argument(
        "--reference", metavar="MODEL", help="what it was made of; what it remembers if left out"
    )
    _refiner_argument(bench)
    condition_arguments(bench, "to run on")
    bench.add_argument("--batch", type=COUNT, default=4, help="images at a time")
    bench.add_argument("--repeats", type=COUNT, default=3, help="the fastest one counts")
    group = bench.add_argument_group("language models")
    text_arguments(group)
    group.add_argument("--tokens", type=COUNT, default=512, help="of a text")
    group.add_argument("--new", type=COUNT, default=64, help="tokens that follow a text")


def _pipeline_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="pipeline directory or hub repository")
    sampler_arguments(command)
    decoder_argument(command)
    command.add_argument("--seed", type=NATURAL, default=0, help="of all that is drawn")
    _loading_arguments(command)


def _refiner_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--refiner", metavar="MODEL", help="a smaller model of codes, which makes the last maps"
    )


def _loading_arguments(command: argparse.ArgumentParser) -> None:
    group = command.add_argument_group("loading")
    group.add_argument("--dtype", choices=_DTYPES, help="of the parameters; as stored if left out")
    group.add_argument(
        "--compute-dtype", choices=_DTYPES, help="of the computation; that of the parameters"
    )
    group.add_argument("--check-finite", action="store_true", help="reject NaN and infinity")
    group.add_argument(
        "--cache",
        type=Path,
        default=os.environ.get("EFFJAX_CACHE"),
        help="folder that keeps compiled programs for later runs; that of EFFJAX_CACHE",
    )
    _version_arguments(group)


def _version_arguments(command: Arguments) -> None:
    command.add_argument("--variant", help="which weights, such as fp16, if there are several")
    command.add_argument("--revision", help="branch, tag or commit of a hub repository")
