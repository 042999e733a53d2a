"""Knorm: keep the tokens of a prompt whose keys are short.

Buys: a share of the prompt's keys and values, for a sort of one number a token. Keys of small norm
are those that queries attend to most, which was found by looking, layer after layer.

    score(t) = -|k_t|        for each key head alone

Static: how many tokens are kept. Dynamic: which. The prompt itself attends to all of itself; tokens
that follow are all kept. Cost: (kept + new) / (prompt + new) of the dense cache.

Source: arXiv 2406.11430; kvpress' `KnormPress`.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import testing
from effjax.context import CacheLength
from effjax.fields import Count
from effjax.forward import Forward, Params
from effjax.layers.attention import CausalCore, Heads, KeyHeads, Positions
from effjax.layers.kv_cache import Caches, Dropped, EvictingCache, Kind, budgets, check_budget
from effjax.transform import Method, Pair, Plan, Transform


@dataclasses.dataclass(frozen=True)
class KnormPlan(Plan):
    """How many tokens of a prompt are kept.

    Attributes:
        capacity: tokens; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
    """

    capacity: Count | None = None
    ratio: Dropped | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)


def transform(plan: KnormPlan) -> Transform:
    """Give every attention layer a cache that keeps the tokens with the shortest keys."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(plan: KnormPlan, core: CausalCore, cache_length: CacheLength, layer: int) -> Kind:
    keep, own = budgets(plan.capacity, plan.ratio, cache_length.prompt)
    return KnormCache, {"keep": keep, "own": own}


class KnormCache(EvictingCache):
    """Keeps the tokens with the shortest keys."""

    def scores(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Float[Array, "B K S"]:
        return -jnp.linalg.norm(k.astype(jnp.float32), axis=-1).transpose(0, 2, 1)


def _identity(subject: testing.Subject) -> KnormPlan:
    return KnormPlan(ratio=0.0)


def _ladder(subject: testing.Subject) -> tuple[KnormPlan, ...]:
    return tuple(KnormPlan(ratio=ratio) for ratio in (0.25, 0.5, 0.75))


METHOD = Method(
    name="knorm",
    paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression, arXiv "
    "2406.11430",
    seams=("patches",),
    domain="language models",
    plan=KnormPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("KNorm",),
)
