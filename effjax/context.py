"""What models are, and what their submodules may know and remember while a forward runs.

`Context` is what the caller knows (step, guidance, layout, learned parameters); `State` is what a
wrapper remembers from one network call to the next; `switch` and `when` are the only branches
allowed around a module, because they carry its state in and out of the branch.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effjax.guidance import Guidance
from effjax.rows import replaced, taken
from effjax.stacking import current_stacks
from effjax.targets import original

PyTree = Any
Step = int | np.integer | jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """A static description of the tokens of a sequence.

    A model describes the tokens of its inputs. A method that changes tokens describes the new ones.

    Attributes:
        grid: image or video tokens as (frames, rows, columns), frame by frame and row by row; None
            once they are no such raster any more.
        text: number of text tokens in the same sequence, 0 when there are none.
        text_first: True if the text tokens precede the image tokens.
        loose: image tokens where there is no raster.
        changed_by: what took the raster away.
    """

    grid: tuple[int, int, int] | None
    text: int = 0
    text_first: bool = False
    loose: int = 0
    changed_by: str = ""

    @property
    def image_tokens(self) -> int:
        return self.loose if self.grid is None else math.prod(self.grid)

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text

    def without_raster(self, image_tokens: int, changed_by: str) -> Layout:
        """The layout after a method merged, pruned or permuted image tokens.

        Args:
            image_tokens: how many there are now.
            changed_by: the method's name, for messages.
        """
        return dataclasses.replace(self, grid=None, loose=image_tokens, changed_by=changed_by)

    def raster(self, needed_by: str) -> tuple[int, int, int]:
        """The grid of the image tokens.

        Args:
            needed_by: what works on a raster, for the message.

        Raises:
            ValueError: if the tokens are no raster any more.
        """
        if self.grid is None:
            raise ValueError(
                f"{needed_by} needs image tokens as a raster, but {self.changed_by} has left "
                f"{self.loose} tokens in no such order. Use one of the two, or give them different "
                f"layers."
            )
        return self.grid


_LAYOUT: contextvars.ContextVar[Layout | None] = contextvars.ContextVar("layout", default=None)


@contextlib.contextmanager
def tokens_as(layout: Layout | None) -> Iterator[None]:
    """Describe the tokens to all modules that are called within this context.

    The forward does this for the model's inputs, while it is traced. A wrapper that changes tokens
    must call its inner module within this context.
    """
    before = _LAYOUT.set(layout)
    try:
        yield
    finally:
        _LAYOUT.reset(before)


def current_layout() -> Layout | None:
    """The layout of the tokens that the calling module receives; None if none was set."""
    return _LAYOUT.get()


@dataclasses.dataclass(frozen=True)
class CacheLength:
    """How long a sequence may become: what caches are sized by, static.

    Attributes:
        prompt: tokens (columns, with padding) that are read before generation starts.
        new: tokens that may follow.
        most: tokens that no sequence exceeds, though both may be rounded up; None for their sum.
    """

    prompt: int
    new: int
    most: int | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.new < 0:
            raise ValueError(
                f"a cache length is for a prompt of 1 or more tokens and 0 or more new, got {self}"
            )

    @property
    def total(self) -> int:
        total = self.prompt + self.new
        return total if self.most is None else min(total, self.most)


@dataclasses.dataclass(frozen=True)
class Context:
    """Everything that a patch may use while it builds its wrappers.

    Attributes:
        step: index of the network call; a Python int is static (it chooses while tracing), a traced
            array is a branch.
        guidance: arrangement of the guided batch, None when the batch is not guided.
        layout: token layout of the model's sequence, None if the model has none.
        learned: `params["methods"]`: what methods learned, by method name and target module.
        span: the first network call that this trace serves and the one after the last; None if that
            is not known.
        cache_length: how long sequences may become, None if nobody said.
    """

    step: Step = 0
    guidance: Guidance | None = None
    layout: Layout | None = None
    learned: Mapping[str, Mapping[str, PyTree]] = dataclasses.field(default_factory=dict)
    span: tuple[int, int] | None = None
    cache_length: CacheLength | None = None

    def segment(self, boundaries: tuple[int, ...]) -> int:
        """The segment of the network calls that this trace serves, static.

        Args:
            boundaries: first call of every segment but the first, in order.

        Raises:
            ValueError: if it may serve several.
        """
        span = (int(self.step), int(self.step) + 1) if is_static(self.step) else self.span
        if span is None or any(span[0] < boundary < span[1] for boundary in boundaries):
            raise ValueError(
                f"parameters change at the network calls {boundaries}, but this trace may serve "
                f"calls on both sides. Samplers scan each segment by itself; in a loop of your own "
                f"use forward.within(start, stop), or forward.at(step)."
            )
        return sum(span[0] >= boundary for boundary in boundaries)


class Model(nnx.Module):
    """Base class of models: built by `Model(config, rngs=...)`, with parameters and no state.

    Attributes:
        Config: type of the configuration, a frozen dataclass of scalars and tuples with `dtype` and
            `param_dtype`.
        counts: fields of the configuration that say how many parts a model has, with the path
            of their list: a file without these parts must not make a model of that size.
        systems: the published systems that it is, as `docs/systems.toml` names them.
        config: the configuration.
    """

    Config: ClassVar[type]
    counts: ClassVar[Mapping[str, str]] = {"num_layers": "blocks"}
    systems: ClassVar[tuple[str, ...]] = ()
    config: Any

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        raise NotImplementedError(f"{type(self).__name__} must build its modules")

    def layout(self, *inputs: Any) -> Layout | None:
        """Static token layout for inputs of these shapes; None for a model without tokens."""
        return None

    def example_inputs(self) -> tuple[PyTree, ...] | None:
        """Shapes of inputs for two samples, of the usual size or of a few tokens; None if unsaid.

        What describes a model without data is traced for them.
        """
        return None

    def valid_tokens(self, *inputs: Any) -> jax.Array | None:
        """Say which tokens of the blocks' inputs count, bool[B, S]; None if all do.

        Calibrations leave padding out of arrays [..., B, S, C] with these B and S. Other arrays in
        the model have no padding.
        """
        return None


def check_counts(said: Mapping[str, Any], counts: Mapping[str, str], paths: Iterable[str]) -> None:
    """Compare the numbers of parts that a configuration asks for with the parameters in a file.

    Args:
        said: the configuration, unchecked.
        counts: as `Model.counts`, by the names in `said`; lists are counted.
        paths: of the parameters in the file.

    Raises:
        ValueError: if a field asks for more parts than the file has.
    """
    split = [path.split(".") for path in paths]
    for field, listed in counts.items():
        asked, stem = said.get(field), listed.split(".")
        asked = len(asked) if isinstance(asked, list | tuple) else asked
        depth = len(stem)
        found = {path[depth] for path in split if path[:depth] == stem and len(path) > depth}
        if isinstance(asked, int) and asked > len(found):
            raise ValueError(
                f"{field} asks for {asked} parts of the model ({listed}), and the file holds "
                f"tensors of {len(found)}"
            )


class State(nnx.Variable):
    """A value that a wrapper remembers between two network calls.

    It is empty until the forward loads it. Only while `Forward.init` shapes the initial state may
    `read` and `write` create it; `fill` is its initial value.
    """

    def __init__(self, *, fill: float = 0.0):
        super().__init__(None, fill=fill, creating=False, path="", run=None)

    @property
    def empty(self) -> bool:
        return self.get_value() is None

    def read(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the value, which must have this shape and dtype.

        Raises:
            ValueError: if the state was not initialized, or has another shape or dtype.
        """
        if self.empty:
            self._check_creating()
            self.set_value(jnp.full(shape, self.get_metadata("fill"), dtype))
        value = taken(self.get_value(), shape)
        self._check_like(value, shape, dtype)
        return value

    def write(self, value: jax.Array) -> None:
        """Replace the value by one of the same shape and dtype."""
        if self.empty:
            self._check_creating()
        else:
            whole = self.get_value()
            self._check_like(taken(whole, value.shape), value.shape, value.dtype)
            value = replaced(whole, value)
        self.set_value(value)

    def _check_creating(self) -> None:
        if not self.get_metadata("creating"):
            raise ValueError(
                f"state {self.get_metadata('path')!r} is missing. Make the initial state with "
                f"forward.init(params, *inputs) and pass on the state that each call returns."
            )

    def _check_like(
        self, value: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike
    ) -> None:
        if value.shape != tuple(shape) or value.dtype != jnp.dtype(dtype):
            raise ValueError(
                f"state {self.get_metadata('path')!r} holds {value.dtype}{list(value.shape)}, but "
                f"this call needs {jnp.dtype(dtype)}{list(shape)}. A state belongs to one batch "
                f"shape: make a new one with forward.init(params, *inputs)."
            )


