"""Pipelines of prompts: one to three text encoders make the conditions of images and videos."""

from __future__ import annotations

import dataclasses
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax.buckets import by_parts
from effjax.context import PyTree
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.diffusion import Images, OnStepEnd, OutputType, Pipeline
from effjax.pipelines.family import DiffusionFamily, TextEncoder
from effjax.pipelines.loading import Components
from effjax.pipelines.recent import Recent
from effjax.transform import Pair

_REMEMBERED = 64  # conditions of prompts: 300 x 4096 values each
_TOKENIZING = threading.Lock()  # tokenizers, which pipelines may share, are not for two threads

Videos = list[list[Image.Image]] | np.ndarray | jax.Array


@dataclasses.dataclass(frozen=True, repr=False)
class PromptPipeline(Pipeline):
    """A diffusion model that is conditioned on prompts: the base of its pipelines.

    Several threads may call it at the same time.

    Attributes:
        text_encoder, text_encoder_2, text_encoder_3: forward and parameters of the text encoders
            that the family has; None for an optional one that is missing.
        tokenizer, tokenizer_2, tokenizer_3: tokenizers of transformers, one for each encoder.

    Raises:
        ValueError: for text encoders that are missing, or that the family does not have.
    """

    text_encoder: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer: Any = dataclasses.field(default=None, kw_only=True)
    text_encoder_2: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer_2: Any = dataclasses.field(default=None, kw_only=True)
    text_encoder_3: Pair | None = dataclasses.field(default=None, kw_only=True)
    tokenizer_3: Any = dataclasses.field(default=None, kw_only=True)
    _captions: Recent[PyTree] = dataclasses.field(
        default_factory=lambda: Recent(_REMEMBERED), init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        encoders = self.family.text_encoders
        known = {name for each in encoders for name in (each.name, each.tokenizer)}
        needed = {
            name for each in encoders if not each.optional for name in (each.name, each.tokenizer)
        }
        fields = [field.name for field in dataclasses.fields(PromptPipeline)]
        given = {name for name in fields if name.startswith(("text_encoder", "tokenizer"))}
        given = {name for name in given if getattr(self, name) is not None}
        if missing := sorted(needed - given):
            raise ValueError(f"a {self.family.name} needs its {', '.join(missing)}")
        if unknown := sorted(given - known):
            raise ValueError(f"a {self.family.name} has no {', '.join(unknown)}")

    @classmethod
    def of(cls, found: Components) -> PromptPipeline:
        """Load from components."""
        family = found.family
        assert isinstance(family, DiffusionFamily)
        encoders = [
            each for each in family.text_encoders if not each.optional or found.has(each.name)
        ]
        for each in encoders:
            found.require(each.name, each.tokenizer)
        shared = cls.shared(found)
        for each in encoders:
            shared[each.name] = encoder = found.model(each.name)
            if each.channels is not None:
                width = encoder[0].config.hidden_size
                read = getattr(shared["forward"].config, each.channels)
                if width != read:
                    raise ValueError(
                        f"the {each.name.replace('_', ' ')} gives {width} channels and the "
                        f"transformer reads {read}: they belong to different models"
                    )
            shared[each.tokenizer] = found.tokenizer(each.tokenizer, each.tokenizer)
        return cls(**shared)

    def conditions(
        self,
        prompts: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str | None] | None = None,
        guidance_scale: float | None = None,
    ) -> tuple[PyTree, PyTree]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these prompts.

        Args:
            prompts: one or more prompts.
            negative_prompt: one for all prompts, or one for each of them.
            guidance_scale: as for `sampler`. Models that take the scale as an input find it in
                these conditions.

        Raises:
            ValueError: for prompts that are too long, or another number of negative prompts.
        """
        prompts = arguments.texts("prompt", prompts)
        default = self.family.negative
        negative = arguments.listed("negative_prompt", negative_prompt)
        unsaid = [each is None for each in negative]
        stands_for = default if isinstance(default, str) else ""
        negative = arguments.texts(
            "negative_prompt", [stands_for if each is None else each for each in negative]
        )
        if isinstance(negative_prompt, str | None):
            negative, unsaid = negative * len(prompts), unsaid * len(prompts)
        if len(negative) != len(prompts):
            raise ValueError(
                f"negative_prompt must be one for all prompts, or one for each of the "
                f"{len(prompts)}; got {len(negative)}"
            )
        cond, uncond = self.encode(prompts), self.encode(negative)
        if callable(default) and any(unsaid):
            uncond = _rows_of(np.array(unsaid), default(cond), uncond)
        embed = self.family.embed_guidance
        if embed is None:
            return cond, uncond
        scale = self.guidance_scale(guidance_scale)
        return tuple(embed(each, scale, self.forward.config) for each in (cond, uncond))

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt, padding included, for the text encoder that reads most."""
        return max(self._length(each) for each in self._encoders)

    @property
    def _encoders(self) -> list[TextEncoder]:
        """The family's, without those that are missing."""
        return [each for each in self.family.text_encoders if getattr(self, each.name) is not None]

    def _length(self, encoder: TextEncoder) -> int:
        return min(getattr(self, encoder.tokenizer).model_max_length, encoder.max_length)

    def encode(self, prompts: Sequence[str]) -> PyTree:
        """Encode prompts into conditions [B, ...]. Those of the last few prompts are remembered.

        Raises:
            ValueError: for prompts that are too long.
        """
        found = self._captions.get([self.family.clean(each) for each in prompts], self._each)
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    def _each(self, prompts: Sequence[str]) -> list[PyTree]:
        leaves, structure = jax.tree.flatten(self._encode(prompts))
        return [structure.unflatten(each) for each in zip(*leaves, strict=True)]

    def _encode(self, prompts: Sequence[str]) -> PyTree:
        encoded = dict.fromkeys(each.name for each in self.family.text_encoders)
        encoded |= {each.name: self._read(each, prompts) for each in self._encoders}
        return self.family.condition(encoded, self.forward.config)

    def _read(self, encoder: TextEncoder, prompts: Sequence[str]) -> PyTree:
        """What the condition takes from one text encoder."""
        length = self._length(encoder)
        texts = [encoder.template.replace("{}", prompt) for prompt in prompts]
        options = {"padding": "max_length", "max_length": length, "truncation": encoder.truncates}
        with _TOKENIZING:
            read = getattr(self, encoder.tokenizer)(texts, **options)
        longest = max(range(len(texts)), key=lambda row: len(read["input_ids"][row]))
        if (tokens := len(read["input_ids"][longest])) > length:
            raise ValueError(
                f"a prompt has {tokens} tokens, this model reads {length}; shorten "
                f"{prompts[longest][:60]!r}..."
            )
        ids = np.asarray(read["input_ids"], np.int32)
        mask = np.asarray(read["attention_mask"], bool)
        run = functools.partial(_read, encoder.read, encoder.masked, *getattr(self, encoder.name))
        return by_parts(run, self.buckets, ids, mask)

    def _prompted(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str | None] | None,
        settings: Mapping[str, Any],
        **options: Any,
    ) -> Any:
        """Outputs of prompts.

        Args:
            prompt, negative_prompt: as in `conditions`.
            settings: of the sampler.
            options: of `_generate`.
        """
        prompts = arguments.texts("prompt", prompt)
        asked = {"negative_prompt": negative_prompt, "guidance_scale": settings["guidance_scale"]}
        conditions = functools.partial(self.conditions, prompts, **asked)
        return self._generate(self.sampler(**settings), len(prompts), conditions, **options)


