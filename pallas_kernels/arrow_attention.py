"""Attention of image and text whose heads have windows of their own, known when it runs.

Text sees, and is seen by, everything; an image token sees the image tokens that its head's window
reaches (`block_mask.Arrow`; DiTFastAttnV2, arXiv 2503.22796). Widths of windows are data: one
program serves every plan that takes its widths from one short list. A head may also be left out,
and gives what the caller kept of it.

Kernels run block-sparse attention; each head picks its lists of blocks among those of the widths.
XLA has one loop for each width, over as many heads as have it. Windows of a block of queries are
one slice of keys beside the text, so that nothing is gathered; a head that is left out is a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.attention import dense_attention, dense_in_xla
from pallas_kernels.block_mask import Arrow, BlockMask, block_mask, visible_pairs
from pallas_kernels.block_sparse_attention import block_sparse_attention, xla
from pallas_kernels.block_sparse_attention.heads import Heads
from pallas_kernels.block_sparse_attention.operation import (
    KERNELS,
    check,
    choose_block,
    heads_first,
)
from pallas_kernels.implementation import Implementation, dispatch
from pallas_kernels.marks import useful
from pallas_kernels.on_mesh import Cut
from pallas_kernels.tiling import pad_axis

DENSE, KEPT = -1, 0  # widths that are no windows

# Queries of XLA's products: more make longer windows, fewer make small products.
ROWS = 128


def arrow_attention(
    q: Array,
    k: Array,
    v: Array,
    window: Array | Sequence[int] | np.ndarray,
    *,
    widths: Sequence[int] | None = None,
    text: int = 0,
    text_first: bool = False,
    tile: tuple[int, int] | None = None,
    kept: Array | None = None,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> Array:
    """Attend in each head through its own window.

    Args:
        q, k, v: [B, S, H, D], float32, bfloat16 or float16; v may have another width E.
        window: one number for each head: image tokens that its windows reach to each side, -1 for
            everything, 0 for a head that is not computed. Numbers, or int32[H] at run time.
        widths: the windows that can occur, for windows at run time; one that is not among them is
            taken for a neighboring one.
        text: how many tokens of the sequence are text.
        text_first: whether they stand before the image or after it.
        tile: (queries, keys) of tiles that are seen whole or not at all; see `Arrow`.
        kept: [B, S, H, E] in v's dtype, what heads that are not computed give; zeros if None.
        implementation: see `pallas_kernels.implementation`.
        interpret: run a named kernel in interpret mode.

    Returns:
        [B, S, H, E] in v's dtype.

    Raises:
        ValueError: for shapes, dtypes or windows that do not fit.
        NotImplementedError: if the named implementation cannot run these operands.
    """
    check(q, k, v)
    heads, static = q.shape[2], not isinstance(window, jax.Array)
    if k.shape[1:3] != q.shape[1:3]:
        raise ValueError(
            f"queries, keys and values must be of the same tokens and heads; got q {list(q.shape)} "
            f"and k {list(k.shape)}"
        )
    if np.shape(window) != (heads,):
        raise ValueError(
            f"window must be one number for each of {heads} heads, got {list(np.shape(window))}"
        )
    if static:
        widths = [int(each) for each in np.asarray(window)]
    elif not widths:
        raise ValueError("windows at run time need widths=, those that can occur")
    problem = _Problem(
        Arrow(tuple(sorted(set(map(int, widths or ())))), text, text_first, tile),
        tuple(widths or ()) if static else None,
        implementation,
        interpret,
    )
    problem.rule.limited(q.shape[1])
    wanted = (*q.shape[:3], v.shape[3])
    if kept is not None and (kept.shape != wanted or kept.dtype != v.dtype):
        raise ValueError(
            f"what is kept of heads must be {v.dtype}{list(wanted)}, got "
            f"{kept.dtype}{list(kept.shape)}"
        )
    if problem.widths == (DENSE,):
        return dense_attention(q, k, v, implementation=implementation, interpret=interpret)
    if kept is None:
        kept = jnp.zeros(wanted, v.dtype)
    if problem.widths == (KEPT,):
        return kept
    return _differentiable(problem, q, k, v, kept, None if static else window)


class _Problem(NamedTuple):
    """What is known while tracing.

    Attributes:
        rule: with the widths that occur, in order.
        window: of every head; None if that is data.
        implementation, interpret: as in `arrow_attention`.
    """

    rule: Arrow
    window: tuple[int, ...] | None
    implementation: Implementation | None
    interpret: bool

    @property
    def widths(self) -> tuple[int, ...]:
        assert isinstance(self.rule.window, tuple)
        return self.rule.window

    def of(self, window: int | tuple[int, ...]) -> Arrow:
        """The rule with other windows."""
        return self.rule.__class__(window, self.rule.text, self.rule.text_first, self.rule.tile)

    def place(self, window: Array) -> Array:
        """The places of windows among the widths."""
        widths = jnp.asarray(self.widths[:-1], window.dtype)
        return jnp.sum(window[:, None] > widths, axis=1, dtype=jnp.int32)


# Jitted, so that the equal layers of a model trace it once.
@partial(jax.jit, static_argnums=0)
def _forward(
    problem: _Problem, q: Array, k: Array, v: Array, kept: Array, window: Array | None
) -> Array:
    by_head, whole = "h", ""
    if window is None:
        by_head, whole = None, "h"
    else:
        window = jnp.asarray(problem.widths, jnp.int32)[problem.place(window)]

    def refusal(name: str) -> str | None:
        mask, by_row = _lists(problem, KERNELS[name], q, v, window)
        return KERNELS[name].refusal(mask, Heads(*heads_first(q, k, v), by_row=by_row))

    return dispatch(
        "arrow_attention",
        problem.implementation,
        {"reference": partial(_listed, problem, "reference"), "xla": partial(_xla, problem)}
        | {name: partial(_listed, problem, name) for name in KERNELS},
        *(q, k, v, kept, window),
        refusal=refusal,
        cut=Cut(("b.h.",) * 4 + (by_head,), "b.h.", whole),
        interpret=problem.interpret,
    )


def _forward_and_save(problem: _Problem, *operands: Any) -> tuple[Array, Any]:
    return _forward(problem, *operands), operands


def _backward(problem: _Problem, saved: Any, gradient: Array) -> Any:
    *floats, window = saved
    through = partial(_listed, problem, "xla", window=window)
    return *jax.vjp(through, *floats)[1](gradient), None


_differentiable = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_differentiable.defvjp(_forward_and_save, _backward)


def _lists(
    problem: _Problem, program: Any, q: Array, v: Array, window: Array | None
) -> tuple[BlockMask, Array | None]:
    """The lists of every head in a program's blocks, and windows if they are data."""
    batch, tokens, heads, width = q.shape
    seen = tuple(width for width in problem.widths if width > 0) or DENSE
    block = choose_block(problem.of(seen), tokens, tokens, **program.blocks(max(width, v.shape[3])))
    if window is None:
        assert problem.window is not None
        return block_mask(problem.of(problem.window), tokens, block=block), None
    mask, place = block_mask(problem.rule, tokens, block=block), problem.place(window)
    index, count, full = (
        jnp.take(jnp.asarray(each), place, axis=1, mode="clip")
        for each in (mask.index, mask.count, mask.full)
    )
    by_row = jnp.broadcast_to(window[:, None], (batch, heads, 1))
    sizes = mask.queries, mask.keys, mask.block_q, mask.block_k
    return BlockMask(index, count, full, *sizes, problem.of(DENSE), None, by_row=True), by_row


