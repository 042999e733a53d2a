"""How the next token is drawn from the logits."""

from __future__ import annotations

import dataclasses
import math
import numbers
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from effjax.fields import LARGEST


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_p", "min_p", "repetition_penalty"),
    meta_fields=("top_k",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the distribution of the next token is changed before a token is drawn.

    None leaves a step out. Numbers are data, so other values do not compile again; only another
    `top_k` does.

    Attributes:
        temperature: divides the logits. None takes the most likely token (greedy), and 0 draws
            among the most likely tokens if several are equally likely.
        top_k: keeps the k most likely tokens, and those as likely as the last of them; 0 keeps all.
        top_p: keeps the most likely tokens whose probabilities reach this sum.
        min_p: keeps tokens at least this likely relative to the most likely one.
        repetition_penalty: logits of tokens that occurred are divided by it where positive and
            multiplied where negative (arXiv 1909.05858).
    """

    temperature: float | Array | None = None
    top_k: int | None = None
    top_p: float | Array | None = None
    min_p: float | Array | None = None
    repetition_penalty: float | Array | None = None

    def check(self) -> None:
        """Raise ValueError for values that are no numbers or out of range, with all their names."""
        wrong = [
            f"{name} must be {allowed}, got {value}"
            for name, (holds, allowed) in _RANGES.items()
            if (value := getattr(self, name)) is not None and not holds(_number(value))
        ]
        if wrong:
            raise ValueError("; ".join(wrong))


_RANGES = {
    "temperature": (lambda x: 0 <= x < math.inf, "a finite number of 0 (greedy) or more"),
    "top_k": (lambda x: 0 <= x <= LARGEST and x == int(x), "a whole number of 0 (off) or more"),
    "top_p": (lambda x: 0 <= x <= 1, "from 0 to 1 (off)"),
    "min_p": (lambda x: 0 <= x <= 1, "from 0 (off) to 1"),
    "repetition_penalty": (lambda x: 0 < np.float32(x) < np.inf, "above 0 (1 is off), and finite"),
}


def _number(value: Any) -> float:
    """A number, or an array without axes, as a float; NaN for what is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real | jax.Array):
        return math.nan
    try:
        return float(value)
    except (TypeError, OverflowError):  # an array with axes, a number of hundreds of digits
        return math.nan


def process_logits(
    logits: Float[Array, "*B V"], sampling: Sampling, occurred: Bool[Array, "*B V"] | None = None
) -> Float[Array, "*B V"]:
    """Compute the distribution from which the next token is drawn, as log-probabilities.

    The changes have the order of transformers: repetition penalty, temperature, top-k, top-p,
    min-p. Tokens that are left out have -inf.

    Args:
        logits: of the model.
        occurred: which tokens the sequence holds; needed for a repetition penalty.

    Raises:
        ValueError: for a repetition penalty without them.
    """
    logits = logits.astype(jnp.float32)
    if sampling.repetition_penalty is not None:
        if occurred is None:
            raise ValueError("a repetition penalty must know which tokens occurred")
        penalty = jnp.float32(sampling.repetition_penalty)
        changed = jnp.where(logits > 0, logits / penalty, logits * penalty)
        logits = jnp.where(occurred, changed, logits)
    if sampling.temperature is not None:
        # Below the largest: 0 divided by any temperature is 0, so the likeliest tokens stay.
        below = logits - jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(below < 0, below / jnp.float32(sampling.temperature), below)
    if sampling.top_k:
        least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p is not None:
        falling = -jnp.sort(-logits, axis=-1)
        sums = jnp.cumsum(jax.nn.softmax(falling, axis=-1), axis=-1)
        needed = jnp.sum(sums < jnp.float32(sampling.top_p), axis=-1, keepdims=True)
        needed = jnp.minimum(needed, logits.shape[-1] - 1)
        least = jnp.take_along_axis(falling, needed, axis=-1)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.min_p is not None:
        least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(jnp.float32(sampling.min_p))
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return jax.nn.log_softmax(logits, axis=-1)
