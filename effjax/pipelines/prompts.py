"""Pipelines of prompts: one to three text encoders make the conditions of images and videos."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax.context import PyTree
from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.diffusion import Images, OnStepEnd, OutputType, Pipeline, strength_of
from effjax.pipelines.family import DiffusionFamily
from effjax.pipelines.loading import Components
from effjax.pipelines.text_encoders import OfPrompts

Texts = str | Sequence[str]
Negative = str | Sequence[str | None]
Videos = list[list[Image.Image]] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class PromptPipeline(OfPrompts, Pipeline):
    """A diffusion model that is conditioned on prompts: the base of its pipelines.

    Several threads may call it at the same time.
    """

    SETTINGS: ClassVar[tuple[str, ...]] = (*Pipeline.SETTINGS, "height", "width")

    @classmethod
    def of(cls, found: Components) -> PromptPipeline:
        """Load from components."""
        assert isinstance(found.family, DiffusionFamily)
        shared = cls.shared(found)
        return cls(**shared, **cls.encoders_of(found, shared["forward"].config))

    def conditions(
        self,
        prompts: Texts,
        *,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        negative_prompt: Negative | None = None,
        negative_prompt_2: Negative | None = None,
        negative_prompt_3: Negative | None = None,
        guidance_scale: float | None = None,
        max_sequence_length: int | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these prompts.

        Args:
            prompts: one or more prompts.
            prompt_2, prompt_3: other texts for the second and the third text encoder, one for each
                prompt; None gives them the prompts.
            negative_prompt: one for all prompts, or one for each of them.
            negative_prompt_2, negative_prompt_3: likewise; None gives them `negative_prompt`.
            guidance_scale: as for `sampler`. Models that take the scale as an input find it in
                these conditions.
            max_sequence_length: tokens of a prompt for the encoder that reads most; None for the
                family's number.

        Raises:
            ValueError: for prompts that are too long, another number of prompts, and prompts of an
                encoder that the family does not have.
        """
        prompts = arguments.texts("prompt", prompts)
        count, default = len(prompts), self.family.negative
        stands_for = default if isinstance(default, str) else ""
        negative = _for_each("negative_prompt", negative_prompt, count, [None] * count)
        unsaid = np.array([each is None for each in negative])
        negative = [stands_for if each is None else each for each in negative]
        said, unsaid_texts = [prompts], [negative]
        for number, (own, other) in enumerate(
            ((prompt_2, negative_prompt_2), (prompt_3, negative_prompt_3)), 2
        ):
            name = f"text_encoder_{number}"
            if (own is not None or other is not None) and name not in self._encoder_names:
                raise ValueError(
                    f"a {self.family.name} has no {name}: leave out prompt_{number} and "
                    f"negative_prompt_{number}"
                )
            said.append(_for_each(f"prompt_{number}", own, count, prompts))
            other = _for_each(f"negative_prompt_{number}", other, count, negative)
            unsaid_texts.append(["" if each is None else each for each in other])
        lengths = self._lengths(max_sequence_length)
        cond = self._encoded(list(zip(*said)), lengths)
        uncond = self._encoded(list(zip(*unsaid_texts)), lengths)
        if callable(default) and unsaid.any():
            uncond = _rows_of(unsaid, default(cond), uncond)
        embed = self.family.embed_guidance
        if embed is None:
            return cond, uncond
        scale = self.guidance_scale(guidance_scale)
        return tuple(embed(each, scale, self.forward.config) for each in (cond, uncond))

    def encode(self, prompts: Sequence[str]) -> PyTree:
        """Encode prompts into conditions [B, ...]. Those of the last few prompts are remembered.

        Raises:
            ValueError: for prompts that are too long.
        """
        return self._encoded([(each,) * 3 for each in prompts], self._lengths(None))

    def _prompted(
        self,
        prompt: Texts,
        asked: Mapping[str, Any],
        settings: Mapping[str, Any],
        **options: Any,
    ) -> Any:
        """Outputs of prompts.

        Args:
            prompt: one or more.
            asked: further arguments of `conditions`.
            settings: of the sampler.
            options: of `_generate`.
        """
        prompts = arguments.texts("prompt", prompt)
        sampler = self.sampler(**settings)
        if self.family.embed_guidance is not None and sampler.guided:
            negatives = [each for name, each in asked.items() if name.startswith("negative")]
            if all(each is None for each in negatives):
                raise ValueError(
                    f"true_cfg_scale={settings.get('true_cfg_scale')} leads away from a negative "
                    f"prompt: give negative_prompt, '' for the empty one"
                )
        scale = settings["guidance_scale"]
        conditions = functools.partial(self.conditions, prompts, guidance_scale=scale, **asked)
        return self._generate(sampler, len(prompts), conditions, **options)


