"""The patch of LiteVAR: cores that see windows, and attention that branches of guidance share."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.context import Context
from effjax.forward import Forward, Params
from effjax.guidance import Guidance, current_guidance
from effjax.layers.attention import Heads, KeyHeads, attentions
from effjax.layers.scales import Outputs, ScaleAttention, ScaleCore, Scales, Values
from effjax.methods.attention.litevar.plan import NAME, LiteVARPlan, Sharing
from effjax.methods.quantization import round_to_nearest
from effjax.models.var import VAR
from effjax.targets import Wrapper, wrap
from effjax.transform import Pair, Transform
from pallas_kernels.block_mask import EVERYTHING, MultiDiagonal
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.quantized_attention import quantized_attention


def transform(plan: LiteVARPlan) -> Transform:
    """Run a model of scales by the plan.

    Raises:
        ValueError: if the model has other scales, layers or heads, or no layer of a role that the
            rules name; while tracing, if a call is not guided though the plan shares attention.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        own, planned = described(forward, params), (plan.patch_nums, plan.layers, plan.heads)
        if own != planned:
            names = "patch_nums", "layers", "heads"
            wrong = [f"{n} {a}, not {b}" for n, a, b in zip(names, own, planned) if a != b]
            raise ValueError(
                f"the plan of {NAME} (model {plan.model!r}) is for another model than this one, "
                f"which has {'; '.join(wrong)}. Search a plan for this model."
            )
        if plan.rules:
            rounded = round_to_nearest.RoundToNearestPlan(plan.rules)
            forward, params = round_to_nearest.transform(rounded).apply(forward, params)
        return forward.patch(LiteVAR(plan)), params

    return Transform(NAME, plan, apply)


def described(forward: Forward, params: Params) -> tuple[tuple[int, ...], int, int]:
    """Sides of the maps, attention layers and heads of a model of scales.

    Raises:
        ValueError: for another model.
    """
    layers = attentions(forward.module(params), "scales")
    if not layers or not issubclass(forward.model, VAR):
        raise ValueError(
            f"{NAME} is for models that predict maps of tokens scale by scale (VAR), got a "
            f"{forward.model.__name__}"
        )
    config = forward.config
    return config.patch_nums, len(layers), config.num_heads


@dataclasses.dataclass(frozen=True)
class LiteVAR:
    """The patch: every attention over scales follows its part of the plan."""

    plan: LiteVARPlan

    def __call__(self, module: nnx.Module, context: Context) -> None:
        plan = self.plan
        for target, rules in zip(attentions(module, "scales"), plan.rules_of_attention):
            options = rules, plan.attention_bits, plan.renormalize
            wrap(module, f"{target.path}.core", WindowedCore, *options)
            if plan.share != "none":
                wrap(module, target.path, SharedAttention, plan.share)


class SharedAttention(Wrapper):
    """Attention of which the unconditional branch takes a part from the conditional one.

    What the scales before it left are keys of the conditional branch alone, and of outputs its
    values too.

    Args:
        share: "map" or "output".
    """

    replaces_internals = True
    inner: ScaleAttention

    def __init__(self, inner: nnx.Module, share: Sharing):
        super().__init__(inner)
        self.share: Sharing = share

    def __call__(self, x: Float[Array, "B S C"], scales: Scales) -> Float[Array, "B S C"]:
        guidance, attention = _shared(self.share), self.inner
        own = guidance.branch("cond", x)
        if self.share == "output":
            o = attention.core(*attention.project(own), scales)
            return guidance.duplicate(attention.merge(o, own))
        q, k = attention.compared(own, own)
        values = guidance.split(attention.split(attention.to_v(x)))
        # One map for the values of all branches, which stand beside each other.
        o = attention.core(q, k, jnp.concatenate(list(values.values()), axis=-1), scales)
        parts = jnp.split(o, len(values), axis=-1)
        return attention.merge(guidance.join(dict(zip(values, parts))), x)


def _shared(share: Sharing) -> Guidance:
    """The branches of this call.

    Raises:
        ValueError: if there is nothing to share with, or a branch that is to differ.
    """
    guidance = current_guidance()
    if guidance is None:
        raise ValueError(
            f'the plan of {NAME} shares attention over guidance (share="{share}"), but this call '
            f'is not guided. Sample with guidance above 0, or take a plan with share="none".'
        )
    if others := sorted({*guidance.branches} - {"cond", "uncond"}):
        raise ValueError(
            f"the plan of {NAME} gives all branches the attention of the conditional one, but this "
            f'call has {", ".join(others)} too. Take a plan with share="none".'
        )
    return guidance


class WindowedCore(Wrapper):
    """Attention of each scale to the windows that its heads have on the scales before and itself.

    Args:
        rules: what tokens of every scale see, None for all keys.
        bits: of queries, keys, probabilities and values, 16 for floats.
        renormalize: see the plan.
    """

    replaces_internals = True
    inner: ScaleCore

    def __init__(
        self,
        inner: nnx.Module,
        rules: tuple[MultiDiagonal | None, ...],
        bits: int,
        renormalize: bool,
    ):
        super().__init__(inner)
        self.rules, self.bits, self.renormalize = rules, bits, renormalize

    def __call__(self, q: Heads, k: KeyHeads, v: Values, scales: Scales) -> Outputs:
        read = range(scales.start, scales.stop)
        if self.bits == 16 and all(self.rules[scale] is None for scale in read):
            return self.inner(q, k, v, scales)
        parts, begin = [], 0
        for scale in read:
            own = Scales(scales.sides, scale, scale + 1)
            end, keys = begin + own.tokens, own.before + own.tokens
            parts.append(self._attend(q[:, begin:end], k[:, :keys], v[:, :keys], own))
            begin = end
        return jnp.concatenate(parts, axis=1)

    def _attend(self, q: Heads, k: KeyHeads, v: Values, scales: Scales) -> Outputs:
        """Of one scale."""
        rule, single = self.rules[scales.start], k.shape[1] == 1
        if single or (rule is None and self.bits == 16):
            return self.inner(q, k, v, scales)
        attend: Any = partial(block_sparse_attention, return_lse=True)
        if self.bits != 16:
            options = {"bits": self.bits, "values": f"int{self.bits}", "smooth": False}
            attend = partial(quantized_attention, return_lse=True, **options)
        with jax.named_scope("attention"):
            out, lse = attend(q, k, v, EVERYTHING if rule is None else rule)
            if not self.renormalize and rule is not None:
                _, whole = attend(q, k, v, EVERYTHING)
                out = (out * jnp.exp(lse - whole)[..., None]).astype(out.dtype)
            return out