@dataclasses.dataclass(frozen=True, repr=False)
class TextToImagePipeline(PromptPipeline):
    """A text-to-image diffusion model (diffusers' PixArtSigmaPipeline)."""

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
            num_inference_steps: denoising steps; those of the plan, else the family's (PixArt: 20).
            guidance_scale: 1 is no guidance; that of the plan, else the family's (PixArt: 4.5).
            negative_prompt: what the images are led away from, if they are guided: one for all, or
                one for each prompt. None is as "", unless the family says otherwise.
            height, width: in pixels; the size that the model was made for. There are no bins: other
                sizes are sampled as they are asked for (diffusers' `use_resolution_binning=False`).
            latents, output_type: as for `ClassConditionalPipeline`.
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
            "height": height,
            "width": width,
        }
        return self._prompted(
            prompt,
            negative_prompt,
            settings,
            key=key,
            repeats=num_images_per_prompt,
            latents=latents,
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
        prompt: str | Sequence[str],
        *,
        key: jax.Array,
        num_videos_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | Sequence[str | None] | None = None,
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
            negative_prompt,
            settings,
            key=key,
            repeats=num_videos_per_prompt,
            latents=latents,
            output_type=output_type,
            progress=progress,
            callback_on_step_end=callback_on_step_end,
        )


def _rows_of(chosen: np.ndarray, yes: PyTree, no: PyTree) -> PyTree:
    """Rows of one tree of arrays [B, ...] where they are chosen, of another elsewhere."""

    def one(first: jax.Array, second: jax.Array) -> jax.Array:
        return jnp.where(chosen.reshape(-1, *(1,) * (first.ndim - 1)), first, second)

    return jax.tree.map(one, yes, no)


@functools.partial(Program, static_argnums=(0, 1))
def _read(
    read: Callable[[Any, jax.Array], PyTree],
    masked: bool,
    forward: Forward,
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
) -> PyTree:
    inputs = (ids, mask) if masked else (ids,)
    return read(forward(params, {}, *inputs)[0], mask)
