"""What models are, and what their submodules may know and remember while a forward runs.

`Context` is what the caller knows (step, guidance, layout, learned parameters); `State` is what a
wrapper remembers from one network call to the next; `switch` and `when` are the only branches
allowed around a module, because they carry its state in and out of the branch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

PyTree = Any
Step = int | np.integer | jax.Array


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static token layout of a model's sequence, from `model.layout(*inputs)`.

    Attributes:
        grid: image or video tokens as (frames, rows, columns), raster order, frame-major.
        text: number of text tokens in the same sequence, 0 when there are none.
        text_first: True if the text tokens precede the image tokens.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False

    @property
    def image_tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How the conditional and unconditional halves of a guided batch are arranged.

    Attributes:
        cond_first: True for [cond, uncond] (DiT), False for [uncond, cond] (PixArt, SD).
        paired: True interleaves the halves (c0, u0, c1, u1, ...), so that a batch sharded over
            devices keeps both halves of a sample on one device.
    """

    cond_first: bool = True
    paired: bool = False

    def join(self, cond: PyTree, uncond: PyTree) -> PyTree:
        """Join two trees of arrays [B, ...] to one tree of arrays [2B, ...]."""

        def one(c: jax.Array, u: jax.Array) -> jax.Array:
            pair = (c, u) if self.cond_first else (u, c)
            axis = 1 if self.paired else 0
            return jnp.stack(pair, axis=axis).reshape(2 * c.shape[0], *c.shape[1:])

        return jax.tree.map(one, cond, uncond)

    def split(self, joined: PyTree) -> tuple[PyTree, PyTree]:
        """Split a tree of arrays [2B, ...] into its (cond, uncond) trees of arrays [B, ...].

        Raises:
            ValueError: if a batch is odd.
        """

        def half(x: jax.Array, index: int) -> jax.Array:
            if x.shape[0] % 2:
                raise ValueError(
                    f"a guided batch holds a conditional and an unconditional half, so its size "
                    f"must be even; got {x.shape[0]} (shape {x.shape}). Call the model through a "
                    f"sampler with guidance, or join both halves with Guidance.join."
                )
            batch = x.shape[0] // 2
            if self.paired:
                return x.reshape(batch, 2, *x.shape[1:])[:, index]
            return x[index * batch : (index + 1) * batch]

        first, second = (0, 1) if self.cond_first else (1, 0)
        return (
            jax.tree.map(lambda x: half(x, first), joined),
            jax.tree.map(lambda x: half(x, second), joined),
        )

    def cond(self, joined: PyTree) -> PyTree:
        """Return the conditional half [B, ...] of a joined tree [2B, ...]."""
        return self.split(joined)[0]

    def duplicate(self, half: PyTree) -> PyTree:
        """Use one half [B, ...] for both: a tree of arrays [2B, ...]."""
        return self.join(half, half)


@dataclasses.dataclass(frozen=True)
class CacheLength:
    """How long a text may become: what caches are sized by, static.

    Attributes:
        prompt: tokens (columns, with padding) that are read before generation starts.
        new: tokens that may follow.
        most: tokens that no text exceeds, though both may be rounded up; None if that is their sum.
    """

    prompt: int
    new: int
    most: int | None = None

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.new < 0:
            raise ValueError(
                f"room is for a prompt of 1 or more tokens and 0 or more new, got {self}"
            )

    @property
    def total(self) -> int:
        total = self.prompt + self.new
        return total if self.most is None else min(total, self.most)


@dataclasses.dataclass(frozen=True)
class Context:
    """What a patch may use while it builds its wrappers.

    Attributes:
        step: index of the network call; a Python int is static (it chooses while tracing), a traced
            array is a branch.
        guidance: arrangement of the guided batch, None when the batch is not guided.
        layout: token layout of the model's sequence, None if the model has none.
        learned: `params["methods"]`: what methods learned, by method name and target module.
        span: the first network call that this trace serves and the one after the last; None if that
            is not known.
        room: how long texts may become, None if nobody said.
    """

    step: Step = 0
    guidance: Guidance | None = None
    layout: Layout | None = None
    learned: Mapping[str, Mapping[str, PyTree]] = dataclasses.field(default_factory=dict)
    span: tuple[int, int] | None = None
    cache_length: CacheLength | None = None

    def segment(self, boundaries: tuple[int, ...]) -> int:
        """Which segment of the network calls this trace serves, static.

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
        config: the configuration.
    """

    Config: ClassVar[type]
    counts: ClassVar[Mapping[str, str]] = {"num_layers": "blocks"}
    config: Any

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        raise NotImplementedError(f"{type(self).__name__} must build its modules")

    def layout(self, *inputs: Any) -> Layout | None:
        """Static token layout for inputs of these shapes; None for a model without tokens."""
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
        super().__init__(None, fill=fill, creating=False, path="")

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
        self._check_like(shape, dtype)
        return self.get_value()

    def write(self, value: jax.Array) -> None:
        """Replace the value by one of the same shape and dtype."""
        if self.empty:
            self._check_creating()
        else:
            self._check_like(value.shape, value.dtype)
        self.set_value(value)

    def _check_creating(self) -> None:
        if not self.get_metadata("creating"):
            raise ValueError(
                f"state {self.get_metadata('path')!r} is missing. Make the initial state with "
                f"forward.init(params, *inputs) and pass on the state that each call returns."
            )

    def _check_like(self, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> None:
        value = self.get_value()
        if value.shape != tuple(shape) or value.dtype != jnp.dtype(dtype):
            raise ValueError(
                f"state {self.get_metadata('path')!r} holds {value.dtype}{list(value.shape)}, but "
                f"this call needs {jnp.dtype(dtype)}{list(shape)}. A state belongs to one batch "
                f"shape: make a new one with forward.init(params, *inputs)."
            )


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

    def on_copy(function: Callable[..., PyTree]) -> Callable[..., tuple[PyTree, dict]]:
        def branch(*operands: PyTree) -> tuple[PyTree, dict]:
            copy = nnx.merge(graphdef, variables, copy=True)
            out = function(copy, *operands)
            return out, {path: state.get_value() for path, state in states(copy).items()}

        return branch

    index = jnp.asarray(index)
    position = jnp.sum(jnp.stack([index > key for key in keys[:-1]]), dtype=jnp.int32)
    out, values = jax.lax.switch(position, [on_copy(branches[key]) for key in keys], *operands)
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
