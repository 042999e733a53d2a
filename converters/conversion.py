"""Rewriting checkpoints in the layouts of diffusers and transformers: models, and pipelines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from converters.checkpoint import SUFFIXES
from converters.family import family_of_json
from converters.hub import Folder, open_folder, resolve, weight_files
from converters.pretrained import SHARD_BYTES, save_pretrained, write_model
from converters.weights import open_weights
from effjax import recipe
from effjax.forward import METHODS
from effjax.storage import new_directory, read_json, write_json

INDEX, GENERATION = "model_index.json", "generation_config.json"

# What transformers may keep a tokenizer in.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_DRAWING = ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_COPIED = ("scheduler_config.json", "preprocessor_config.json", *TOKENIZER)


def convert(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    dtype: DTypeLike | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    max_shard_bytes: int = SHARD_BYTES,
    layout: str | None = None,
    progress: bool = True,
    check_finite: bool = False,
) -> dict[str, Any]:
    """Rewrite a checkpoint in another layout or dtype, with one tensor in memory at a time.

    All components of a pipeline are rewritten, or copied (scheduler, tokenizer, model_index.json).
    A language model keeps its tokenizer. Directories that `effjax.save` or a pipeline's `save`
    wrote are converted too, if methods changed nothing but leaves that these layouts can hold.

    Quantized layers keep their values and are written as compressed-tensors. That format has no
    layers whose inputs have an order of their own: these become floats, with a warning.

    The arguments are those of `from_pretrained` and `save_pretrained`. The result is that of
    calling these two. `variant` applies to the components that have it, and `subfolder` chooses one
    model of a pipeline.

    Returns:
        A dictionary of what was written, as from `save_pretrained`. For a pipeline it has pipeline,
        destination, components (by name), parameters and bytes.

    Raises:
        ValueError: as these, and for a component or a method that cannot be converted.
    """
    remote = {
        "revision": revision,
        "token": token,
        "cache_dir": cache_dir,
        "local_files_only": local_files_only,
    }
    reading = {"dtype": dtype, "check_finite": check_finite}
    writing = {"max_shard_bytes": max_shard_bytes, "layout": layout, "progress": progress}
    path = Path(os.path.expanduser(src))
    if path.is_file():
        if subfolder is not None or variant is not None:
            resolve(src, subfolder=subfolder, variant=variant)  # says what is wrong
        return _rewrite(path, dst, **reading, **writing)
    try:
        folder = open_folder(src, **remote)
    except ValueError:  # a file of a repository, or what is neither
        return _rewrite(resolve(src, subfolder=subfolder, **remote), dst, **reading, **writing)
    if subfolder is None and folder.has(INDEX):
        return _convert_pipeline(folder, dst, variant, reading, writing)
    return _convert_model(folder, subfolder, dst, variant, reading, writing)


def _rewrite(
    path: Path,
    dst: str | os.PathLike,
    *,
    dtype: DTypeLike | None,
    check_finite: bool,
    add: Callable[[Path], None] = lambda directory: None,
    **writing: Any,
) -> dict[str, Any]:
    """Rewrite the model of a weight file; `add` puts more into its directory."""
    weights = open_weights(path, dtype=dtype, check_finite=check_finite)
    for name, part in weights.family.parts.items():
        stripped = (each.removeprefix(f"model.{name}.") for each in weights.tensors)
        within = [*weights.tensors, *stripped]
        if any(part.tables[part.layout(within)].paths(within)):
            raise ValueError(
                f"{path} holds a {name} beside its {weights.family.class_name}, which would be "
                f"lost: effjax.pipeline(...).save(...) keeps both, in a folder each"
            )

    def finish(directory: Path) -> None:
        weights.inspection.raise_faults()
        add(directory)

    return write_model(
        dst,
        weights.family,
        writing.pop("layout"),
        weights.forward.config,
        weights.leaves,
        weights.read,
        finish=finish,
        **writing,
    )


def _convert_model(
    folder: Folder,
    subfolder: str | None,
    dst: str | os.PathLike,
    variant: str | None,
    reading: Mapping[str, Any],
    writing: Mapping[str, Any],
    also: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Convert one model; one that is no part of a pipeline takes the tokenizer beside it along.

    Args:
        folder, subfolder: where it is.
        dst: directory to make.
        variant: of its weights.
        reading, writing: options.
        also: files to copy, by the names that they get.
    """
    if subfolder is None:
        also = {name: name for name in (*TOKENIZER, GENERATION)}

    def add(directory: Path) -> None:
        _copy(folder, also or {}, directory)
        if subfolder is None:
            _keep_settings(folder, directory)

    saved = folder.saved_model(subfolder, progress=writing["progress"])
    if saved is None:
        path = resolve(
            folder.source,
            subfolder=subfolder,
            variant=variant,
            progress=writing["progress"],
            **folder.remote,
        )
        return _rewrite(path, dst, add=add, **reading, **writing)
    described, params = recipe.describe(saved)
    if described.patches or METHODS in params:
        methods = ", ".join(dict.fromkeys(name for name, _ in described.recipe))
        raise ValueError(
            f"{saved} was compressed by {methods}, which other layouts do not hold: "
            f"effjax.pipeline loads it as it is. Convert the model that it was made of instead"
        )
    pair = recipe.load(saved, progress=writing["progress"], **reading)
    return save_pretrained(*pair, dst, finish=add, **writing)


