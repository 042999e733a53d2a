"""Rules: which keys a query sees, exactly, as a few disjoint intervals."""

from __future__ import annotations

import dataclasses
import operator
from functools import partial, reduce
from itertools import accumulate
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Integers: TypeAlias = Any  # int32, numpy while lists are made, traced inside of kernels
Spans: TypeAlias = tuple[tuple[Integers, Integers], ...]
PerHead: TypeAlias = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Every query sees every key. Other rules override `spans`, and say what differs by head.

    A rule works on numpy and on traced integers alike, so that lists, reference and kernels all
    follow the same lines of code.
    """

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        """Disjoint intervals [start, stop) of keys that the queries see.

        Args:
            row: int32 positions of queries, any shape.
            keys: number of keys T.
            parameters: one row of `parameters`, the head's.
        """
        return ((0 * row, 0 * row + keys),)

    @property
    def parameters(self) -> np.ndarray:
        """What differs by head: int32[H, P]; H = 1 if nothing does."""
        return np.zeros((1, 0), np.int32)

    @property
    def bands(self) -> int:
        """How many intervals of about equal length a query sees: many want small blocks."""
        return 1

    def check(self, batch: int, queries: int, heads: int, keys: int) -> None:
        """Raise ValueError unless the rule fits arrays of these sizes."""
        given = self.parameters.shape[0]
        if given not in (1, heads):
            raise ValueError(
                f"{self} is a rule for {given} heads, the arrays have {heads}. Give one number for "
                f"all heads, or one for each."
            )

    def visible(
        self, row: Integers, column: Integers, keys: int, *parameters: Integers
    ) -> Integers:
        """True where a query at `row` sees the key at `column`; shapes broadcast."""
        pieces = self.spans(row, keys, *parameters)
        return reduce(operator.or_, [(a <= column) & (column < b) for a, b in pieces])


Full = Rule
EVERYTHING = Full()


@dataclasses.dataclass(frozen=True)
class Band(Rule):
    """Query i sees keys i - window ... i + window, clipped at the ends.

    Attributes:
        window: keys to each side, one number or one for each head.
    """

    window: PerHead

    def __post_init__(self) -> None:
        at_least(0, window=self.window)

    @property
    def parameters(self) -> np.ndarray:
        return _table(self.window)

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        (window,) = parameters
        return ((_maximum(row - window, 0), _minimum(row + window + 1, keys)),)


@dataclasses.dataclass(frozen=True)
class Causal(Rule):
    """Query i sees keys 0 ... i + offset.

    Attributes:
        offset: keys before the first query; T - S if the queries are the last of the keys.
    """

    offset: int = 0

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        return ((0 * row, _minimum(row + (self.offset + 1), keys)),)


@dataclasses.dataclass(frozen=True)
class SinkLocal(Rule):
    """Causal: query i sees the first keys ("sinks") and the last ones up to itself (MoA).

    Attributes:
        sinks: first keys that stay visible, one number or one for each head.
        local: last keys, the query's own included, likewise.
        granularity: the local part starts at a multiple of this, counted from the end of the
            query's own block of this size: 1 gives every query the same number, MoA's prefill
            kernel has 64.
    """

    sinks: PerHead
    local: PerHead
    granularity: int = 1

    def __post_init__(self) -> None:
        at_least(0, sinks=self.sinks)
        at_least(1, local=self.local, granularity=self.granularity)

    @property
    def parameters(self) -> np.ndarray:
        return _table(self.sinks, self.local)

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        sinks, local = parameters
        end = (_divide(row, self.granularity) + 1) * self.granularity
        stop = _minimum(row + 1, keys)
        return ((0 * row, _minimum(stop, sinks)), (_maximum(end - local, sinks), stop))


@dataclasses.dataclass(frozen=True)
class Arrow(Rule):
    """A band on image tokens while text tokens see, and are seen by, everything (DiTFastAttnV2).

    With `tile` whole tiles are seen or not, as the fused kernel of DiTFastAttnV2 computes them: a
    tile of queries sees every tile of keys that its band touches and every one that holds text, and
    one that holds text sees everything.

    Attributes:
        window: keys of the image to each side, one number or one for each head; -1 for everything
            and 0 for a head that is not computed at all (all its rows are empty).
        text: number of text tokens in the joint sequence.
        text_first: True if the text precedes the image.
        tile: (queries, keys) of a tile; None for windows that are exact.
    """

    window: PerHead
    text: int
    text_first: bool = False
    tile: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        at_least(-1, window=self.window)
        at_least(0, text=self.text)
        if self.tile is not None:
            at_least(1, tile=self.tile)

    @property
    def parameters(self) -> np.ndarray:
        return _table(self.window)

    def limited(self, keys: int) -> tuple[slice, slice]:
        """The queries that have windows, and the keys that are seen through windows alone."""
        if self.text > keys:
            raise ValueError(f"{self.text} text tokens do not fit in a sequence of {keys}")
        of_queries, of_keys = self.tile or (1, 1)
        if self.text_first:
            starts = (-(-self.text // tile) * tile for tile in (of_queries, of_keys))
            first_query, first_key = (min(start, keys) for start in starts)
            return slice(first_query, keys), slice(first_key, keys)
        image = keys - self.text
        last_query = image // of_queries * of_queries if self.text else image
        return slice(0, last_query), slice(0, image // of_keys * of_keys)

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        (window,) = parameters
        rows, limits = self.limited(keys)
        first, last = limits.start, limits.stop
        everything = (row < rows.start) | (row >= rows.stop) | (window < 0)
        near, far = row - window, row + window + 1
        if self.tile is not None:
            of_queries, of_keys = self.tile
            start = _divide(row, of_queries) * of_queries
            near = _divide(_maximum(start - window, 0), of_keys) * of_keys
            stop = start + of_queries + window
            far = _divide(_maximum(stop, 0) + (of_keys - 1), of_keys) * of_keys
        near, far = (_minimum(_maximum(edge, first), last) for edge in (near, far))
        start, stop = _where(everything, first, near), _where(everything, last, far)
        rest = (0, first) if self.text_first else (last, keys)
        computed = window + 0 * row != 0  # of every query: not all kernels choose by one number
        image = (start, _where(computed, stop, start))
        return image, (0 * row + rest[0], _where(computed, 0 * row + rest[1], rest[0]))


@dataclasses.dataclass(frozen=True)
class Levels(Rule):
    """Block-causal: a query sees its own level and the levels before it (VAR's scales).

    Attributes:
        sizes: tokens of each level.
        first: level of the first query; the levels before it are cached keys.
        whole: False if a query sees itself alone of its own level.
    """

    sizes: tuple[int, ...]
    first: int = 0
    whole: bool = True

    def __post_init__(self) -> None:
        at_least(1, sizes=self.sizes)
        if not 0 <= self.first < len(self.sizes):
            raise ValueError(f"first must be a level 0 ... {len(self.sizes) - 1}, got {self.first}")

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        starts = [0, *accumulate(self.sizes)]
        position = row + starts[self.first]
        stop = 0 * row
        for level, (start, size) in enumerate(zip(starts, self.sizes)):
            added = size if self.whole else self.sizes[level - 1] if level else 0
            stop = stop + _where(position >= start, added, 0)
        before = (0 * row, _minimum(stop, keys))
        if self.whole:
            return (before,)
        return before, (_minimum(position, keys), _minimum(position + 1, keys))


@dataclasses.dataclass(frozen=True)
class Grouped(Rule):
    """Causal, but for groups of tokens that follow the first ones and see each other.

    A query sees all keys up to the end of its group. A last group of which keys are missing is
    causal.

    Attributes:
        before: first tokens, which are in no group.
        sizes: tokens of each group.
    """

    before: int
    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        at_least(0, before=self.before)
        at_least(1, sizes=self.sizes)

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        place = _maximum(row - self.before, 0)
        if len(set(self.sizes)) == 1:
            stop = (_divide(place, self.sizes[0]) + 1) * self.sizes[0]
        else:
            stop = 0 * row
            for start, size in zip((0, *accumulate(self.sizes)), self.sizes):
                stop = stop + _where(place >= start, size, 0)
        stop = stop + self.before
        whole = (row >= self.before) & (stop <= keys)
        return ((0 * row, _minimum(_where(whole, stop, row + 1), keys)),)


@dataclasses.dataclass(frozen=True)
class MultiDiagonal(Rule):
    """The queries of one level see of each level a band around its diagonal (LiteVAR).

    Query x of n sees key y of a level of m keys if and only if |x m / n - y| < w.

    Attributes:
        sizes: tokens of the levels of keys; the queries are those of the last one.
        widths: w of each level, one number or one for each head; 0 for nothing of a level, its
            size or more for all of it.
    """

    sizes: tuple[int, ...]
    widths: tuple[PerHead, ...]

    def __post_init__(self) -> None:
        at_least(1, sizes=self.sizes)
        if len(self.widths) != len(self.sizes):
            raise ValueError(
                f"there is one width for each of {len(self.sizes)} levels, got {len(self.widths)}"
            )
        for level, width in enumerate(self.widths):
            at_least(0, **{f"widths[{level}]": width})

    @property
    def parameters(self) -> np.ndarray:
        return _table(*self.widths)

    def check(self, batch: int, queries: int, heads: int, keys: int) -> None:
        super().check(batch, queries, heads, keys)
        if (queries, keys) != (self.sizes[-1], sum(self.sizes)):
            raise ValueError(
                f"{self} is a rule for {self.sizes[-1]} queries and {sum(self.sizes)} keys, got "
                f"{queries} and {keys}"
            )

    def spans(self, row: Integers, keys: int, *parameters: Integers) -> Spans:
        whole = self._whole
        first, queries = sum(self.sizes[:whole]), self.sizes[-1]
        pieces = [(0 * row, 0 * row + first)] if whole else []
        for size, width in zip(self.sizes[whole:], parameters[whole:]):
            low, high = row * size - width * queries, row * size + width * queries
            start = _where(low < 0, 0, _divide(_maximum(low, 0), queries) + 1)
            stop = _minimum(_divide(high + (queries - 1), queries), size)
            pieces.append((first + start, first + _maximum(stop, start)))
            first += size
        return tuple(pieces)

    @property
    def bands(self) -> int:
        return max(1, len(self.sizes) - self._whole)

    @property
    def _whole(self) -> int:
        """How many levels, from the first one on, all heads see whole: one interval."""
        whole = [np.min(width) >= size for size, width in zip(self.sizes, self.widths)]
        return [*whole, False].index(False)


def visible_pairs(rule: Rule, queries: int, keys: int | None = None) -> int:
    """Number of (query, key) pairs that a rule lets be seen, summed over its heads."""
    keys = queries if keys is None else keys
    rows = np.arange(queries)
    return sum(
        int(np.maximum(0, stop - start).sum())
        for parameters in rule.parameters
        for start, stop in rule.spans(rows, keys, *parameters)
    )


def _table(*fields: PerHead) -> np.ndarray:
    """Columns of per-head parameters: int32[H, fields]."""
    columns = [np.atleast_1d(np.asarray(field, np.int32)) for field in fields]
    try:
        return np.stack(np.broadcast_arrays(*columns), axis=1)
    except ValueError:
        raise ValueError(
            f"per-head parameters must have one value, or one for each head; got lengths "
            f"{[len(column) for column in columns]}"
        ) from None


def at_least(minimum: int, **fields: PerHead) -> None:
    """Raise ValueError for a field, or a head's number in it, that is below a minimum."""
    for name, field in fields.items():
        if not np.size(field) or np.min(field) < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {field}")


# Numpy stays numpy, so that lists can be made while a program is traced.
def _pick(name: str, *operands: Integers) -> Integers:
    traced = any(isinstance(operand, jax.Array) for operand in operands)
    return getattr(jnp if traced else np, name)(*operands)


def _divide(x: Integers, y: int) -> Integers:
    # Not `//` on traced integers: kernels cannot lower its treatment of negative ones.
    return jax.lax.div(x, jnp.full_like(x, y)) if isinstance(x, jax.Array) else x // y


_minimum, _maximum, _where = (partial(_pick, name) for name in ("minimum", "maximum", "where"))
