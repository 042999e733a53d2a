"""ChunkKV: keep whole chunks of a prompt, the same for all heads.

Use it where single tokens mean little without their neighbors: words and sentences are kept or
dropped as a whole.

    score(chunk) = mean over its tokens of the sum over key heads of another press' scores

Of all chunks, the shorter one at the end included, the best max(1, int(chunks (1 - ratio))) are
kept, with their tokens in order. A prompt that is shorter than one chunk is pressed token by token.
The score is that of another press (`press`, SnapKV by default). The number of kept tokens is
static, and which chunks they are in is decided at run time. The prompt attends to all of itself,
and all tokens that follow are kept.

Cost: (kept + new) / (prompt + new) of the dense cache.

Source: ChunkKV, arXiv 2502.00299; kvpress' `ChunkKVPress`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from effjax.caches import AttentionInputs, Kind, Lengths
from effjax.caches.budgets import by_length, shares
from effjax.caches.install import Place
from effjax.caches.pressed import Columns, best
from effjax.caches.slots import left_aligned
from effjax.fields import Count
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class ChunkKVPlan(press.WrapperPlan):
    """How many tokens of a prompt are kept, in whole chunks, and by which score.

    Attributes:
        capacity: tokens, of which whole chunks are kept; or None, for
        ratio: the share of the chunks that is dropped; half of them if neither is given.
        press, options: whose score, see `WrapperPlan`.
        chunk: tokens of a chunk.
    """

    chunk: Count = 20

    def kind(self, place: Place) -> Kind:
        most = place.cache_length.prompt
        return self.pressed(self.choose, *by_length(self._slots(most)), place)

    def _kept(self, most: int) -> np.ndarray:
        """Chunks that are kept of 0 ... `most` tokens; of fewer than a chunk, tokens."""
        tokens = np.arange(most + 1)
        chunks = -(-tokens // self.chunk)
        if self.capacity is None:
            kept, few = shares(self.ratio or 0.0, most + 1)[chunks], shares(self.ratio or 0.0, most)
        else:
            whole = tokens <= self.capacity
            kept = np.where(whole, chunks, max(1, self.capacity // self.chunk))
            few = np.minimum(tokens, self.capacity)
        return np.where(tokens < self.chunk, few, kept)

    def _slots(self, most: int) -> np.ndarray:
        tokens, kept = np.arange(most + 1), self._kept(most)
        return np.where(tokens < self.chunk, kept, np.minimum(kept * self.chunk, tokens))

    def choose(self, inputs: AttentionInputs, keep: Lengths, slots: int) -> Columns:
        """The tokens of the best chunks; of prompts shorter than a chunk the best tokens."""
        scores, valid = self.score(inputs), inputs.positions >= 0
        lengths, columns = jnp.sum(valid, axis=1, dtype=jnp.int32), valid.shape[1]
        kept = jnp.asarray(self._kept(columns))[lengths]
        # By place in the sequence: chunks count from its first token.
        sums = left_aligned(jnp.sum(scores, axis=1), inputs.positions)
        sums = jnp.where(jnp.arange(columns) < lengths[:, None], sums, 0.0)
        sums = jnp.pad(sums, ((0, 0), (0, -columns % self.chunk)))
        sums = jnp.sum(sums.reshape(len(sums), -1, self.chunk), axis=2)
        sizes = jnp.clip(lengths[:, None] - self.chunk * jnp.arange(sums.shape[1]), 0, self.chunk)
        means = jnp.where(sizes > 0, sums / jnp.maximum(sizes, 1).astype(sums.dtype), -jnp.inf)
        ranks = jnp.argsort(jnp.argsort(-means, axis=1, stable=True), axis=1)
        taken = jnp.repeat(ranks < kept[:, None], self.chunk, axis=1)[:, :columns]
        taken &= jnp.arange(columns) < lengths[:, None]
        first = jnp.argmax(valid, axis=1)[:, None]
        whole = jnp.sort(jnp.where(taken, jnp.arange(columns) + first, columns), axis=1)[:, :slots]
        few = best(scores, valid, kept, min(slots, self.chunk))
        short = ((0, 0), (0, 0), (0, whole.shape[1] - few.shape[2]))
        few = jnp.pad(few, short, constant_values=columns)
        return jnp.where((lengths < self.chunk)[:, None, None], few, whole[:, None])


METHOD = press.method(
    "chunk_kv",
    "ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM Inference, "
    "arXiv 2502.00299",
    ChunkKVPlan,
    systems=("ChunkKV",),
    press="knorm",
    chunk=3,
)
transform = METHOD.transform
