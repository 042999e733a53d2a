"""Diffusion pipelines: a denoiser with its sampler and decoders, from conditions to PIL images."""

from __future__ import annotations

import dataclasses
import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax import recipe
from effjax.context import Guidance, PyTree
from effjax.forward import Forward, Params
from effjax.models import autoencoder_kl
from effjax.models.pixart import Caption
from effjax.samplers import Sampler, Schedule
from effjax.storage import new_directory, write_json
from effjax.transform import Pair

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"

AnyPipeline = TypeVar("AnyPipeline", bound="Pipeline")
OnStepEnd = Callable[[int, jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """A diffusion model, ready to sample: what all pipelines share.

    Attributes:
        forward, params: the denoiser, possibly transformed.
        scheduler: contents of its scheduler_config.json.
        vae: forward and parameters of the latent decoder, None for models of pixels.
    """

    forward: Forward
    params: Params
    scheduler: Mapping[str, Any]
    vae: Pair | None = None

    STEPS: ClassVar[int]
    GUIDANCE: ClassVar[float]
    ARRANGEMENT: ClassVar[Guidance]

    def sampler(
        self,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Sampler:
        """The sampler that a call uses: `jax.jit(sampler)(forward, params, cond, key)`.

        Args:
            num_steps, guidance_scale: those of the plan, else the pipeline's own, if None.
            height, width: of the images in pixels, for models that take several sizes; the size
                that the model was made for if None.

        Raises:
            ValueError: for a height or width that is not a whole number of patches.
        """
        steps = self._planned("calls", self.STEPS) if num_steps is None else num_steps
        scale = guidance_scale
        scale = self._planned("guidance", self.GUIDANCE) if scale is None else scale
        config = self.forward.config
        shape = self._sample_shape(height, width)
        tokens = config.tokens * math.prod(shape) // math.prod(config.sample_shape)
        schedule = Schedule.from_config(self.scheduler, steps=steps, tokens=tokens)
        return Sampler(schedule, float(scale), self.ARRANGEMENT, shape)

    def decode(self, x: jax.Array) -> jax.Array:
        """Samples [B, H, W, C] to images float32 in -1 ... 1 (about)."""
        return x if self.vae is None else _decode(*self.vae, x)

    def transform(self: AnyPipeline, *transforms: Callable[[Forward, Params], Pair]) -> AnyPipeline:
        """This pipeline with a transformed denoiser."""
        forward, params = self.forward, self.params
        for each in transforms:
            forward, params = each(forward, params)
        return dataclasses.replace(self, forward=forward, params=params)

    def save(self, path: str | os.PathLike) -> None:
        """Save all components as one directory that `effjax.pipeline` reads, atomically."""
        with new_directory(Path(path)) as directory:
            write_json(directory / INDEX, {"_class_name": type(self).__name__, **self._index()})
            (directory / SCHEDULER).parent.mkdir()
            write_json(directory / SCHEDULER, self.scheduler)
            recipe.save(directory / "transformer", self.forward, self.params)
            if self.vae is not None:
                recipe.save(directory / "vae", *self.vae)
            self._save_more(directory)

    def _index(self) -> dict[str, Any]:
        """What model_index.json holds besides the class."""
        return {}

    def _save_more(self, directory: Path) -> None:
        """Save the components that only this kind of pipeline has."""

    def _generate(
        self,
        sampler: Sampler,
        conditions: tuple[PyTree, PyTree],
        key: jax.Array,
        *,
        progress: bool,
        callback_on_step_end: OnStepEnd | None,
    ) -> list[Image.Image]:
        cond, uncond = conditions
        x = sampler.stepwise(
            self.forward,
            self.params,
            cond,
            key,
            uncond=uncond if sampler.guided else None,
            progress=progress,
            callback=callback_on_step_end,
        )
        return to_pil(self.decode(x))

    def _sample_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape of what is denoised for images of so many pixels, the model's own by default."""
        config = self.forward.config
        scale = 1 if self.vae is None else self.vae[0].config.downscale
        *own, channels = config.sample_shape
        sides = [
            scale * side if given is None else given for given, side in zip((height, width), own)
        ]
        unit = scale * config.patch_size
        if any(side < unit or side % unit for side in sides):
            raise ValueError(
                f"height and width must be positive multiples of {unit} pixels (a patch of "
                f"{config.patch_size}, {scale} pixels to a latent); got {sides[0]} x {sides[1]}"
            )
        return (sides[0] // scale, sides[1] // scale, channels)

    def _planned(self, attribute: str, default: Any) -> Any:
        """What a plan of the recipe says, else the default."""
        values = [getattr(plan, attribute, None) for _, plan in self.forward.recipe]
        return next((value for value in values if value is not None), default)


@dataclasses.dataclass(frozen=True)
class ClassConditionalPipeline(Pipeline):
    """A class-conditional diffusion model (diffusers' DiTPipeline).

    Attributes:
        names: class index by name; may be empty.
    """

    names: Mapping[str, int] = dataclasses.field(default_factory=dict, kw_only=True)

    STEPS, GUIDANCE, ARRANGEMENT = 50, 4.0, Guidance()  # of diffusers' DiTPipeline

    def __call__(
        self,
        labels: Sequence[int | str],
        *,
        key: jax.Array,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each label.

        Args:
            labels: class indices or names; the same key gives the same image for a label's place.
            key: PRNG key, `jax.random.key(seed)`.
            num_steps: denoising steps; those of the plan, else 50.
            guidance_scale: 1 is no guidance; that of the plan, else 4.0.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`.

        Returns:
            PIL images, "L" or "RGB".

        Raises:
            ValueError: for unknown labels, or steps that the forward is not planned for.
        """
        return self._generate(
            self.sampler(num_steps=num_steps, guidance_scale=guidance_scale),
            self.conditions(labels),
            key,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )

    def conditions(self, labels: Sequence[int | str]) -> tuple[jax.Array, None]:
        """What a sampler takes for these labels: `cond` and `uncond`."""
        return jnp.asarray([self.index(label) for label in labels], jnp.int32), None

    def index(self, label: int | str) -> int:
        """Class index of a label: an index, the name of a class, or an index as text.

        Raises:
            ValueError: for an unknown label.
        """
        if isinstance(label, str) and label in self.names:
            return self.names[label]
        classes = self.forward.config.num_classes
        index = int(label) if not isinstance(label, str) or label.isdigit() else -1
        if not 0 <= index < classes:
            known = f", or one of {', '.join(self.names)}" if self.names else ""
            raise ValueError(f"no class {label!r}: a label is 0 ... {classes - 1}{known}")
        return index

    def _index(self) -> dict[str, Any]:
        return {"id2label": {str(index): name for name, index in self.names.items()}}


@dataclasses.dataclass(frozen=True)
class TextToImagePipeline(Pipeline):
    """A text-to-image diffusion model with one text encoder (diffusers' PixArtSigmaPipeline).

    Attributes:
        text_encoder: forward and parameters of the text encoder.
        tokenizer: of transformers.
    """

    text_encoder: Pair = dataclasses.field(kw_only=True)
    tokenizer: Any = dataclasses.field(kw_only=True)
    _captions: OrderedDict[str, Caption] = dataclasses.field(
        default_factory=OrderedDict, init=False, repr=False, compare=False
    )

    # Of diffusers' PixArtSigmaPipeline: [negative, positive].
    STEPS, GUIDANCE, ARRANGEMENT = 20, 4.5, Guidance(cond_first=False)

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        key: jax.Array,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> list[Image.Image]:
        """Generate one image for each prompt.

        Args:
            prompt: one or more; the same key gives the same image for a prompt's place.
            key: PRNG key, `jax.random.key(seed)`.
            num_steps: denoising steps; those of the plan, else 20.
            guidance_scale: 1 is no guidance; that of the plan, else 4.5.
            negative_prompt: what the images are led away from, if they are guided.
            height, width: in pixels; the size that the model was made for. There are no bins: other
                sizes are sampled as they are asked for (diffusers' `use_resolution_binning=False`).
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`.

        Returns:
            PIL images, "L" or "RGB".

        Raises:
            ValueError: for prompts of more tokens than the model was trained on, sizes that are not
                whole patches, or steps that the forward is not planned for.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        return self._generate(
            self.sampler(
                num_steps=num_steps, guidance_scale=guidance_scale, height=height, width=width
            ),
            self.conditions(prompts, negative_prompt=negative_prompt),
            key,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )

    def conditions(
        self, prompts: Sequence[str], *, negative_prompt: str = ""
    ) -> tuple[Caption, Caption]:
        """What a sampler takes for these prompts: `cond` and `uncond`."""
        return self.encode(prompts), self.encode([negative_prompt] * len(prompts))

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption, its padding included."""
        return min(self.tokenizer.model_max_length, _MAX_TOKENS)

    def encode(self, prompts: Sequence[str]) -> Caption:
        """Captions [B, max_tokens] of prompts, in lower case; the last few are remembered.

        Raises:
            ValueError: for prompts that are too long.
        """
        prompts = [prompt.lower().strip() for prompt in prompts]
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._captions]
        if new:
            for prompt, *caption in zip(new, *self._encode(new), strict=True):
                self._captions[prompt] = Caption(*caption)
        found = [self._captions[prompt] for prompt in prompts]
        for prompt in dict.fromkeys(prompts):
            self._captions.move_to_end(prompt)
        while len(self._captions) > _REMEMBERED:
            self._captions.popitem(last=False)
        return Caption(*(jnp.stack(parts) for parts in zip(*found, strict=True)))

    def _encode(self, prompts: Sequence[str]) -> Caption:
        length = self.max_tokens
        read = self.tokenizer(
            list(prompts), padding="max_length", max_length=length, return_tensors="np"
        )
        ids = read["input_ids"]
        if ids.shape[1] > length:
            longest = max(prompts, key=lambda prompt: len(self.tokenizer(prompt)["input_ids"]))
            raise ValueError(
                f"a prompt has {ids.shape[1]} tokens, this model reads {length}; shorten "
                f"{longest[:60]!r}..."
            )
        mask = jnp.asarray(read["attention_mask"]).astype(bool)
        return Caption(_states(*self.text_encoder, jnp.asarray(ids, jnp.int32), mask), mask)

    def _save_more(self, directory: Path) -> None:
        recipe.save(directory / "text_encoder", *self.text_encoder)
        self.tokenizer.save_pretrained(directory / "tokenizer")


_MAX_TOKENS = 300  # of PixArt-Sigma; its tokenizer says 512, T5's
_REMEMBERED = 64  # captions: 300 x 4096 values each


def to_pil(images: jax.Array | np.ndarray) -> list[Image.Image]:
    """Images float[B, H, W, 1 or 3] in -1 ... 1 as 8-bit PIL images."""
    pixels = np.asarray(jax.device_get(images), np.float32)
    if pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"images must be [B, H, W, 1 or 3], got {list(pixels.shape)}; latents need a decoder"
        )
    pixels = np.clip(np.rint(127.5 * (pixels + 1)), 0, 255).astype(np.uint8)
    return [Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]


@jax.jit
def _decode(forward: Forward, params: Params, latents: jax.Array) -> jax.Array:
    return autoencoder_kl.decode(forward, params, latents)


@jax.jit
def _states(forward: Forward, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return forward(params, {}, ids, mask)[0]
