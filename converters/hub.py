"""Finding a model: weight file, directory in diffusers' layout, or hub repository."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from converters.checkpoint import SUFFIXES, refuse_gguf
from effjax.storage import index_files, is_index, read_json

_STEMS = (
    (".safetensors", ("diffusion_pytorch_model", "model")),
    (".bin", ("diffusion_pytorch_model", "pytorch_model")),
)
# What may stand between a stem and a suffix, as in "model.fp16.safetensors"; in an index's name,
# diffusers wrote it at another place before.
_PLAIN = ("{suffix}", "{suffix}.index.json")
_OF_VARIANT = (
    ".{variant}{suffix}",
    "{suffix}.index.{variant}.json",
    "{suffix}.{variant}.index.json",
    ".{variant}{suffix}.index.json",
)
_VARIANT = r"[A-Za-z0-9_][\w.-]*"
_REPO = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:/(.+))?")

Fetch = Callable[[str], Path | None]
Names = Callable[[str], Iterable[str]]


def weight_files(variant: str | None = None) -> tuple[str, ...]:
    """Names that the weights of a model may have, safetensors before pickles.

    Args:
        variant: which of several sets of weights, such as "fp16"; None for the one without a name.

    Raises:
        ValueError: for what is no name of a variant.
    """
    if variant is not None and not re.fullmatch(_VARIANT, variant):
        raise ValueError(f"variant must be a word such as 'fp16', got {variant!r}")
    return tuple(
        stem + pattern.format(suffix=suffix, variant=variant)
        for suffix, stems in _STEMS
        for stem in stems
        for pattern in (_PLAIN if variant is None else _OF_VARIANT)
    )


def _variants(names: Iterable[str]) -> list[str]:
    """Variants of which there are weights among files of these names."""
    held = {re.sub(r"-\d+-of-\d+", "", name) for name in names}
    words = {word for name in held for word in name.split(".") if re.fullmatch(_VARIANT, word)}
    return sorted(word for word in words if not held.isdisjoint(weight_files(word)))


def resolve(
    source: str | os.PathLike,
    *,
    subfolder: str | None = None,
    variant: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
    progress: bool = True,
) -> Path:
    """The weight file of a model, or the index of its shards, on this machine.

    What belongs to it (config.json, the shards) stands beside it. From the hub only these files are
    downloaded, all of one commit.

    Args: see `converters.from_pretrained`.

    Raises:
        ValueError: if there is no such model, with what was looked for.
    """
    path = Path(os.path.expanduser(source))
    names = weight_files(variant)
    if path.is_file():
        for option, value in (("subfolder", subfolder), ("variant", variant)):
            if value is not None:
                raise ValueError(f"{path} is a file; {option}={value!r} is for directories")
        return path
    if path.is_dir():
        if (path / "recipe.json").is_file():
            raise ValueError(f"{path} was saved by effjax.save; load it with effjax.load")

        def fetch(name: str) -> Path | None:
            return path / name if (path / name).is_file() else None

        def listed(prefix: str) -> Iterable[str]:
            return [file.name for file in (path / prefix).iterdir()]

        return _find(fetch, listed, str(path), subfolder, names)
    match = _REPO.fullmatch(str(source))
    file = match and match[2]
    if match is None or (file and not (is_index(file) or file.endswith(SUFFIXES))):
        refuse_gguf(str(path.parent), [path.name])
        raise ValueError(
            f"{source} is no file or directory here, and no hub repository either: those are "
            f'"owner/name", or "owner/name/file" with a file in {", ".join(SUFFIXES)}'
        )
    if file and variant is not None:
        raise ValueError(f"{source} is a file; variant={variant!r} is for repositories")
    repo = match[1]
    hub = _Hub(repo, revision, token, cache_dir, local_files_only)
    try:
        with _download_bars(progress):
            if file is None:
                return _find(hub.fetch, hub.names, repo, subfolder, names)
            return _find_file(hub.fetch, repo, f"{subfolder}/{file}" if subfolder else file)
    except ValueError as error:
        if hub.unreached is None:
            raise
        raise ValueError(
            f"{source} is no file or directory here, it is not (completely) in the hub's cache, "
            f"and the hub was not asked or did not answer: {hub.unreached}"
        ) from error


@dataclasses.dataclass(frozen=True)
class Folder:
    """A directory here, or one commit of a hub repository; its files are fetched when asked for.

    Attributes:
        source: as it was given, for messages.
        fetch: the file of this name, on this machine; None if there is none.
        hub: where the files come from; None for a directory.
    """

    source: str
    fetch: Fetch
    hub: _Hub | None = None

    @property
    def remote(self) -> dict[str, Any]:
        """Options with which others find the same commit."""
        if self.hub is None:
            return {}
        names = ("revision", "token", "cache_dir", "local_files_only")
        return {name: getattr(self.hub, name) for name in names}

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.fetch(name) is not None

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file, such as "model_index.json".

        Raises:
            ValueError: if there is none, or it cannot be had.
        """
        found = self.fetch(name)
        if found is not None:
            return read_json(found)
        if self.hub is not None and self.hub.unreached is not None:
            raise ValueError(
                f"{name} of {self.source} is not in the hub's cache, and the hub was not asked or "
                f"did not answer: {self.hub.unreached}"
            )
        raise ValueError(f"{self.source} has no {name}")

    def saved_model(
        self, subfolder: str | None, *, weights: bool = True, progress: bool = True
    ) -> Path | None:
        """The folder of a model that `effjax.save` wrote; None if this is another.

        Args:
            subfolder: where to look; at the top if None.
            weights: fetch them too, not only what describes them.
            progress: show bars of downloads.
        """
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        recipe = self.fetch(f"{prefix}recipe.json")
        if recipe is None:
            return None
        self.fetch(f"{prefix}config.json")
        names = ("model.safetensors.index.json", "model.safetensors") if weights else ()
        with _download_bars(progress):
            any(_fetch_weights(self.fetch, prefix + name) for name in names)
        return recipe.parent


