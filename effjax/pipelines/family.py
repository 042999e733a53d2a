"""What a pipeline class of diffusers or transformers is made of.

An entry of the table (`effjax.pipelines.families`) is a `PipelineFamily`, or a `DiffusionFamily`
for models that denoise. It names the components of a model directory, and holds what pipeline
classes differ in: how a prompt becomes a condition, which shape is denoised, how latents become
images or videos, and the defaults. Loading, saving, describing and calling read all of it from
here.

Functions in an entry that run inside of compiled programs (`TextEncoder.read`, `decode`) must be
functions of a module, so that `effjax.executables` can name them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.context import PyTree
from effjax.guidance import Guidance
from effjax.pipelines import arguments

Decoder = Callable[..., tuple[PyTree, PyTree]]  # a forward
Kind = Literal["model", "tokenizer", "processor", "scheduler"]

TEXT = "TextPipeline"  # of language models, whose directories have no model_index.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineFamily:
    """A pipeline class: its components, and what it becomes here.

    Attributes:
        name: the class in diffusers, which model_index.json names; of families that stand in
            transformers' layout, the class here.
        pipeline: name of the class in `effjax.pipelines`.
        models: names of the classes in `effjax.models` that its model may have.
        model: the component that is denoiser or language model, and that methods compress.
        architectures: classes of transformers, for directories without a model_index.json.
        tokenizers, processors: components that transformers' AutoTokenizer and AutoProcessor load.
    """

    name: str
    pipeline: str
    models: tuple[str, ...]
    model: str = "transformer"
    architectures: tuple[str, ...] = ()
    tokenizers: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()

    @property
    def kinds(self) -> dict[str, Kind]:
        """What its components are, by name, in the order in which they are described."""
        tokenizers: dict[str, Kind] = dict.fromkeys(self.tokenizers, "tokenizer")
        processors: dict[str, Kind] = dict.fromkeys(self.processors, "processor")
        return {self.model: "model", **tokenizers, **processors}

    @property
    def loaded_models(self) -> tuple[str, ...]:
        """Components that are models."""
        return tuple(name for name, kind in self.kinds.items() if kind == "model")

    @property
    def replaceable(self) -> tuple[str, ...]:
        """Components that may be given in the place of a directory's own."""
        fixed = (self.model, "scheduler")
        return tuple(name for name in self.kinds if name not in fixed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageFamily(PipelineFamily):
    """A pipeline class around a model of stages of resolution.

    Attributes:
        vae: component that decodes latents. It may be missing where samples are pixels.
        steps, guidance: defaults of a call; the steps are those of each stage.
    """

    vae: str = "vae"
    steps: int
    guidance: float

    @property
    def kinds(self) -> dict[str, Kind]:
        return {self.model: "model", self.vae: "model"}


# --- what conditions are made of ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """A text encoder with its tokenizer, and what a condition takes from it.

    Attributes:
        name: component; its tokenizer is named alike ("text_encoder_2", "tokenizer_2").
        max_length: tokens of a prompt, padding included; the tokenizer's own limit, if that is
            smaller.
        read: `read(output, mask)`: trees of arrays [B, ...], from what the encoder's forward
            returns (a hidden layer, a pooled vector) and the mask [B, max_length] of tokens that
            are no padding. It runs inside of the program: what it leaves out is not computed.
        template: text around a prompt, "{}" where the prompt stands.
        truncates: cut longer prompts, as diffusers does; else they are an error.
        masked: give the encoder the mask, so that no token attends to padding.
        channels: field of the denoiser's configuration that must equal the encoder's `hidden_size`;
            None where the two differ.
        optional: the pipeline works without; `condition` is given None then.
        longest: tokens that `max_sequence_length` of a call may ask for; None where it says
            nothing about this encoder.
    """

    name: str = "text_encoder"
    max_length: int
    read: Callable[[Any, Bool[Array, "B T"]], PyTree]
    template: str = "{}"
    truncates: bool = False
    masked: bool = True
    channels: str | None = None
    optional: bool = False
    longest: int | None = None

    @property
    def tokenizer(self) -> str:
        """Name of its tokenizer."""
        return self.name.replace("text_encoder", "tokenizer")


def stripped(prompt: str) -> str:
    """A prompt without white space around it."""
    return prompt.strip()


def lower_case(prompt: str) -> str:
    """A prompt in lower case, without white space around it."""
    return prompt.lower().strip()


def only_condition(
    encoded: Mapping[str, PyTree], config: Any, lengths: Mapping[str, int]
) -> PyTree:
    """The condition of a family with one text encoder: what is read from it."""
    (condition,) = encoded.values()
    return condition


def encoder_kinds(encoders: tuple[TextEncoder, ...]) -> dict[str, Kind]:
    """Text encoders and tokenizers by name."""
    found: dict[str, Kind] = {}
    for each in encoders:
        found |= {each.name: "model", each.tokenizer: "tokenizer"}
    return found


# --- codes ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class CodesFamily(PipelineFamily):
    """A pipeline class around a model that predicts codes.

    Attributes:
        vae: the component whose codes they are.
        vae_part: which part of a directory in transformers' layout it is, see
            `converters.from_pretrained`.
        vae_file: the file there that has it; None for those of the model.
        refiner: a second model, which makes the last maps and may be missing; None where there is
            never one.
        guidance, top_k, top_p, temperature: defaults of a call; of no meaning for models that draw
            nothing.
        text_encoders, clean, condition: of models of prompts, see `DiffusionFamily`.
    """

    vae: str = "vae"
    vae_part: str | None = None
    vae_file: str | None = None
    refiner: str | None = None
    guidance: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 1.0
    text_encoders: tuple[TextEncoder, ...] = ()
    clean: Callable[[str], str] = stripped
    condition: Callable[[Mapping[str, PyTree], Any, Mapping[str, int]], PyTree] = only_condition

    @property
    def kinds(self) -> dict[str, Kind]:
        found: dict[str, Kind] = {**super().kinds, **encoder_kinds(self.text_encoders)}
        found[self.vae] = "model"
        return found if self.refiner is None else {**found, self.refiner: "model"}


# --- samples and outputs --------------------------------------------------------------------------


class Size(NamedTuple):
    """The size of an output that is asked for; None for the size that the model was made for.

    Attributes:
        height, width: in pixels.
        num_frames: of a video.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None


def image_shape(size: Size, config: Any, vae: Any) -> tuple[int, ...]:
    """Shape [H, W, C] of what is denoised for images.

    Args:
        size: what is asked for.
        config: of the denoiser, with `sample_shape` [H, W, C] and `patch_size`.
        vae: configuration of the VAE, with `downscale` (pixels of a latent's side); None for models
            of pixels.

    Raises:
        ValueError: for sides that are no positive multiples of a patch, and for frames.
    """
    if size.num_frames is not None:
        raise ValueError(f"this pipeline makes images, so num_frames={size.num_frames} means none")
    *sides, channels = config.sample_shape
    return (*_latent_sides(size, sides, config, vae), channels)


def video_shape(size: Size, config: Any, vae: Any) -> tuple[int, ...]:
    """Shape [F, H, W, C] of what is denoised for videos.

    A VAE with `downscale_t` t > 1 keeps the first frame and joins t later ones to a latent each, so
    videos have t n + 1 frames.

    Args:
        size: what is asked for.
        config: of the denoiser, with `sample_shape` [F, H, W, C], `patch_size` and, where patches
            have several frames, `patch_size_t`.
        vae: configuration of the VAE, with `downscale` and, if it joins frames, `downscale_t`; None
            for models of pixels.

    Raises:
        ValueError: for sides that are no positive multiples of a patch, and numbers of frames that
            make no whole latents and patches.
    """
    frames, *sides, channels = config.sample_shape
    joined, patch = getattr(vae, "downscale_t", 1), getattr(config, "patch_size_t", 1)
    if size.num_frames is not None:
        asked = arguments.count("num_frames", size.num_frames)
        frames = (asked - 1) // joined + 1
        if (asked - 1) % joined or frames % patch:
            allowed = [joined * (patch * n - 1) + 1 for n in (1, 2, 3)]
            raise ValueError(
                f"num_frames must make whole latents of {joined} frames (the first one alone) and "
                f"patches of {patch}: {', '.join(map(str, allowed))}, ...; got {asked}"
            )
    return (frames, *_latent_sides(size, sides, config, vae), channels)


def _latent_sides(size: Size, own: list[int], config: Any, vae: Any) -> list[int]:
    """Height and width of what is denoised."""
    scale = 1 if vae is None else vae.downscale
    given = {"height": size.height, "width": size.width}
    sides = [
        scale * side if asked is None else arguments.count(name, asked)
        for (name, asked), side in zip(given.items(), own, strict=True)
    ]
    unit = scale * config.patch_size
    if any(side < unit or side % unit for side in sides):
        raise ValueError(
            f"height and width must be positive multiples of {unit} pixels (a patch of "
            f"{config.patch_size}, {scale} pixels to a latent); got {sides[0]} x {sides[1]}"
        )
    return [side // scale for side in sides]


def decode_latents(
    forward: Decoder, params: PyTree, latents: Float[Array, "B ..."]
) -> Float[Array, "B ..."]:
    """What a VAE makes of latents, images of images or videos of videos.

    Forwards of VAEs take the latents that diffusion models make: shift and scale, or mean and
    standard deviation by channel, are fields of their configuration.
    """
    return forward(params, {}, latents)[0]


def encode_images(
    forward: Decoder, params: PyTree, images: Float[Array, "B H W I"]
) -> Float[Array, "B Y X Z"]:
    """Latents of images, as diffusion models take them: the mean of what a VAE makes of them."""
    (mean, _), _ = forward(params, {}, None, images)
    return mean


def decode_frames(
    forward: Decoder, params: PyTree, latents: Float[Array, "B F Y X Z"]
) -> Float[Array, "B F H W O"]:
    """What a VAE of images makes of the latents of a video, every frame by itself."""
    frames = decode_latents(forward, params, latents.reshape(-1, *latents.shape[2:]))
    return frames.reshape(*latents.shape[:2], *frames.shape[1:])


# --- diffusion ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionFamily(PipelineFamily):
    """A pipeline class around a denoiser.

    Attributes:
        text_encoders: with their tokenizers; none for class-conditional models.
        vae: component that decodes latents. It may be missing where samples are pixels.
        steps, guidance: defaults of `num_inference_steps` and `guidance_scale`.
        arrangement: of the branches of guidance in a batch, as the checkpoints were made for.
        schedule: fields of the schedule that diffusers' pipeline sets, not scheduler_config.json.
        clean: a prompt before it is tokenized.
        condition: `condition(encoded, config, lengths)`: the condition [B, ...] that the denoiser
            reads, from what was read of each text encoder by name, the denoiser's configuration,
            and the tokens of a prompt for each text encoder, those that are missing included.
        negative: what stands for a negative prompt that nobody gave: a prompt, or a function that
            makes its condition of the prompts' (`zeros_like`).
        embed_guidance: `embed_guidance(condition, scale, config)`: the condition of a model that is
            given the guidance scale as an input, and is sampled without guidance unless a call has
            a `true_cfg_scale`; None for classifier-free guidance.
        shape: `shape(size, config, vae)`: shape of a sample, see `image_shape`.
        decode: `decode(forward, params, latents)`: outputs in -1 ... 1 from latents [B, ...].
        encode: `encode(forward, params, outputs)`: its inverse, of the VAE, for image to image.
    """

    text_encoders: tuple[TextEncoder, ...] = ()
    vae: str = "vae"
    steps: int
    guidance: float
    arrangement: Guidance = dataclasses.field(default=Guidance())
    schedule: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    clean: Callable[[str], str] = stripped
    condition: Callable[[Mapping[str, PyTree], Any, Mapping[str, int]], PyTree] = only_condition
    negative: str | Callable[[PyTree], PyTree] = ""
    embed_guidance: Callable[[PyTree, float, Any], PyTree] | None = None
    shape: Callable[[Size, Any, Any], tuple[int, ...]] = image_shape
    decode: Callable[[Decoder, PyTree, Array], Array] = decode_latents
    encode: Callable[[Decoder, PyTree, Array], Array] = encode_images

    @property
    def kinds(self) -> dict[str, Kind]:
        found: dict[str, Kind] = {self.model: "model", **encoder_kinds(self.text_encoders)}
        found |= dict.fromkeys(self.processors, "processor")
        return {**found, self.vae: "model", "scheduler": "scheduler"}


def image_tokens(config: Any, shape: tuple[int, ...]) -> int:
    """Tokens of a sample of this shape, for schedules that shift by size."""
    return config.tokens * math.prod(shape) // math.prod(config.sample_shape)


def zeros_like(condition: PyTree) -> PyTree:
    """A condition of zeros."""
    return jax.tree.map(jnp.zeros_like, condition)
