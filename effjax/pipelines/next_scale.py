"""Pipelines of models that predict maps of codes from coarse to fine: VAR."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from effjax.autoregression import Collaborative, NextScale, teacher_forced
from effjax.buckets import by_parts
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.codes import OutputType, check_same
from effjax.pipelines.diffusion import Images, OnStepEnd
from effjax.pipelines.labels import Label
from effjax.pipelines.loading import Components
from effjax.pipelines.scales import ScalePipeline
from effjax.transform import Pair


@dataclasses.dataclass(frozen=True, repr=False)
class NextScalePipeline(ScalePipeline):
    """A class-conditional model of scales (VAR) with the VQVAE of its codes.

    Call it with class indices or names to get images of these classes.

        pipe = effjax.pipeline("var-d16", dtype="bfloat16")
        images = pipe([207, 980], key=jax.random.key(0), guidance_scale=4.0)

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQVAE.
        names: see `OfClasses`.
        refiner: forward and parameters of a second model, which makes the last maps; None for none.
    """

    refiner: Pair | None = dataclasses.field(default=None, kw_only=True)

    SETTINGS: ClassVar[tuple[str, ...]] = (
        *("guidance_scale", "top_k", "top_p", "temperature", "more_smooth", "draft_scales"),
    )

    @classmethod
    def of(cls, found: Components) -> NextScalePipeline:
        made = super().of(found)
        refiner = made.family.refiner
        if refiner is None or not found.has(refiner):
            return made
        return made.with_refiner(found.model(refiner))

    def with_refiner(self, refiner: NextScalePipeline | Pair | None) -> NextScalePipeline:
        """Return a copy whose last maps a second, smaller model makes (CoDe).

        Args:
            refiner: a pipeline of the same codes, maps and classes, or forward and parameters of
                its model; None for no second model.

        Raises:
            ValueError: for a model of other codes, maps or classes.
        """
        if isinstance(refiner, NextScalePipeline):
            if refiner.refiner is not None:
                raise ValueError("the refiner has a refiner itself, and two models are what go on")
            refiner = refiner.forward, refiner.params
        pair = isinstance(refiner, tuple) and len(refiner) == 2
        if refiner is not None and not (pair and isinstance(refiner[0], Forward)):
            raise ValueError(
                f"a refiner is a NextScalePipeline, or forward and parameters of its model; got a "
                f"{type(refiner).__name__}"
            )
        return dataclasses.replace(self, refiner=refiner, executables=None)

    def loop(self, *, draft_scales: int | None = None, **options: Any) -> NextScale:
        if self.refiner is None:
            if draft_scales is not None:
                raise ValueError(
                    f"draft_scales={draft_scales} is for two models, and this pipeline has no "
                    f"refiner: give one, `pipe.with_refiner(...)` or --refiner"
                )
            return NextScale(self.vae, self.patch_nums, **options)
        given = max(len(self.patch_nums) - 2, 1) if draft_scales is None else draft_scales
        options |= {"refiner": self.refiner}
        options |= {"draft_scales": arguments.count("draft_scales", given)}
        return Collaborative(self.vae, self.patch_nums, **options)

    def sampler(
        self,
        *,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | Sequence[float] | None = None,
        more_smooth: bool = False,
        draft_scales: int | None = None,
    ) -> NextScale:
        """Make the loop that a call uses.

        The arguments are those of a call.

        Raises:
            ValueError: for numbers out of range.
        """
        scale = self.family.guidance if guidance_scale is None else guidance_scale
        scale = arguments.scale("guidance_scale", scale)
        loop = self.loop(
            draft_scales=draft_scales,
            guidance=scale or None,
            temperature=self._temperature(temperature),
            more_smooth=arguments.flag("more_smooth", more_smooth),
            **self.drawing(top_k, top_p),
        )
        loop.check(self.forward)
        return loop

    def _temperature(self, given: Any) -> float | tuple[float, ...] | None:
        if given is None:
            return None
        options = len(self.patch_nums), "scales", arguments.scale
        found = arguments.by_place("temperature", given, *options)
        if 0.0 in (found if isinstance(found, tuple) else (found,)):
            raise ValueError(
                f"temperature must be above 0 (top_k=1 takes the likeliest tokens), got {given!r}"
            )
        return found

    @runs_executables
    def __call__(
        self,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        temperature: float | Sequence[float] | None = None,
        more_smooth: bool = False,
        draft_scales: int | None = None,
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
            guidance_scale: t in (1 + t) cond - t uncond at the last scale; it grows from 0 at the
                first one. 0 means no guidance, which halves the cost. None takes the family's (1.5,
                with which the published figures were measured; 4 makes clearer pictures).
            top_k: draw among so many of the likeliest tokens; 0 for all. None takes the family's
                (900).
            top_p: draw among the likeliest tokens whose probabilities reach this sum; 1 for all.
                None takes the family's (0.96).
            temperature: divides the logits of the tokens that are left; one number, or one for each
                scale. None is 1.
            more_smooth: mix codes by their probabilities in place of drawing them: for pictures.
            draft_scales: of a pipeline with a refiner, how many scales its model makes before that
                goes on; None for all but two, all for the model alone.
            output_type: "pil" for PIL images, "np" for float32[images, H, W, C] in 0 ... 1,
                "latent" for the latents float32[images, S, S, Z] before they are decoded, "tokens"
                for the tokens int32[images, L] of all scales.
            progress: show a bar over the parts of a batch.
            callback_on_step_end: called as `callback_on_step_end(scale, latents)` after every
                scale; if it returns latents, sampling goes on from those. Scales are then programs
                of their own.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, and numbers out of range.
            TypeError: if `key` is not a key.
        """
        if output_type == "tokens" and more_smooth:
            raise ValueError("more_smooth mixes codes, so that no tokens stand for the images")
        asked = arguments.listed("labels", labels)
        loop = self.sampler(
            guidance_scale=guidance_scale,
            top_k=top_k,
            top_p=top_p,
            temperature=temperature,
            more_smooth=more_smooth,
            draft_scales=draft_scales,
        )
        return self.drawn(
            loop,
            asked,
            key=key,
            repeats=num_images_per_prompt,
            output_type=output_type,
            progress=progress,
            callback=callback_on_step_end,
        )

    def logits(
        self,
        tokens: jax.Array | np.ndarray,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
    ) -> jax.Array:
        """Logits float32[B, L, V] of given tokens [B, L], all scales in one call, without guidance.

        Args:
            tokens: of whole scales, from the first one on.
            labels: class of each image.

        Raises:
            ValueError: for what is no tokens of whole scales, and unknown labels.
        """
        tokens, (cond, _) = self._tokens(tokens), self.conditions(labels)
        check_same(tokens, cond, "labels")
        run = partial(_read, self.forward, self.params, self.vae)
        return by_parts(run, self.buckets, tokens, cond)

    def _components(self, directory: Path) -> dict[str, Any]:
        found = super()._components(directory)
        if self.refiner is None and self.family.refiner is not None:
            found.pop(self.family.refiner, None)
        return found


@Program
def _read(forward: Forward, params: Params, vae: Pair, tokens: Array, labels: Array) -> Array:
    return teacher_forced(forward, params, vae, tokens, labels)
