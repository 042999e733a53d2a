"""Executables: programs that were compiled ahead of time, kept in files, and run without a trace.

    with executables.record() as calls:  # nothing is computed
        pipe([0], key=key)
    executables.save("dit-fast", calls)  # dit-fast/executables/cpu-...
    pipe = effjax.pipeline("dit-fast", executables=True)  # in another process

A file is what XLA serializes: machine code, which runs with the rights of the process that loads
it. So nothing is loaded unless it is asked for. What stands around it is JSON, and no pickle.

An executable is used for calls that it was made for: of the same program with equal static values
(model, recipe, sampler), and arguments of the same shapes and dtypes on one device. The versions,
the settings and the device must be those that it was compiled with.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import hashlib
import importlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from effjax import compat
from effjax.descriptions import (
    differences,
    flat,
    here,
    kind,
    settings,
    stable,
    static_parts,
    target,
)
from effjax.fields import Checked, naming, read
from effjax.storage import new_directory, read_json, write_json

FOLDER, INDEX = "executables", "executables.json"
PyTree = Any
Result = TypeVar("Result")

_recorded: contextvars.ContextVar[Calls | None] = contextvars.ContextVar("recorded", default=None)
_used: contextvars.ContextVar[Executables | None] = contextvars.ContextVar("used", default=None)


class ExecutablesWarning(UserWarning):
    """A call that no saved executable fits was compiled."""


class Program(Generic[Result]):
    """A jitted function whose calls can be recorded, and run by saved executables.

    Args:
        function: as for `jax.jit`.
        name: in files; that of the function if None.
        static_argnums, donate_argnums, donate_argnames: as for `jax.jit`.
    """

    def __init__(
        self,
        function: Callable[..., Result],
        *,
        name: str | None = None,
        static_argnums: tuple[int, ...] = (),
        donate_argnums: tuple[int, ...] = (),
        donate_argnames: tuple[str, ...] = (),
    ):
        self.function, self.name = function, name or function.__qualname__
        self.parameters = tuple(inspect.signature(function).parameters)
        self.static = {self.parameters[number] for number in static_argnums}
        donated = [self.parameters[number] for number in donate_argnums]
        self.donated = {*donated, *donate_argnames}
        self.jitted = jax.jit(
            function,
            static_argnums=static_argnums,
            donate_argnums=donate_argnums or None,
            donate_argnames=donate_argnames or None,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        recorded, used = _recorded.get(), _used.get()
        if recorded is None and used is None:
            return self.jitted(*args, **kwargs)
        call = Call(self, args, kwargs)
        if any(isinstance(leaf, Tracer) for leaf in call.leaves):
            return self.jitted(*args, **kwargs)
        if recorded is not None:
            return recorded.add(call)
        executable = used.find(call) if used is not None else None
        return self.jitted(*args, **kwargs) if executable is None else executable(call)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.jitted, name)


class Call:
    """A program with its arguments."""

    def __init__(self, program: Program, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.program = program
        # In the order of the executable's arguments.
        values = dict(zip(program.parameters, args)) | dict(sorted(kwargs.items()))
        self.static = {name: values.pop(name) for name in list(values) if name in program.static}
        self.given = values
        self.leaves, self.tree = jax.tree.flatten(tuple(values.values()))

    @property
    def key(self) -> tuple:
        """What decides about the executable, hashable and made quickly."""
        kinds = tuple(
            (leaf.shape, leaf.dtype, getattr(leaf, "weak_type", False), leaf.sharding)
            if isinstance(leaf, jax.Array)
            else jax.typeof(leaf)
            for leaf in self.leaves
        )
        around = tuple(settings().items())
        return self.program.name, tuple(self.static.items()), self.tree, kinds, around

    def describe(self) -> dict[str, str]:
        """The same in words, by place; equal for equal calls of different processes."""
        words = {"program": self.program.name} | settings()
        for name, value in self.static.items():
            words |= flat(name, stable(value))
        for number, value in enumerate(static_parts(self.tree)):
            words |= flat(f"part {number}", value)
        for name, value in self.given.items():
            for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]:
                inner = jax.tree_util.keystr(path, simple=True, separator=".")
                words[f"argument {name}.{inner}".rstrip(".")] = kind(leaf)
        return words

    def on(self, place: jax.sharding.Sharding) -> Traced:
        """The program traced for arguments of these shapes on a device."""
        kinds = map(jax.typeof, self.leaves)
        shapes = [
            jax.ShapeDtypeStruct(kind.shape, kind.dtype, weak_type=kind.weak_type, sharding=place)
            for kind in kinds
        ]
        names = [name for name in self.given for _ in jax.tree.leaves(self.given[name])]
        found = []

        def flat(*leaves: jax.Array) -> list[jax.Array]:
            values = self.static | dict(zip(self.given, self.tree.unflatten(leaves), strict=True))
            results = self.program.function(**values)
            found[:] = [_shape_of(results, self.given), jax.tree.structure(results)]
            return jax.tree.leaves(results)

        donated = [number for number, name in enumerate(names) if name in self.program.donated]
        # An executable takes all arguments, also those that it does not need.
        traced = jax.jit(flat, donate_argnums=donated, keep_unused=True).trace(*shapes)
        return Traced(traced, *found)


class Traced(NamedTuple):
    """A call that was traced for one device.

    Attributes:
        program: of arrays, to lower.
        returns: how its results make a tree, as JSON.
        structure: the same for this process.
    """

    program: Any
    returns: Any
    structure: Any


class Calls(list[Call]):
    """Different calls of programs, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.returned: dict[tuple, tuple[Any, list]] = {}  # structure and shapes of results

    def add(self, call: Call) -> PyTree:
        """Keep a call; return arrays of ones of the shapes that its results would have.

        They end loops: of a text, all rows are done.
        """
        if call.key not in self.returned:
            self.append(call)
            traced = call.on(here())
            self.returned[call.key] = traced.structure, traced.program.out_info
        structure, shapes = self.returned[call.key]
        return structure.unflatten([_ones(shape) for shape in shapes])


