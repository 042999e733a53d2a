"""What a language model still finds in its context: answers to questions that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from effjax.bundled.texts import Document
from effjax.forward import Forward, Params
from effjax.generate import Reading
from effjax.transform import Pair

ROWS = 16  # documents at a time


def right(pair: Pair, documents: Sequence[Document]) -> np.ndarray:
    """Whether answers are the most likely tokens, bool[documents, answers].

    Documents are of one length; their contexts are read at once, the rest through the cache.
    """
    found = []
    for start in range(0, len(documents), ROWS):
        some = documents[start : start + ROWS]
        tokens, answers = (np.stack([each[i] for each in some]) for i in (0, 2))
        prompt = some[0].context
        reading = Reading(prompt, tokens.shape[1] - prompt)
        likely = np.asarray(_likely(reading, *pair, tokens))
        guessed = np.take_along_axis(likely, answers - prompt, axis=1)
        found.append(guessed == np.take_along_axis(tokens, answers, axis=1))
    return np.concatenate(found)


@jax.jit(static_argnums=0)
def _likely(reading: Reading, forward: Forward, params: Params, tokens: jax.Array) -> jax.Array:
    return jnp.argmax(reading(forward, params, tokens), axis=-1)
