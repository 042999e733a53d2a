"""Pipelines of models that make images in stages of resolution: ECAR."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.autoregression import NextStage
from effjax.buckets import by_parts
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.models import vq_model
from effjax.models.vq_model import VQModelConfig
from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.diffusion import Images, OnStepEnd, OutputType
from effjax.pipelines.family import StageFamily, decode_latents
from effjax.pipelines.labels import Label, OfClasses
from effjax.pipelines.loading import Components, check_decodes
from effjax.pipelines.looped import LoopPipeline
from effjax.transform import Pair


@dataclasses.dataclass(frozen=True, repr=False)
class NextStagePipeline(OfClasses, LoopPipeline):
    """A class-conditional model of stages (ECAR), with the VAE of its latents if it has one.

    Call it with class indices or names to get images of these classes.

        pipe = effjax.pipeline("experiments/weights/ecar_glyphs")
        images = pipe(["A", 7], key=jax.random.key(0))

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the autoencoder of its latents, an `AutoencoderKL` or a
            `VQModel` whose latents are not rounded to codes; None for a model of pixels.
        names: see `OfClasses`.
    """

    vae: Pair | None = None
    family: StageFamily = dataclasses.field(default=cast(Any, None), kw_only=True, repr=False)

    OUTPUTS = get_args(OutputType)
    SETTINGS: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale")

    def __post_init__(self) -> None:
        super().__post_init__()
        channels = self.forward.config.in_channels
        if self.vae is None and channels not in (1, 3):
            raise ValueError(
                f"this model makes latents of {channels} channels, no pixels: give the VAE that "
                f"decodes them, such as vae=converters.from_pretrained(...)"
            )
        check_decodes(self.vae, channels)

    @classmethod
    def of(cls, found: Components) -> NextStagePipeline:
        """Load from components.

        Raises:
            ValueError: for components that are missing or belong to different models.
        """
        family = found.family
        assert isinstance(family, StageFamily)
        found.require(family.model)
        names, pair = cls.names_of(found), found.model(family.model)
        vae = found.model(family.vae) if found.has(family.vae) else None
        return cls(*pair, vae=vae, names=names, origin=found.origin, family=family)

    def sampler(
        self,
        *,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
    ) -> NextStage:
        """Make the loop that a call uses.

        The arguments are those of a call.

        Raises:
            ValueError: for numbers out of range, or of another number of stages.
        """
        config, family = self.forward.config, self.family
        steps = self._by_stage(
            "num_inference_steps", family.steps, num_inference_steps, arguments.count
        )
        scales = self._by_stage("guidance_scale", family.guidance, guidance_scale, arguments.scale)
        if isinstance(scales, tuple):
            guidance = None if all(scale == 1 for scale in scales) else scales
        else:
            guidance = None if scales == 1 else scales
        steps = steps if isinstance(steps, tuple) else (steps,) * config.num_stages
        loop = NextStage(config.stages, config.in_channels, steps, guidance=guidance)
        loop.check(self.forward)
        return loop

    def _by_stage(self, name: str, default: Any, given: Any, read: Any) -> Any:
        """A number, or a tuple of one for each stage."""
        given, count = default if given is None else given, self.forward.config.num_stages
        return arguments.by_place(name, given, count, "stages", read)

    @runs_executables
    def __call__(
        self,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | Sequence[int] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Images:
        """Generate images of classes.

        Args:
            labels: one or more class indices or names.
            key: PRNG key, `jax.random.key(seed)`. The same key gives the same image at its place.
            num_images_per_prompt: images of each label. All of the first label come first, then all
                of the second, ...
            num_inference_steps: steps of the flow of each stage: one number for all, or one for
                each. None takes the family's (8).
            guidance_scale: strength of guidance of the last stage; it grows from 1 (none) at the
                first one. Several numbers are those of the stages. 1 means no guidance, at half the
                cost. None takes the family's (3).
            output_type: "pil" for PIL images, "np" for float32[images, H, W, C] in 0 ... 1,
                "latent" for the samples float32[images, H, W, C] before they are decoded.
            progress: show a bar over the parts of a batch.
            callback_on_step_end: called as `callback_on_step_end(call, latents)` after every call
                of the backbone and of the head; if it returns latents, sampling goes on from those.
                Latents have their full size all the time.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, and numbers out of range.
            TypeError: if `key` is not a key.
        """
        asked = arguments.listed("labels", labels)
        loop = self.sampler(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale)
        return self.drawn(
            loop,
            asked,
            key=key,
            repeats=num_images_per_prompt,
            output_type=output_type,
            progress=progress,
            callback=callback_on_step_end,
        )

    def decode(self, x: jax.Array) -> jax.Array:
        """Decode samples [B, H, W, C] into images, float32 in about -1 ... 1."""
        if self.vae is None:
            return x
        latents = x / self.forward.config.latent_scale
        return by_parts(partial(_decode, *self.vae), self.buckets, latents)


@Program
def _decode(forward: Forward, params: Params, latents: Array) -> Array:
    decode = vq_model.decode if isinstance(forward.config, VQModelConfig) else decode_latents
    return decode(forward, params, latents).astype(jnp.float32)