@contextlib.contextmanager
def record() -> Iterator[Calls]:
    """Within this context, programs are not run but recorded: `save` compiles them.

    Their results are arrays of ones, made here, so a pipeline that is called goes through all of
    its programs and what it returns means nothing.
    """
    calls = Calls()
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


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
        directory: of a saved model or pipeline.
        calls: what `record` gave.
        place: a device, such as `effjax.chips.chip("v5e")`; the first one of this machine if None.

    Returns:
        The folder.

    Raises:
        ValueError: without calls, for static values that cannot be described, and if a folder for
            these calls and this device is there already.
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
    """What `load` found, for the calls within `using`."""

    def __init__(self, device: Any, entries: Mapping[Path, Entry]):
        self.device = device
        self.entries = {_frozen(entry.call): (path, entry) for path, entry in entries.items()}
        self.found: dict[tuple, Executable | None] = {}

    def __repr__(self) -> str:
        names = sorted({entry.call["program"] for _, entry in self.entries.values()})
        return f"Executables({len(self.entries)} for {self.device}: {', '.join(names)})"

    @contextlib.contextmanager
    def using(self) -> Iterator[None]:
        """Within this context, programs are run by these executables where they fit.

        Warns:
            ExecutablesWarning: if none fits; the program is compiled as it would be without.
        """
        token = _used.set(self)
        try:
            yield
        finally:
            _used.reset(token)

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
        impls = {leaf.dtype: jax.random.key_impl(leaf) for leaf in call.leaves if _is_key(leaf)}
        buffers = [_as_buffer(leaf, self.device) for leaf in call.leaves]
        results = iter(compat.execute(self.loaded, buffers))

        def built(node: Any) -> PyTree:
            if node is None:
                return None
            kind, of = node["kind"], node["of"]
            if kind == "array":
                return next(results)
            if kind == "key":
                (impl,) = set(impls.values())
                return jax.random.wrap_key_data(next(results), impl=impl)
            if kind == "given":
                structure = jax.tree.structure(call.given[of])
                return structure.unflatten([built(leaf) for leaf in node["leaves"]])
            if kind == "dict":
                return {name: built(value) for name, value in of.items()}
            parts = [built(value) for value in of]
            if "fields" in node:
                return _own_type(kind)(**dict(zip(node["fields"], parts, strict=True)))
            return parts if kind == "list" else _own_type(kind)(*parts)

        return built(self.returns)


