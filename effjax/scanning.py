"""Small programs of deep models: runs of equal blocks become one block, which is scanned.

    forward, params = effjax.scan_blocks()(forward, params)
    pipe = pipe.transform(effjax.scan_blocks())

A model's program holds every block anew, and a patched block every branch of its patch. What takes
most of a minute to compile is mostly the same block, 28 or 64 times. `scan_blocks` finds runs of
consecutive blocks that are equal but for their numbers, and traces each run once, in a `lax.scan`
over layers. Results are the same.

Blocks are equal if they have the same modules, the same patches with the same settings, and arrays
of the same kinds and shapes. What patches hold as data (actions by step, scales, spans) and weights
may differ. Branches of a scanned block are those that some layer of the run uses. A step that is
static still chooses while tracing: layers that then do different things are different blocks.

Weights are used where they are: each turn of the scan picks those of its layer, which moves them
once. With `stack=True` the parameters are stacked too, and no weight is moved. This is for TPUs and
for gradients, see `stack_params`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from effjax.context import Context, PyTree
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.guidance import Guidance
from effjax.layers.scan import Run, Scan, kind, runs_of
from effjax.layers.stack import Stack
from effjax.stacking import Range, by_layer
from effjax.targets import target_modules
from effjax.transform import Pair


def scan_blocks(*stacks: str, stack: bool = False) -> Callable[[Forward, Params], Pair]:
    """Make a transform after which runs of equal blocks are scanned.

    It belongs to a program and not to a model: recipes do not have it, and what is saved has its
    usual layout. Apply it last.

    Args:
        stacks: paths of the `Stack`s that must be one run each, such as "blocks"; none for all
            runs that there are.
        stack: whether parameters are stacked too, see `stack_params`.

    Returns:
        A function (forward, params) -> (forward, params). Calls of its forward raise ValueError if
        a named stack is not one run; the message says which block differs, and in what. Calls that
        append to a KV cache are never scanned, and no error.
    """

    def transform(forward: Forward, params: Params) -> Pair:
        scanned = unscanned(forward).patch(ScanBlocks(stacks))
        return scanned, stack_params(forward, params) if stack else params

    return transform


def unscanned(forward: Forward) -> Forward:
    """The forward whose blocks are traced one by one."""
    patches = tuple(each for each in forward.patches if not isinstance(each, ScanBlocks))
    return dataclasses.replace(forward, patches=patches)


def find_runs(forward: Forward, params: Params, *inputs: PyTree, **options: Any) -> list[Run]:
    """List the programs that a model's blocks would need if runs of equal ones were scanned.

    Args:
        params, inputs: arrays or shapes.
        options: `step` and `guidance`, as in `Forward.__call__`. A step that is neither given nor
            fixed by `Forward.at` is one that is known when the program runs only.
    """
    found: list[Run] = []

    def trace(params: Params, inputs: tuple[PyTree, ...], step: jax.Array) -> None:
        first = forward if forward.span is not None else forward.segments(0, 1)[0][0]
        fixed = forward.fixed_step
        arguments = {"step": step if fixed is None else fixed, **options}
        module = first.patched(params, inputs, **arguments)
        for target in target_modules(module, Stack):
            assert isinstance(target.module, Stack)
            blocks = list(target.module)
            if target.module.scans:
                found.extend(runs_of(target.path, blocks))
            else:
                why = "the model reads what every block gives"
                found.extend(Run(target.path, i, i + 1, why) for i in range(len(blocks)))

    jax.eval_shape(trace, params, inputs, jax.ShapeDtypeStruct((), jnp.int32))
    return found


def example_runs(forward: Forward, params: Params) -> list[Run]:
    """`find_runs` for inputs of the model's own (`Model.example_inputs`), guided or as a prefill.

    Returns:
        The runs; none for a model without example inputs.
    """
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), params)
    inputs = forward.module(shapes).example_inputs()
    if inputs is None:
        return []
    options: dict[str, Any] = {"guidance": Guidance()}
    if any(getattr(patch, "caches", False) for patch in forward.patches):
        forward, options = forward.with_cache_length(64, 64), {"step": 0}
    return find_runs(forward, shapes, *inputs, **options)


def describe_runs(runs: Sequence[Run]) -> str:
    """How many programs a model's blocks need, and why, in a few lines."""
    lines = []
    for stack, group in itertools.groupby(runs, key=lambda run: run.stack):
        parts = list(group)
        blocks, programs = parts[-1].stop, len(parts)
        lines.append(
            f"{stack}: {blocks} block{'s' * (blocks > 1)}, {programs} program{'s' * (programs > 1)}"
        )
        lines += [f"  from {run.start}: {run.differs}" for run in parts[1:]]
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class ScanBlocks:
    """The patch: stacks of blocks scan their runs.

    Attributes:
        stacks: paths of stacks that must be one run; () for all runs that there are.
    """

    stacks: tuple[str, ...] = ()

    def __call__(self, module: nnx.Module, context: Context) -> None:
        found = {target.path: target.module for target in target_modules(module, Stack)}
        if unknown := sorted(set(self.stacks) - set(found)):
            raise ValueError(f"there are no stacks {unknown} to scan; this model has {[*found]}")
        for path in self.stacks or found:
            stack = found[path]
            assert isinstance(stack, Stack)
            if not stack.scans and self.stacks:
                raise ValueError(
                    f"{path} cannot be scanned: {type(module).__name__} reads what each of its "
                    f"blocks gives. Leave out the name."
                )
            stack.scan = Scan(path, bool(self.stacks))


