"""SnapKV: keep the tokens of a prompt that its last tokens attend to.

Use it where a prompt is long and ends with the question: what the end of the prompt attends to is
what the answer will need. A question that is asked later, with a prefix cache, is not seen when
tokens are chosen.

    A = softmax(Q_w K^T / sqrt(D))            the last w queries of the prompt, causal
    s_t = mean over these queries and the query heads of a key head of A_t, then a moving average
          over neighboring tokens
    kept: the last w tokens, and the tokens of highest s

The number of kept tokens, w (`window`) and the width of the average (`kernel`) are static; which
tokens are kept is decided at run time. The prompt attends to all of itself, and all tokens that
follow are kept.

Cost: (kept + new) / (prompt + new) of the dense cache. The attention of w queries to the prompt is
computed a second time.

Source: SnapKV, arXiv 2404.14469. With grouped heads, scores are averaged over the query heads of a
key head; the reference copies keys for every query head instead, and so loses what grouping saves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.caches import AttentionInputs
from effjax.caches.pressed import Scores
from effjax.caches.slots import lengths_after
from effjax.fields import Count
from effjax.methods.cache import press


@dataclasses.dataclass(frozen=True)
class SnapKVPlan(press.PressPlan):
    """How many tokens of a prompt are kept, and by what.

    Attributes:
        capacity: tokens, the window's included; or None, for
        ratio: the share of the prompt that is dropped; half of it if neither is given.
        window: last tokens of the prompt, which look and are always kept.
        kernel: tokens over which scores are averaged, odd.
    """

    window: Count = 32
    kernel: Count = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel must be odd, got {self.kernel}")

    @property
    def always(self) -> Mapping[str, int]:
        return {"window": self.window}

    def score(self, inputs: AttentionInputs) -> Scores:
        weights, in_window = last_attention(inputs, self.window)
        scores = jnp.mean(weights, axis=(2, 3))
        scores = jnp.where(in_window, 0.0, scores)  # the window is left out before smoothing
        window = (1, 1, self.kernel)
        smooth = jax.lax.reduce_window(scores, 0.0, jax.lax.add, window, (1, 1, 1), "SAME")
        return jnp.where(in_window, jnp.inf, smooth / self.kernel)


def last_attention(
    inputs: AttentionInputs, window: int
) -> tuple[Float[Array, "B K G W S"], Bool[Array, "B 1 S"]]:
    """How a prompt's last tokens attend to it, by key head, and which tokens these are.

    A row that is shorter than the window has its first token in place of those that it lacks.
    """
    q, k, positions = inputs.rotated_q, inputs.rotated_k, inputs.positions
    (batch, columns, heads, width), lengths = k.shape, lengths_after(positions)
    window = min(window, columns)
    wanted = lengths[:, None] - window + jnp.arange(window)
    first = jnp.argmax(positions >= 0, axis=1)[:, None]
    column = jnp.clip(jnp.maximum(wanted, 0) + first, 0, columns - 1)
    q = jnp.take_along_axis(q, column[:, :, None, None], axis=1)
    q = q.reshape(batch, window, heads, -1, width) * jnp.asarray(width**-0.5, q.dtype)
    logits = jnp.einsum("bwkgd,btkd->bkgwt", q, k, preferred_element_type=jnp.float32)
    seen = (positions >= 0)[:, None] & (positions[:, None] <= wanted[:, :, None])
    logits = jnp.where(seen[:, None, None], logits, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen[:, None, None], jax.nn.softmax(logits, axis=-1), 0.0)
    return weights, (positions >= (lengths - window)[:, None])[:, None]


METHOD = press.method(
    "snap_kv",
    "SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469",
    SnapKVPlan,
    systems=("SnapKV",),
    window=2,
)
transform = METHOD.transform
