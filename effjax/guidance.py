"""The branches of a guided batch: how they stand in it, and which of them a call sees."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effjax.rows import Rows, on_rows

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Guidance:
    """The branches of a guided batch and how they stand in it.

    Classifier-free guidance has a conditional and an unconditional branch. Perturbed-attention and
    skip-layer guidance add a branch that a patch changes. A second text adds a branch with its
    condition.

    Attributes:
        branches: their names, in the order of the batch: ("cond", "uncond") for DiT,
            ("uncond", "cond") for PixArt and Stable Diffusion.
        paired: True interleaves the branches (c0, u0, c1, u1, ...), so that a batch sharded over
            devices keeps all branches of a sample on one device.
    """

    branches: tuple[str, ...] = ("cond", "uncond")
    paired: bool = False

    def __post_init__(self) -> None:
        if len(set(self.branches)) != len(self.branches) or "cond" not in self.branches:
            raise ValueError(
                f"branches of guidance have different names, one of which is 'cond'; got "
                f"{self.branches}"
            )

    def join(self, parts: Mapping[str, PyTree]) -> PyTree:
        """Join trees of arrays [B, ...] by branch to one tree of arrays [N B, ...]."""

        def one(*parts: jax.Array) -> jax.Array:
            axis = 1 if self.paired else 0
            joined = jnp.stack(parts, axis=axis)
            return joined.reshape(len(parts) * parts[0].shape[0], *parts[0].shape[1:])

        return jax.tree.map(one, *(parts[name] for name in self.branches))

    def split(self, joined: PyTree) -> dict[str, PyTree]:
        """Split a tree of arrays [N B, ...] into trees of arrays [B, ...] by branch.

        Raises:
            ValueError: if the batch does not divide into the branches.
        """
        return {name: self.branch(name, joined) for name in self.branches}

    def branch(self, name: str, joined: PyTree) -> PyTree:
        """One branch [B, ...] of a joined tree [N B, ...].

        Raises:
            ValueError: for a branch that there is not, or a batch that does not divide.
        """
        count = len(self.branches)
        if name not in self.branches:
            raise ValueError(f"there is no branch {name!r}; there are {self.branches}")
        index = self.branches.index(name)

        def own(x: jax.Array) -> jax.Array:
            if x.shape[0] % count:
                raise ValueError(
                    f"a guided batch holds the branches {', '.join(self.branches)}, so its size "
                    f"must be a multiple of {count}; got {x.shape[0]} (shape {x.shape}). Call the "
                    f"model through a sampler with guidance, or join the branches with "
                    f"Guidance.join."
                )
            batch = x.shape[0] // count
            if self.paired:
                return x.reshape(batch, count, *x.shape[1:])[:, index]
            return x[index * batch : (index + 1) * batch]

        return jax.tree.map(own, joined)

    def duplicate(self, part: PyTree) -> PyTree:
        """Use one part [B, ...] for all branches: a tree of arrays [N B, ...]."""
        return self.join(dict.fromkeys(self.branches, part))


_GUIDANCE: contextvars.ContextVar[Guidance | None] = contextvars.ContextVar(
    "guidance", default=None
)


@contextlib.contextmanager
def guided_by(guidance: Guidance | None) -> Iterator[None]:
    """Say how the rows of a batch are arranged to all modules that are called in this context."""
    before = _GUIDANCE.set(guidance)
    try:
        yield
    finally:
        _GUIDANCE.reset(before)


def current_guidance() -> Guidance | None:
    """The arrangement of the rows that the calling module sees; None if they are not guided.

    A patch may run some branches only (`on_branch`), so that a wrapper asks for them when it is
    called, not when it is built.
    """
    return _GUIDANCE.get()


@dataclasses.dataclass(frozen=True)
class ConditionalRows(Rows):
    """The rows of the branch "cond".

    Attributes:
        guidance: how the branches stand in the batch.
        batch: rows of all branches together.
    """

    guidance: Guidance
    batch: int

    def fits(self, rows: int) -> bool:
        return rows == self.batch

    def take(self, whole: jax.Array) -> jax.Array:
        return self.guidance.branch("cond", whole)

    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        return self.guidance.join({**self.guidance.split(whole), "cond": part})


@dataclasses.dataclass(frozen=True, eq=False)
class SampleRows(Rows):
    """The rows of some samples, in all branches of guidance.

    What remembers one branch alone has as many rows as there are samples.

    Attributes:
        guidance: how the branches stand in the batch, None if there are none.
        samples: in the whole batch.
        start: the first one of the part, which may be traced.
        count: in the part.
    """

    guidance: Guidance | None
    samples: int
    start: jax.Array
    count: int

    @property
    def branches(self) -> int:
        return 1 if self.guidance is None else len(self.guidance.branches)

    def fits(self, rows: int) -> bool:
        return rows in (self.samples, self.branches * self.samples)

    def take(self, whole: jax.Array) -> jax.Array:
        parted, axis = self._by_sample(whole)
        part = jax.lax.dynamic_slice_in_dim(parted, self.start, self.count, axis)
        return part.reshape(-1, *whole.shape[1:])

    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        parted, axis = self._by_sample(whole)
        shape = list(parted.shape)
        shape[axis] = self.count
        new = jax.lax.dynamic_update_slice_in_dim(parted, part.reshape(shape), self.start, axis)
        return new.reshape(whole.shape)

    def _by_sample(self, whole: jax.Array) -> tuple[jax.Array, int]:
        """An array with an axis of samples alone, and which one that is."""
        branches = whole.shape[0] // self.samples
        if self.guidance is not None and self.guidance.paired:
            return whole.reshape(self.samples, branches, *whole.shape[1:]), 0
        return whole.reshape(branches, self.samples, *whole.shape[1:]), 1


@contextlib.contextmanager
def on_condition(guidance: Guidance, batch: int) -> Iterator[None]:
    """Call modules on the rows of the branch "cond" alone: states are read and written in these.

    Args:
        guidance: how the branches stand in the batch around.
        batch: rows of all branches together.
    """
    with on_rows(ConditionalRows(guidance, batch)), guided_by(Guidance(("cond",))):
        yield