class StateTree(nnx.Module):
    """Values that a wrapper remembers of tokens: one array, or one for each named stream.

    Args:
        streams: names of the streams; () for a single array.
    """

    def __init__(self, streams: tuple[str, ...] = ()):
        self.streams = streams
        for name in streams or ("tokens",):
            setattr(self, name, State())

    @classmethod
    def of(cls, module: nnx.Module) -> StateTree:
        """For the tokens that come out of a target module, wrapped or not."""
        inside = original(module)
        return cls(getattr(inside, "outputs", getattr(inside, "streams", ())))

    def read(self, like: PyTree) -> PyTree:
        """What was written last, with the shapes and dtypes of these tokens; zeros before that."""
        if not self.streams:
            return self._state("tokens").read(like.shape, like.dtype)
        return {n: self._state(n).read(like[n].shape, like[n].dtype) for n in self.streams}

    def write(self, tokens: PyTree) -> None:
        """Remember tokens of the same shapes and dtypes."""
        if not self.streams:
            self._state("tokens").write(tokens)
        for name in self.streams:
            self._state(name).write(tokens[name])

    def _state(self, name: str) -> State:
        return getattr(self, name)


def states(module: nnx.Module) -> dict[tuple, State]:
    """All `State` variables below a module, by their path in it."""
    found = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, State)}
    return dict(sorted(found.items(), key=lambda item: tuple(map(str, item[0]))))


