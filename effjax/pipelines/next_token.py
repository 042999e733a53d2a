"""Pipelines of models that predict the codes of a raster: LlamaGen, and in groups NAR and NBP.

Those of models that read prompts themselves are in `effjax.pipelines.prompt_token`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.autoregression import NextBlock, NextDiagonal, NextToken
from effjax.buckets import by_parts
from effjax.context import PyTree
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.generate import JacobiDecoding
from effjax.models.llamagen import Caption
from effjax.pipelines import arguments
from effjax.pipelines.base import INDEX, runs_executables
from effjax.pipelines.codes import OutputType, check_same
from effjax.pipelines.diffusion import Images
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.labels import Label
from effjax.pipelines.loading import Components
from effjax.pipelines.rasters import ClassRasterPipeline, RasterPipeline, sized
from effjax.pipelines.text_encoders import OfPrompts

# Of models that predict several tokens in a call.
_LOOPS: dict[type, type[NextBlock | NextDiagonal]] = {
    loop.CONFIG: loop for loop in (NextBlock, NextDiagonal)
}


@dataclasses.dataclass(frozen=True, repr=False)
class TokenPipeline(RasterPipeline):
    """A model that predicts codes in an order: the base of its pipelines."""

    SETTINGS: ClassVar[tuple[str, ...]] = (
        "guidance_scale",
        "guidance_interval",
        "top_k",
        "top_p",
        "temperature",
        "decoder",
    )

    def loop(self, **options: Any) -> NextToken:
        config = self.forward.config
        if loop := _LOOPS.get(type(config)):
            return loop(self.vae, self.grid, groups=config.groups, **options)
        return NextToken(self.vae, self.grid, **options)

    def sampler(
        self,
        *,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        decoder: JacobiDecoding | None = None,
    ) -> NextToken:
        """Make the loop that a call uses.

        The arguments are those of a call.

        Raises:
            ValueError: for numbers out of range.
        """
        scale = self.family.guidance if guidance_scale is None else guidance_scale
        scale = arguments.scale("guidance_scale", scale)
        temperature = self.family.temperature if temperature is None else temperature
        if (temperature := arguments.scale("temperature", temperature)) == 0:
            raise ValueError("temperature must be above 0 (top_k=1 takes the likeliest tokens)")
        if guidance_interval is not None:
            guidance_interval = arguments.count("guidance_interval", guidance_interval)
        loop = self.loop(
            guidance=None if scale == 1 else scale,
            guidance_interval=guidance_interval,
            temperature=None if temperature == 1 else temperature,
            decoder=decoder,
            **self.drawing(top_k, top_p),
        )
        loop.check(self.forward)
        return loop

    def read(self, tokens: Any, cond: PyTree, what: str) -> jax.Array:
        """Logits of given tokens, the first ones of each image or all."""
        tokens = self.checked_tokens(tokens)
        most = self.grid[0] * self.grid[1]
        if tokens.shape[1] > most:
            raise ValueError(f"an image has {most} tokens, got {tokens.shape[1]}")
        check_same(tokens, cond, what)
        return by_parts(partial(_read, self.forward, self.params), self.buckets, tokens, cond)


@dataclasses.dataclass(frozen=True, repr=False)
class NextTokenPipeline(ClassRasterPipeline, TokenPipeline):
    """A class-conditional model of tokens (LlamaGen, NAR, NBP) with the VQ model of its codes.

    Call it with class indices or names to get images of these classes.

        pipe = effjax.pipeline("llamagen-b", dtype="bfloat16")
        images = pipe([207, 980], key=jax.random.key(0))

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQ model.
        names: see `OfClasses`.
    """

    @runs_executables
    def __call__(
        self,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        decoder: JacobiDecoding | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Images:
        """Generate images of classes.

        Args:
            labels: one or more class indices or names.
            key: PRNG key, `jax.random.key(seed)`. The same key gives the same image at its place.
            num_images_per_prompt: images of each label. All of the first label come first, then all
                of the second, ...
            guidance_scale: of classifier-free guidance; 1 means none, which halves the cost. None
                takes the family's (2).
            guidance_interval: how many of the first tokens are guided; None for all.
            top_k: draw among so many of the likeliest tokens; 0 for all. None takes the family's
                (all).
            top_p: draw among the likeliest tokens whose probabilities reach this sum; 1 for all.
                None takes the family's (1).
            temperature: divides the logits; None is 1.
            decoder: how several tokens are found in one call, such as `JacobiDecoding(window=16)`;
                None finds one. The distribution of images is the same.
            output_type: "pil" for PIL images, "np" for float32[images, H, W, C] in 0 ... 1,
                "latent" for the latents float32[images, rows, columns, Z] before they are decoded,
                "tokens" for the tokens int32[images, N].
            progress: show a bar over the parts of a batch.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, and numbers out of range.
            TypeError: if `key` is not a key.
        """
        asked = arguments.listed("labels", labels)
        loop = self.sampler(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            decoder=decoder,
        )
        return self.drawn(
            loop,
            asked,
            key=key,
            repeats=num_images_per_prompt,
            output_type=output_type,
            progress=progress,
        )

    def logits(
        self,
        tokens: jax.Array | np.ndarray,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
    ) -> jax.Array:
        """Logits float32[B, L, V] of given tokens [B, L], all in one call, without guidance.

        Args:
            tokens: the first ones of each image, or all; all of models that predict groups.
            labels: class of each image.

        Raises:
            ValueError: for what is no tokens of an image, and unknown labels.
        """
        return self.read(tokens, self.conditions(labels)[0], "labels")


@dataclasses.dataclass(frozen=True, repr=False)
class PromptedRaster(TokenPipeline):
    """A model that predicts the codes of images of prompts: the base of its pipelines."""

    TASK = "text-to-image"

    @abc.abstractmethod
    def conditions(self, prompts: str | Sequence[str]) -> tuple[PyTree, None]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these prompts."""

    @runs_executables
    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: int | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | None = None,
        decoder: JacobiDecoding | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Images:
        """Generate images of prompts.

        Args:
            prompt: one or more. What a text encoder cannot read (LlamaGen's: beyond 120 tokens) is
                cut, with a warning.
            key, num_images_per_prompt, guidance_interval, decoder, output_type, progress: as for
                `NextTokenPipeline`.
            guidance_scale: of classifier-free guidance; 1 means none. None takes the family's
                (LlamaGen: 7.5, Janus: 5, Chameleon: 3).
            top_k: draw among so many of the likeliest tokens; 0 for all. None takes the family's
                (LlamaGen: 1000, Janus and Chameleon: all).
            top_p: draw among the likeliest tokens whose probabilities reach this sum; 1 for all.
                None takes the family's (LlamaGen and Janus: 1, Chameleon: 0.9).
            temperature: divides the logits. None takes the family's (LlamaGen and Janus: 1,
                Chameleon: 0.7).

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for images that are NaN or infinite.

        Raises:
            ValueError: for what is no text, prompts that are too long for a model that reads all of
                them, numbers out of range, and a decoder for models of groups of tokens.
            TypeError: if `key` is not a key.
        """
        prompts = arguments.texts("prompt", prompt)
        loop = self.sampler(
            guidance_scale=guidance_scale,
            guidance_interval=guidance_interval,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            decoder=decoder,
        )
        return self.drawn(
            loop,
            prompts,
            key=key,
            repeats=num_images_per_prompt,
            output_type=output_type,
            progress=progress,
        )

    def logits(self, tokens: jax.Array | np.ndarray, prompts: str | Sequence[str]) -> jax.Array:
        """Logits float32[B, L, V] of given tokens [B, L], see `NextTokenPipeline.logits`."""
        return self.read(tokens, self.conditions(prompts)[0], "prompts")