@dataclasses.dataclass(frozen=True, repr=False)
class TextToImagePipeline(PromptPipeline):
    """A text-to-image diffusion model (diffusers' PixArtSigmaPipeline)."""

    @runs_executables
    def __call__(
        self,
        prompt: Texts,
        *,
        key: jax.Array,
        prompt_2: Texts | None = None,
        prompt_3: Texts | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        true_cfg_scale: float | None = None,
        negative_prompt: Negative | None = None,
        negative_prompt_2: Negative | None = None,
        negative_prompt_3: Negative | None = None,
        max_sequence_length: int | None = None,
        height: int | None = None,
        width: int | None = None,
        image: Any = None,
        strength: float | None = None,
        latents: jax.Array | np.ndarray | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Images:
        """Generate images of prompts.

        Args:
            prompt: one or more.
            key: PRNG key, `jax.random.key(seed)`; the same key gives the same image at its place.
            prompt_2, prompt_3: other texts for the second and the third text encoder.
            num_images_per_prompt: all of the first prompt, then of the second, ...
            num_inference_steps: denoising steps; those of the plan, else the family's (PixArt: 20).
            guidance_scale: 1 is no guidance; that of the plan, else the family's (PixArt: 4.5).
            true_cfg_scale: of classifier-free guidance for a model that is told its guidance scale
                (FLUX): it is led away from a negative prompt, which must be given, and called twice
                a step. None, or 1, for none.
            negative_prompt: what the images are led away from, if they are guided: one for all, or
                one for each prompt. None is as "", unless the family says otherwise.
            negative_prompt_2, negative_prompt_3: other ones for the second and the third text
                encoder.
            max_sequence_length: tokens of a prompt for the encoder that reads most (SD3: 256, FLUX:
                512, PixArt-Sigma: 300).
            height, width: in pixels; the size that the model was made for. There are no bins: other
                sizes are sampled as they are asked for (diffusers' `use_resolution_binning=False`).
            image, strength, latents, output_type: as for `ClassConditionalPipeline`.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`; if it returns
                latents, sampling goes on from those.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for text embeddings, latents or images that are NaN or infinite.

        Raises:
            ValueError: for prompts of more tokens than the model was trained on, sizes that are not
                whole patches, or steps that the forward is not planned for.
            TypeError: if `key` is no key.
        """
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "true_cfg_scale": true_cfg_scale,
            "height": height,
            "width": width,
            "strength": strength_of(image, strength),
        }
        asked = {
            "prompt_2": prompt_2,
            "prompt_3": prompt_3,
            "negative_prompt": negative_prompt,
            "negative_prompt_2": negative_prompt_2,
            "negative_prompt_3": negative_prompt_3,
            "max_sequence_length": max_sequence_length,
        }
        return self._prompted(
            prompt,
            asked,
            settings,
            key=key,
            repeats=num_images_per_prompt,
            latents=latents,
            image=image,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )


@dataclasses.dataclass(frozen=True, repr=False)
class TextToVideoPipeline(PromptPipeline):
    """A text-to-video diffusion model."""

    TASK = "text-to-video"
    MAKES = "videos"

    @runs_executables
    def __call__(
        self,
        prompt: Texts,
        *,
        key: jax.Array,
        num_videos_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: Negative | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        latents: jax.Array | np.ndarray | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Videos:
        """Generate videos of prompts.

        Args:
            prompt, key, num_inference_steps, guidance_scale, negative_prompt, height, width,
                progress, callback_on_step_end: as for `TextToImagePipeline`.
            num_videos_per_prompt: all of the first prompt, then of the second, ...
            num_frames: of a video; the number that the model was made for. A VAE that joins frames
                allows some numbers only, which an error lists.
            latents: unit noise [videos, F, H, W, C] to start from, in place of the key's.
            output_type: "pil"; "np" for float32[videos, frames, H, W, 1 or 3] in 0 ... 1; "latent"
                for the samples float32[videos, F, H, W, C] before they are decoded.

        Returns:
            A list of PIL images for each video, or what `output_type` says.

        Warns:
            NotFiniteWarning: for text embeddings, latents or videos that are NaN or infinite.

        Raises:
            ValueError: as for `TextToImagePipeline`, and for numbers of frames that the model or
                its VAE cannot make.
            TypeError: if `key` is no key.
        """
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "height": height,
            "width": width,
            "num_frames": num_frames,
        }
        return self._prompted(
            prompt,
            {"negative_prompt": negative_prompt},
            settings,
            key=key,
            repeats=num_videos_per_prompt,
            latents=latents,
            image=None,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )


def _for_each(name: str, given: Any, count: int, default: list[Any]) -> list[Any]:
    """One text for each of so many prompts; None within it stays.

    Raises:
        ValueError: for another number of texts, or what is no text.
    """
    if given is None:
        return default
    texts = arguments.listed(name, given)
    arguments.texts(name, ["" if each is None else each for each in texts])
    texts = texts * count if isinstance(given, str) else texts
    if len(texts) != count:
        raise ValueError(
            f"{name} must be one for all prompts, or one for each of the {count}; got {len(texts)}"
        )
    return texts


def _rows_of(chosen: np.ndarray, yes: PyTree, no: PyTree) -> PyTree:
    """Rows of one tree of arrays [B, ...] where they are chosen, of another elsewhere."""

    def one(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (first.ndim - 1)), first, second)

    return jax.tree.map(one, yes, no)