def is_static(index: object) -> bool:
    """True if an index or predicate is known while tracing."""
    return isinstance(index, (bool, int, np.bool_, np.integer))


def switch(
    index: Step,
    branches: Mapping[int, Callable[..., PyTree]],
    module: nnx.Module,
    *operands: PyTree,
) -> PyTree:
    """Run `branches[index](module, *operands)`, for a static or a traced index.

    A traced index becomes `lax.switch`; each branch works on its own copy of the module, and the
    states that it writes are written back to `module` afterwards. All branches must return the same
    shapes and dtypes. Pass only the indices that can occur: fewer branches, less to compile.

    Args:
        index: int or int32[]; a traced index that is no key of `branches` takes a neighboring one.
        branches: index -> function of (module, *operands).
        module: the module that the branches call; it may hold state.
        operands: trees of arrays.

    Raises:
        ValueError: if a static index is not a key of `branches`.
    """
    keys = sorted(int(key) for key in branches)
    if is_static(index):
        if int(index) not in keys:
            raise ValueError(f"no branch for index {int(index)}; there are branches for {keys}")
        return branches[int(index)](module, *operands)
    held = states(module)
    if any(state.get_metadata("creating") for state in held.values()):
        # Shaping the initial state: every branch must be seen, and nothing is computed.
        return [branches[key](module, *operands) for key in keys][-1]
    if len(keys) == 1:
        return branches[keys[0]](module, *operands)

    graphdef, variables = nnx.split(module)
    stacks = current_stacks()
    whole = stacks.groups({path: state.get_value() for path, state in held.items()})

    def on_copy(function: Callable[..., PyTree]) -> Callable[..., tuple[PyTree, dict, dict]]:
        def branch(*operands: PyTree) -> tuple[PyTree, dict, dict]:
            with stacks.inside():
                copy = nnx.merge(graphdef, variables, copy=True)
                out = function(copy, *operands)
                values = {path: state.get_value() for path, state in states(copy).items()}
                together = {
                    name: stacks.collect(name, {i: values.pop(path) for i, path in layers.items()})
                    for name, layers in whole.items()
                }
            return out, values, together

        return branch

    index = jnp.asarray(index)
    position = jnp.sum(jnp.stack([index > key for key in keys[:-1]]), dtype=jnp.int32)
    functions = [on_copy(branches[key]) for key in keys]
    out, values, together = jax.lax.switch(position, functions, *operands)
    for name, layers in whole.items():
        pieces = stacks.replace(name, together[name], layers)
        values |= {path: pieces[index] for index, path in layers.items()}
    for path, state in held.items():
        state.set_value(values[path])
    return out


def when(
    predicate: bool | np.bool_ | jax.Array,
    yes: Callable[..., PyTree],
    no: Callable[..., PyTree],
    module: nnx.Module,
    *operands: PyTree,
) -> PyTree:
    """Run `yes(module, *operands)` if the predicate holds, else `no(module, *operands)`."""
    index = int(predicate) if is_static(predicate) else jnp.asarray(predicate).astype(jnp.int32)
    return switch(index, {0: no, 1: yes}, module, *operands)
