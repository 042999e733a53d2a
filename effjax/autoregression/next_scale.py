"""Sampling scale by scale (VAR, arXiv 2404.02905): one call for each map of tokens.

    x = 0                                             latents, the sum of what all scales make
    for i in 0 ... K - 1:
        z = model(area(x, p_i), labels)               all tokens of scale i at once
        t = guidance i / (K - 1);  z = (1 + t) z_cond - t z_uncond
        tokens = draw(top_p(top_k(z)) / temperature)
        x += phi_i(bicubic(codebook[tokens]))

Guidance grows from scale to scale, and the first scale has none: the published numbers (1.5 for
measurements, 4 for pictures) are that of the last scale, and 0 means none. With `more_smooth` a
code is a mixture of all codes: exp((z (1 + r) + Gumbel noise) / tau), normalized, with r = i / (K -
1) and tau = max(0.27 (1 - 0.95 r), 0.005). That is for pictures, not for measurements.

All scales are one program of K calls, whose shapes differ. Keys and values of a scale are kept
where its place in the sequence is; nothing that depends on the label alone is computed twice.

FLOPs of an image, with d layers of width C and b branches of guidance: 24 b n C^2 d for each scale
of n tokens (linear layers), 4 b n S C d (attention to S tokens), 2 b n C V (head), and 12 b C^2 d
once (modulation).
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.autoregression.maps import MapLoop, check_kept
from effjax.caches import ScaleCaches
from effjax.context import PyTree, Step, is_static
from effjax.finite import token_or_none
from effjax.forward import Forward, Params, StateDict
from effjax.generate import Sampling, process_logits
from effjax.layers.scales import Scales, Sides, token_starts, whole_scales
from effjax.loops import Carry
from effjax.models.var import VAR
from effjax.models.vqvae import MultiScaleQuantizer, VQVAEConfig, averaged, quantizer_of
from effjax.samplers import sample_keys
from effjax.transform import Pair

DATA = ("vae", "guidance", "top_p", "temperature")  # of the fields of the loop
STATIC = ("patch_nums", "top_k", "more_smooth")


@partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=STATIC)
@dataclasses.dataclass(frozen=True, eq=False)
class NextScale(MapLoop):
    """The loop that samples latents scale by scale.

    `jax.jit(loop)(forward, params, labels, key)` gives the latents of images, float32[B, s, s, Z].
    Numbers that are data (guidance, top_p, temperature) do not compile again where the loop is an
    argument of a program.

    Attributes:
        vae: forward and parameters of the VQVAE whose codes the model predicts.
        patch_nums: sides of the maps of tokens, those of the model.
        guidance: t of the last scale; None for no guidance, which halves the cost.
        top_k: draw among the k likeliest tokens, and those as likely as the last; None for all.
        top_p: draw among the likeliest tokens whose probabilities reach this sum; None for all.
        temperature: divides the logits of the tokens that are left: a number, or one for each
            scale.
        more_smooth: mix codes in place of drawing them.
    """

    vae: Pair
    patch_nums: Sides
    guidance: float | Array | None = None
    top_k: int | None = None
    top_p: float | Array | None = None
    temperature: float | Array | tuple[float, ...] | None = None
    more_smooth: bool = False

    @property
    def calls(self) -> int:
        """Number of scales."""
        return len(self.patch_nums)

    @property
    def kept_scales(self) -> int:
        """Scales whose keys and values the model keeps that the loop is called with."""
        return self.calls

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: Int[Array, " B"],
        key: Any = None,
        *,
        uncond: Int[Array, " B"] | None = None,
    ) -> Carry:
        """Latents of zeros, no tokens, empty caches and the keys.

        Raises:
            ValueError: if model and VQVAE do not belong together, or for a `top_k` above the
                number of codes.
        """
        self.check(forward)
        forward.check_calls(self.calls)
        batch, last = cond.shape[0], self.patch_nums[-1]
        x = jnp.zeros((batch, last, last, forward.config.code_channels), jnp.float32)
        uncond = self.unconditional(forward, cond, uncond)
        state = self._state(forward, params, x, cond, uncond, 0)
        if forward.patches:
            last = self._state(forward, params, x, cond, uncond, self.kept_scales - 1)
            check_kept(forward, state, last)
        tokens = jnp.zeros((batch, token_starts(self.patch_nums)[-1]), jnp.int32)
        return Carry(x, tokens, state, sample_keys(key, batch))

    def after(
        self,
        forward: Forward,
        params: Params,
        tokens: Int[Array, "B P"],
        cond: Int[Array, " B"],
        key: Array,
        *,
        uncond: Int[Array, " B"] | None = None,
        stop: int | None = None,
    ) -> Carry:
        """Sample what follows given tokens, which are read in the first call.

        Args:
            tokens: of the first scales; none of them, [B, 0], to begin at the first.
            stop: the scale before which to stop; all are sampled if None.

        Raises:
            ValueError: for a number of tokens that whole scales do not have, if nothing is left to
                sample, and for given tokens in a loop of two models.
        """
        stop = self.calls if stop is None else stop
        carry = self.init(forward, params, cond, key, uncond=uncond)
        if not tokens.shape[1]:
            return self.run(forward, params, carry, cond, uncond, stop=stop)
        if self.alone is not self:
            raise ValueError(
                "two models sample from the first scale on: what follows given tokens is sampled "
                "by one of them, without a refiner"
            )
        scale = whole_scales(self.patch_nums, tokens.shape[1])
        if not scale < stop <= self.calls:
            raise ValueError(
                f"tokens of {scale} scales are given, and sampling stops before scale {stop} of "
                f"{self.calls}: nothing is left to sample"
            )
        uncond = self.unconditional(forward, cond, uncond)
        quantizer = quantizer_of(*self.vae)
        x = quantizer.partial_sums(tokens, self.patch_nums)[-1]
        read = codes_of(quantizer, tokens, self.patch_nums)
        codes = jnp.concatenate([read, averaged(x, self.patch_nums[scale])], axis=1)
        codes, labels = self.branches(codes, cond, uncond)
        inputs = codes, labels, Scales(self.patch_nums, 0, scale + 1)
        ready, options = self.ready(forward), {"step": 0, "guidance": self.joined}
        raw, state = ready(params, carry.state, *inputs, **options)
        memory = jax.lax.dynamic_update_slice_in_dim(carry.memory, tokens, 0, axis=1)
        carry = carry._replace(x=x, memory=memory, state=state)
        out = self.output(raw[:, tokens.shape[1] :], x, scale)
        carry = self.update(carry, out, scale)
        return self.run(forward, params, carry, cond, uncond, start=scale + 1, stop=stop)

    def _state(
        self, forward: Forward, params: Params, x: Array, cond: Array, uncond: Any, scale: int
    ) -> StateDict:
        """An initial state, as a call of a scale shapes it."""
        inputs = self.inputs(x, cond, uncond, scale)
        return self.ready(forward).init(params, *inputs, guidance=self.joined)

    def check(self, forward: Forward) -> None:
        """Raise what `init` raises of the loop and the model."""
        config, codes = forward.config, self.vae[0].config
        if not issubclass(forward.model, VAR) or not isinstance(codes, VQVAEConfig):
            raise ValueError(
                f"scales are sampled of a VAR with its VQVAE, got {forward.model.__name__} and "
                f"{self.vae[0].model.__name__}"
            )
        if config.patch_nums != self.patch_nums:
            raise ValueError(
                f"the model has maps of the sides {config.patch_nums}, and the loop is for "
                f"{self.patch_nums}: give patch_nums=forward.config.patch_nums"
            )
        theirs = codes.vocab_size, codes.latent_channels
        if theirs != (config.vocab_size, config.code_channels):
            raise ValueError(
                f"the VQVAE has {theirs[0]} codes of {theirs[1]} channels, and the model predicts "
                f"{config.vocab_size} of {config.code_channels}: they belong to different models"
            )
        if self.top_k is not None and not 1 <= self.top_k <= config.vocab_size:
            raise ValueError(
                f"top_k must be 1 ... {config.vocab_size}, the number of codes, or None for all; "
                f"got {self.top_k}"
            )
        given = self.temperature
        shape = (len(given),) if isinstance(given, tuple) else getattr(given, "shape", ())
        if shape not in ((), (self.calls,)):
            raise ValueError(
                f"temperature is a number, or one for each of {self.calls} scales; got "
                f"{self.temperature}"
            )

    def inputs(
        self,
        x: Float[Array, "B S S Z"],
        cond: Int[Array, " B"],
        uncond: Int[Array, " B"] | None,
        step: Step,
    ) -> tuple[Float[Array, "N T Z"], Int[Array, " N"], Scales]:
        """What the latents are at the tokens of a scale, labels, and which scale it is."""
        if not is_static(step):
            raise ValueError("scales differ in their numbers of tokens: a call's step is static")
        scale = int(step)
        codes, labels = self.branches(averaged(x, self.patch_nums[scale]), cond, uncond)
        kept = self.kept_scales if scale < self.kept_scales < self.calls else None
        return codes, labels, Scales(self.patch_nums, scale, scale + 1, kept=kept)

    def whole(
        self, carry: Carry, cond: Int[Array, " B"], uncond: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "N L Z"], Int[Array, " N"], Scales]:
        codes = codes_of(quantizer_of(*self.vae), carry.memory, self.patch_nums)
        codes, labels = self.branches(codes, cond, uncond)
        return codes, labels, Scales(self.patch_nums, 0, self.calls)

    def branches(
        self, codes: Float[Array, "B T Z"], cond: Int[Array, " B"], uncond: Int[Array, " B"] | None
    ) -> tuple[Float[Array, "N T Z"], Int[Array, " N"]]:
        """Codes and labels of all branches of guidance."""
        if self.joined is None:
            return codes, cond
        return self.joined.duplicate(codes), self.joined.join({"cond": cond, "uncond": uncond})

    def output(
        self, raw: Float[Array, "N T V"], x: Float[Array, "B S S Z"], step: Step
    ) -> Float[Array, "B T V"]:
        """The guided logits of a scale."""
        return self.guide(raw, step)

    def guide(self, raw: Float[Array, "N T V"], step: Step) -> Float[Array, "B T V"]:
        """The guided logits (1 + t) cond - t uncond of a scale."""
        if self.joined is None or self.guidance is None:
            return raw
        parts = self.joined.split(raw.astype(jnp.float32))
        t = jnp.asarray(self.guidance, jnp.float32) * self.progress(step)
        return (1 + t) * parts["cond"] - t * parts["uncond"]

    def progress(self, step: Step) -> float:
        """i / (K - 1): 0 for the first scale, 1 for the last one."""
        return int(step) / max(self.calls - 1, 1)

    def update(self, carry: Carry, out: Float[Array, "B T V"], step: Step) -> Carry:
        """Draw the tokens of a scale, and add what they make to the latents."""
        scale, quantizer = int(step), quantizer_of(*self.vae)
        logits = process_logits(out, Sampling(top_k=self.top_k, top_p=self.top_p))
        keys = jax.vmap(lambda key: jax.random.fold_in(key, scale))(carry.keys)
        tokens = self.draw(keys, self.tempered(logits, scale))
        vectors = quantizer.vectors(tokens)
        if self.more_smooth:
            vectors = self._mixed(keys, logits, scale, quantizer)
        start = token_starts(self.patch_nums)[scale]
        memory = jax.lax.dynamic_update_slice_in_dim(carry.memory, tokens, start, axis=1)
        x = carry.x + quantizer.enlarged(vectors, scale, self.patch_nums)
        return carry._replace(x=x, memory=memory)

    def draw(self, keys: Array, logits: Float[Array, "B T V"]) -> Int[Array, "B T"]:
        """Draw the tokens of a scale; the keys are its own, one for each sample."""
        drawn = jax.vmap(jax.random.categorical)(keys, logits)
        return token_or_none(drawn.astype(jnp.int32), logits)

    def tempered(self, logits: Float[Array, "B T V"], scale: int) -> Float[Array, "B T V"]:
        """Logits divided by the temperature of a scale."""
        if self.temperature is None:
            return logits
        temperature = jnp.asarray(self.temperature, jnp.float32)
        return logits / (temperature[scale] if temperature.ndim else temperature)

    def _mixed(
        self, keys: Array, logits: Float[Array, "B T V"], scale: int, quantizer: MultiScaleQuantizer
    ) -> Float[Array, "B T Z"]:
        progress = self.progress(scale)
        keys = jax.vmap(lambda key: jax.random.fold_in(key, self.calls))(keys)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        sharpness = max(0.27 * (1 - 0.95 * progress), 0.005)
        weights = jax.nn.softmax((logits * (1 + progress) + noise) / sharpness, axis=-1)
        return jnp.einsum("btv,vz->btz", weights, quantizer.codes())

    def ready(self, forward: Forward, cond: PyTree = None) -> Forward:
        """The forward with caches."""
        if any(isinstance(patch, ScaleCaches) for patch in forward.patches):
            return forward
        return forward.patch(ScaleCaches())


def codes_of(
    quantizer: MultiScaleQuantizer, tokens: Int[Array, "B L"], patch_nums: Sides
) -> Float[Array, "B L Z"]:
    """What a model reads to predict the tokens of whole scales, from the first one on.

    For each token the latents of all scales before its own, averaged to its place; zeros for the
    first scale.
    """
    sums = quantizer.partial_sums(tokens, patch_nums)
    first = jnp.zeros((tokens.shape[0], patch_nums[0] ** 2, sums[0].shape[-1]), jnp.float32)
    later = [averaged(each, side) for each, side in zip(sums, patch_nums[1 : len(sums)])]
    return jnp.concatenate([first, *later], axis=1)


def teacher_forced(
    forward: Forward, params: Params, vae: Pair, tokens: Int[Array, "B L"], labels: Int[Array, " B"]
) -> Float[Array, "B L V"]:
    """Logits of given tokens, all scales in one call.

    Args:
        forward: a VAR without caches.
        params: its parameters.
        vae: forward and parameters of its VQVAE.
        tokens: of whole scales, from the first one on.
        labels: class of each image, `num_classes` for none.
    """
    codes = codes_of(quantizer_of(*vae), tokens, forward.config.patch_nums)
    return forward(params, {}, codes, labels)[0]
