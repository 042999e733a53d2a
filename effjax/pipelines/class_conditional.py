"""Class-conditional pipelines: images of classes by index or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.diffusion import Images, OnStepEnd, OutputType, Pipeline, strength_of
from effjax.pipelines.labels import Label, OfClasses
from effjax.pipelines.loading import Components


@dataclasses.dataclass(frozen=True, repr=False)
class ClassConditionalPipeline(OfClasses, Pipeline):
    """A class-conditional diffusion model (diffusers' DiTPipeline).

    Call it with class indices or names to get images of these classes.

    Attributes:
        names: see `OfClasses`.
    """

    @classmethod
    def of(cls, found: Components) -> ClassConditionalPipeline:
        """Load from components."""
        return cls(**cls.shared(found), names=cls.names_of(found))

    @runs_executables
    def __call__(
        self,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        latents: jax.Array | np.ndarray | None = None,
        image: Any = None,
        strength: float | None = None,
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
            num_inference_steps: denoising steps. None takes those of the plan, else of the family
                (50).
            guidance_scale: strength of guidance; 1 means no guidance. None takes that of the plan,
                else of the family (4.0).
            latents: unit noise [images, H, W, C] to start from, in place of the key's. The schedule
                scales it as it would its own.
            image: image to change, in place of starting from noise alone: a PIL image, which is
                resized, or an array [H, W, C] of uint8 or floats in 0 ... 1; one for all, or one
                for each image that is made.
            strength: share of the steps that change it, above 0 and at most 1; None is 0.6.
            output_type: "pil" for PIL images, "np" for float32[images, H, W, 1 or 3] in 0 ... 1,
                "latent" for the samples float32[images, H, W, C] before they are decoded.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`; if it returns
                latents, sampling goes on from those.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for latents or images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, or steps that the forward is not planned for.
            TypeError: if `key` is not a key.
        """
        asked = arguments.listed("labels", labels)
        sampler = self.sampler(
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            strength=strength_of(image, strength),
        )
        return self._generate(
            sampler,
            len(asked),
            lambda: self.conditions(asked),
            key=key,
            repeats=num_images_per_prompt,
            latents=latents,
            image=image,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )
