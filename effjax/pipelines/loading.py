"""The components of a pipeline: where they are looked for, and what is given in their place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import converters
from converters.checkpoint import SUFFIXES
from converters.hub import Folder, weight_files
from effjax import fields, recipe
from effjax.forward import Forward
from effjax.pipelines import families
from effjax.pipelines.base import INDEX, Origin
from effjax.pipelines.family import PipelineFamily
from effjax.transform import Pair

_ENTRY = str | tuple[str | None, str | None] | None  # a weight file; library and class


@dataclasses.dataclass(frozen=True)
class Components:
    """Components of a directory or repository, and those that are given in their place.

    Attributes:
        family: what the pipeline is made of.
        folder: the directory or repository.
        index: contents of its model_index.json; None for a directory of transformers.
        given: components by name; None for those that are to be loaded.
        variant: of the weight files, where a component has it.
        options: of `effjax.load` and `converters.from_pretrained`.
    """

    family: PipelineFamily
    folder: Folder
    index: Mapping[str, Any] | None
    given: Mapping[str, Any]
    variant: str | None
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in self.family.kinds:
            entry = fields.from_json(_ENTRY, (self.index or {}).get(name))
            if wrong := fields.problems(_ENTRY, entry, name):
                raise ValueError(f"{self.folder.source}/{INDEX}: {'; '.join(wrong)}")
            if isinstance(entry, str):
                check_file(name, entry, self.folder.source)

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
        if isinstance(entry, str):
            return self.folder.has(entry)
        if isinstance(entry, list):
            return any(part is not None for part in entry)
        files = ("config.json", "tokenizer_config.json")
        return any(self.folder.has(f"{name}/{file}") for file in files)

    def file(self, name: str | None) -> str | None:
        """Where the weight file is that the index names for a component; None if it names none."""
        entry = (self.index or {}).get(name or "")
        return f"{self.folder.source}/{entry}" if isinstance(entry, str) else None

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
            raise ValueError(f"{self.folder.source} has no {words}: {self._advice(name)}")

    def _advice(self, name: str) -> str:
        """What to do about a component that is missing."""
        if name not in self.family.replaceable:
            return f"put it there, and name it in {INDEX}"
        return f"give one, such as effjax.pipeline(..., {name}={_example(name)})"

    def check_given(self) -> None:
        """Check that nothing is given that is no component of the family, and what files lack.

        Raises:
            ValueError: for components that this kind of pipeline does not have, and for files that
                the index names and that are not there, of components that may be missing too.
        """
        for name in self.family.kinds:
            entry = (self.index or {}).get(name)
            if isinstance(entry, str) and not self.has(name):
                raise ValueError(
                    f"{self.folder.source} has no {entry}, which {INDEX} names as its {name}: "
                    f"{self._advice(name)}"
                )
        names = self.family.replaceable
        given = [name for name, value in self.given.items() if value is not None]
        if other := [name for name in given if name not in names]:
            raise ValueError(
                f"{self.folder.source} takes no {', '.join(other)}; this kind of pipeline can be "
                f"given {', '.join(names)}"
            )

    def model(
        self,
        name: str | None,
        *,
        part: str | None = None,
        part_file: str | None = None,
        any_kind: bool = False,
    ) -> Pair:
        """A model: the one that is given, else that of a subfolder, or of the directory itself.

        Args:
            name: component; None for the directory itself.
            part: a further model in the files of the directory itself, which the component is.
            part_file: the file there that has it; None for those of the directory's model.
            any_kind: whether the model may be one that the family has no pipeline of.

        Raises:
            ValueError: for what is no model, one of a kind that the family has no pipeline of, and
                a file that is missing.
        """
        found, family = self._model(name, part, part_file), self.family
        kind = found[0].model.__name__
        own = part is None and name in (None, family.model) and not any_kind
        if own and kind not in family.models:
            raise ValueError(
                f"the {family.model.replace('_', ' ')} of a {family.name} is a "
                f"{' or a '.join(family.models)}, and that of {self.folder.source} is a {kind}"
            )
        return found

    def _model(self, name: str | None, part: str | None, part_file: str | None) -> Pair:
        given = self.given.get(name) if name else None
        if given is not None:
            if not _is_pair(given):
                raise ValueError(
                    f"{name} must be a pair (forward, params), such as {_example(name)}; got "
                    f"{type(given).__name__}"
                )
            return given
        if part_file is not None and not self.folder.has(part_file):
            raise ValueError(
                f"{self.folder.source} has no {part_file}, which decodes images: the files of "
                f"transformers' layout do not. Put it beside config.json, or give the model, such "
                f'as effjax.pipeline(..., {name}=converters.from_pretrained(".../{part_file}")). '
                f"Texts alone are made by converters.from_pretrained and effjax.generate"
            )
        name = name if part is None else None
        if name:
            progress = self.options["progress"]
            if (saved := self.folder.saved_model(name, progress=progress)) is not None:
                return recipe.load(saved, **self.options)
        if (file := self.file(name)) is not None:
            return converters.from_pretrained(file, **self.options, **self.folder.remote)
        if part_file is not None:
            file = f"{self.folder.source}/{part_file}"
            return converters.from_pretrained(file, part=part, **self.options, **self.folder.remote)
        return converters.from_pretrained(
            self.folder.source,
            subfolder=name,
            variant=self.variant if name is None or self.has_variant(name) else None,
            part=part,
            **self.options,
            **self.folder.remote,
        )

    def tokenizer(self, name: str, subfolder: str | None) -> Any:
        """The tokenizer that is given, else that of a subfolder, or of the directory itself.

        Raises:
            ValueError: if there is none that can be read.
        """
        from transformers import AutoTokenizer  # slow to import

        def load(source: Any, **options: Any) -> Any:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)

        return self._of_transformers(load, "tokenizer", name, subfolder)

    def processor(self, name: str, subfolder: str | None) -> Any:
        """A processor (of images, or of several kinds of inputs) likewise."""
        from transformers import AutoProcessor  # slow to import

        def load(source: Any, **options: Any) -> Any:
            return AutoProcessor.from_pretrained(source, trust_remote_code=False, **options)

        return self._of_transformers(load, "processor", name, subfolder)

    def _of_transformers(
        self, load: Callable[..., Any], what: str, name: str, subfolder: str | None
    ) -> Any:
        """A component that is given, else one that transformers loads without code beside it."""
        if (given := self.given.get(name)) is not None:
            return given
        source = self.folder.source
        try:
            if self.folder.hub is None:
                directory = Path(os.path.expanduser(source)) / (subfolder or "")
                return load(directory)
            return load(source, subfolder=subfolder or "", **self.folder.remote)
        except Exception as error:  # transformers raises many kinds for bad files
            if "trust_remote_code" in str(error):
                raise ValueError(
                    f"the {what} of {source} needs code that stands beside it (auto_map in its "
                    f"{what}_config.json), and effjax runs no such code. If you trust it, load "
                    f"the {what} yourself and give it: effjax.pipeline(..., {name}=...)"
                ) from None
            message = f"{source} has no {what} that can be read: {error or repr(error)}"
            file = f"{subfolder}/tokenizer.json" if subfolder else "tokenizer.json"
            sentencepiece = what == "tokenizer" and find_spec("sentencepiece") is None
            if sentencepiece and not self.folder.has(file):
                message += (
                    f"\nIt has no {file}; for a sentencepiece model: pip install sentencepiece"
                )
            raise ValueError(message) from error


def check_file(name: str, file: str, source: str) -> None:
    """Check that what an index names for a component is a weight file beside it.

    Raises:
        ValueError: for what is not.
    """
    if "/" in file or "\\" in file or not file.endswith(SUFFIXES):
        raise ValueError(
            f"{source}/{INDEX}: {name} must be [library, class], or the name of a weight file "
            f"beside it ({', '.join(SUFFIXES)}); got {file!r}"
        )


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Forward)


def _example(name: str | None) -> str:
    if name is not None and name.startswith("tokenizer"):
        return "transformers.AutoTokenizer.from_pretrained(...)"
    return f'converters.from_pretrained("OWNER/NAME", subfolder="{name}")'


def check_decodes(vae: Pair | None, channels: int) -> None:
    """Check that a VAE, if there is one, decodes latents of so many channels.

    Raises:
        ValueError: for one that decodes others, and for a model that is none.
    """
    if vae is None:
        return
    own = getattr(vae[0].config, "latent_channels", None)
    if own is None:
        raise ValueError(f"the vae must decode latents, got a {vae[0].model.__name__}")
    if own != channels:
        raise ValueError(
            f"the VAE decodes {own} channels and the model makes {channels}: they belong to "
            f"different models"
        )


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
    family, made = families.of_model(model), ""
    if family is not None:
        needs = ", ".join(name.replace("_", " ") for name in family.kinds if name != family.model)
        made = f"; with its {needs}, effjax.pipelines.{family.pipeline} makes a pipeline of them"
    raise ValueError(
        f"{path} is a single file of a {model}, and a pipeline is a directory or repository. Load "
        f"the model with `forward, params = converters.from_pretrained({str(path)!r})`{made}"
    )