def _convert_pipeline(
    folder: Folder,
    dst: str | os.PathLike,
    variant: str | None,
    reading: Mapping[str, Any],
    writing: Mapping[str, Any],
) -> dict[str, Any]:
    """Convert every component of a pipeline."""
    if writing["layout"] is not None:
        raise ValueError(
            f"layouts are those of single models: give subfolder= with layout={writing['layout']!r}"
        )
    index = folder.read(INDEX)
    if index.get("_class_name") == "TextPipeline":  # transformers keeps all in one folder
        also = {file: f"tokenizer/{file}" for file in TOKENIZER} | {GENERATION: GENERATION}
        return _convert_model(folder, "model", dst, variant, reading, writing, also)
    entries = {key: value for key, value in index.items() if isinstance(value, list)}
    names = {key for key, value in entries.items() if any(part is not None for part in value)}
    names |= _unlisted(folder, entries)
    files = {
        key: value
        for key, value in index.items()
        if isinstance(value, str) and value.endswith(SUFFIXES) and "/" not in value
    }
    reports: dict[str, Any] = {}
    with new_directory(Path(os.path.expanduser(dst))) as directory:
        for key, file in files.items():
            path = resolve(f"{folder.source}/{file}", **folder.remote)
            reports[key] = _rewrite(path, directory / key, **reading, **writing)
            reports[key]["destination"] = str(Path(dst) / key)
            index[key] = _entry(directory / key)
        for key in sorted(names):
            if folder.has(f"{key}/config.json"):
                held = None if variant is None else _held(folder, key, variant)
                to = directory / key
                reports[key] = _convert_model(folder, key, to, held, reading, writing)
                reports[key]["destination"] = str(Path(dst) / key)
                index[key] = _entry(to)
                continue
            (directory / key).mkdir()
            if not _copy(folder, {f"{key}/{file}": f"{key}/{file}" for file in _COPIED}, directory):
                raise ValueError(
                    f"{folder.source} lists a component {key} that is no model, scheduler or "
                    f"tokenizer in its folder"
                )
        if variant is not None and not any(_held(folder, key, variant) for key in reports):
            raise ValueError(f"no component of {folder.source} has a variant {variant!r}")
        index.pop("origin", None)
        write_json(directory / INDEX, index)
    return {
        "destination": str(dst),
        "pipeline": index.get("_class_name"),
        "components": reports,
        "parameters": sum(report["parameters"] for report in reports.values()),
        "bytes": sum(report["bytes"] for report in reports.values()),
    }


def _keep_settings(folder: Folder, directory: Path) -> None:
    """Keep what config.json alone says of generation in generation_config.json: it is rewritten."""
    config, path = folder.read("config.json"), directory / GENERATION
    given = read_json(path) if path.exists() else {}
    names = _TOKENS if given else (*_TOKENS, *_DRAWING)
    told = {name: config[name] for name in names if config.get(name) is not None}
    if told.keys() - given.keys():
        write_json(path, told | given)


def _unlisted(folder: Folder, listed: Container[str]) -> set[str]:
    """Components that a directory has and its model_index.json does not list."""
    if folder.hub is not None:
        return set()
    describing = ("config.json", "scheduler_config.json", "tokenizer_config.json")
    return {
        each.name
        for each in Path(os.path.expanduser(folder.source)).iterdir()
        if each.name not in listed and any((each / file).is_file() for file in describing)
    }


def _held(folder: Folder, name: str, variant: str) -> str | None:
    """The variant, if a component has it."""
    files = weight_files(variant)
    return variant if any(folder.has(f"{name}/{file}") for file in files) else None


def _entry(directory: Path) -> list[str]:
    """How model_index.json names the model of a directory: its library and class."""
    config = read_json(directory / "config.json")
    if "_class_name" in config:
        return [family_of_json(config).library, config["_class_name"]]
    return ["transformers", config["architectures"][0]]


def _copy(folder: Folder, names: Mapping[str, str], directory: Path) -> int:
    """Copy files by the names that they get, those that there are; return how many."""
    count = 0
    for target, source in names.items():
        if (found := folder.fetch(source)) is not None:
            shutil.copyfile(found, directory / target)
            count += 1
    return count
