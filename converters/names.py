"""Name tables: which tensor of a checkpoint is which parameter, as data that is read both ways.

A rule says that source tensor `a.{i}.weight` is parameter `b.{i}.kernel` in another layout; `{i}`
is an integer. Three kinds of correspondence come from the same form:

    one to one     Rule("proj.weight", "final.proj.kernel", "linear")
    part of one    Rule("attn.qkv.weight", "attn.to_q.kernel", "linear 0/3")  first third of rows
                   Rule("out.weight", "down.kernel", "linear columns 1:5/5")  last four fifths
    one of copies  Rule("blocks.{i}.time.weight", "time.kernel", "linear")    `{i}` in source only
    one of a stack Rule("experts.{e}.up.weight", "up.kernel", "linear each e")  of its first axis

Copies must be equal when they are read, and each is written. Their `{i}` takes every value that
`{i}` has in the parameters' names, so indices that count different things need different names.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from effjax.storage import Shape


class Layout(NamedTuple):
    """How a source tensor becomes a parameter and back: views, but for those that are swapped."""

    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]
    shape: Callable[[Shape], Shape]  # of the source tensor, from the parameter's


def _swap(x: np.ndarray) -> np.ndarray:
    """The second half of the rows first: scales and shifts stand in either order."""
    half = x.shape[0] // 2
    return np.concatenate([x[half:], x[:half]])


LAYOUTS: Mapping[str, Layout] = MappingProxyType(
    {
        "same": Layout(lambda x: x, lambda x: x, lambda shape: shape),
        # [out, in] <-> [in, out]
        "linear": Layout(np.transpose, np.transpose, lambda shape: shape[::-1]),
        "swapped": Layout(_swap, _swap, lambda shape: shape),
        "swapped-linear": Layout(
            lambda x: _swap(x).T, lambda x: _swap(x.T), lambda shape: shape[::-1]
        ),
        # [stack, out, in] <-> [stack, in, out]
        "linears": Layout(
            lambda x: x.transpose(0, 2, 1),
            lambda x: x.transpose(0, 2, 1),
            lambda shape: (shape[0], shape[2], shape[1]),
        ),
        # [1, ...] <-> [...]
        "first": Layout(lambda x: x[0], lambda x: x[None], lambda shape: (1, *shape)),
        # [out, in, height, width] <-> [height, width, in, out]
        "conv": Layout(
            lambda x: x.transpose(2, 3, 1, 0),
            lambda x: x.transpose(3, 2, 0, 1),
            lambda shape: (shape[3], shape[2], shape[0], shape[1]),
        ),
        # [out, in, 1, 1] of a convolution of single pixels <-> [in, out]
        "pointwise": Layout(
            lambda x: x[:, :, 0, 0].T,
            lambda x: x.T[:, :, None, None],
            lambda shape: (*shape[::-1], 1, 1),
        ),
    }
)


class Rule(NamedTuple):
    """Source tensor, parameter, and layout.

    The layout is a name in `LAYOUTS` or in those of the table; then, for a part of the tensor,
    " k/n" for part k of n along its rows, " a:b/n" for the parts a ... b - 1, and "columns" before
    that for its second axis. " each e" is for a parameter whose first axis `{e}` counts: a tensor
    for each.
    """

    source: str
    target: str
    layout: str = "same"


def affine(source: str, target: str, layout: str = "linear", part: str = "") -> tuple[Rule, Rule]:
    """The two rules of a layer: `weight` is `kernel` in this layout, `bias` is `bias`."""
    bias = "swapped" if layout.startswith("swapped") else "same"
    return (
        Rule(f"{source}.weight", f"{target}.kernel", f"{layout} {part}".strip()),
        Rule(f"{source}.bias", f"{target}.bias", f"{bias} {part}".strip()),
    )


class Buffer(NamedTuple):
    """A tensor that checkpoints may hold and that the model computes from its configuration.

    Its shape is a function of its own, so that nothing is computed for one of another shape.
    """

    source: str
    value: Callable[[Any], np.ndarray]
    shape: Callable[[Any], Shape]
    written: bool = True


class Piece(NamedTuple):
    """A parameter as a source tensor, or as the parts start ... stop - 1 of it along an axis.

    With a place it is that matrix of a parameter which is a stack of them.
    """

    source: str
    target: str
    layout: Layout
    start: int = 0
    stop: int = 1
    parts: int = 1
    axis: int = 0
    place: int | None = None

    def read(self, tensor: np.ndarray) -> np.ndarray:
        """The parameter, as a view of the source tensor."""
        if self.parts > 1:
            size = tensor.shape[self.axis] // self.parts
            own = slice(self.start * size, self.stop * size)
            tensor = tensor[own] if self.axis == 0 else tensor[:, own]
        return self.layout.forward(tensor)

    def source_shape(self, shape: Shape) -> Shape:
        """Shape of the whole source tensor, from the parameter's."""
        sizes = list(self.layout.shape(shape if self.place is None else shape[1:]))
        sizes[self.axis : self.axis + 1] = [
            size * self.parts // (self.stop - self.start)
            for size in sizes[self.axis : self.axis + 1]
        ]
        return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class Binding:
    """A table written out for one model.

    Attributes:
        sources: the parts of each source tensor, in order.
        targets: the source tensors that hold each parameter: equal copies, or all of a stack.
        aliases: the source tensor of which each of these names, if there is one, is a copy.
    """

    sources: Mapping[str, tuple[Piece, ...]]
    targets: Mapping[str, tuple[Piece, ...]]
    aliases: Mapping[str, str]

    def source_shapes(self, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Shapes of the source tensors, from the parameters'."""
        return {
            source: pieces[0].source_shape(shapes[pieces[0].target])
            for source, pieces in self.sources.items()
        }

    def assemble(self, source: str, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """A source tensor from the parameters that `read` gives by path."""
        pieces = self.sources[source]
        parts = []
        for piece in pieces:
            value = read(piece.target)
            parts.append(piece.layout.inverse(value if piece.place is None else value[piece.place]))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=pieces[0].axis)


@dataclasses.dataclass(frozen=True)
class Table:
    """The names in one layout of checkpoints.

    Attributes:
        rules: see `Rule`; the first rule that fits a parameter's path holds.
        buffers: tensors that are computed, not loaded.
        aliases: other names of tensors, under which files hold them a second time or alone; never
            written, and no aliases in a model that has both as parameters.
        ignored: tensors that some files hold and that nothing needs; `{i}` as in rules.
        infer: configuration from the tensors' shapes by name, for files without a config.json.
        stem: name of the weight files that are written, without suffix.
        layouts: further ones that the rules name.
    """

    rules: tuple[Rule, ...]
    buffers: tuple[Buffer, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    infer: Callable[[Mapping[str, Shape]], Any] | None = None
    stem: str = "diffusion_pytorch_model"
    layouts: Mapping[str, Layout] = dataclasses.field(default_factory=dict)

    def ignores(self, name: str) -> bool:
        """Whether nothing needs the tensor of this name."""
        return any(_pattern(each).fullmatch(name) for each in self.ignored)

    def recognized(self, names: Iterable[str]) -> int:
        """How many of these tensor names the table knows."""
        sources = [entry.source for entry in (*self.rules, *self.buffers)]
        known = [_pattern(source) for source in (*sources, *self.aliases, *self.ignored)]
        return sum(any(pattern.fullmatch(name) for pattern in known) for name in names)

    def paths(self, names: Iterable[str]) -> Iterator[str]:
        """Paths of the parameters that tensors of these names hold, whatever the model's size."""
        rules = [(_pattern(rule.source), rule.target) for rule in self.rules]
        for name in names:
            for pattern, target in rules:
                if match := pattern.fullmatch(name):
                    yield _INDEX.sub(lambda index, found=match: found[index[1]], target)

    def bind(self, targets: Mapping[str, Any], held: Container[str] = ()) -> Binding:
        """Write out the rules for the parameters of one model.

        Args:
            targets: parameters by path: arrays, or shapes.
            held: names of the tensors in a file; an alias that stands alone there is the source.

        Raises:
            ValueError: for parameters that no rule gives, or tensors of which a part is missing.
        """
        patterns = [(rule, _pattern(rule.target)) for rule in self.rules]
        layouts = {**LAYOUTS, **self.layouts}
        matched: dict[str, tuple[Rule, dict[str, str]]] = {}
        values: dict[str, dict[str, None]] = {}  # that each index takes; a dict keeps their order
        for target in targets:
            for rule, pattern in patterns:
                if match := pattern.fullmatch(target):
                    matched[target] = (rule, match.groupdict())
                    for index, value in match.groupdict().items():
                        values.setdefault(index, {})[value] = None
                    break
        by_target: dict[str, tuple[Piece, ...]] = {}
        by_source: dict[str, list[Piece]] = {}
        for target, (rule, indices) in matched.items():
            shape = getattr(targets[target], "shape", targets[target])
            by_target[target] = _pieces(rule, layouts, target, indices, values, shape)
            for piece in by_target[target]:
                by_source.setdefault(piece.source, []).append(piece)
        problems = [f"{target}: no rule" for target in targets if not by_target.get(target)]
        for source, pieces in by_source.items():
            pieces.sort(key=lambda piece: piece.start)
            ends = [0, *(piece.stop for piece in pieces)]
            if [*(piece.start for piece in pieces), pieces[0].parts] != ends:
                problems.append(f"{source}: parts {pieces}")
        if problems:
            raise ValueError("the name table does not cover the model:\n  " + "\n  ".join(problems))
        others = {alias: name for alias, name in self.aliases.items() if alias not in by_source}
        alone = {
            name: alias
            for alias, name in others.items()
            if alias in held and name in by_source and name not in held
        }

        def as_held(pieces: Iterable[Piece]) -> tuple[Piece, ...]:
            return tuple(
                piece._replace(source=alone.get(piece.source, piece.source)) for piece in pieces
            )

        return Binding(
            {alone.get(name, name): as_held(pieces) for name, pieces in by_source.items()},
            {target: as_held(pieces) for target, pieces in by_target.items()},
            {alias: alone.get(name, name) for alias, name in others.items()},
        )


def _pieces(
    rule: Rule,
    layouts: Mapping[str, Layout],
    target: str,
    indices: Mapping[str, str],
    values: Mapping[str, Iterable[str]],
    shape: Shape,
) -> tuple[Piece, ...]:
    """The source tensors of one parameter."""
    name, _, part = rule.layout.partition(" ")
    if name not in layouts:
        raise ValueError(f"{rule} has an unknown layout; there are {sorted(layouts)}")
    layout = layouts[name]
    if part.startswith("each "):
        counted = f"{{{part.removeprefix('each ')}}}"
        source = _INDEX.sub(
            lambda index: index[0] if index[0] == counted else indices[index[1]], rule.source
        )
        names = (source.replace(counted, str(place)) for place in range(shape[0]))
        return tuple(Piece(each, target, layout, place=i) for i, each in enumerate(names))
    axis = int(part.startswith("columns "))
    start, stop, parts = _part(part.removeprefix("columns ")) if part else (0, 1, 1)
    sources = [rule.source]
    for index in dict.fromkeys(_INDEX.findall(rule.source)):
        choices = [indices[index]] if index in indices else list(values.get(index, ()))
        sources = [held.replace(f"{{{index}}}", value) for held in sources for value in choices]
    return tuple(Piece(source, target, layout, start, stop, parts, axis) for source in sources)


def _part(said: str) -> tuple[int, int, int]:
    """k/n or a:b/n."""
    which, _, parts = said.partition("/")
    start, _, stop = which.partition(":")
    return int(start), int(stop or int(start) + 1), int(parts)


_INDEX = re.compile(r"\{(\w+)\}")


def _pattern(name: str) -> re.Pattern[str]:
    """`a.{i}.b` as an expression in which the integer is a group named i."""
    literal = re.escape(name).replace(r"\{", "{").replace(r"\}", "}")
    for index in dict.fromkeys(_INDEX.findall(literal)):
        literal = literal.replace(f"{{{index}}}", rf"(?P<{index}>\d+)", 1)
        literal = literal.replace(f"{{{index}}}", f"(?P={index})")
    return re.compile(literal)