def open_folder(
    source: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool = False,
) -> Folder:
    """A directory here, or a hub repository; what is fetched from one is of one commit.

    Args: see `converters.from_pretrained`.

    Raises:
        ValueError: if it can be neither.
    """
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return Folder(str(source), lambda name: path / name if (path / name).is_file() else None)
    match = _REPO.fullmatch(str(source))
    if match is None or match[2] is not None or path.exists():
        raise ValueError(f"{source} is no directory here and no hub repository (owner/name)")
    hub = _Hub(str(source), revision, token, cache_dir, local_files_only)
    return Folder(str(source), hub.fetch, hub)


def _find(
    fetch: Fetch,
    listed: Names,
    source: str,
    subfolder: str | None,
    names: tuple[str, ...],
) -> Path:
    """Get the files of the model in a folder.

    Args:
        fetch: gives a file; None for one that does not exist.
        listed: gives the names of a folder's files, as far as they can be known.
        source, subfolder: as in `resolve`.
        names: that its weights may have.
    """
    pipeline = fetch("model_index.json") if subfolder is None else None
    folder = "transformer" if pipeline else subfolder
    prefix = f"{folder.strip('/')}/" if folder else ""
    if fetch(f"{prefix}config.json") is None:
        if not prefix:
            refuse_gguf(source, listed(prefix))
        parts = read_json(pipeline) if pipeline else {}
        models = sorted(name for name, value in parts.items() if isinstance(value, list))
        hint = f" It is a pipeline: give subfolder=, one of {models}." if models else ""
        raise ValueError(
            f"{source} has no {prefix}config.json, so it is no model in diffusers' layout.{hint} "
            f"For a single weight file, give the file itself."
        )
    for name in names:
        if found := _fetch_weights(fetch, prefix + name):
            return found
    held = listed(prefix)
    refuse_gguf(source, held)
    hints = [f"variant={variant!r}" for variant in _variants(held)]
    if not set(held).isdisjoint(weight_files()):
        hints.append("no variant")
    raise ValueError(
        f"{source} has no weights in {prefix or 'its top folder'}; looked for {', '.join(names)}. "
        + (f"There are weights for {' and '.join(hints)}. " if hints else "")
        + "For a file of another name, give the file itself."
    )


def _find_file(fetch: Fetch, source: str, file: str) -> Path:
    """Get one weight file, and the config.json beside it if there is one."""
    found = _fetch_weights(fetch, file)
    if found is None:
        raise ValueError(f"{source} has no file {file}")
    folder, slash, _ = file.rpartition("/")
    fetch(f"{folder}{slash}config.json")
    return found


def _fetch_weights(fetch: Fetch, name: str) -> Path | None:
    """Get a weight file; for an index, all shards too (one that is missing is found on opening)."""
    found = fetch(name)
    if found is not None and is_index(name):
        folder, slash, _ = name.rpartition("/")
        for shard in sorted(set(index_files(found).values())):
            fetch(f"{folder}{slash}{shard}")
    return found


class _Hub:
    """Files of one commit of a repository, from the cache or the server.

    Attributes:
        unreached: why the server was not asked, if it was not.
    """

    def __init__(
        self,
        repo: str,
        revision: str | None,
        token: str | bool | None,
        cache_dir: str | os.PathLike | None,
        local_files_only: bool,
    ):
        self.repo = repo
        self.revision = revision
        self.token = token
        self.cache_dir = cache_dir
        self.local_files_only = local_files_only
        self.unreached: Exception | None = None

    def fetch(self, name: str) -> Path | None:
        """The file on this machine, or None if the repository has no such file."""
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            path = Path(
                hf_hub_download(
                    self.repo,
                    name,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=None
                    if self.cache_dir is None
                    else os.path.expanduser(self.cache_dir),
                    local_files_only=self.local_files_only,
                )
            )
        except LocalEntryNotFoundError as error:
            self.unreached = self.unreached or error
            self.local_files_only = True  # do not wait for the same server again
            return None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.repo} is no directory here, and {name} of revision "
                f"{self.revision or 'main'} cannot be had from the hub; check the name, the "
                f"revision, and token= for a private repository: {reason}"
            ) from error
        # Path of the cache: .../snapshots/COMMIT/NAME. Further files come from that commit too.
        self.revision = path.parents[name.count("/")].name
        return path

    def names(self, prefix: str) -> list[str]:
        """Names of the files in a folder of the repository; none where the server is not asked."""
        from huggingface_hub import list_repo_files
        from huggingface_hub.errors import HfHubHTTPError

        if self.local_files_only:
            return []
        try:
            files = list_repo_files(self.repo, revision=self.revision, token=self.token)
        except (HfHubHTTPError, OSError):  # a hint less
            return []
        heads = (file.rpartition("/") for file in files)
        return [name for head, slash, name in heads if head + slash == prefix]


@contextlib.contextmanager
def _download_bars(shown: bool) -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
