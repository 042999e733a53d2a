"""Executables in files: compiled from recorded calls, saved, loaded and run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from effjax import compat
from effjax.descriptions import differences, here, target
from effjax.executables.program import Call, used
from effjax.executables.trees import PyTree, built, check_tree, is_key
from effjax.fields import Checked, naming, read
from effjax.storage import new_directory, read_json, write_json

FOLDER, INDEX = "executables", "executables.json"


class ExecutablesWarning(UserWarning):
    """A call that no saved executable fits was compiled."""


@dataclasses.dataclass(frozen=True)
class Entry(Checked):
    """One executable in the index of a folder.

    Attributes:
        file: its name.
        sha256: of its bytes.
        call: what it was compiled for, as `Call.describe` says.
        returns: how the results make a tree.
    """

    file: str
    sha256: str
    call: Mapping[str, str]
    returns: Any


@dataclasses.dataclass(frozen=True)
class Index(Checked):
    """Contents of executables.json.

    Attributes:
        target: what runs them, as `target` says.
        programs: the executables.
    """

    target: Mapping[str, str]
    programs: tuple[Entry, ...]


def save(
    directory: str | os.PathLike, calls: Sequence[Call], place: jax.sharding.Sharding | None = None
) -> Path:
    """Compile recorded calls, and write their executables to a folder in `executables`.

    Args:
        directory: directory of a saved model or pipeline.
        calls: the calls that `record` recorded.
        place: a device, such as `effjax.chips.chip("v5e")`; the first one of this machine if None.

    Returns:
        The folder.

    Raises:
        ValueError: if there are no calls, if static values cannot be described, and if a folder for
            these calls and this device exists already.
    """
    if not calls:
        raise ValueError("no program was recorded: call a pipeline within executables.record()")
    place = place or here()
    (device,) = place.device_set
    described = [call.describe() for call in calls]
    made_for = target(device)
    named = json.dumps([made_for, described], sort_keys=True).encode()
    chip = device.device_kind.replace(" ", "-").lower()
    folder = Path(directory) / FOLDER / f"{chip}-{hashlib.sha256(named).hexdigest()[:12]}"
    with new_directory(folder) as partial, compat.without_compilation_cache():
        entries = []
        for number, (call, words) in enumerate(zip(calls, described, strict=True)):
            traced = call.on(place)
            data = traced.program.lower().compile().runtime_executable().serialize()
            file = f"{number:03d}.xla"
            (partial / file).write_bytes(data)
            digest = hashlib.sha256(data).hexdigest()
            entries.append(Entry(file, digest, words, traced.returns))
        index = Index(made_for, tuple(entries))
        write_json(partial / INDEX, dataclasses.asdict(index))
    return folder


class Executables:
    """The executables that `load` found. They run calls that are made within `using`."""

    def __init__(self, device: Any, entries: Mapping[Path, Entry]):
        self.device = device
        self.entries = {_frozen(entry.call): (path, entry) for path, entry in entries.items()}
        self.found: dict[tuple, Executable | None] = {}

    def __repr__(self) -> str:
        names = sorted({entry.call["program"] for _, entry in self.entries.values()})
        return f"Executables({len(self.entries)} for {self.device}: {', '.join(names)})"

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Run programs by these executables, where one fits, within this context.

        Warns:
            ExecutablesWarning: if none fits a call. The program is then compiled as usual.
        """
        token = used.set(self)
        try:
            yield
        finally:
            used.reset(token)

    def find(self, call: Call) -> Executable | None:
        """The executable for a call; None if there is none, which is warned of once."""
        key = call.key
        if key not in self.found:
            words = call.describe()
            path, entry = self.entries.get(_frozen(words), (None, None))
            if path is None or entry is None:
                warnings.warn(self._misfit(words), ExecutablesWarning, stacklevel=3)
                self.found[key] = None
            else:
                self.found[key] = Executable(path, entry, self.device)
        return self.found[key]

    def _misfit(self, words: Mapping[str, str]) -> str:
        name = words["program"]
        own = [entry.call for _, entry in self.entries.values() if entry.call["program"] == name]
        what = "there is none of this program"
        if own:
            near = min((differences(words, each) for each in own), key=len)
            what = f"the nearest differs in {len(near)} places: {'; '.join(near[:3])}"
        return f"no saved executable fits this call of {name}, so it is compiled here: {what}"


class Executable:
    """One loaded executable."""

    def __init__(self, path: Path, entry: Entry, device: Any):
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            raise ValueError(f"{path} is damaged: it is not what {INDEX} says; compile it again")
        self.loaded = compat.load_executable(data, device)
        self.returns, self.device = entry.returns, device

    def __call__(self, call: Call) -> PyTree:
        """The program's results; arguments that it donates are gone."""
        impls = {jax.random.key_impl(leaf) for leaf in call.leaves if is_key(leaf)}
        buffers = [_as_buffer(leaf, self.device) for leaf in call.leaves]
        results = iter(compat.execute(self.loaded, buffers))

        return built(self.returns, results, call.given, impls)


def load(directory: str | os.PathLike) -> Executables:
    """Load the executables of a saved model or pipeline that this process can run.

    Executables are machine code. Load them only from sources from which you would install a
    package.

    Args:
        directory: a directory with a folder `executables`, as `save` wrote it.

    Raises:
        ValueError: if there are no executables, for damaged files, and if all executables were made
            for something else. The message then says what differs.
    """
    folders = sorted(path.parent for path in (Path(directory) / FOLDER).glob(f"*/{INDEX}"))
    if not folders:
        raise ValueError(
            f"{directory} has no executables; make some with `effjax compile`, or leave out "
            f"executables=True"
        )
    (device,) = here().device_set
    own, entries, reasons = target(device), {}, []
    for folder in folders:
        index = read(Index, read_json(folder / INDEX), str(folder / INDEX))
        if different := differences(own, index.target):
            reasons.append(f"{folder.name}: {'; '.join(different)}")
            continue
        with naming(folder / INDEX):
            for entry in index.programs:
                _check(entry, folder)
                entries[folder / entry.file] = entry
    if not entries:
        listed = "\n  ".join(reasons)
        raise ValueError(
            f"no executables in {directory} were made for this process (which is named first):\n"
            f"  {listed}\nCompile them here with `effjax compile`, or leave out executables=True."
        )
    return Executables(device, entries)


def _frozen(words: Mapping[str, str]) -> str:
    return json.dumps(dict(words), sort_keys=True)


def _as_buffer(leaf: Any, device: Any) -> jax.Array:
    if is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    return jax.device_put(np.asarray(leaf, jax.typeof(leaf).dtype), device)


def _check(entry: Entry, folder: Path) -> None:
    """Raise ValueError for an entry that `save` would not have written."""
    if Path(entry.file).name != entry.file or not (folder / entry.file).is_file():
        raise ValueError(f"there is no executable {entry.file!r:.80} in its folder")
    if "program" not in entry.call:
        raise ValueError(f"{entry.file} names no program")
    check_tree(entry.returns, entry.file)
