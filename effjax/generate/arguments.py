"""What users give: rows of any lengths, numbers, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
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


def split(tokens: np.ndarray, lengths: np.ndarray, chunk: int) -> list[tuple[Any, Any]]:
    """Prompts in pieces of columns, with the positions of each piece."""
    pieces = []
    for start in range(0, tokens.shape[1], chunk):
        columns = np.arange(start, min(start + chunk, tokens.shape[1]))
        positions = np.where(columns < lengths[:, None], columns, -1).astype(np.int32)
        pieces.append((tokens[:, columns], positions))
    return pieces
