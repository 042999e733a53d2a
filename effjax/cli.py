"""The command line: `effjax demo | info | convert | search | quantize | sample | generate | ...`.

Figures go to standard output (as JSON with --json), progress and messages to standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from effjax.fields import Count, Natural, NotNegative, Positive, Range, naming, parse

if TYPE_CHECKING:
    from effjax.transform import Plan

_EXAMPLES = """examples:
  effjax demo                                       the whole story on the bundled model
  effjax info facebook/DiT-XL-2-512                 what a checkpoint is
  effjax search MODEL SMALLER --threshold 0.1       search a plan, save the compressed pipeline
  effjax quantize MODEL SMALLER --bits w4a8 --method vidit_q   quantize, save the pipeline
  effjax sample SMALLER --labels 207,360 -o images  generate images
  effjax generate MODEL --prompt "Once upon"        continue texts with a language model
  effjax compress MODEL SMALLER --method snap_kv --set ratio=0.5   give it a smaller cache
  effjax compile SMALLER --batch 4                  save its programs, which start at once
  effjax bench SMALLER                              compressed against dense, side by side
"""

_CHIPS = ("host", "v4", "v5e", "v5p", "v6e", "tpu7x")
_DTYPES = ("float32", "bfloat16", "float16")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status (0, or 1 for an error, told on standard error)."""
    arguments = _parser().parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            setattr(arguments, name, Path(os.path.expanduser(value)))
    try:
        figures, text = arguments.run(arguments)
        shown = json.dumps(figures, indent=2, sort_keys=True) if arguments.json else text
        print(shown, flush=True)
    except BrokenPipeError:  # whoever read the figures has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"effjax {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


COUNT, NATURAL = parse(Count), parse(Natural)
Bits = Annotated[float, Range(2, 16)]
Density = Annotated[float, Range(0, 1, above=True)]


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and defaults where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, [], argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