def load(directory: str | os.PathLike) -> Executables:
    """Load the executables beside a saved model or pipeline that this process can run.

    They are machine code: load them only from where you would install a package from.

    Args:
        directory: with a folder `executables`, as `save` wrote it.

    Raises:
        ValueError: if there are none, or if all of them were made for something else, which is
            named; and for damaged files.
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


# --- arguments and results ------------------------------------------------------------------------


def _frozen(words: Mapping[str, str]) -> str:
    return json.dumps(dict(words), sort_keys=True)


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(jax.typeof(leaf).dtype, jax.dtypes.prng_key)


def _as_buffer(leaf: Any, device: Any) -> jax.Array:
    if _is_key(leaf):
        return jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array):
        return leaf
    return jax.device_put(np.asarray(leaf, jax.typeof(leaf).dtype), device)


def _ones(shape: Any) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0)  # of the default kind, as are all keys here
        return jnp.broadcast_to(key, shape.shape)
    return jnp.asarray(np.ones(shape.shape, shape.dtype))


def _shape_of(results: PyTree, given: Mapping[str, Any]) -> Any:
    """How results make a tree, as JSON; trees that an argument has too are said by its name."""

    def shape(value: PyTree) -> Any:
        if value is None:
            return None
        if isinstance(value, jax.Array):
            return {"kind": "key" if _is_key(value) else "array", "of": None}
        if isinstance(value, dict):
            return {"kind": "dict", "of": {name: shape(value[name]) for name in sorted(value)}}
        if isinstance(value, tuple | list):
            kind = "list" if isinstance(value, list) else _name(type(value))
            return {"kind": kind, "of": [shape(part) for part in value]}
        leaves, structure = jax.tree.flatten(value)
        for name, argument in given.items():
            if jax.tree.structure(argument) == structure:
                return {"kind": "given", "of": name, "leaves": [shape(leaf) for leaf in leaves]}
        if dataclasses.is_dataclass(value):
            names = [field.name for field in dataclasses.fields(value)]
            of = [shape(getattr(value, name)) for name in names]
            return {"kind": _name(type(value)), "of": of, "fields": names}
        raise ValueError(
            f"a program that returns a {type(value).__name__} cannot be saved, unless an argument "
            f"has the same structure"
        )

    return shape(results)


def _name(kind: type) -> str:
    return "tuple" if kind is tuple else f"{kind.__module__}:{kind.__qualname__}"


def _own_type(name: str) -> Callable[..., Any]:
    """A named tuple or dataclass of this library.

    Raises:
        ValueError: for any other name.
    """
    if name == "tuple":
        return lambda *parts: parts
    module, _, qualified = name.partition(":")
    if module.split(".")[0] == "effjax":
        with contextlib.suppress(ImportError):
            found: Any = getattr(importlib.import_module(module), qualified, None)
            named = inspect.isclass(found) and issubclass(found, tuple)
            if (named and hasattr(found, "_fields")) or dataclasses.is_dataclass(found):
                return found
    raise ValueError(f"results cannot be a {name!r:.80}, which is no value of this library")


def _check(entry: Entry, folder: Path) -> None:
    """Raise ValueError for an entry that `save` would not have written."""
    if Path(entry.file).name != entry.file or not (folder / entry.file).is_file():
        raise ValueError(f"there is no executable {entry.file!r:.80} in its folder")
    if "program" not in entry.call:
        raise ValueError(f"{entry.file} names no program")

    def check(node: Any) -> None:
        if node is None:
            return
        if not isinstance(node, Mapping) or not isinstance(kind := node.get("kind"), str):
            raise ValueError(f"{entry.file} returns no tree, but {node!r:.80}")
        if kind in ("array", "key"):
            return
        of = node.get("leaves" if kind == "given" else "of")
        if kind not in ("dict", "list", "given"):
            _own_type(kind)
        parts = list(of.values()) if isinstance(of, Mapping) and kind == "dict" else of
        if not isinstance(parts, list):
            raise ValueError(f"{entry.file} returns no tree, but {node!r:.80}")
        for part in parts:
            check(part)

    check(entry.returns)
