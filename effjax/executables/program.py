"""Programs: jitted functions whose calls are recorded, or run by saved executables."""

from __future__ import annotations

import contextlib
import contextvars
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from effjax.descriptions import flat, here, kind, settings, stable, static_parts
from effjax.executables.trees import shape_of

PyTree = Any
Result = TypeVar("Result")


class Finder(Protocol):
    """What knows executables for calls, such as `Executables`."""

    def find(self, call: Call) -> Callable[[Call], Any] | None:
        """What runs a call; None if nothing fits."""
        ...


recorded: contextvars.ContextVar[Calls | None] = contextvars.ContextVar("recorded", default=None)
used: contextvars.ContextVar[Finder | None] = contextvars.ContextVar("used", default=None)


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
        calls, finder = recorded.get(), used.get()
        if calls is None and finder is None:
            return self.jitted(*args, **kwargs)
        call = Call(self, args, kwargs)
        if any(isinstance(leaf, Tracer) for leaf in call.leaves):
            return self.jitted(*args, **kwargs)
        if calls is not None:
            return calls.add(call)
        executable = finder.find(call) if finder is not None else None
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
            found[:] = [shape_of(results, self.given), jax.tree.structure(results)]
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
    """Record programs within this context, in place of running them. `save` compiles them later.

    The results of recorded programs are arrays of ones. A pipeline that is called within the
    context therefore goes through all of its programs, and what it returns has no meaning.

    Yields:
        The list of the recorded calls, which grows as they are made.
    """
    calls = Calls()
    token = recorded.set(calls)
    try:
        yield calls
    finally:
        recorded.reset(token)


def _ones(shape: Any) -> jax.Array:
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        key = jax.random.key(0)  # of the default kind, as are all keys here
        return jnp.broadcast_to(key, shape.shape)
    return jnp.asarray(np.ones(shape.shape, shape.dtype))
