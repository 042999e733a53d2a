"""Expected attention: keep the tokens of a prompt that coming queries are expected to attend to.

Buys: a share of the prompt's keys and values, without looking at the prompt's end. Queries are
taken to be normal, with the mean m and covariance C that the prompt's queries have before their
rotation; R is the mean rotation over the next `future` positions.

    z_t = (R m) k_t / sqrt(D) + k_t^T (R C R^T) k_t / (2 D)      log of the mean exp(q k / sqrt(D))
    score(t) = mean over query heads of softmax(z)_t, times |v_t|

Static: how many tokens are kept. Dynamic: which. The prompt itself attends to all of itself; tokens
that follow are all kept. Cost: (kept + new) / (prompt + new) of the dense cache.

Source: Expected Attention, arXiv 2510.00636; kvpress' `ExpectedAttentionPress`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import testing
from effjax.context import CacheLength
from effjax.fields import Count, Natural
from effjax.forward import Forward, Params
from effjax.layers.attention import CausalCore, Heads, KeyHeads, Positions
from effjax.layers.kv_cache import (
    Caches,
    Dropped,
    EvictingCache,
    Kind,
    budgets,
    check_budget,
    lengths_after,
)
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class ExpectedAttentionPlan(Plan):
    """How many tokens of a prompt are kept, and how coming queries are imagined.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        future: positions after the prompt over which rotations are averaged.
        sinks: first tokens that are always kept, and whose queries do not count.
    """

    capacity: Count | None = None
    ratio: Dropped | None = None
    future: Count = 512
    sinks: Natural = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self, sinks=self.sinks)


def transform(plan: ExpectedAttentionPlan) -> Transform:
    """Give every attention layer a cache that keeps what queries to come should attend to."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(
    plan: ExpectedAttentionPlan, core: CausalCore, cache_length: CacheLength, layer: int
) -> Kind:
    keep, own = budgets(plan.capacity, plan.ratio, cache_length.prompt, always=plan.sinks)
    options = {"future": plan.future, "sinks": plan.sinks}
    return ExpectedCache, {"keep": keep, "own": own, **options}


class ExpectedCache(EvictingCache):
    """Keeps the tokens that queries to come are expected to attend to."""

    def __init__(self, inner: Any, *, future: int, sinks: int, **options: Any):
        super().__init__(inner, **options)
        self.future = future
        self.sinks = sinks

    def scores(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Float[Array, "B K S"]:
        batch, _, heads, width = k.shape
        counted = (positions >= self.sinks).astype(jnp.float32)
        total = jnp.maximum(jnp.sum(counted, axis=1), 1)[:, None, None]
        share = (counted / total[:, 0])[:, :, None, None]
        queries = q.astype(jnp.float32)
        mean = jnp.sum(share * queries, axis=1)  # [B, H, D]
        centered = (queries - mean[:, None]) * jnp.sqrt(share)
        covariance = jnp.einsum("bshi,bshj->bhij", centered, centered)
        ahead = lengths_after(positions)[:, None] + jnp.arange(self.future)
        turn = _mean_rotation(self.core.rotary, ahead)  # [B, D, D]
        mean = jnp.einsum("bij,bhj->bhi", turn, mean)
        covariance = jnp.einsum("bij,bhjk,blk->bhil", turn, covariance, turn)
        keys = self.core.rotary(k, positions).astype(jnp.float32)
        mean = mean.reshape(batch, heads, -1, width)
        covariance = covariance.reshape(batch, heads, -1, width, width)
        logits = jnp.einsum("bkgd,btkd->bkgt", mean, keys) * width**-0.5
        logits += jnp.einsum("btki,bkgij,btkj->bkgt", keys, covariance, keys) / (2 * width)
        scored = (positions >= self.sinks)[:, None, None]
        logits = jnp.where(scored, logits, jnp.finfo(jnp.float32).min)
        scores = jnp.mean(jax.nn.softmax(logits, axis=-1), axis=2)
        scores *= jnp.linalg.norm(v.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
        return jnp.where((positions < self.sinks)[:, None], jnp.inf, scores)


def _mean_rotation(rotary: Any, positions: Positions) -> Float[Array, "B D D"]:
    """The mean over positions [B, N] of the matrices that rotate a head."""
    width = 2 * len(rotary.frequencies)
    units = jnp.broadcast_to(jnp.eye(width)[None, None], (*positions.shape, width, width))
    return jnp.mean(rotary(units, positions), axis=1).transpose(0, 2, 1)


def _identity(subject: testing.Subject) -> ExpectedAttentionPlan:
    return ExpectedAttentionPlan(ratio=0.0)


def _ladder(subject: testing.Subject) -> tuple[ExpectedAttentionPlan, ...]:
    return tuple(ExpectedAttentionPlan(ratio=ratio, sinks=1) for ratio in (0.25, 0.5, 0.75))


METHOD = Method(
    name="expected_attention",
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries "
    "Distribution, arXiv 2510.00636",
    seams=("patches",),
    domain="language models",
    plan=ExpectedAttentionPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("Expected Attention",),
)
