"""Diffusion pipelines: a denoiser with its sampler and decoder, from conditions to outputs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from effjax.buckets import by_parts
from effjax.context import PyTree
from effjax.executables import Program
from effjax.fields import naming
from effjax.finite import warn_unless_finite
from effjax.forward import Forward, Params
from effjax.pipelines import arguments
from effjax.pipelines.base import SCHEDULER, BasePipeline
from effjax.pipelines.family import DiffusionFamily, Size, image_tokens
from effjax.pipelines.images import finished, prepared
from effjax.pipelines.loading import Components, check_decodes
from effjax.pipelines.summary import Summary, Watch, summarize
from effjax.recipe import RECIPE
from effjax.samplers import Sampler, Schedule, check_keys
from effjax.transform import Pair

OnStepEnd = Callable[[int, jax.Array], Any]
OutputType = Literal["pil", "np", "latent"]
Images = list[Image.Image] | np.ndarray | jax.Array
Conditions = Callable[[], tuple[PyTree, PyTree]]

STRENGTH = 0.6
"""Share of the steps that change a given image, unless a call says another (diffusers' too)."""
_PIXELS = (1, 3)  # channels of a model that needs no VAE


@dataclasses.dataclass(frozen=True, repr=False)
class Pipeline(BasePipeline):
    """A diffusion model that is ready to sample: the base of pipelines of images and videos.

    `SETTINGS` are the arguments of a call that `sampler` takes too, and that commands ask for.

    Attributes:
        forward, params: the denoiser, possibly transformed.
        scheduler: contents of its scheduler_config.json.
        vae: forward and parameters of the latent decoder; None for models of pixels.
        processors: processors of transformers, by the names of the components.
    """

    scheduler: Mapping[str, Any]
    vae: Pair | None = None
    processors: Mapping[str, Any] = dataclasses.field(default_factory=dict, kw_only=True)
    family: DiffusionFamily = dataclasses.field(default=cast(Any, None), kw_only=True, repr=False)
    _last: list[Watch] = dataclasses.field(
        default_factory=list, init=False, repr=False, compare=False
    )

    TASK = "text-to-image"
    MAKES: ClassVar[str] = "images"
    SETTINGS: ClassVar[tuple[str, ...]] = ("num_inference_steps", "guidance_scale")

    @classmethod
    def shared(cls, found: Components) -> dict[str, Any]:
        """The components that all these pipelines have, loaded.

        Raises:
            ValueError: for components that are missing or belong to different models, and for a
                scheduler that is not known.
        """
        family, name = found.family, found.family.model
        assert isinstance(family, DiffusionFamily)
        found.require(name)
        if found.variant is not None and not any(map(found.has_variant, family.loaded_models)):
            raise ValueError(
                f"no component of {found.folder.source} has a variant {found.variant!r}"
            )
        scheduler = found.folder.read(SCHEDULER)
        with naming(SCHEDULER):
            # So that it is known before the work.
            Schedule.from_config(scheduler, steps=1, tokens=1, **family.schedule)
        own = found.folder.has(f"{name}/{RECIPE}")  # it may have been saved without a VAE
        channels = found.folder.read(f"{name}/config.json").get("in_channels", 4)
        if not own and channels not in _PIXELS:
            found.require(family.vae)
        forward, params = found.model(name)
        vae = found.model(family.vae) if found.has(family.vae) else None
        check_decodes(vae, forward.config.sample_shape[-1])
        return {
            "forward": forward,
            "params": params,
            "scheduler": scheduler,
            "vae": vae,
            "processors": {each: found.processor(each, each) for each in family.processors},
            "origin": found.origin,
            "family": family,
        }

    def sampler(
        self,
        *,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        true_cfg_scale: float | None = None,
        strength: float | None = None,
    ) -> Sampler:
        """Make the sampler that a call uses.

        Use it to sample in one program of your own: `jax.jit(sampler)(forward, params, cond, key)`.

        Args:
            num_inference_steps, guidance_scale: None takes those of the plan, else the pipeline's
                own.
            height, width: size of the images in pixels, for models that take several sizes. None
                takes the size that the model was made for.
            num_frames: number of frames of a video, likewise.
            true_cfg_scale: of classifier-free guidance, for a model that is told its guidance scale
                and has this one besides (FLUX); None for none.
            strength: share of the steps that change a given image; None to begin with noise.

        Raises:
            ValueError: for a height or width that is not a whole number of patches, for steps that
                are not a whole number of at least 1, for a scale that is not finite or is below 0,
                and for a `true_cfg_scale` that the family does not take.
        """
        steps = (
            self._planned("calls", self.family.steps)
            if num_inference_steps is None
            else num_inference_steps
        )
        steps = arguments.count("num_inference_steps", steps)
        scale = self.guidance_scale(guidance_scale)
        config, vae = self.forward.config, None if self.vae is None else self.vae[0].config
        shape = self.family.shape(Size(height, width, num_frames), config, vae)
        schedule = Schedule.from_config(
            self.scheduler,
            steps=steps,
            tokens=image_tokens(config, shape),
            **self.family.schedule,
        )
        if strength is not None:
            schedule = schedule.from_strength(arguments.scale("strength", strength))
        if self.family.embed_guidance is not None:
            scale = arguments.scale(
                "true_cfg_scale", 1 if true_cfg_scale is None else true_cfg_scale
            )
        elif true_cfg_scale is not None:
            raise ValueError(
                f"a {self.family.name} has one scale of guidance: give guidance_scale, leave out "
                f"true_cfg_scale"
            )
        return Sampler(schedule, scale, self.family.arrangement, shape)

    def guidance_scale(self, given: float | None = None) -> float:
        """The guidance scale of a call: the given one, else the plan's, else the family's.

        Raises:
            ValueError: for a scale that is not finite or below 0.
        """
        scale = self._planned("guidance", self.family.guidance) if given is None else given
        return arguments.scale("guidance_scale", scale)

    def decode(self, x: jax.Array) -> jax.Array:
        """Decode samples [B, ...] into images or videos, float32 in about -1 ... 1."""
        return x if self.vae is None else _decode(self.family.decode, *self.vae, x)

    def summary(self) -> Summary:
        """What the last call computed, kept from step to step, and held quantized.

        Raises:
            ValueError: if there was no call yet.
        """
        if not self._last:
            raise ValueError("nothing was sampled yet: call the pipeline first")
        return summarize(self._last[0], self.forward, self.params)

    def encode_images(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Encode images [B, H, W, C] or videos in -1 ... 1 into samples [B, ...], to change them.

        Raises:
            ValueError: for a VAE that was loaded without an encoder.
        """
        if self.vae is None:
            return jnp.asarray(images)
        run = functools.partial(_encode, self.family.encode, *self.vae)
        return by_parts(run, self.buckets, images)

    def component(self, name: str) -> Any:
        if name == self.family.vae:
            return self.vae
        return (
            self.processors.get(name) if name in self.family.processors else super().component(name)
        )

    def _generate(
        self,
        sampler: Sampler,
        asked: int,
        conditions: Conditions,
        *,
        key: jax.Array,
        repeats: Any,
        latents: jax.Array | np.ndarray | None,
        image: Any,
        output_type: str,
        progress: bool,
        callback_on_step_end: OnStepEnd | None,
    ) -> Any:
        """Outputs of so many conditions; `conditions` may be slow and comes after all checks."""
        arguments.one_of("output_type", output_type, get_args(OutputType))
        arguments.callback(callback_on_step_end)
        repeats = arguments.count(f"num_{self.MAKES}_per_prompt", repeats)
        count = repeats * asked
        check_keys(key, count)
        if latents is not None:
            latents = sampler.given_noise(self.forward, count, latents)
        if image is not None:
            image = prepared("image", image, count, self._size(sampler))
        cond, uncond = conditions()
        if repeats > 1:
            cond, uncond = jax.tree.map(
                lambda leaf: jnp.asarray(np.repeat(leaf, repeats, axis=0)), (cond, uncond)
            )
        uncond = uncond if sampler.guided else None
        watch = Watch()
        x = sampler.stepwise(
            self.forward,
            self.params,
            cond,
            key,
            uncond=uncond,
            noise=latents,
            image=None if image is None else self.encode_images(image),
            progress=progress,
            callback=callback_on_step_end,
            watch=watch,
            buckets=self.buckets,
        )
        self._last[:] = [watch]
        outputs = x if output_type == "latent" else by_parts(self.decode, self.buckets, x)
        self._warn_unless_finite((cond, uncond), x, outputs)
        return finished(outputs, output_type)

    def _size(self, sampler: Sampler) -> tuple[int, int, int]:
        """(H, W, C) of an output."""
        *sides, channels = sampler.sample_shape(self.forward)
        if len(sides) > 2:
            raise ValueError(f"image= is of pipelines of images, a {self.family.name} makes videos")
        if self.vae is None:
            return sides[0], sides[1], channels
        config = self.vae[0].config
        return sides[0] * config.downscale, sides[1] * config.downscale, config.in_channels

    def _warn_unless_finite(
        self, conditions: tuple[PyTree, PyTree], x: jax.Array, outputs: jax.Array
    ) -> None:
        """Name the first stage whose result is not finite; what follows it is not finite either."""
        if _finite(outputs):
            return
        stages = [
            ("text embeddings", leaf)
            for leaf in jax.tree.leaves(conditions)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
        ]
        stages += [("latents after the last step", x), (f"decoded {self.MAKES}", outputs)]
        what, values = next(stage for stage in stages if not _finite(stage[1]))
        advice = (
            'Load the pipeline with dtype="float32" or "bfloat16", whose range is larger than '
            "float16's, or with check_finite=True, which finds damaged weights."
        )
        warn_unless_finite(what, values, advice)

    def _planned(self, attribute: str, default: Any) -> Any:
        """What a plan of the recipe says, else the default."""
        values = [getattr(plan, attribute, None) for _, plan in self.forward.recipe]
        return next((value for value in values if value is not None), default)


def strength_of(image: Any, given: float | None) -> float | None:
    """The strength of a call: what it says, else the default where there is an image to change.

    Raises:
        ValueError: for a strength without an image.
    """
    if image is not None:
        return STRENGTH if given is None else given
    if given is not None:
        raise ValueError("strength says how much of an image to change: give image=")
    return None


def _finite(values: jax.Array) -> bool:
    return bool(np.isfinite(values).all())


@functools.partial(Program, static_argnums=(0,))
def _decode(
    decode: Callable[..., jax.Array], forward: Forward, params: Params, latents: jax.Array
) -> jax.Array:
    return decode(forward, params, latents)


@functools.partial(Program, static_argnums=(0,))
def _encode(
    encode: Callable[..., jax.Array], forward: Forward, params: Params, images: jax.Array
) -> jax.Array:
    return encode(forward, params, images)