def _lengths(words: str) -> list[int]:
    """Numbers of tokens with commas between them."""
    return sorted(COUNT(word) for word in words.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="effjax",
        description="Efficient generative inference in JAX.",
        epilog=_EXAMPLES,
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"effjax {version('effjax')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable, about: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=about, description=about, formatter_class=_Help)
        command.add_argument("--json", action="store_true", help="print figures as JSON")
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "convert, search, sample and compare on the bundled tiny DiT")
    demo.add_argument("--llm", action="store_true", help="on the bundled tiny language model")
    demo.add_argument("-o", "--output", type=Path, default=Path("demo"), help="folder of results")
    demo.add_argument("--steps", type=COUNT, default=20, help="denoising steps")
    demo.add_argument("--images", type=COUNT, default=128, help="images of each program")
    demo.add_argument("--threshold", type=parse(NotNegative), default=None, help="of the search")
    demo.add_argument("--seed", type=NATURAL, default=0, help="of noise and search")

    info = add("info", _info, "say what a checkpoint, pipeline or saved model is")
    info.add_argument("source", help="directory, weight file or hub repository")
    info.add_argument("--subfolder", help="of one model in it")
    _version_arguments(info)

    convert = add("convert", _convert, "rewrite a checkpoint for diffusers or transformers")
    convert.add_argument("source", help="directory, weight file or hub repository")
    convert.add_argument("destination", type=Path)
    convert.add_argument("--subfolder", help="of one model; else a pipeline is converted whole")
    convert.add_argument("--dtype", choices=_DTYPES, help="as stored if left out")
    _version_arguments(convert)
    convert.add_argument("--check-finite", action="store_true", help="reject NaN and infinity")

    search = add("search", _search, "search a plan and save the compressed pipeline")
    _pipeline_arguments(search)
    search.add_argument("destination", type=Path, help="directory of the compressed pipeline")
    search.add_argument("--method", default="dit_fast_attn", help="see `effjax methods`")
    search.add_argument(
        "--threshold",
        type=parse(NotNegative),
        default=0.1,
        help="of dit_fast_attn: larger saves more",
    )
    search.add_argument(
        "--average-bits", type=parse(Bits), default=6.0, help="of vidit_q: of a weight"
    )
    _condition_arguments(search, "to search on")
    _text_arguments(search, tokens=False)
    search.add_argument(
        "--density", type=parse(Density), default=0.5, help="of moa: kept of the cache"
    )
    search.add_argument(
        "--lengths", type=_lengths, default="256,512,704", help="of moa; the last one validates"
    )

    quantize = add("quantize", _quantize, "quantize weights and inputs, save the pipeline")
    _pipeline_arguments(quantize)
    quantize.add_argument("destination", type=Path, help="directory of the compressed pipeline")
    quantize.add_argument("--method", default="vidit_q", help="see `effjax methods`")
    quantize.add_argument("--bits", default="w8a8", help="w8a8, w4a8, w4 ..., or a plan.json")
    quantize.add_argument("--group-size", type=COUNT, help="inputs that share a weight scale")
    _condition_arguments(quantize, "to calibrate on")
    _text_arguments(quantize)

    compress = add("compress", _compress, "give a language model a smaller cache, save it")
    compress.add_argument("source", help="language model: directory or hub repository")
    compress.add_argument("destination", type=Path, help="directory of the compressed model")
    compress.add_argument("--method", default="cskv", help="see `effjax methods`")
    compress.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a field of the plan"
    )
    compress.add_argument("--steps", type=NATURAL, default=400, help="of training, if there is any")
    compress.add_argument("--learning-rate", type=parse(Positive), default=5e-5, help="of training")
    compress.add_argument("--checkpoints", type=Path, help="folder; a second run resumes")
    _loading_arguments(compress)
    _text_arguments(compress)

    sample = add("sample", _sample, "generate images")
    _pipeline_arguments(sample)
    _condition_arguments(sample, "to generate")
    sample.add_argument("--negative-prompt", help="what to lead away from, of text to image")
    sample.add_argument("--images-per-prompt", type=COUNT, default=1, help="or per label")
    sample.add_argument("-o", "--output", type=Path, default=Path("images"))

    generate = add("generate", _generate, "continue texts, or answer, with a language model")
    generate.add_argument("source", help="language model: directory or hub repository")
    generate.add_argument("--prompt", action="append", required=True, help="may be repeated")
    generate.add_argument("--chat", action="store_true", help="prompts are a user's messages")
    generate.add_argument("--max-new-tokens", type=COUNT, help="the model's settings, else 128")
    generate.add_argument(
        "--seed", type=NATURAL, help="draw, with the model's settings; else greedy"
    )
    generate.add_argument("--temperature", type=parse(NotNegative), help="with a seed; 0 is greedy")
    _loading_arguments(generate)

    for command in (sample, generate):
        command.add_argument(
            "--executables", action="store_true", help="run what `effjax compile` saved in it"
        )

    compile_ = add("compile", _compile, "compile a pipeline ahead of time, beside it")
    _pipeline_arguments(compile_)
    compile_.add_argument("--chip", choices=_CHIPS, default="host", help="what will run it")
    compile_.add_argument("--batch", type=COUNT, default=1, help="images or texts at a time")
    group = compile_.add_argument_group("language models")
    group.add_argument("--tokens", type=_lengths, default="64", help="of prompts, with commas")
    group.add_argument("--new", type=COUNT, default=128, help="the most that follow")
    group.add_argument("--drawn", action="store_true", help="with a seed; else greedy")

    bench = add("bench", _bench, "run a compressed pipeline against its dense model, side by side")
    _pipeline_arguments(bench)
    bench.add_argument(
        "--reference", metavar="MODEL", help="what it was made of; what it remembers if left out"
    )
    _condition_arguments(bench, "to run on")
    bench.add_argument("--batch", type=COUNT, default=4, help="images at a time")
    bench.add_argument("--repeats", type=COUNT, default=3, help="the fastest one counts")
    bench.add_argument("--new", type=COUNT, default=64, help="tokens that follow a text")
    _text_arguments(bench)

    methods = add("methods", _methods, "list the methods")
    methods.add_argument("--markdown", action="store_true", help="as the table of the docs")
    return parser


def _pipeline_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", help="pipeline directory or hub repository")
    command.add_argument(
        "--steps", type=COUNT, help="denoising steps; those of the plan, else the model's"
    )
    command.add_argument(
        "--guidance", type=parse(NotNegative), help="scale; that of the plan, else the model's"
    )
    command.add_argument("--height", type=COUNT, help="pixels, of a text-to-image model's images")
    command.add_argument("--width", type=COUNT, help="pixels")
    command.add_argument("--seed", type=NATURAL, default=0, help="of all that is drawn")
    _loading_arguments(command)