def _listed(
    problem: _Problem,
    name: Implementation,
    q: Array,
    k: Array,
    v: Array,
    kept: Array,
    window: Array | None,
) -> Array:
    """Block-sparse attention by lists of each head."""
    mask, by_row = _lists(problem, KERNELS.get(name, xla), q, v, window)
    options = {"implementation": name, "interpret": problem.interpret and name in KERNELS}
    out = block_sparse_attention(q, k, v, mask, by_row=by_row, **options)
    if KEPT not in problem.widths:
        return out
    computed = jnp.asarray(problem.window) if window is None else window
    return jnp.where((computed == KEPT)[:, None], kept, out)


def _xla(
    problem: _Problem, q: Array, k: Array, v: Array, kept: Array, window: Array | None
) -> Array:
    batch, tokens, heads, _ = q.shape
    if window is None:
        return _by_width(problem, q, k, v, kept)
    lines = [x.swapaxes(1, 2).reshape(batch * heads, tokens, -1) for x in (q, k, v)]
    place = jnp.tile(problem.place(window), batch)
    order = jnp.argsort(place)
    ends = jnp.sum(place[:, None] < jnp.arange(len(problem.widths) + 1), axis=0, dtype=jnp.int32)

    def of_line(i: Array, out: Array, rule: Arrow) -> Array:
        line = order[i]
        own = [jax.lax.dynamic_index_in_dim(x, line, keepdims=False) for x in lines]
        return jax.lax.dynamic_update_index_in_dim(out, _line(rule, *own), line, 0)

    out = jnp.zeros_like(lines[2])
    for number, width in enumerate(problem.widths):
        # Not a branch for each head, which is slower on a CPU.
        if width != KEPT:
            body = partial(of_line, rule=problem.of(width))
            out = jax.lax.fori_loop(ends[number], ends[number + 1], body, out)
    out = out.reshape(batch, heads, tokens, -1).swapaxes(1, 2)
    return jnp.where((window == KEPT)[:, None], kept, out) if KEPT in problem.widths else out


