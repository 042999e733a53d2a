"""How the next token is drawn from the logits."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("temperature", "top_p", "min_p", "repetition_penalty"),
    meta_fields=("top_k",),
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the distribution of the next token is changed before one is drawn.

    None leaves a step out. Numbers are data: other values do not compile again, but `top_k` does.

    Attributes:
        temperature: divides the logits; None chooses the most likely token (greedy).
        top_k: keeps the k most likely tokens, and those as likely as the last of them.
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
        """Raise ValueError for numbers out of range; all wrong ones are named."""
        wrong = []
        if self.temperature is not None and not self.temperature > 0:
            wrong.append(f"temperature must be above 0 (None is greedy), got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                wrong.append(f"{name} must be in (0, 1], got {value}")
        if self.repetition_penalty is not None and not self.repetition_penalty > 0:
            wrong.append(f"repetition_penalty must be above 0, got {self.repetition_penalty}")
        if wrong:
            raise ValueError("; ".join(wrong))


def process_logits(
    logits: Float[Array, "B V"], sampling: Sampling, occurred: Bool[Array, "B V"] | None = None
) -> Float[Array, "B V"]:
    """Log-probabilities of the next token, whole: -inf for tokens that are left out.

    In the order of transformers: repetition penalty, temperature, top-k, top-p, min-p.

    Args:
        logits: of the model.
        occurred: which tokens the text holds; needed for a repetition penalty.

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
        logits = logits / jnp.float32(sampling.temperature)
    if sampling.top_k is not None:
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
