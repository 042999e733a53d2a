"""Warnings for results that are not finite.

Without a warning, NaN and infinite values would turn into black pictures or into wrong text.
"""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np


class NotFiniteWarning(RuntimeWarning):
    """A model gave NaN or infinite values."""


def warn_unless_finite(what: str, values: jax.Array | np.ndarray, advice: str) -> None:
    """Warn with a `NotFiniteWarning` if any of the values is NaN or infinite.

    Args:
        what: what the values are ("latents after step 3 of 20").
        values: float array of any shape; of one on a device, one number comes to the host.
        advice: what to try.
    """
    on = np if isinstance(values, np.ndarray) else jnp
    wrong = int(on.sum(~on.isfinite(values)))
    if wrong:
        message = f"{what}: {wrong} of {values.size} values are NaN or infinite. {advice}"
        warnings.warn(message, NotFiniteWarning, stacklevel=3)


def token_or_none(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """Tokens, -1 where the logits that they follow from are NaN or infinite.

    No code stands for -1: what it is decoded to is NaN, and is warned of.

    Args:
        tokens: int32[...].
        logits: of each, float[..., V]; -inf for those that are never drawn.
    """
    return jnp.where(jnp.isfinite(jnp.max(logits, axis=-1)), tokens, -1)
