"""KIVI: keys and values as 8 or 4-bit values, keys by channel and values by token.

Use it where all tokens must stay and bytes matter: a quarter to a seventh of a float32 cache, half
to two sevenths of a bfloat16 cache, and as much less traffic when a token attends to it. Some
channels of the keys are large for all tokens; with a scale for each channel they lose little.
Values have no such channels, and have a scale for each token.

A sequence is cut into windows of G tokens (`group`). A window is quantized as a whole when it is
full; the tokens of the window that is not full yet stay floats:

    k = (q + 2^(b-1)) s_c + min_c    for each channel c, over the window's tokens
    v = (q + 2^(b-1)) s_t + min_t    for each token t, over a head's channels

Bits and G are static; scales are found at run time. The prompt attends to all of itself, exactly.
Later tokens see quantized values.

Cost: (b_k + b_v) / 2 / 16 of a bfloat16 cache. Besides, each head has two float32 for a channel of
the keys in each window, two float32 for a token of the values, and one window of floats.

Source: KIVI, arXiv 2402.02750, with a residual that is quantized as a whole (Algorithm 1 with
R = G).
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from jaxtyping import Array, Float

from effjax import testing
from effjax.caches import Caches, Kind, Lengths, ResidualBufferCache
from effjax.caches.install import Place
from effjax.caches.quantization import pack, to_qvalues
from effjax.caches.residual_buffer import Arrays, Tokens
from effjax.context import CacheLength
from effjax.fields import Count, OneOf
from effjax.forward import Forward, Params
from effjax.layers.attention import Heads, Outputs
from effjax.transform import Method, Pair, Plan, Transform
from pallas_kernels.decode_attention import quantized_decode_attention

Bits = Annotated[int, OneOf(4, 8)]


@dataclasses.dataclass(frozen=True)
class KIVIPlan(Plan):
    """Bits of keys and values.

    Attributes:
        key_bits, value_bits: 8 or 4.
        group: tokens of a window: those that share the scales of the keys, and the most that stay
            floats.
    """

    key_bits: Bits = 4
    value_bits: Bits = 4
    group: Count = 32


def transform(plan: KIVIPlan) -> Transform:
    """Give every attention layer a cache of quantized values."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.patch(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(plan: KIVIPlan, place: Place) -> Kind:
    return KIVICache, {"plan": plan}


class KIVICache(ResidualBufferCache):
    """Sealed windows as quantized values."""

    def __init__(self, inner: Any, *, plan: KIVIPlan, first: bool, cache_length: CacheLength):
        names = [f"{of}{part}" for of in "kv" for part in ("", "_scale", "_offset")]
        super().__init__(
            inner, window=plan.group, sealed=names, first=first, cache_length=cache_length
        )
        self.plan = plan

    def seal(self, tokens: Tokens) -> Arrays:
        k, v = tokens["k"], tokens["v"]
        by_window = k.reshape(k.shape[0], -1, self.window, *k.shape[2:])
        k_qvalues, k_scale, k_offset = to_qvalues(by_window, self.plan.key_bits, axis=2)
        v_qvalues, v_scale, v_offset = to_qvalues(v, self.plan.value_bits, axis=3)
        return {
            "k": pack(k_qvalues.reshape(k.shape), self.plan.key_bits),
            "v": pack(v_qvalues, self.plan.value_bits),
            "k_scale": k_scale[:, :, 0],
            "k_offset": k_offset[:, :, 0],
            "v_scale": v_scale,
            "v_offset": v_offset,
        }

    def attend_sealed(
        self, q: Heads, sealed: Arrays, lengths: Lengths
    ) -> tuple[Outputs, Float[Array, "B S H"]]:
        qvalues: dict[str, Any] = dict(sealed)
        out, log_sum_exps = quantized_decode_attention(
            q, lengths=lengths, return_lse=True, **qvalues
        )
        return out, log_sum_exps


def _identity(subject: testing.Subject) -> KIVIPlan:
    return KIVIPlan(group=1 << 20)  # no window is ever full


def _ladder(subject: testing.Subject) -> tuple[KIVIPlan, ...]:
    return tuple(KIVIPlan(k, v, group=4) for k, v in ((8, 8), (8, 4), (4, 4)))


METHOD = Method(
    name="kivi",
    paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750",
    seams=("patches",),
    domain="language models",
    plan=KIVIPlan,
    transform=transform,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
    systems=("KIVI",),
)
