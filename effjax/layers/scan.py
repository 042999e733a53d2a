"""Runs of equal blocks, traced once and scanned over their layers.

`effjax.scanning` says when and how to use it. Here is how it works: blocks are compared, cut into
runs, and each run becomes a `lax.scan` whose turns get the arrays of their layer.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.context import PyTree, State, states
from effjax.stacking import Stacks, current_stacks
from effjax.targets import Wrapper


class Scan(NamedTuple):
    """How a stack scans its blocks.

    Attributes:
        path: of the stack in its model.
        whole: whether it is an error if all its blocks are not one run, in a call that no patch
            keeps out of runs.
    """

    path: str
    whole: bool = False


class Run(NamedTuple):
    """Consecutive blocks that share one program.

    Attributes:
        stack: path of their `Stack`.
        start, stop: number of the first block, and of the one after the last.
        differs: in what the block before the first differs from it; "" for the first run.
    """

    stack: str
    start: int
    stop: int
    differs: str = ""


class _Block:
    """A block with what is asked of it more than once.

    Attributes:
        module: the block.
        wrappers, states: those in it, by their path.
        values: its arrays and quantized leaves by path, those of states too.
        signature: what blocks of one run have in common.
        alone: whether a wrapper says that this call is not scanned.
    """

    def __init__(self, module: nnx.Module):
        self.module = module
        found = list(nnx.iter_graph(module))
        self.wrappers = {path: node for path, node in found if isinstance(node, Wrapper)}
        self.states = {path: node for path, node in found if isinstance(node, State)}
        for state in self.states.values():
            state.set_metadata(path="")
            state.set_metadata(run=None)
        united = [
            (wrapper, name, getattr(wrapper, name))
            for wrapper in self.wrappers.values()
            for name in wrapper.united
        ]
        for wrapper, name, _ in united:
            setattr(wrapper, name, ())
        graphdef, variables = nnx.split(module)
        for wrapper, name, value in united:
            setattr(wrapper, name, value)
        self.values = {
            tuple(path): leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
            for path, leaf in nnx.to_flat_state(variables)
        }
        kinds = {
            path: (jax.tree.structure(value), tuple(map(kind, jax.tree.leaves(value))))
            for path, value in self.values.items()
        }
        self.signature = graphdef, kinds
        self.alone = not all(wrapper.scans for wrapper in self.wrappers.values())

    def name_states(self, scan: Scan, run: Run) -> None:
        """Say of every state which layers it is of, and whether those are kept together."""
        for path, state in self.states.items():
            name = ".".join(str(part) for part in path if part != "inner")
            state.set_metadata(path=f"{scan.path}.{run.start}:{run.stop}.{name}")
            together = run.stop - run.start > 1 and not self._apart(path)
            state.set_metadata(run=(scan.path, run.start, run.stop) if together else None)

    def _apart(self, path: tuple) -> bool:
        """Whether a state keeps a name for each layer, as its wrapper says."""
        above = [at for at in self.wrappers if at == path[: len(at)] and path[len(at)] != "inner"]
        return any(self.wrappers[at].apart for at in above)


def kind(array: Any) -> tuple:
    """What two arrays must have in common to be layers of one run."""
    return array.shape, array.dtype, getattr(array, "weak_type", False)


def runs_of(stack: str, blocks: Sequence[nnx.Module], first: int = 0) -> list[Run]:
    """Cut blocks into runs of equal ones; `first` is the number of the first one."""
    return _runs(stack, list(map(_Block, blocks)), first)


def _runs(stack: str, blocks: Sequence[_Block], first: int) -> list[Run]:
    starts = [
        i
        for i, block in enumerate(blocks)
        if i == 0 or block.alone or block.signature != blocks[i - 1].signature
    ]
    runs = []
    for start, stop in itertools.pairwise([*starts, len(blocks)]):
        number, differs = start + first, ""
        if blocks[start].alone:
            differs = f"block {number} is called by itself, as a patch of it says"
        elif start:
            modules = blocks[start - 1].module, blocks[start].module
            what = next(_differences(*modules), "their structure")
            differs = f"block {number} differs from block {number - 1} in {what}"
        runs.append(Run(stack, number, stop + first, differs))
    return runs


def run_blocks(
    scan: Scan, modules: Sequence[nnx.Module], first: int, x: PyTree, conditioning: tuple
) -> PyTree:
    """Call blocks in order, runs of equal ones in a scan.

    Args:
        scan: whose blocks they are.
        modules: consecutive blocks of the stack.
        first: number of the first one in the stack.
        x, conditioning: what the first one is called with.

    Raises:
        ValueError: if they must be one run and are not, with the difference.
    """
    blocks = list(map(_Block, modules))
    runs = _runs(scan.path, blocks, first)
    if scan.whole and len(runs) > 1 and not any(block.alone for block in blocks):
        raise ValueError(
            f"{scan.path} cannot be scanned as one: {runs[1].differs}. Leave out the name to scan "
            f"the runs of equal blocks, of which there are {len(runs)}."
        )
    for run in runs:
        x = _run(scan, run, blocks[run.start - first : run.stop - first], x, conditioning)
    return x


def _run(scan: Scan, run: Run, blocks: Sequence[_Block], x: PyTree, conditioning: tuple) -> PyTree:
    _unite(blocks)
    creating = any(state.get_metadata("creating") for state in blocks[0].states.values())
    while len(blocks) > 1:
        for block in blocks:
            block.name_states(scan, run)
        try:
            return (_shape if creating else _scan)(blocks, x, conditioning)
        except _Reshaped as change:
            if scan.whole:
                raise ValueError(f"{scan.path} cannot be scanned: {change}") from None
        # What the first one gives may be what all others take and give.
        x = _alone(scan, run, blocks[0], x, conditioning)
        run, blocks = run._replace(start=run.start + 1), blocks[1:]
    return _alone(scan, run, blocks[0], x, conditioning)


def _alone(scan: Scan, run: Run, block: _Block, x: PyTree, conditioning: tuple) -> PyTree:
    """Call the first block of a run by itself."""
    block.name_states(scan, run._replace(stop=run.start + 1))
    return block.module(x, *conditioning)


def _unite(blocks: Sequence[_Block]) -> None:
    """Give every wrapper of a run what the same wrapper of some layer needs."""
    for path, wrapper in blocks[0].wrappers.items():
        for name in wrapper.united:
            same = [block.wrappers[path] for block in blocks]
            union = tuple(sorted({value for each in same for value in getattr(each, name)}))
            for each in same:
                setattr(each, name, union)


def _shape(blocks: Sequence[_Block], x: PyTree, conditioning: tuple[PyTree, ...]) -> PyTree:
    """Give equal blocks the states that the first one makes; nothing is computed."""
    y = blocks[0].module(x, *conditioning)
    _check_kept(x, y)
    for block in blocks[1:]:
        for path, state in block.states.items():
            if not blocks[0].states[path].empty:
                state.write(blocks[0].states[path].get_value())
    return y


class _Reshaped(Exception):
    """A block gives tokens of another kind than it takes."""


def _scan(blocks: Sequence[_Block], x: PyTree, conditioning: tuple[PyTree, ...]) -> PyTree:
    """Run equal blocks as one that is scanned, and leave their new states in them."""
    stacks, count = current_stacks(), len(blocks)
    graphdef, _ = nnx.split(blocks[0].module)
    held = [block.states for block in blocks]
    carried = {
        path: piece
        for path, state in held[0].items()
        if not state.empty and (piece := stacks.run([own[path].get_value() for own in held]))
    }
    loose = [path for path, state in held[0].items() if not state.empty and path not in carried]
    given = [
        {path: value for path, value in block.values.items() if path not in carried}
        for block in blocks
    ]
    columns = _Columns(stacks, given)

    def one(carry: tuple[PyTree, dict], layer: tuple[jax.Array, dict]) -> tuple[Any, dict]:
        x, whole = carry
        index, cut = layer
        values = columns.layer(index, cut)
        for path, piece in carried.items():
            values[path] = jax.lax.dynamic_index_in_dim(
                whole[path], index + piece.index, keepdims=False
            )
        block = nnx.merge(graphdef, nnx.from_flat_state(values), copy=True)
        before = {path: state.get_value() for path, state in states(block).items()}
        y = block(x, *conditioning)
        _check_kept(x, y)
        after = {path: state.get_value() for path, state in states(block).items()}
        for path, piece in carried.items():
            if after[path] is not before[path]:
                place = index + piece.index
                new = jax.lax.dynamic_update_index_in_dim(whole[path], after[path], place, 0)
                whole = whole | {path: new}
        return (y, whole), {path: after[path] for path in loose}

    whole = {path: stacks.newest[piece.stack] for path, piece in carried.items()}
    layers = jnp.arange(count), columns.sliced
    (y, whole), apart = jax.lax.scan(one, (x, whole), layers)
    for path, piece in carried.items():
        places = range(piece.index, piece.index + count)
        pieces = stacks.replace(piece.stack, whole[path], places)
        for own, place in zip(held, places):
            own[path].set_value(pieces[place])
    for path in loose:
        for index, own in enumerate(held):
            own[path].set_value(apart[path][index])
    return y


class _Columns:
    """The arrays of equal blocks, and how a turn of the scan gets those of its layer.

    An array that all layers share is used as it is. Layers of a stacked array are indexed in it.
    All others are picked by a branch for each layer, which moves those of one layer.

    Args:
        stacks: the stacked arrays of the trace.
        layers: arrays and quantized leaves of each block, by path.

    Attributes:
        sliced: stacked arrays that have exactly these layers, which the scan itself indexes.
    """

    def __init__(self, stacks: Stacks, layers: Sequence[dict[tuple, Any]]):
        self.trees = {path: jax.tree.structure(value) for path, value in layers[0].items()}
        flat = [jax.tree.leaves(list(values.values())) for values in layers]
        self.shared: dict[int, Any] = {}
        self.within: dict[int, tuple[Any, int]] = {}
        self.sliced: dict[int, Any] = {}
        picked: list[int] = []
        for number, column in enumerate(zip(*flat, strict=True)):
            piece = stacks.run(column)
            if all(value is column[0] for value in column):
                self.shared[number] = column[0]
            elif piece is None:
                picked.append(number)
            elif stacks.newest[piece.stack].shape[0] == len(layers):
                self.sliced[number] = stacks.newest[piece.stack]
            else:
                self.within[number] = stacks.newest[piece.stack], piece.index
        self.picked = picked
        self.by_layer = [[values[number] for number in picked] for values in flat]
        self.size = len(flat[0])

    def layer(self, index: jax.Array, cut: dict[int, Any]) -> dict[tuple, Any]:
        """The values of a layer by path."""
        leaves = dict(self.shared) | cut
        for number, (stacked, offset) in self.within.items():
            leaves[number] = jax.lax.dynamic_index_in_dim(stacked, index + offset, keepdims=False)
        if self.picked:
            branches = [functools.partial(list, own) for own in self.by_layer]
            leaves |= dict(zip(self.picked, jax.lax.switch(index, branches)))
        flat = iter(leaves[number] for number in range(self.size))
        return {
            path: jax.tree.unflatten(tree, itertools.islice(flat, tree.num_leaves))
            for path, tree in self.trees.items()
        }


def _check_kept(x: PyTree, y: PyTree) -> None:
    """Check that a block gives what the next one takes."""

    def kinds(tree: PyTree) -> Any:
        return jax.tree.map(lambda part: (part.shape, part.dtype.name), tree)

    if kinds(x) != kinds(y):
        raise _Reshaped(f"its blocks take {kinds(x)} and give {kinds(y)}")


def _differences(one: nnx.Module, other: nnx.Module, path: str = "") -> Iterator[str]:
    """In what two blocks differ, in words; settings that a run unites are left out."""
    if type(one) is not type(other):
        yield f"{path or 'their type'}: {type(one).__name__} and {type(other).__name__}"
        return
    united = one.united if isinstance(one, Wrapper) else ()
    mine, theirs = vars(one), vars(other)
    for name in sorted({*mine, *theirs} - {*united, "_pytree__state", "_pytree__nodes"}):
        where = path if name == "inner" else f"{path}.{name}".lstrip(".")
        a, b = mine.get(name), theirs.get(name)
        if isinstance(a, nnx.Module) and isinstance(b, nnx.Module):
            yield from _differences(a, b, where)
        elif isinstance(a, nnx.Variable) and isinstance(b, nnx.Variable):
            yield from _unlike(a.get_value(), b.get_value(), where)
        else:
            yield from _unlike(a, b, where)


def _unlike(a: Any, b: Any, where: str) -> Iterator[str]:
    def said(value: Any) -> Any:
        leaves, tree = jax.tree.flatten(value)
        return [kind(leaf) if hasattr(leaf, "dtype") else leaf for leaf in leaves], tree

    if said(a) != said(b):
        yield f"{where}: {_short(a)} and {_short(b)}"


def _short(value: Any, most: int = 60) -> str:
    if isinstance(value, jax.Array | jax.ShapeDtypeStruct | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."
