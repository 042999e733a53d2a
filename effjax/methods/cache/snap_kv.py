"""SnapKV: keep the tokens of a prompt that its last tokens attend to.

Buys: a share of the prompt's keys and values. What the end of a prompt (the question, if it stands
there) looks at is what the answer will need.

    A = softmax(Q_w K^T / sqrt(D))            the last w queries of the prompt, causal
    s_t = mean over queries and query heads of A, smoothed over neighboring tokens
    kept: the last w tokens, and those of highest s

Static: how many tokens are kept, w, the smoothing. Dynamic: which. The prompt itself attends to all
of itself; tokens that follow are all kept. Cost: (kept + new) / (prompt + new) of the dense cache;
w queries are scored a second time.

Source: SnapKV, arXiv 2404.14469. With grouped heads, scores are averaged over the query heads of a
key head (the reference expands the keys instead, and loses what grouping saves).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from effjax import testing
from effjax.context import CacheLength
from effjax.fields import Count
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
class SnapKVPlan(Plan):
    """How many tokens of a prompt are kept, and by what.

    Attributes:
        capacity: tokens, the window's included; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        window: last tokens of the prompt, which look and are always kept.
        kernel: tokens over which scores are averaged, odd.
    """

    capacity: Count | None = None
    ratio: Dropped | None = None
    window: Count = 32
    kernel: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")
        check_budget(self, window=self.window)


def transform(plan: SnapKVPlan) -> Transform:
    """Give every attention layer a cache that keeps what the prompt's end attends to."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(plan: SnapKVPlan, core: CausalCore, cache_length: CacheLength, layer: int) -> Kind:
    keep, own = budgets(plan.capacity, plan.ratio, cache_length.prompt, always=plan.window)
    options = {"window": plan.window, "kernel": plan.kernel}
    return SnapKVCache, {"keep": keep, "own": own, **options}


class SnapKVCache(EvictingCache):
    """Keeps the tokens that the prompt's last ones attend to."""

    def __init__(self, inner: Any, *, window: int, kernel: int, **options: Any):
        super().__init__(inner, **options)
        self.window = window
        self.kernel = kernel

    def scores(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Float[Array, "B K S"]:
        batch, columns, heads, width = k.shape
        lengths, window = lengths_after(positions), min(self.window, columns)
        # The last tokens of each row; a shorter row's first one stands in for those it lacks.
        wanted = lengths[:, None] - window + jnp.arange(window)
        first = jnp.argmax(positions >= 0, axis=1)[:, None]
        place = jnp.clip(jnp.maximum(wanted, 0) + first, 0, columns - 1)
        own = jnp.take_along_axis(q, place[:, :, None, None], axis=1)
        own = self.core.rotary(own, jnp.maximum(wanted, 0))
        own = own.reshape(batch, window, heads, -1, width) * jnp.asarray(width**-0.5, q.dtype)
        keys = self.core.rotary(k, positions)
        logits = jnp.einsum("bwkgd,btkd->bkgwt", own, keys, preferred_element_type=jnp.float32)
        seen = (positions >= 0)[:, None] & (positions[:, None] <= wanted[:, :, None])
        logits = jnp.where(seen[:, None, None], logits, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
        scores = jnp.mean(weights, axis=(2, 3))
        in_window = (positions >= (lengths - window)[:, None])[:, None]
        scores = jnp.where(in_window, 0.0, scores)  # the window is left out before smoothing
        smooth = jax.lax.reduce_window(
            scores, 0.0, jax.lax.add, (1, 1, self.kernel), (1, 1, 1), "SAME"
        )
        return jnp.where(in_window, jnp.inf, smooth / self.kernel)


def _identity(subject: testing.Subject) -> SnapKVPlan:
    return SnapKVPlan(ratio=0.0, window=2)


def _ladder(subject: testing.Subject) -> tuple[SnapKVPlan, ...]:
    return tuple(SnapKVPlan(ratio=ratio, window=2) for ratio in (0.25, 0.5, 0.75))


METHOD = Method(
    name="snap_kv",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469",
    seams=("patches",),
    domain="language models",
    plan=SnapKVPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("SnapKV",),
)
