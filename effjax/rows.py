"""Rows of a batch: what a call sees that runs on a part of the rows, and where states have these.

States of a batch have a leading axis of its rows. A patch that calls a model on some rows only (one
branch of guidance, a chunk of the batch) does so within `on_rows(part)`. States are then read and
written in these rows; a state without the batch's rows, such as a counter, is the same for all.
"""

from __future__ import annotations

import abc
import contextlib
import contextvars
from collections.abc import Iterator

import jax


class Rows(abc.ABC):
    """A part of the rows of a batch."""

    @abc.abstractmethod
    def fits(self, rows: int) -> bool:
        """Whether an array with so many rows has those of the batch."""

    @abc.abstractmethod
    def take(self, whole: jax.Array) -> jax.Array:
        """The part of an array with the batch's rows."""

    @abc.abstractmethod
    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        """An array with the batch's rows and another part."""


_ROWS: contextvars.ContextVar[tuple[Rows, ...]] = contextvars.ContextVar("rows", default=())


@contextlib.contextmanager
def on_rows(part: Rows) -> Iterator[None]:
    """Call modules on a part of the rows that are seen around this context."""
    before = _ROWS.set((*_ROWS.get(), part))
    try:
        yield
    finally:
        _ROWS.reset(before)


def taken(whole: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The rows of an array that this call sees; the array itself if it has not the batch's rows.

    Args:
        whole: an array of a state.
        shape: that the call needs.
    """
    return _taken(whole, tuple(shape), _ROWS.get())


def replaced(whole: jax.Array, part: jax.Array) -> jax.Array:
    """An array of a state with new rows, those that this call sees."""
    return _replaced(whole, part, _ROWS.get())


def _splits(whole: jax.Array, shape: tuple[int, ...], rows: tuple[Rows, ...]) -> bool:
    return bool(rows and whole.shape != shape and whole.ndim and rows[0].fits(len(whole)))


def _taken(whole: jax.Array, shape: tuple[int, ...], rows: tuple[Rows, ...]) -> jax.Array:
    if not rows:
        return whole
    own = rows[0].take(whole) if _splits(whole, shape, rows) else whole
    return _taken(own, shape, rows[1:])


def _replaced(whole: jax.Array, part: jax.Array, rows: tuple[Rows, ...]) -> jax.Array:
    if not rows:
        return part
    if not _splits(whole, part.shape, rows):
        return _replaced(whole, part, rows[1:])
    return rows[0].put(whole, _replaced(rows[0].take(whole), part, rows[1:]))
