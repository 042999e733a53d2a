"""Chunked pressing: each chunk of a prompt keeps its share, as if it were a prompt of its own.

Use it where a score of the whole prompt would spend the budget in one place: with chunks the kept
tokens are spread evenly over the prompt. Each chunk is scored alone, and nothing that follows a
chunk is needed to choose its tokens.

    a chunk of L tokens keeps its max(1, int(L (1 - ratio))) tokens of highest score, head by head

The score is that of another press (`press`, KNorm by default). The number of kept tokens is static,
and which tokens they are is decided at run time. The prompt attends to all of itself, and all
tokens that follow are kept.

Cost: (kept + new) / (prompt + new) of the dense cache.

Source: kvpress' `ChunkPress`, after FINCH, doi 10.1162/tacl_a_00716, and chunked prefill under a
press as in QuickVideo, arXiv 2505.16175.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.caches import AttentionInputs, Kind, Lengths
from effjax.caches.budgets import by_length, shares
from effjax.caches.install import Place
from effjax.caches.pressed import Columns, best
from effjax.caches.slots import left_aligned
from effjax.fields import Count
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class ChunkPressPlan(press.WrapperPlan):
    """What share of every chunk is dropped, and by which score.

    Attributes:
        capacity: must be None: a chunk keeps a share.
        ratio: the share of every chunk that is dropped; half of it if none is given.
        press, options: whose score, see `WrapperPlan`.
        chunk: tokens of a chunk.
    """

    press: str = "knorm"
    chunk: Count = 1024

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.capacity is not None:
            raise ValueError(
                f"capacity={self.capacity} is for whole prompts; say the share that every chunk "
                f"drops, ratio=0.5"
            )

    def kind(self, place: Place) -> Kind:
        table = _table(self.ratio or 0.0, self.chunk, place.cache_length.prompt)
        return self.pressed(self.choose, *by_length(table), place)

    def choose(self, inputs: AttentionInputs, keep: Lengths, slots: int) -> Columns:
        """The best tokens of every chunk, each scored as a prompt of its own."""
        batch, columns = inputs.positions.shape
        chunk = min(self.chunk, columns)
        count, short = -(-columns // chunk), -columns % chunk
        lengths = jnp.sum(inputs.positions >= 0, axis=1, dtype=jnp.int32)

        def cut(x: Array) -> Array:
            x = left_aligned(x, inputs.positions)
            x = jnp.pad(x, ((0, 0), (0, short)) + ((0, 0),) * (x.ndim - 2))
            return x.reshape(batch * count, chunk, *x.shape[2:])

        own = jnp.clip(lengths[:, None] - chunk * jnp.arange(count), 0, chunk).reshape(-1)
        places = jnp.where(jnp.arange(chunk) < own[:, None], jnp.arange(chunk), -1)
        q, k, v, x = (cut(part) for part in (inputs.q, inputs.k, inputs.v, inputs.x))
        scores = self.score(AttentionInputs(q, k, v, x, places, places, inputs.core))
        table = _table(self.ratio or 0.0, chunk, chunk)
        kept = best(scores, places >= 0, jnp.asarray(table)[own], int(table[-1]))
        kept = kept.reshape(batch, count, *kept.shape[1:])
        found = jnp.where(kept < chunk, kept + chunk * jnp.arange(count)[:, None, None], columns)
        found = found.swapaxes(1, 2).reshape(batch, found.shape[2], -1)
        first = jnp.argmax(inputs.positions >= 0, axis=1)[:, None, None]
        found = jnp.where(found < columns, found + first, columns)
        return jnp.sort(found, axis=2)[:, :, :slots]


@lru_cache(maxsize=64)
def _table(ratio: float, chunk: int, most: int) -> np.ndarray:
    """What is kept of 0 ... `most` tokens."""
    tokens, own = np.arange(most + 1), shares(ratio, chunk)
    return tokens // chunk * own[-1] + own[tokens % chunk]


METHOD = press.method(
    "chunk_press",
    "FINCH: Prompt-guided Key-Value Cache Compression, arXiv 2408.00167",
    ChunkPressPlan,
    systems=("ChunkPress",),
    chunk=5,
)
transform = METHOD.transform
