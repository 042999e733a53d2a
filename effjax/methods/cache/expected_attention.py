"""Expected attention: keep the tokens of a prompt that coming queries are expected to attend to.

Use it where the question is not a part of the prompt, so that the prompt's end does not show what
will be needed. Queries to come are modeled as normal, with the mean m and the covariance C that the
queries of the prompt have before their rotation. R is the mean rotation over the next `future`
positions.

    z_t = (R m) k_t / sqrt(D) + k_t^T (R C R^T) k_t / (2 D)      log of the mean exp(q k / sqrt(D))
    score(t) = |v_t| times the mean over the query heads of a key head of softmax(z)_t

The number of kept tokens is static, and which tokens they are is decided at run time. The first
`sinks` tokens are always kept. The prompt attends to all of itself, and all tokens that follow are
kept.

Cost: (kept + new) / (prompt + new) of the dense cache; for the scores, about 2 D^2 multiply-adds
for each token and query head.

Source: Expected Attention, arXiv 2510.00636; kvpress' `ExpectedAttentionPress`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.caches import AttentionInputs
from effjax.caches.pressed import Scores
from effjax.fields import Count, Natural
from effjax.layers.rotary import Rotary
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class ExpectedAttentionPlan(press.PressPlan):
    """How many tokens of a prompt are kept, and how coming queries are imagined.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        future: positions after the prompt over which rotations are averaged.
        sinks: first tokens that are always kept, and whose queries do not count.
    """

    future: Count = 512
    sinks: Natural = 4

    @property
    def always(self) -> Mapping[str, int]:
        return {"sinks": self.sinks}

    def score(self, inputs: AttentionInputs) -> Scores:
        if inputs.core.leading is not None:
            raise ValueError(
                "expected_attention turns the mean query to later positions, and queries of "
                "latents are turned in a part of their channels alone: use another score"
            )
        (batch, _, heads, width), positions = inputs.k.shape, inputs.positions
        counted = (positions >= self.sinks).astype(jnp.float32)
        total = jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None, None]
        share = (counted / total[:, 0])[:, :, None, None]
        queries = inputs.q.astype(jnp.float32)
        mean = jnp.sum(share * queries, axis=1)  # [B, H, D]
        centered = (queries - mean[:, None]) * jnp.sqrt(share)
        covariance = jnp.einsum("bshi,bshj->bhij", centered, centered)
        next_ = jnp.max(inputs.angles.reshape(batch, -1), axis=1) + 1
        turn = _mean_rotation(inputs.core.rotary, next_[:, None] + jnp.arange(self.future))
        mean = jnp.einsum("bij,bhj->bhi", turn, mean)
        covariance = jnp.einsum("bij,bhjk,blk->bhil", turn, covariance, turn)
        keys = inputs.rotated_k.astype(jnp.float32)
        mean = mean.reshape(batch, heads, -1, width)
        covariance = covariance.reshape(batch, heads, -1, width, width)
        logits = jnp.einsum("bkgd,btkd->bkgt", mean, keys) * width**-0.5
        logits += jnp.einsum("btki,bkgij,btkj->bkgt", keys, covariance, keys) / (2 * width)
        scored = (positions >= self.sinks)[:, None, None]
        logits = jnp.where(scored, logits, jnp.finfo(jnp.float32).min)
        scores = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)
        scores *= jnp.linalg.norm(inputs.v.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
        return jnp.where((positions < self.sinks)[:, None], jnp.inf, scores)


def _mean_rotation(rotary: Rotary, positions: Int[Array, "B N"]) -> Float[Array, "B D D"]:
    """The mean over positions of the matrices that rotate a head."""
    width = 2 * len(rotary.frequencies)
    units = jnp.broadcast_to(jnp.eye(width)[None, None], (*positions.shape, width, width))
    return jnp.mean(rotary(units, positions), axis=1).transpose(0, 2, 1)


METHOD = press.method(
    "expected_attention",
    "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
    "Distribution, arXiv 2510.00636",
    ExpectedAttentionPlan,
    systems=("Expected Attention",),
    sinks=1,
)
transform = METHOD.transform
