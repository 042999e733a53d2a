"""What users give: rows of any lengths, numbers, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.forward import Forward

INT32_MAX = 2**31 - 1

Prompts = Sequence[Sequence[int] | np.ndarray] | np.ndarray | jax.Array


def padded(prompts: Prompts) -> tuple[np.ndarray, np.ndarray]:
    """Rows as int32[B, S], padded with zeros at the right, and their lengths int32[B].

    Raises:
        ValueError: without rows, or with an empty one.
    """
    rows = [np.asarray(row) for row in prompts]
    if not rows or any(row.ndim != 1 or row.size == 0 for row in rows):
        raise ValueError(
            "prompts are rows of one or more token ids, [[5, 9, 2], [7, 7]]; got "
            f"{[list(row.shape) for row in rows]}"
        )
    for row in rows:
        if row.dtype.kind not in "iu" or not 0 <= row.min() <= row.max() <= INT32_MAX:
            raise ValueError(f"token ids are whole numbers from 0 on, of 32 bits; got {row}")
    lengths = np.asarray([row.size for row in rows], np.int32)
    tokens = np.zeros((len(rows), lengths.max()), np.int32)
    for place, row in zip(tokens, rows, strict=True):
        place[: row.size] = row
    return tokens, lengths


def wider(array: np.ndarray, *shape: int) -> np.ndarray:
    """An array with zeros at its ends, up to a shape."""
    return np.pad(array, [(0, size - own) for own, size in zip(array.shape, shape, strict=True)])


def check_count(name: str, value: int, least: int = 1) -> None:
    """Raise ValueError for what is no whole number of 32 bits, or is below the least one."""
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if not whole or not least <= value <= INT32_MAX:
        raise ValueError(f"{name} must be a whole number of tokens, at least {least}; got {value}")


def check_tokens(forward: Forward, tokens: np.ndarray) -> None:
    """Raise ValueError for ids that the model does not know."""
    known = forward.config.vocab_size
    wrong = tokens[(tokens < 0) | (tokens >= known)]
    if wrong.size:
        raise ValueError(
            f"the model knows tokens 0 ... {known - 1}, got {wrong.flat[0]}. Is this another "
            f"model's tokenizer?"
        )


class Rows(NamedTuple):
    """What is read: sequences as rows, padded at the right.

    Attributes:
        lengths: int32[B].
        tokens: int32[B, S], None where only embeddings are known.
        embeds: [B, S, C] in their place; None for the model's own.
        angles: int32[B, R, S] what tokens are rotated to; None for their places.
    """

    lengths: np.ndarray
    tokens: np.ndarray | None
    embeds: np.ndarray | None
    angles: np.ndarray | None

    @property
    def columns(self) -> int:
        """Tokens of the longest one."""
        return int(self.lengths.max())

    def wider(self, batch: int, columns: int) -> Rows:
        """The same with rows and columns of padding."""

        def padded(x: np.ndarray | None, *shape: int) -> np.ndarray | None:
            return None if x is None else wider(x, *shape)

        width = () if self.embeds is None else self.embeds.shape[2:]
        rows = () if self.angles is None else self.angles.shape[1:2]
        return Rows(
            wider(self.lengths, batch),
            padded(self.tokens, batch, columns),
            padded(self.embeds, batch, columns, *width),
            padded(self.angles, batch, *rows, columns),
        )

    def split(self, chunk: int, before: np.ndarray | int = 0) -> list[tuple[Any, ...]]:
        """Pieces of columns: tokens, positions and, where they are given, embeddings.

        Args:
            chunk: columns of a piece.
            before: tokens int32[B, 1] that the sequences have already.
        """
        whole = self.tokens if self.embeds is None else self.embeds
        assert whole is not None
        pieces = []
        for start in range(0, whole.shape[1], chunk):
            columns = np.arange(start, min(start + chunk, whole.shape[1]))
            place = np.where(columns < self.lengths[:, None], before + columns, -1)
            positions = place.astype(np.int32)
            if self.angles is not None:
                rows = self.angles[:, :, columns]
                positions = np.concatenate([positions[:, None], rows], axis=1)
            tokens = None if self.tokens is None else self.tokens[:, columns]
            embeds = () if self.embeds is None else (self.embeds[:, columns],)
            pieces.append((tokens, positions, *embeds))
        return pieces


def rows_of(
    forward: Forward, prompts: Prompts | None, inputs_embeds: Any = None, positions: Any = None
) -> Rows:
    """What is read, checked.

    Args:
        forward: the model.
        prompts: rows of token ids; beside `inputs_embeds` they are what a repetition penalty knows.
        inputs_embeds: rows [S, C] in place of the tokens' embeddings.
        positions: rows int[R, S] of what tokens are rotated to.

    Raises:
        ValueError: for rows that do not fit together or the model.
    """
    if prompts is None and inputs_embeds is None:
        raise ValueError("give prompts, or inputs_embeds in their place")
    tokens = lengths = None
    if prompts is not None:
        tokens, lengths = padded(prompts)
        check_tokens(forward, tokens)
    embeds = angles = None
    if inputs_embeds is not None:
        rows = [np.asarray(row) for row in inputs_embeds]
        width = forward.config.hidden_size
        if not rows or any(row.ndim != 2 or row.shape[1] != width or not len(row) for row in rows):
            raise ValueError(
                f"inputs_embeds are rows [S, {width}] of one or more tokens, as wide as the model; "
                f"got {[list(row.shape) for row in rows]}"
            )
        if len({row.dtype for row in rows}) > 1 or not jnp.issubdtype(rows[0].dtype, jnp.floating):
            kinds = sorted({str(row.dtype) for row in rows})
            raise ValueError(f"inputs_embeds are floats of one dtype, got {', '.join(kinds)}")
        lengths = _same("inputs_embeds", rows, lengths)
        embeds = np.zeros((len(rows), lengths.max(), width), rows[0].dtype)
        for place, row in zip(embeds, rows, strict=True):
            place[: len(row)] = row
    assert lengths is not None
    if positions is not None:
        rows = [np.asarray(row) for row in positions]
        counts = {row.shape[0] for row in rows if row.ndim == 2}
        allowed = (1, len(forward.config.rope_sections))
        whole = all(row.ndim == 2 and row.dtype.kind in "iu" for row in rows)
        if not whole or len(counts) != 1 or not counts <= set(allowed):
            raise ValueError(
                f"positions are whole numbers [R, S] for each sequence, where R is 1 or the "
                f"model's number of rope_sections ({allowed[1]}); got "
                f"{[f'{row.dtype}{list(row.shape)}' for row in rows]}"
            )
        if any(row.size and not 0 <= row.min() <= row.max() <= INT32_MAX for row in rows):
            raise ValueError("positions are from 0 on, of 32 bits: padding is not among them")
        _same("positions", [row.T for row in rows], lengths)
        angles = np.zeros((len(rows), *counts, lengths.max()), np.int32)
        for place, row in zip(angles, rows, strict=True):
            place[:, : row.shape[1]] = row
    return Rows(lengths, tokens, embeds, angles)


def _same(name: str, rows: Sequence[np.ndarray], lengths: np.ndarray | None) -> np.ndarray:
    """Lengths of rows, which must be those that are known."""
    own = np.asarray([len(row) for row in rows], np.int32)
    if lengths is not None and own.tolist() != lengths.tolist():
        raise ValueError(
            f"{name} are of {own.tolist()} tokens, the sequences have {lengths.tolist()}"
        )
    return own
