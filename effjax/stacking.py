"""Several layers at once: what names with a range of blocks mean, and where arrays were cut from.

A name of a parameter or a state may say a range of blocks in the place of one: `blocks.0:28.attn.k`
are 28 arrays `blocks.0.attn.k` ... `blocks.27.attn.k`, stacked along a new leading axis. While a
forward is traced, its modules hold arrays by layer. `Stacks` remembers which stacked array the
array of a layer was cut from, so that a program that scans over layers takes the whole array and no
copy is made of its parts.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

PyTree = Any

_RANGE = re.compile(r"(?P<before>(?:.*\.)?)(?P<start>\d+):(?P<stop>\d+)(?P<after>(?:\..*)?)")


class Range(NamedTuple):
    """A name with a range of blocks, such as `blocks.0:28.attn.k`."""

    before: str
    start: int
    stop: int
    after: str

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the single layers, in order."""
        return tuple(f"{self.before}{i}{self.after}" for i in range(self.start, self.stop))

    @classmethod
    def of(cls, name: str) -> Range | None:
        """Read a name; None if it has no range."""
        found = _RANGE.fullmatch(name)
        if found is None:
            return None
        start, stop = int(found["start"]), int(found["stop"])
        return cls(found["before"], start, stop, found["after"]) if start < stop else None


class Piece(NamedTuple):
    """An array of a single layer that was cut from a stacked one."""

    stack: str
    index: int
    array: Any  # kept, so that no other array takes its place in memory


class Stacks:
    """The stacked arrays of one trace, and the pieces that modules hold of them.

    A piece always equals its place in the newest array of that name.
    """

    def __init__(self) -> None:
        self.newest: dict[str, Any] = {}
        self._pieces: dict[int, Piece] = {}

    def cut(self, name: str, stacked: Any) -> list[Any]:
        """Cut a stacked array into its layers, and remember that."""
        self.newest[name] = stacked
        return [self._piece(name, index) for index in range(stacked.shape[0])]

    def _piece(self, name: str, index: int) -> Any:
        piece = jax.lax.index_in_dim(self.newest[name], index, keepdims=False)
        self._pieces[id(piece)] = Piece(name, index, piece)
        return piece

    def find(self, array: Any) -> Piece | None:
        """Where an array was cut from; None if from nowhere."""
        return self._pieces.get(id(array))

    def run(self, arrays: Sequence[Any]) -> Piece | None:
        """The first piece, if these are consecutive layers of one stacked array."""
        found = [self.find(array) for array in arrays]
        first = found[0]
        if first is None:
            return None
        expected = itertools.count(first.index)
        same = all(
            piece is not None and (piece.stack, piece.index) == (first.stack, next(expected))
            for piece in found
        )
        return first if same else None

    def collect(self, name: str, layers: Mapping[int, Any]) -> Any:
        """The stacked array with these layers, by their place in it."""
        stacked = self.newest[name]
        for index, value in layers.items():
            piece = self.find(value)
            if piece is None or (piece.stack, piece.index) != (name, index):
                stacked = stacked.at[index].set(value)
        return stacked

    def groups(self, values: Mapping[Any, Any]) -> dict[str, dict[int, Any]]:
        """Stacked arrays of which several layers are among these values: place -> key."""
        found: dict[str, dict[int, Any]] = {}
        for key, value in values.items():
            if (piece := self.find(value)) is not None:
                found.setdefault(piece.stack, {})[piece.index] = key
        return {name: layers for name, layers in found.items() if len(layers) > 1}

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Within a branch: what is new there stays there."""
        before = dict(self.newest)
        try:
            yield
        finally:
            self.newest = before

    def replace(self, name: str, stacked: Any, layers: Iterable[int]) -> dict[int, Any]:
        """Take a new array for a name.

        Returns:
            Pieces of the new one for the layers that differ in it, by layer.
        """
        self.newest[name] = stacked
        return {index: self._piece(name, index) for index in layers}


_STACKS: contextvars.ContextVar[Stacks | None] = contextvars.ContextVar("stacks", default=None)


def current_stacks() -> Stacks:
    """The stacked arrays of the forward that is traced; none outside of one."""
    return _STACKS.get() or Stacks()


@contextlib.contextmanager
def stacks_of_call() -> Iterator[Stacks]:
    """Remember stacked arrays within this context."""
    before = _STACKS.set(Stacks())
    try:
        found = _STACKS.get()
        assert found is not None
        yield found
    finally:
        _STACKS.reset(before)


def by_layer(flat: Mapping[str, Any], *, of: str = "state") -> dict[str, Any]:
    """Parameters or states by layer: stacked arrays are cut.

    Args:
        flat: arrays, shapes or quantized leaves by name.
        of: what they are; a parameter and a state may have the same name.

    Raises:
        ValueError: if two names stand for the same layer, or an array has not as many layers as its
            name says.
    """
    stacks, found = current_stacks(), {}
    for name, leaf in flat.items():
        layers = Range.of(name)
        pieces = {name: leaf} if layers is None else _cut(stacks, name, layers, leaf, of)
        if twice := sorted(set(pieces) & set(found)):
            raise ValueError(f"given twice, by itself and in a stack of layers: {', '.join(twice)}")
        found |= pieces
    return found


def _cut(stacks: Stacks, name: str, layers: Range, leaf: Any, of: str) -> dict[str, Any]:
    parts, tree = jax.tree.flatten(leaf)
    count = layers.stop - layers.start
    if any(part.shape[:1] != (count,) for part in parts):
        raise ValueError(
            f"{name} stands for {count} layers, which must be its first axis; it is "
            f"{list(leaf.shape)}"
        )
    cut = []
    for number, part in enumerate(parts):
        if isinstance(part, jax.ShapeDtypeStruct):
            cut.append([jax.ShapeDtypeStruct(part.shape[1:], part.dtype)] * count)
        else:
            cut.append(stacks.cut(f"{of}/{name}/{number}", jnp.asarray(part)))
    return {
        layer: jax.tree.unflatten(tree, [part[i] for part in cut])
        for i, layer in enumerate(layers.names)
    }


def stacked_as(names: Iterable[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `by_layer` for states: values by these names, ranges among them."""
    stacks, found = current_stacks(), {}
    for name in names:
        layers = Range.of(name)
        if layers is None:
            found[name] = values[name]
            continue
        parts = {index: values[each] for index, each in enumerate(layers.names)}
        found[name] = stacks.collect(f"state/{name}/0", parts)
    return found


def updated(values: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Values with new ones in the place of those of the same layers, whatever their names' form."""

    def layers_of(name: str) -> tuple[str, ...]:
        layers = Range.of(name)
        return (name,) if layers is None else layers.names

    replaced = {layer for name in new for layer in layers_of(name)}
    kept: dict[str, Any] = {}
    for name, value in values.items():
        if replaced.isdisjoint(layers_of(name)):
            kept[name] = value
        else:
            parts = by_layer({name: value})
            kept |= {layer: part for layer, part in parts.items() if layer not in replaced}
    return {**kept, **new}