def _loading_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--dtype", choices=_DTYPES, help="of the parameters; as stored if left out"
    )
    command.add_argument(
        "--compute-dtype", choices=_DTYPES, help="of the computation; that of the parameters"
    )
    command.add_argument("--check-finite", action="store_true", help="reject NaN and infinity")
    command.add_argument(
        "--cache",
        type=Path,
        default=os.environ.get("EFFJAX_CACHE"),
        help="folder that keeps compiled programs for later runs; that of EFFJAX_CACHE",
    )
    _version_arguments(command)


def _version_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--variant", help="which weights, such as fp16, if there are several")
    command.add_argument("--revision", help="branch, tag or commit of a hub repository")


def _condition_arguments(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument(
        "--labels",
        help=f"class names or indices with commas, {what}; a name that has commas itself stands in "
        f"double quotes: '\"tench, Tinca tinca\",207'",
    )
    command.add_argument("--prompt", action="append", help=f"may be repeated, {what}")


def _text_arguments(command: argparse.ArgumentParser, *, tokens: bool = True) -> None:
    group = command.add_argument_group("language models")
    group.add_argument("--texts", type=Path, help="a file; else Python's own library")
    if tokens:
        group.add_argument("--tokens", type=COUNT, default=512, help="of a text")
    group.add_argument("--samples", type=COUNT, default=8, help="texts to calibrate on")


def _demo(arguments: argparse.Namespace) -> tuple[Any, str]:
    if arguments.llm:
        from effjax.bundled import llm_demo

        rows = llm_demo.run(seed=arguments.seed)
        return rows, llm_demo.table(rows)

    from effjax.bundled import demo

    report = demo.run(
        arguments.output,
        steps=arguments.steps,
        images=arguments.images,
        threshold=demo.THRESHOLD if arguments.threshold is None else arguments.threshold,
        seed=arguments.seed,
    )
    return report, f"{demo.table(report)}\nimages, plan and report: {arguments.output}/"


def _info(arguments: argparse.Namespace) -> tuple[Any, str]:
    from effjax.pipelines.description import describe, lines

    figures = describe(
        arguments.source,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
        revision=arguments.revision,
    )
    return figures, "\n".join(lines(figures))


def _convert(arguments: argparse.Namespace) -> tuple[Any, str]:
    import converters
    from converters.__main__ import lines

    figures = converters.convert(
        arguments.source,
        arguments.destination,
        subfolder=arguments.subfolder,
        variant=arguments.variant,
        revision=arguments.revision,
        dtype=arguments.dtype,
        check_finite=arguments.check_finite,
    )
    return figures, "\n".join(lines(figures))


def _search(arguments: argparse.Namespace) -> tuple[Any, str]:
    import jax

    from effjax import storage
    from effjax.registry import method

    chosen = method(arguments.method)
    if chosen.search is None:
        raise ValueError(f"{chosen.name} has no search; write its plan by hand")
    storage.check_destination(arguments.destination)
    pipe = _load(arguments)
    if _is_text(pipe):
        from effjax import cli_text

        return cli_text.search(pipe, chosen, arguments)
    if "samples" in inspect.signature(chosen.search).parameters:
        raise ValueError(f"{chosen.name} is for language models; {arguments.source} is none")
    goals = {"threshold": arguments.threshold, "average_bits": arguments.average_bits}
    known = inspect.signature(chosen.search).parameters
    cond, uncond = pipe.conditions(_asked(pipe, arguments, default=8))
    sampler = pipe.sampler(**_settings(pipe, arguments))
    subject = (pipe.forward, pipe.params, sampler, cond)
    shared = {"uncond": uncond, "key": jax.random.key(arguments.seed)}
    goal = {name: value for name, value in goals.items() if name in known}
    plan = chosen.search(*subject, **shared, **goal)
    with told_if_lost(plan):
        learned = ()
        if chosen.calibrate is not None:
            learned = (chosen.calibrate(plan, *subject, **shared),)
        pipe.transform(chosen.transform(plan, *learned)).save(arguments.destination)
    figures = {"destination": str(arguments.destination), "plan": plan.to_dict()}
    return figures, f"{plan.describe()}\nsaved {arguments.destination}"


@contextlib.contextmanager
def told_if_lost(plan: Plan) -> Iterator[None]:
    """Print a plan that took a search, if what is to keep it fails."""
    try:
        yield
    except BaseException:
        print(
            f"the plan that was found, as its pipeline is not saved:\n{plan.to_json()}",
            file=sys.stderr,
        )
        raise


def _quantize(arguments: argparse.Namespace) -> tuple[Any, str]:
    import jax

    from effjax import storage
    from effjax.cost import weight_bytes
    from effjax.registry import method

    chosen = method(arguments.method)
    uniform = getattr(sys.modules[chosen.plan.__module__], "uniform", None)
    if "leaves" not in chosen.seams or uniform is None:
        raise ValueError(f"{chosen.name} does not quantize; see `effjax methods`")
    storage.check_destination(arguments.destination)
    bits = re.fullmatch(r"w(\d+)(?:a(\d+))?", arguments.bits.lower())
    if bits:
        inputs = 16 if bits[2] is None else int(bits[2])
        group = {} if arguments.group_size is None else {"group_size": arguments.group_size}
        if group and "group_size" not in inspect.signature(uniform).parameters:
            raise ValueError(f"{chosen.name} has one scale for a channel; leave out --group-size")
        plan = uniform(int(bits[1]), inputs, **group)
    elif (file := Path(os.path.expanduser(arguments.bits))).is_file():
        with naming(file):
            plan = chosen.plan.from_dict(storage.read_json(file))
    else:
        raise ValueError(
            f"--bits must be such as w8a8, w4a8 or w4, or a plan.json; got {arguments.bits!r}"
        )
    pipe = _load(arguments)
    if _is_text(pipe):
        from effjax import cli_text

        return cli_text.quantize(pipe, chosen, plan, arguments)
    learned = ()
    if chosen.calibrate is not None:
        cond, uncond = pipe.conditions(_asked(pipe, arguments, default=8))
        sampler = pipe.sampler(**_settings(pipe, arguments))
        key = jax.random.key(arguments.seed)
        pair = (pipe.forward, pipe.params)
        learned = (chosen.calibrate(plan, *pair, sampler, cond, key=key, uncond=uncond),)
    small = pipe.transform(chosen.transform(plan, *learned))
    small.save(arguments.destination)
    before, after = weight_bytes(pipe.params), weight_bytes(small.params)
    figures = {
        "destination": str(arguments.destination),
        "plan": plan.to_dict(),
        "weight_bytes": after,
        "weight_bytes_before": before,
    }
    return figures, (
        f"{plan.describe()}\n{before:,} bytes of weights are {after:,} now "
        f"({after / before:.3f})\nsaved {arguments.destination}"
    )


def _sample(arguments: argparse.Namespace) -> tuple[Any, str]:
    import jax

    from effjax.pipelines import TextToImagePipeline

    pipe = _load(arguments)
    if _is_text(pipe):
        raise ValueError(f"{arguments.source} is a language model; use `effjax generate`")
    asked = _asked(pipe, arguments)
    settings = _settings(pipe, arguments)
    if arguments.negative_prompt is not None:
        if not isinstance(pipe, TextToImagePipeline):
            raise ValueError("this pipeline is conditioned on classes: leave out --negative-prompt")
        settings["negative_prompt"] = arguments.negative_prompt
    each = arguments.images_per_prompt
    key = jax.random.key(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    images: Any = pipe(asked, key=key, num_images_per_prompt=each, **settings)
    files = []
    for number, image in enumerate(images):
        word = re.sub(r"\W+", "_", asked[number // each])[:40]
        files.append(str(arguments.output / f"{number:03d}_{word}.png"))
        image.save(files[-1])
    return {"files": files}, "\n".join(files)


def _bench(arguments: argparse.Namespace) -> tuple[Any, str]:
    pipe = _load(arguments)
    if not pipe.forward.recipe:
        raise ValueError(
            f"{arguments.source} is not compressed, there is nothing to compare. Make a compressed "
            f"model with `effjax search`, `effjax quantize` or `effjax compress`."
        )
    from effjax import cli_bench, cli_text
    from effjax.pipelines.reference import reference

    compared = reference(pipe, arguments.reference)
    if _is_text(pipe):
        return cli_text.bench(pipe, compared, arguments)
    some = _asked(pipe, arguments, default=1, texts=[""])[:1]
    return cli_bench.bench(pipe, compared, some, _settings(pipe, arguments), arguments)


def _compile(arguments: argparse.Namespace) -> tuple[Any, str]:
    if not Path(os.path.expanduser(arguments.source)).is_dir():
        raise ValueError(f"{arguments.source} is no directory, in which programs could be saved")
    if arguments.chip != "host":
        from effjax import chips  # noqa: F401  before JAX starts
    pipe = _load(arguments)
    from effjax import cli_compile

    settings = {} if _is_text(pipe) else _settings(pipe, arguments)
    return cli_compile.compile_(pipe, settings, arguments)


def _methods(arguments: argparse.Namespace) -> tuple[Any, str]:
    from effjax.registry import methods

    figures = {
        method.name: {
            "paper": method.paper,
            "seams": list(method.seams),
            "search": method.search is not None,
        }
        for method in methods().values()
    }
    if arguments.markdown:
        lines = [
            "# Methods",
            "",
            "Made by `make docs` from the declarations in `effjax/methods/`.",
            "",
            "| method | changes | search | paper |",
            "|---|---|---|---|",
        ]
        for name, row in figures.items():
            search = "yes" if row["search"] else "no"
            lines.append(f"| `{name}` | {', '.join(row['seams'])} | {search} | {row['paper']} |")
    else:
        lines = [f"{name:18} {row['paper']}" for name, row in figures.items()]
    return figures, "\n".join(lines)


def _compress(arguments: argparse.Namespace) -> tuple[Any, str]:
    from effjax import cli_text, storage
    from effjax.registry import method

    chosen = method(arguments.method)
    storage.check_destination(arguments.destination)
    pipe = _load(arguments)
    if not _is_text(pipe):
        raise ValueError(f"{arguments.source} is no language model; use `effjax search`")
    return cli_text.compress(pipe, chosen, arguments)


def _load(arguments: argparse.Namespace) -> Any:
    import effjax

    if arguments.cache:
        effjax.compilation_cache(arguments.cache)
    return effjax.pipeline(
        arguments.source,
        variant=arguments.variant,
        revision=arguments.revision,
        dtype=arguments.dtype,
        compute_dtype=arguments.compute_dtype,
        check_finite=arguments.check_finite,
        executables=getattr(arguments, "executables", False),
    )


def _is_text(pipe: Any) -> bool:
    from effjax.pipelines import TextPipeline

    return isinstance(pipe, TextPipeline)


def _generate(arguments: argparse.Namespace) -> tuple[Any, str]:
    import jax

    pipe = _load(arguments)
    if not _is_text(pipe):
        raise ValueError(f"{arguments.source} is no language model; use `effjax sample`")
    if arguments.temperature is not None and arguments.seed is None:
        raise ValueError("--temperature needs --seed: without one the likeliest tokens are taken")
    prompts = arguments.prompt
    asked = [[{"role": "user", "content": each}] for each in prompts] if arguments.chat else prompts
    sampling = {} if arguments.temperature is None else {"temperature": arguments.temperature}
    key = None if arguments.seed is None else jax.random.key(arguments.seed)
    texts = pipe(asked, max_new_tokens=arguments.max_new_tokens, key=key, **sampling)
    figures = [
        {"prompt": prompt, "text": text} for prompt, text in zip(prompts, texts, strict=True)
    ]
    return figures, "\n\n".join(f"{each['prompt']}{each['text']}" for each in figures)


def _asked(
    pipe: Any, arguments: argparse.Namespace, *, default: int = 0, texts: Sequence[str] = ()
) -> list[str]:
    """Prompts of a text-to-image pipeline, labels of another.

    If none are given: `texts`, or `default` of all classes.
    """
    from effjax.pipelines import TextToImagePipeline

    takes_prompts = isinstance(pipe, TextToImagePipeline)
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


def _settings(pipe: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Options of a pipeline's sampler."""
    from effjax.pipelines import TextToImagePipeline

    asked = {"height": arguments.height, "width": arguments.width}
    sizes = {name: value for name, value in asked.items() if value is not None}
    if sizes and not isinstance(pipe, TextToImagePipeline):
        raise ValueError("this model makes images of one size: leave out --height and --width")
    return {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance, **sizes}


if __name__ == "__main__":
    sys.exit(main())
