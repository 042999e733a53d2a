"""The components of a pipeline: where they are looked for, and what is given in their place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import converters
from converters.hub import Folder, weight_files
from effjax import fields, recipe
from effjax.forward import Forward
from effjax.pipelines.base import INDEX, Origin
from effjax.transform import Pair

# What a pipeline around one model needs beside it.
_BESIDE = {
    "Llama": ("TextPipeline", "its tokenizer"),
    "DiT": ("ClassConditionalPipeline", "its scheduler, and a VAE if it makes latents"),
    "PixArt": ("TextToImagePipeline", "its scheduler, text encoder, tokenizer and VAE"),
}

_ENTRY = tuple[str | None, str | None] | None  # library and class of a component


@dataclasses.dataclass(frozen=True)
class Components:
    """Components of a directory or repository, and those that are given in their place.

    Attributes:
        folder: the directory or repository.
        index: contents of its model_index.json; None for a directory of transformers.
        given: components by name; None for those that are to be loaded.
        variant: of the weight files, where a component has it.
        options: of `effjax.load` and `converters.from_pretrained`.
    """

    folder: Folder
    index: Mapping[str, Any] | None
    given: Mapping[str, Any]
    variant: str | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("transformer", "model", "text_encoder", "tokenizer", "vae", "scheduler"):
            entry = fields.from_json(_ENTRY, (self.index or {}).get(name))
            if wrong := fields.problems(_ENTRY, entry, name):
                raise ValueError(f"{self.folder.source}/{INDEX}: {'; '.join(wrong)}")

    @property
    def origin(self) -> Origin:
        """What the pipeline was made of: this, or what this was compressed from."""
        if "origin" in (index := self.index or {}):
            return fields.read(Origin, index["origin"], f"{self.folder.source}, {INDEX}, origin")
        return Origin(self.folder.source, self.folder.remote.get("revision"), self.variant)

    def has(self, name: str) -> bool:
        """Whether a component is given or there: diffusers writes [null, null] where it is not."""
        if self.given.get(name) is not None:
            return True
        entry = (self.index or {}).get(name)
        if isinstance(entry, list):
            return any(part is not None for part in entry)
        files = ("config.json", "tokenizer_config.json")
        return any(self.folder.has(f"{name}/{file}") for file in files)

    def has_variant(self, name: str) -> bool:
        """Whether a component is there with weights of the variant that is asked for."""
        files = () if self.variant is None else weight_files(self.variant)
        return any(self.folder.has(f"{name}/{file}") for file in files)

    def require(self, *names: str) -> None:
        """Check that components are there, before any of them is loaded.

        Raises:
            ValueError: for those that are missing, with what can be given.
        """
        for name in (name for name in names if not self.has(name)):
            words = name.replace("_", " ")
            raise ValueError(
                f"{self.folder.source} has no {words}: give one, such as "
                f"effjax.pipeline(..., {name}={_example(name)})"
            )

    def allow(self, *names: str) -> None:
        """Check that nothing else is given.

        Raises:
            ValueError: for components that this kind of pipeline does not have.
        """
        given = [name for name, value in self.given.items() if value is not None]
        if other := [name for name in given if name not in names]:
            raise ValueError(
                f"{self.folder.source} takes no {', '.join(other)}; this kind of pipeline can be "
                f"given {', '.join(names)}"
            )

    def model(self, name: str | None) -> Pair:
        """A model: the one that is given, else that of a subfolder, or of the directory itself."""
        given = self.given.get(name) if name else None
        if given is not None:
            if not _is_pair(given):
                raise ValueError(
                    f"{name} must be a pair (forward, params), such as {_example(name)}; got "
                    f"{type(given).__name__}"
                )
            return given
        if name:
            progress = self.options["progress"]
            if (saved := self.folder.saved_model(name, progress=progress)) is not None:
                return recipe.load(saved, **self.options)
        return converters.from_pretrained(
            self.folder.source,
            subfolder=name,
            variant=self.variant if name is None or self.has_variant(name) else None,
            **self.options,
            **self.folder.remote,
        )

    def tokenizer(self, subfolder: str | None) -> Any:
        """The tokenizer that is given, else that of a subfolder, or of the directory itself.

        Raises:
            ValueError: if there is none that can be read.
        """
        if (given := self.given.get("tokenizer")) is not None:
            return given
        from transformers import AutoTokenizer  # slow to import

        source = self.folder.source
        try:
            if self.folder.hub is None:
                directory = Path(os.path.expanduser(source)) / (subfolder or "")
                return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            return AutoTokenizer.from_pretrained(
                source, subfolder=subfolder or "", trust_remote_code=False, **self.folder.remote
            )
        except Exception as error:  # transformers raises many kinds for bad files
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"the tokenizer of {source} needs code that stands beside it (auto_map in its "
                    f"tokenizer_config.json), and effjax runs no such code. If you trust it, load "
                    f"the tokenizer yourself and give it: effjax.pipeline(..., tokenizer=...)"
                ) from None
            message = f"{source} has no tokenizer that can be read: {error or repr(error)}"
            name = f"{subfolder}/tokenizer.json" if subfolder else "tokenizer.json"
            if find_spec("sentencepiece") is None and not self.folder.has(name):
                message += (
                    f"\nIt has no {name}; for a sentencepiece model: pip install sentencepiece"
                )
            raise ValueError(message) from error


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Forward)


def _example(name: str | None) -> str:
    if name == "tokenizer":
        return "transformers.AutoTokenizer.from_pretrained(...)"
    return f'converters.from_pretrained("OWNER/NAME", subfolder="{name}")'


def refuse_file(path: Path) -> None:
    """Say what is to be given in the place of a single file.

    Raises:
        ValueError: always.
    """
    for folder in (path.parent, path.parent.parent):
        whole = (folder / INDEX).is_file() or (folder / "tokenizer_config.json").is_file()
        if whole:
            raise ValueError(f"{path} is one file of a pipeline: give its directory, {folder}")
    try:
        model = converters.describe(path)["model"]
    except (ValueError, ImportError) as error:
        raise ValueError(
            f"{path} is a single file, and a pipeline is a directory or repository with a "
            f"{INDEX}, or with the config.json and tokenizer of a language model. As a model it "
            f"cannot be loaded either: {error}"
        ) from error
    kind, needs = _BESIDE.get(model, (None, None))
    made = f"; with {needs}, effjax.pipelines.{kind} makes a pipeline of them" if kind else ""
    raise ValueError(
        f"{path} is a single file of a {model}, and a pipeline is a directory or repository. Load "
        f"the model with `forward, params = converters.from_pretrained({str(path)!r})`{made}"
    )