@dataclasses.dataclass(frozen=True, repr=False)
class TextNextTokenPipeline(OfPrompts, PromptedRaster):
    """A text-to-image model of tokens (LlamaGen, NAR) with its text encoder and the VQ model.

    Call it with prompts.

        pipe = effjax.pipeline("llamagen-t2i", dtype="bfloat16")
        images = pipe("a fox in the snow", key=jax.random.key(0))

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQ model.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        model = self.forward.model.__name__
        if not self.forward.config.caption_channels:
            raise ValueError(
                f"this {model} is conditioned on classes: {INDEX} must name a {model}Pipeline"
            )

    def example_condition(self) -> PyTree:
        config = self.forward.config
        shape = 1, config.caption_tokens, config.caption_channels
        return Caption(jnp.zeros(shape), jnp.ones(shape[:2], bool), jnp.zeros(1, bool))

    @classmethod
    def of(cls, found: Components) -> TextNextTokenPipeline:
        """Load from components.

        Raises:
            ValueError: for components that are missing or belong to different models.
        """
        family = found.family
        assert isinstance(family, CodesFamily)
        found.require(family.model, family.vae)
        vae = found.model(family.vae)
        pair = sized(found, vae)
        encoders = cls.encoders_of(found, pair[0].config)
        return cls(*pair, vae, **encoders, origin=found.origin, family=family)

    def conditions(self, prompts: str | Sequence[str]) -> tuple[Caption, None]:
        """Make the conditions `cond` and `uncond` that a sampler takes for these prompts.

        Raises:
            ValueError: for what is no text.
        """
        prompts = arguments.texts("prompt", prompts)
        return self._encoded([(each,) for each in prompts], self._lengths(None)), None


@Program
def _read(forward: Forward, params: Params, tokens: Array, cond: PyTree) -> Array:
    loop = _LOOPS.get(type(forward.config), NextToken)
    return loop.logits(forward, params, tokens, cond)
