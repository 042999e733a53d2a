"""Diffusion pipelines: a denoiser with its sampler and decoders, from conditions to PIL images."""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, SupportsIndex, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax import recipe
from effjax.buckets import by_parts
from effjax.context import Guidance, PyTree
from effjax.executables import Program
from effjax.finite import warn_unless_finite
from effjax.forward import Forward, Params
from effjax.models import autoencoder_kl
from effjax.models.pixart import PromptEmbeddings
from effjax.pipelines import arguments
from effjax.pipelines.base import BasePipeline, entry, runs_executables
from effjax.pipelines.images import draw, to_unit
from effjax.pipelines.labels import check_names, index_of
from effjax.pipelines.recent import Recent
from effjax.samplers import Sampler, Schedule, check_keys
from effjax.storage import write_json
from effjax.transform import Pair

SCHEDULER = "scheduler/scheduler_config.json"

OnStepEnd = Callable[[int, jax.Array], Any]
Label = SupportsIndex | str
OutputType = Literal["pil", "np", "latent"]
Images = list[Image.Image] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class Pipeline(BasePipeline):
    """A diffusion model, ready to sample: what pipelines of images share.

    Attributes:
        forward, params: the denoiser, possibly transformed.
        scheduler: contents of its scheduler_config.json.
        vae: forward and parameters of the latent decoder, None for models of pixels.
    """

    scheduler: Mapping[str, Any]
    vae: Pair | None = None

    TASK = "text-to-image"
    STEPS: ClassVar[int]
    GUIDANCE: ClassVar[float]
    ARRANGEMENT: ClassVar[Guidance]

    def sampler(
        self,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
    ) -> Sampler:
        """The sampler that a call uses: `jax.jit(sampler)(forward, params, cond, key)`.

        Args:
            num_inference_steps, guidance_scale: those of the plan, else the pipeline's own, if
                None.
            height, width: of the images in pixels, for models that take several sizes; the size
                that the model was made for if None.

        Raises:
            ValueError: for a height or width that is not a whole number of patches, for steps that
                are no whole number of at least 1, and a scale that is not finite or below 0.
        """
        steps = (
            self._planned("calls", self.STEPS)
            if num_inference_steps is None
            else num_inference_steps
        )
        steps = arguments.count("num_inference_steps", steps)
        scale = guidance_scale
        scale = self._planned("guidance", self.GUIDANCE) if scale is None else scale
        scale = arguments.scale("guidance_scale", scale)
        config = self.forward.config
        shape = self._sample_shape(height, width)
        tokens = config.tokens * math.prod(shape) // math.prod(config.sample_shape)
        schedule = Schedule.from_config(self.scheduler, steps=steps, tokens=tokens)
        return Sampler(schedule, scale, self.ARRANGEMENT, shape)

    def decode(self, x: jax.Array) -> jax.Array:
        """Samples [B, H, W, C] to images float32 in -1 ... 1 (about)."""
        return x if self.vae is None else _decode(*self.vae, x)

    def _components(self, directory: Path) -> dict[str, Any]:
        (directory / SCHEDULER).parent.mkdir()
        write_json(directory / SCHEDULER, self.scheduler)
        pair = self.forward, self.params
        recipe.save(directory / "transformer", *pair)
        if self.vae is not None:
            recipe.save(directory / "vae", *self.vae)
        return {"transformer": entry(pair), "vae": entry(self.vae)}

    def _generate(
        self,
        sampler: Sampler,
        asked: Sequence[Any],
        conditions: Callable[[], tuple[PyTree, PyTree]],
        *,
        key: jax.Array,
        num_images_per_prompt: int,
        latents: jax.Array | np.ndarray | None,
        output_type: str,
        progress: bool,
        callback_on_step_end: OnStepEnd | None,
    ) -> Images:
        """Images of what is asked for; `conditions` may be slow and comes after all checks."""
        types = get_args(OutputType)
        if not isinstance(output_type, str) or output_type not in types:
            raise ValueError(f"output_type must be one of {', '.join(types)}; got {output_type!r}")
        if not (callback_on_step_end is None or callable(callback_on_step_end)):
            raise ValueError(
                f"callback_on_step_end must be a function of a step and latents, got "
                f"{callback_on_step_end!r}"
            )
        repeats = arguments.count("num_images_per_prompt", num_images_per_prompt)
        count = repeats * len(asked)
        check_keys(key, count)
        if latents is not None:
            latents = sampler.given_noise(self.forward, count, latents)
        cond, uncond = conditions()
        if repeats > 1:
            cond, uncond = jax.tree.map(
                lambda leaf: jnp.asarray(np.repeat(leaf, repeats, axis=0)), (cond, uncond)
            )
        uncond = uncond if sampler.guided else None
        x = sampler.stepwise(
            self.forward,
            self.params,
            cond,
            key,
            uncond=uncond,
            noise=latents,
            progress=progress,
            callback=callback_on_step_end,
            buckets=self.buckets,
        )
        images = x if output_type == "latent" else by_parts(self.decode, self.buckets, x)
        self._warn_unless_finite((cond, uncond), x, images)
        if output_type == "latent":
            return images
        return to_unit(images) if output_type == "np" else draw(to_unit(images))

    def _warn_unless_finite(
        self, conditions: tuple[PyTree, PyTree], x: jax.Array, images: jax.Array
    ) -> None:
        """Name the first stage whose result is not finite; what follows it is not finite either."""
        if _finite(images):
            return
        stages = [
            ("text embeddings", leaf)
            for leaf in jax.tree.leaves(conditions)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        stages += [("latents after the last step", x), ("decoded images", images)]
        what, values = next(stage for stage in stages if not _finite(stage[1]))
        advice = (
            'Load the pipeline with dtype="float32" or "bfloat16", whose range is larger than '
            "float16's, or with check_finite=True, which finds damaged weights."
        )
        warn_unless_finite(what, values, advice)

    def _sample_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """Shape of what is denoised for images of so many pixels, the model's own by default."""
        config = self.forward.config
        scale = 1 if self.vae is None else self.vae[0].config.downscale
        *own, channels = config.sample_shape
        given = {"height": height, "width": width}
        sides = [
            scale * side if asked is None else arguments.count(name, asked)
            for (name, asked), side in zip(given.items(), own)
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


@dataclasses.dataclass(frozen=True, repr=False)
class ClassConditionalPipeline(Pipeline):
    """A class-conditional diffusion model (diffusers' DiTPipeline).

    Attributes:
        names: of classes by their index, several for one class with commas between them; classes
            may be without.
    """

    names: Mapping[int, str] = dataclasses.field(default_factory=dict, kw_only=True)

    TASK = "unconditional-image-generation"  # hubs know no classes
    STEPS, GUIDANCE, ARRANGEMENT = 50, 4.0, Guidance()  # of diffusers' DiTPipeline

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(self.names, self.forward.config.num_classes)

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
        output_type: OutputType = "pil",
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Images:
        """Generate images of classes.

        Args:
            labels: one or more class indices or names.
            key: PRNG key, `jax.random.key(seed)`; the same key gives the same image at its place.
            num_images_per_prompt: images of each label: all of the first, then of the second, ...
            num_inference_steps: denoising steps; those of the plan, else 50.
            guidance_scale: 1 is no guidance; that of the plan, else 4.0.
            latents: unit noise [images, H, W, C] to start from, in place of the key's; the schedule
                scales it as it would its own.
            output_type: "pil"; "np" for float32[images, H, W, 1 or 3] in 0 ... 1; "latent" for the
                samples float32[images, H, W, C] before they are decoded.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for latents or images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, or steps that the forward is not planned for.
            TypeError: if `key` is no key.
        """
        asked = arguments.listed("labels", labels)
        return self._generate(
            self.sampler(num_inference_steps=num_inference_steps, guidance_scale=guidance_scale),
            asked,
            lambda: self.conditions(asked),
            key=key,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )

    def conditions(
        self, labels: Label | Sequence[Label] | np.ndarray | jax.Array
    ) -> tuple[jax.Array, None]:
        """What a sampler takes for these labels: `cond` and `uncond`."""
        indices = [self.index(label) for label in arguments.listed("labels", labels)]
        return jnp.asarray(indices, jnp.int32), None

    def index(self, label: Any) -> int:
        """Class index of a label: an index, also as text, one name of a class, or all its names.

        Raises:
            ValueError: for what is no label, and for a name of no class or of several.
        """
        return index_of(label, self.names, self.forward.config.num_classes)

    def _components(self, directory: Path) -> dict[str, Any]:
        own = {"id2label": {str(index): name for index, name in self.names.items()}}
        return {**super()._components(directory), **own}


@dataclasses.dataclass(frozen=True, repr=False)
class TextToImagePipeline(Pipeline):
    """A text-to-image diffusion model with one text encoder (diffusers' PixArtSigmaPipeline).

    Threads may call it at once.

    Attributes:
        text_encoder: forward and parameters of the text encoder.
        tokenizer: of transformers.
    """

    text_encoder: Pair = dataclasses.field(kw_only=True)
    tokenizer: Any = dataclasses.field(kw_only=True)
    _captions: Recent[PromptEmbeddings] = dataclasses.field(
        default_factory=lambda: Recent(_REMEMBERED), init=False, repr=False, compare=False
    )

    # Of diffusers' PixArtSigmaPipeline: [negative, positive].
    STEPS, GUIDANCE, ARRANGEMENT = 20, 4.5, Guidance(("uncond", "cond"))

    @runs_executables
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
        height: int | None = None,
        width: int | None = None,
        latents: jax.Array | np.ndarray | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
        callback_on_step_end: OnStepEnd | None = None,
    ) -> Images:
        """Generate images of prompts.

        Args:
            prompt: one or more.
            key: PRNG key, `jax.random.key(seed)`; the same key gives the same image at its place.
            num_images_per_prompt: all of the first prompt, then of the second, ...
            num_inference_steps: denoising steps; those of the plan, else 20.
            guidance_scale: 1 is no guidance; that of the plan, else 4.5.
            negative_prompt: what the images are led away from, if they are guided: one for all, or
                one for each prompt. None is as "".
            height, width: in pixels; the size that the model was made for. There are no bins: other
                sizes are sampled as they are asked for (diffusers' `use_resolution_binning=False`).
            latents, output_type: as for `ClassConditionalPipeline`.
            progress: show a bar over the steps.
            callback_on_step_end: called as `callback_on_step_end(step, latents)`.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for text embeddings, latents or images that are NaN or infinite.

        Raises:
            ValueError: for prompts of more tokens than the model was trained on, sizes that are not
                whole patches, or steps that the forward is not planned for.
            TypeError: if `key` is no key.
        """
        prompts = arguments.texts("prompt", prompt)
        return self._generate(
            self.sampler(
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                height=height,
                width=width,
            ),
            prompts,
            lambda: self.conditions(prompts, negative_prompt=negative_prompt),
            key=key,
            num_images_per_prompt=num_images_per_prompt,
            latents=latents,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )

    def conditions(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
    ) -> tuple[PromptEmbeddings, PromptEmbeddings]:
        """What a sampler takes for these prompts: `cond` and `uncond`.

        Raises:
            ValueError: for prompts that are too long, or another number of negative prompts.
        """
        prompts = arguments.texts("prompt", prompts)
        negative = arguments.listed("negative_prompt", negative_prompt)
        negative = arguments.texts(
            "negative_prompt", ["" if each is None else each for each in negative]
        )
        if isinstance(negative_prompt, str | None):
            negative *= len(prompts)
        if len(negative) != len(prompts):
            raise ValueError(
                f"negative_prompt must be one for all prompts, or one for each of the "
                f"{len(prompts)}; got {len(negative)}"
            )
        return self.encode(prompts), self.encode(negative)

    @property
    def max_tokens(self) -> int:
        """Tokens of a caption, its padding included."""
        return min(self.tokenizer.model_max_length, _MAX_TOKENS)

    def encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        """Captions [B, max_tokens] of prompts, in lower case; the last few are remembered.

        Raises:
            ValueError: for prompts that are too long.
        """
        prompts = [prompt.lower().strip() for prompt in prompts]
        found = self._captions.get(
            prompts,
            lambda new: [PromptEmbeddings(*each) for each in zip(*self._encode(new), strict=True)],
        )
        return PromptEmbeddings(*(jnp.stack(parts) for parts in zip(*found, strict=True)))

    def _encode(self, prompts: Sequence[str]) -> PromptEmbeddings:
        length = self.max_tokens
        with _TOKENIZING:
            read = self.tokenizer(list(prompts), padding="max_length", max_length=length)
        longest = max(range(len(prompts)), key=lambda row: len(read["input_ids"][row]))
        if (tokens := len(read["input_ids"][longest])) > length:
            raise ValueError(
                f"a prompt has {tokens} tokens, this model reads {length}; shorten "
                f"{prompts[longest][:60]!r}..."
            )
        ids = np.asarray(read["input_ids"], np.int32)
        mask = np.asarray(read["attention_mask"], bool)
        states = by_parts(partial(_states, *self.text_encoder), self.buckets, ids, mask)
        return PromptEmbeddings(states, jnp.asarray(mask))

    def _components(self, directory: Path) -> dict[str, Any]:
        recipe.save(directory / "text_encoder", *self.text_encoder)
        self.tokenizer.save_pretrained(directory / "tokenizer")
        own = {
            "text_encoder": entry(self.text_encoder),
            "tokenizer": ["transformers", type(self.tokenizer).__name__],
        }
        return {**super()._components(directory), **own}


_MAX_TOKENS = 300  # of PixArt-Sigma; its tokenizer says 512, T5's
_REMEMBERED = 64  # captions: 300 x 4096 values each
_TOKENIZING = threading.Lock()  # tokenizers, which pipelines may share, are not for two threads


def _finite(values: jax.Array) -> bool:
    return bool(np.isfinite(values).all())


@Program
def _decode(forward: Forward, params: Params, latents: jax.Array) -> jax.Array:
    return autoencoder_kl.decode(forward, params, latents)


@Program
def _states(forward: Forward, params: Params, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return forward(params, {}, ids, mask)[0]
