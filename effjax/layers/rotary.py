"""Rotary position embedding and the ways to stretch it (RoFormer, arXiv 2104.09864)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax import fields
from effjax.fields import Count, Positive

_MAX_HEAD_DIM = 65536  # of what models have, hundreds of times as much

# Pairs of transformers' names, `rope_type` among them.
Scaling = tuple[tuple[str, str | bool | int | float | tuple[int | float, ...] | None], ...]


@dataclasses.dataclass
class _Options:
    """What the numbers of a scaling may be; others are not read."""

    factor: Positive
    original_max_position_embeddings: Count
    low_freq_factor: Positive
    high_freq_factor: Positive
    beta_fast: Positive | None
    beta_slow: Positive | None
    attention_factor: Positive | None
    mscale: float | None
    mscale_all_dim: float | None
    truncate: bool


class Rotary(nnx.Module):
    """Turns channel i with channel i + D / 2 by an angle proportional to a token's position.

    Args:
        head_dim: D, even.
        theta: base of the frequencies theta^(-2 i / D).
        scaling: how frequencies are changed for longer sequences, see `frequencies`.
        sections: how many of the D / 2 frequencies go by each row of positions (M-RoPE of
            Qwen2-VL: time, row and column of a patch); () for one row.
        interleaved: rows take turns, frequency by frequency, as long as their section lasts, and
            the first row has the rest (Qwen3-VL).

    Attributes:
        frequencies: D / 2 angles per position.
        factor: of cosines and sines (YaRN's temperature), 1 for all others.
        rows: row of positions that each frequency goes by; () for one row.

    Raises:
        ValueError: for sections that are not D / 2 frequencies together.
    """

    def __init__(
        self,
        head_dim: int,
        *,
        theta: float,
        scaling: Scaling = (),
        sections: tuple[int, ...] = (),
        interleaved: bool = False,
    ):
        found, self.factor = frequencies(head_dim, theta, scaling)
        self.frequencies = tuple(found.tolist())
        self.sections = sections
        self.rows = section_rows(head_dim, sections, interleaved=interleaved)

    def __call__(
        self, x: Float[Array, "B S H D"], positions: Int[Array, "#B S"] | Int[Array, "#B R S"]
    ) -> Float[Array, "B S H D"]:
        """Rotate heads to their tokens' positions; float32 angles, the input's dtype.

        Args:
            x: heads.
            positions: one row for all frequencies, or one for each section.

        Raises:
            ValueError: for another number of rows.
        """
        rates = np.asarray(self.frequencies, np.float32)
        if positions.ndim == 3:
            count = positions.shape[1]
            if count not in (1, len(self.sections)):
                raise ValueError(
                    f"positions have {count} rows to rotate by, and this model has "
                    f"{len(self.sections) or 'no'} sections of frequencies: give 1 row"
                    + (f" or {len(self.sections)}" if self.sections else "")
                )
            rows = np.zeros(len(rates), int) if count == 1 else np.asarray(self.rows)
            positions = positions[:, rows].swapaxes(1, 2)
            angles = positions.astype(jnp.float32)[:, :, None] * rates
        else:
            angles = positions.astype(jnp.float32)[:, :, None, None] * rates
        cos, sin = (self.factor * f(angles).astype(x.dtype) for f in (jnp.cos, jnp.sin))
        return self.turned(x, cos, sin)

    def turned(
        self, x: Float[Array, "B S H D"], cos: Float[Array, "..."], sin: Float[Array, "..."]
    ) -> Float[Array, "B S H D"]:
        """Turn pairs of channels."""
        left, right = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)


class AdjacentRotary(Rotary):
    """Turns adjacent channels, 2 i with 2 i + 1 (DeepSeek)."""

    def turned(
        self, x: Float[Array, "B S H D"], cos: Float[Array, "..."], sin: Float[Array, "..."]
    ) -> Float[Array, "B S H D"]:
        first, second = x[..., 0::2], x[..., 1::2]
        pairs = [first * cos - second * sin, second * cos + first * sin]
        return jnp.stack(pairs, axis=-1).reshape(x.shape)


class RasterRotary(Rotary):
    """Turns adjacent channels by the row and the column of a token of an image (LlamaGen).

    A sequence is a condition and then an image, row by row. The first half of the pairs of channels
    goes by the row, the other half by the column, each with frequencies theta^(-4 i / D). Heads of
    the condition become zero: their queries and keys have the score 0 with everything.

    Args:
        head_dim: D, a multiple of 4.
        theta: base of the frequencies.
        condition: tokens of the condition.
        columns: tokens of a row of the image.
    """

    def __init__(self, head_dim: int, *, theta: float, condition: int, columns: int):
        rates, self.factor = frequencies(head_dim // 2, theta)
        self.frequencies = (*rates.tolist(), *rates.tolist())
        self.sections, self.rows = (), ()
        self.condition = condition
        self.columns = columns

    def __call__(
        self, x: Float[Array, "B S H D"], positions: Int[Array, "#B S"] | Int[Array, "#B R S"]
    ) -> Float[Array, "B S H D"]:
        """Rotate heads; float32 products, the input's dtype.

        Args:
            x: heads.
            positions: of tokens in the sequence, in which the condition has its whole length.

        Raises:
            ValueError: for positions with several rows.
        """
        if positions.ndim == 3:
            if positions.shape[1] != 1:
                raise ValueError(
                    f"tokens of an image are rotated by one number, and positions have "
                    f"{positions.shape[1]} rows of them"
                )
            positions = positions[:, 0]
        place = positions - self.condition
        row, column = (x.astype(jnp.float32) for x in (place // self.columns, place % self.columns))
        axes = jnp.repeat(jnp.stack([row, column], axis=-1), len(self.frequencies) // 2, axis=-1)
        angles = (axes * np.asarray(self.frequencies, np.float32))[:, :, None]
        image = (place >= 0).astype(jnp.float32)[:, :, None, None]
        cos, sin = image * jnp.cos(angles), image * jnp.sin(angles)
        pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
        first, second = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.reshape(x.shape).astype(x.dtype)


def section_rows(
    head_dim: int, sections: tuple[int, ...], *, interleaved: bool = False
) -> tuple[int, ...]:
    """Row of positions that each of the D / 2 frequencies goes by, see `Rotary`.

    Raises:
        ValueError: for sections that are not D / 2 frequencies together.
    """
    if not sections:
        return ()
    if sum(sections) != head_dim // 2:
        raise ValueError(
            f"sections {sections} have {sum(sections)} frequencies, heads of {head_dim} channels "
            f"have {head_dim // 2}"
        )
    if not interleaved:
        return tuple(row for row, count in enumerate(sections) for _ in range(count))
    turns = ((i // len(sections), i % len(sections)) for i in range(head_dim // 2))
    return tuple(row if turn < sections[row] else 0 for turn, row in turns)


def frequencies(head_dim: int, theta: float, scaling: Scaling = ()) -> tuple[np.ndarray, float]:
    """Angles per position float32[head_dim / 2], and the factor of cosines and sines.

    Kinds of scaling, by `rope_type`, with transformers' names and defaults:

        default   none
        linear    positions divided by `factor` (arXiv 2306.15595)
        llama3    long wavelengths divided by `factor`, short ones kept, a ramp between (Llama 3.1)
        yarn      the same on a ramp over channels, and a temperature (arXiv 2309.00071)

    Raises:
        ValueError: for another kind, or one that lacks its numbers, and for absurdly wide heads.
    """
    if head_dim > _MAX_HEAD_DIM:
        raise ValueError(f"head_dim must be at most {_MAX_HEAD_DIM}, got {head_dim}")
    options = dict(scaling)
    kind = options.pop("rope_type", "default")
    if kind not in _KINDS:
        raise ValueError(
            f"no rotary scaling {kind!r}; there are {', '.join(_KINDS)}. Kinds whose frequencies "
            f"change while a text grows ('dynamic', 'longrope') do not fit a cache of rotated keys."
        )
    wrong = [
        text
        for name, allowed in fields.annotated(_Options).items()
        if name in options
        for text in fields.problems(allowed, options[name], name)
    ]
    if wrong:
        raise ValueError(f"rotary scaling {kind!r}: {'; '.join(wrong)}")
    base = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    try:
        values, factor = _KINDS[kind](base, head_dim, theta, options)
    except KeyError as missing:
        raise ValueError(f"rotary scaling {kind!r} lacks {missing}: {dict(scaling)}") from None
    return values.astype(np.float32), float(factor)


def _default(
    base: np.ndarray, dim: int, theta: float, options: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    return base, 1.0


def _linear(
    base: np.ndarray, dim: int, theta: float, options: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    return base / options["factor"], 1.0


def _llama3(
    base: np.ndarray, dim: int, theta: float, options: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    low, high = options["low_freq_factor"], options["high_freq_factor"]
    if low >= high:
        raise ValueError(f"low_freq_factor must be below high_freq_factor, got {low} and {high}")
    turns = options["original_max_position_embeddings"] * base / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)  # share that is not stretched
    return base * (kept + (1 - kept) / options["factor"]), 1.0


def _yarn(
    base: np.ndarray, dim: int, theta: float, options: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    stretch = float(options["factor"])
    length = options["original_max_position_embeddings"]

    def channel(name: str, usual: float) -> float:
        """The channel pair that turns this often within the original length."""
        turns = float(options.get(name) or usual)
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = channel("beta_fast", 32.0), channel("beta_slow", 1.0)
    if options.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - first) / max(last - first, 0.001), 0, 1)
    factor = options.get("attention_factor")
    if factor is None:
        over, under = options.get("mscale"), options.get("mscale_all_dim")
        factor = _temperature(stretch, 1.0)
        if over and under:
            factor = _temperature(stretch, float(over)) / _temperature(stretch, float(under))
    return base * (1 - ramp + ramp / stretch), factor


def _temperature(stretch: float, weight: float) -> float:
    return 1.0 if stretch <= 1 else 0.1 * weight * math.log(stretch) + 1.0


_KINDS = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn}
