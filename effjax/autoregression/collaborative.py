"""Collaborative decoding (CoDe, arXiv 2411.17787): a large VAR drafts, a small one refines.

    scales 0 ... N - 1     the drafter, as ever
    scale N                the refiner, in one call on the drafted scales and this one
    scales N + 1 ... K - 1 the refiner, as ever

Nothing is trained. The large maps, which are most of the tokens, cost the small model; what is
drafted decides what the image is. The refiner's first call has the inputs of the scales 0 ... N,
whose tokens see their own scale and those before; so it fills its caches, and only the logits of
scale N are computed. The drafter's caches hold the drafted scales alone, and are gone when the
refiner's are there.

With a drafter of d layers of width C, a refiner of d' and C', S_i tokens up to and with scale i, b
branches of guidance:

    keys and values    2 b max(S_(N-1) C d, S_(K-1) C' d') numbers of an image, not the sum
    attention          4 b (C d sum_(i<N) n_i S_i + C' d' sum_(i<K) n_i S_i) FLOPs
    linear layers      24 b (S_(N-1) C^2 d + S_(K-1) C'^2 d') FLOPs

`call_flops` and `peak_cache` have them whole. Ten scales and N = 8: the drafter makes 255 of 680
tokens and 40,698 of 286,434 pairs of attention.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.autoregression.next_scale import DATA, STATIC, NextScale
from effjax.context import Step
from effjax.forward import Forward, Params, StateDict
from effjax.layers.scales import Scales, token_starts
from effjax.models.var import VARConfig
from effjax.models.vqvae import averaged
from effjax.transform import Pair

DRAFTED = "drafted_codes"  # in the state: what the scales up to now were read from


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(*DATA, "refiner"),
    meta_fields=(*STATIC, "draft_scales"),
)
@dataclasses.dataclass(frozen=True, eq=False)
class Collaborative(NextScale):
    """The loop of two models; the one that it is called with is the drafter.

    Attributes:
        refiner: forward and parameters of the model that makes the last scales, of the same codes,
            maps and classes.
        draft_scales: N, how many scales are drafted; all of them leave nothing to refine.
    """

    refiner: Pair = dataclasses.field(kw_only=True)
    draft_scales: int = dataclasses.field(kw_only=True)

    @property
    def alone(self) -> NextScale:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(NextScale)}
        return NextScale(**own)

    @property
    def kept_scales(self) -> int:
        return self.draft_scales

    def check(self, forward: Forward) -> None:
        super().check(forward)
        if not 1 <= self.draft_scales <= self.calls:
            raise ValueError(
                f"draft_scales must be 1 ... {self.calls}, the number of scales (all of them leave "
                f"nothing to refine), got {self.draft_scales}"
            )
        refiner = self.refiner[0]
        try:
            super().check(refiner)
        except ValueError as error:
            raise ValueError(f"the refiner does not fit: {error}") from None
        classes = forward.config.num_classes, refiner.config.num_classes
        if classes[0] != classes[1]:
            raise ValueError(
                f"the drafter knows {classes[0]} classes, and the refiner {classes[1]}: they "
                f"belong to different data"
            )

    def network(
        self,
        forward: Forward,
        params: Params,
        state: StateDict,
        x: Float[Array, "B S S Z"],
        cond: Int[Array, " B"],
        uncond: Int[Array, " B"] | None,
        step: Step,
    ) -> tuple[Array, Array, StateDict]:
        scale, first = int(step), self.draft_scales
        if first == self.calls:
            return super().network(forward, params, state, x, cond, uncond, step)
        drafted = state[DRAFTED]
        if scale == first:
            codes = jnp.concatenate([drafted, averaged(x, self.patch_nums[scale])], axis=1)
            codes, labels = self.branches(codes, cond, uncond)
            inputs = codes, labels, Scales(self.patch_nums, 0, first + 1, wanted=first)
            own = self.ready(self.refiner[0]).init(self.refiner[1], *inputs, guidance=self.joined)
        else:
            inputs = self.inputs(x, cond, uncond, step)
            own = {name: value for name, value in state.items() if name != DRAFTED}
        pair, began = ((forward, params), 0) if scale < first else (self.refiner, first)
        options = {"step": scale - began, "guidance": self.joined}
        raw, own = self.ready(pair[0])(pair[1], own, *inputs, **options)
        if scale < first:
            codes = inputs[0] if self.joined is None else self.joined.branch("cond", inputs[0])
            start = token_starts(self.patch_nums)[scale]
            drafted = jax.lax.dynamic_update_slice_in_dim(drafted, codes, start, axis=1)
        return self.guide(raw, step), raw, {**own, DRAFTED: drafted}

    def handed(self, state: StateDict, scale: int) -> StateDict:
        refines = scale == self.draft_scales < self.calls
        return {DRAFTED: state[DRAFTED]} if refines else state

    def _state(
        self, forward: Forward, params: Params, x: Array, cond: Array, uncond: Any, scale: int
    ) -> StateDict:
        own = super()._state(forward, params, x, cond, uncond, scale)
        if self.draft_scales == self.calls:
            return own
        drafted = token_starts(self.patch_nums)[self.draft_scales]
        return {**own, DRAFTED: jnp.zeros((x.shape[0], drafted, x.shape[-1]), jnp.float32)}


def call_flops(config: VARConfig, scales: Scales, *, branches: int = 2) -> int:
    """FLOPs of the products of one call of a VAR for one image, in closed form.

    24 n C^2 d (with a feed-forward layer of 4 C; 8 n C^2 + 4 n C I in general) for the linear
    layers of the blocks, 4 C d sum n_i S_i for attention, 2 n' C V for the head of the wanted
    tokens, 2 n Z C to embed all but the start, and the modulation once, in the first call.

    Args:
        config: of the model.
        scales: of the call; those before are in its caches.
        branches: of guidance.
    """
    width, depth = config.hidden_size, config.num_layers
    ends = token_starts(scales.sides)
    pairs = sum(scales.sides[i] ** 2 * ends[i + 1] for i in range(scales.start, scales.stop))
    linear = scales.tokens * width * (8 * width + 4 * config.intermediate_size) * depth
    head = 2 * (scales.tokens - scales.unwanted) * width * config.vocab_size
    started = scales.sides[0] ** 2 if scales.start == 0 else 0
    embedding = 2 * (scales.tokens - started) * config.code_channels * width
    modulated = 6 if config.shared_modulation else 6 * depth
    modulation = 2 * (modulated + 2) * width**2 if scales.start == 0 else 0
    return branches * (linear + 4 * width * depth * pairs + head + embedding + modulation)


def peak_cache(
    drafter: VARConfig, refiner: VARConfig, draft_scales: int, *, branches: int = 2
) -> int:
    """Numbers that the keys and values of one image are at most, 2 b max(S C d, S' C' d')."""
    ends = token_starts(drafter.patch_nums)
    held = [ends[draft_scales] * drafter.hidden_size * drafter.num_layers]
    if draft_scales < len(drafter.patch_nums):
        held.append(ends[-1] * refiner.hidden_size * refiner.num_layers)
    return 2 * branches * max(held)