def _by_width(problem: _Problem, q: Array, k: Array, v: Array, kept: Array) -> Array:
    """Heads in groups of equal windows."""
    window = np.asarray(problem.window)
    groups, parts = [np.flatnonzero(window == width) for width in problem.widths], []
    for width, group in zip(problem.widths, groups):
        own = [x[:, :, group] for x in (q, k, v)]
        if width == KEPT:
            parts.append(kept[:, :, group])
        elif width == DENSE:
            parts.append(dense_in_xla(*own))
        else:
            lines = [x.swapaxes(1, 2).reshape(-1, *x.shape[1::2]) for x in own]
            rule = problem.of(width)
            out = jax.lax.map(lambda own, rule=rule: _line(rule, *own), lines)
            shape = (q.shape[0], len(group), *out.shape[1:])
            parts.append(out.reshape(shape).swapaxes(1, 2))
    if len(parts) == 1:
        return parts[0]
    return jnp.concatenate(parts, axis=2)[:, :, np.argsort(np.concatenate(groups))]


def _line(rule: Arrow, q: Array, k: Array, v: Array) -> Array:
    """One head of one sample, [S, E] of operands [S, D]."""
    tokens = len(q)
    rows, _ = rule.limited(tokens)

    def dense(q: Array) -> Array:
        return dense_in_xla(*(x[None, :, None] for x in (q, k, v)))[0, :, 0]

    if rule.window == DENSE or visible_pairs(rule, tokens) == tokens**2:
        return dense(q)
    steps = _Steps.of(rule, tokens)
    seen = visible_pairs(rule, tokens) - (tokens - (rows.stop - rows.start)) * tokens
    parts = [useful(partial(_windowed, rule, steps), seen, steps.pairs)(q, k, v)]
    if rows.start:
        parts.insert(0, dense(q[: rows.start]))
    if rows.stop < tokens:
        parts.append(dense(q[rows.stop :]))
    return jnp.concatenate(parts)


class _Steps(NamedTuple):
    """Blocks of queries with windows, and the keys that each of them is multiplied with.

    Attributes:
        rows: queries in a block.
        first: the first query of every block.
        start: the first key of its slice.
        keys: length of the slices.
        rest: keys that all of them see.
    """

    rows: int
    first: np.ndarray
    start: np.ndarray
    keys: int
    rest: slice

    @classmethod
    def of(cls, rule: Arrow, tokens: int) -> _Steps:
        queries, limits = rule.limited(tokens)
        window = rule.parameters[0, 0]
        rows = ROWS
        while rows > 16 and rows > max(window, rule.tile[0] if rule.tile else 0, 16):
            rows //= 2
        first = np.arange(queries.start, queries.stop, rows, dtype=np.int32)
        ends = [np.minimum(first, queries.stop - 1), np.minimum(first + rows, queries.stop) - 1]
        (starts, _), _ = rule.spans(ends[0], tokens, window)
        (_, stops), _ = rule.spans(ends[1], tokens, window)
        keys = int((stops - starts).max())
        start = np.clip(starts, limits.start, limits.stop - keys).astype(np.int32)
        rest = slice(0, limits.start) if rule.text_first else slice(limits.stop, tokens)
        return cls(rows, first, start, keys, rest)

    @property
    def pairs(self) -> int:
        """Queries times keys in all products."""
        return len(self.first) * self.rows * (self.keys + self.rest.stop - self.rest.start)


def _windowed(rule: Arrow, steps: _Steps, q: Array, k: Array, v: Array) -> Array:
    """Attention [n, E] of the queries that have windows."""
    tokens = len(q)
    rows, _ = rule.limited(tokens)
    blocks = pad_axis(q[rows] * jnp.asarray(q.shape[1] ** -0.5, q.dtype), 0, steps.rows)
    text = [x[steps.rest] for x in (k, v)] if steps.rest.start < steps.rest.stop else None

    def step(q: Array, first: Array, start: Array) -> Array:
        own, values = (jax.lax.dynamic_slice_in_dim(x, start, steps.keys) for x in (k, v))
        row = first + jnp.arange(steps.rows, dtype=jnp.int32)[:, None]
        column = start + jnp.arange(steps.keys, dtype=jnp.int32)
        seen = rule.visible(row, column, tokens, rule.parameters[0, 0])
        parts = [(xla.hide(xla.scores(q, own), seen), values)]
        if text is not None:
            parts.append((xla.scores(q, text[0]), text[1]))
        return xla.attend_to_parts(parts, v.dtype.name)

    operands = blocks.reshape(-1, steps.rows, q.shape[1]), steps.first, steps.start
    out = jax.lax.map(lambda each: step(*each), operands)
    return out.reshape(-1, v.shape[1])[: rows.stop - rows.start]