def stack_params(forward: Forward, params: Params, *, donate: bool = False) -> Params:
    """Stack the weights of equal blocks: one array [layers, ...] in the place of many.

    Names then say a range of blocks, such as `blocks.0:28.attn.to_q.kernel`. A forward takes
    parameters in either form. Scanned blocks use stacked weights without moving them, and the
    gradient of a stacked weight is one array too. Shardings and optimizers see the names with
    ranges. Methods that change weights, and `effjax.save`, take weights by layer: see
    `unstack_params`.

    Args:
        forward: a forward of the model.
        params: arrays or shapes.
        donate: give up the arrays of `params` one kind after the other, so that both forms are
            never held together. What is left of `params` cannot be used.

    Returns:
        Parameters whose equal consecutive blocks are stacked.
    """
    if any(map(Range.of, flatten_params(_weights(params)))):
        params = unstack_params(params)
    flat = flatten_params(_weights(params))
    shapes = nest_params({name: _shapes(leaf) for name, leaf in flat.items()})
    for target in target_modules(forward.module(shapes), Stack):
        assert isinstance(target.module, Stack)
        blocks = [_below(flat, f"{target.path}.{i}.") for i in range(len(target.module))]
        kinds = [{name: _kinds(leaf) for name, leaf in block.items()} for block in blocks]
        starts = [i for i, each in enumerate(kinds) if i == 0 or each != kinds[i - 1]]
        for start, stop in itertools.pairwise([*starts, len(blocks)]):
            for name in blocks[start] if stop - start > 1 else ():
                parts = [flat.pop(f"{target.path}.{i}.{name}") for i in range(start, stop)]
                stacked = jax.tree.map(functools.partial(_stack, donate=donate), *parts)
                flat[f"{target.path}.{start}:{stop}.{name}"] = stacked
    return {**nest_params(flat), **_learned(params)}


def unstack_params(params: Params) -> Params:
    """The inverse of `stack_params`: weights by layer."""
    return {**nest_params(by_layer(flatten_params(_weights(params)))), **_learned(params)}


def _weights(params: Params) -> Params:
    return {name: value for name, value in params.items() if name != METHODS}


def _learned(params: Params) -> Params:
    return {name: value for name, value in params.items() if name == METHODS}


def _below(flat: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): v for name, v in flat.items() if name.startswith(prefix)}


def _shapes(leaf: Any) -> Any:
    return jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), leaf)


def _kinds(leaf: Any) -> tuple:
    return jax.tree.structure(leaf), tuple(map(kind, jax.tree.leaves(leaf)))


def _stack(*arrays: Any, donate: bool) -> Any:
    first = arrays[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(arrays), *first.shape), first.dtype)
    stacked = jnp.stack(arrays)
    place = getattr(first, "sharding", None)
    if isinstance(place, NamedSharding):
        stacked = jax.device_put(
            stacked, NamedSharding(place.mesh, PartitionSpec(None, *place.spec))
        )
    if donate:
        stacked.block_until_ready()
        for array in arrays:
            if isinstance(array, jax.Array):  # what numpy holds is not given up
                array.delete()
    return stacked
