"""Log-probabilities of tokens without the logits of all words at once."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

CHUNK = 1 << 24  # logits that are made at once: 64 MiB in float32


def token_scores(
    head: Callable[[Float[Array, "1 N C"]], Float[Array, "1 N V"]],
    x: Float[Array, "B S C"],
    tokens: Int[Array, "B S"],
    *,
    vocabulary: int,
) -> Float[Array, "B S"]:
    """log softmax(head(x)) of one token each, float32, in chunks of as many as `CHUNK` allows."""
    batch, columns, width = x.shape
    size = max(1, min(batch * columns, CHUNK // vocabulary))
    count = -(-batch * columns // size)
    short = count * size - batch * columns
    x = jnp.pad(x.reshape(-1, width), ((0, short), (0, 0))).reshape(count, 1, size, width)
    wanted = jnp.pad(tokens.reshape(-1), (0, short)).reshape(count, size)

    def chunk(pair: tuple[Array, Array]) -> Float[Array, " N"]:
        x, wanted = pair
        logits = head(x)[0].astype(jnp.float32)
        most = jnp.max(logits, axis=-1)
        chosen = jnp.take_along_axis(logits, wanted[:, None], axis=-1)[:, 0]
        return chosen - most - jnp.log(jnp.sum(jnp.exp(logits - most[:, None]), axis=-1))

    return jax.lax.map(chunk, (x, wanted)).reshape(-1)[: batch * columns].reshape(batch, columns)
