"""Pipelines of students of Distilled Decoding: images of classes in one or two calls."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import numpy as np
from jaxtyping import Array

from effjax.autoregression import FewScales, FewStep, FewTokens, NextScale, NextToken
from effjax.autoregression.few_step import calls_of
from effjax.executables import Program
from effjax.pipelines import arguments
from effjax.pipelines.base import runs_executables
from effjax.pipelines.codes import CodesPipeline, OutputType
from effjax.pipelines.diffusion import Images
from effjax.pipelines.labels import Label, OfClasses
from effjax.pipelines.next_scale import NextScalePipeline
from effjax.pipelines.next_token import NextTokenPipeline
from effjax.pipelines.rasters import ClassRasterPipeline
from effjax.pipelines.scales import ScalePipeline
from effjax.transform import Pair


class FewCalls(OfClasses, CodesPipeline):
    """A student with the autoencoder of its codes: what pipelines of students share."""

    SETTINGS: ClassVar[tuple[str, ...]] = ("num_inference_steps",)

    @abc.abstractmethod
    def loop(self, **options: Any) -> Any: ...

    @property
    def calls(self) -> dict[str, Any]:
        """How the student samples, by its configuration."""
        return calls_of(self.forward.config)

    def sampler(self, *, num_inference_steps: int | None = None) -> FewStep:
        """Make the loop that a call uses.

        Args:
            num_inference_steps: see a call.

        Raises:
            ValueError: for calls that the student was not trained for.
        """
        starts = self.forward.config.starts
        steps = len(starts) if num_inference_steps is None else num_inference_steps
        steps = arguments.count("num_inference_steps", steps)
        if steps > len(starts):
            raise ValueError(
                f"this student was trained for calls that start at {starts}: "
                f"num_inference_steps is 1 ... {len(starts)}, got {steps}"
            )
        return self.loop(starts=starts[:steps])

    @runs_executables
    def __call__(
        self,
        labels: Label | Sequence[Label] | np.ndarray | jax.Array,
        *,
        key: jax.Array,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        teacher: NextScalePipeline | NextTokenPipeline | None = None,
        teacher_start: int | None = None,
        output_type: OutputType = "pil",
        progress: bool = True,
    ) -> Images:
        """Generate images of classes.

        Args:
            labels: one or more class indices or names.
            key: PRNG key, `jax.random.key(seed)`. The same key gives the same image at its place,
                with one call and with two much the same one.
            num_images_per_prompt: images of each label. All of the first label come first, then all
                of the second, ...
            num_inference_steps: network calls; None for as many as the student was trained for.
            teacher: the model that the student learned from, to sample some scales (or tokens)
                between two calls, with the settings of its `sampler()`.
            teacher_start: the first of these scales; the last one is that before the second call.
                None for that one alone.
            output_type: "pil" for PIL images, "np" for float32[images, H, W, C] in 0 ... 1,
                "latent" for the latents float32[images, S, S, Z] before they are decoded, "tokens"
                for the tokens int32[images, L] next to what was sampled, which lies between codes
                at the last scales.
            progress: show a bar over the parts of a batch.

        Returns:
            PIL images, "L" or "RGB", or what `output_type` says.

        Warns:
            NotFiniteWarning: for images that are NaN or infinite.

        Raises:
            ValueError: for unknown labels, calls that the student was not trained for, and a
                teacher's scales that are not between two calls.
            TypeError: if `key` is not a key.
        """
        asked = arguments.listed("labels", labels)
        loop = self.sampler(num_inference_steps=num_inference_steps)
        run = None
        if teacher is not None:
            own = self._loop_of(teacher, loop)
            if teacher_start is not None:
                teacher_start = arguments.count("teacher_start", teacher_start, least=0)
            start = loop.teacher_start(teacher_start)
            run = partial(self._with_teacher, loop, start, teacher, own, key)
        elif teacher_start is not None:
            raise ValueError("teacher_start is where a teacher begins: give teacher= too")
        return self.drawn(
            loop,
            asked,
            key=key,
            repeats=num_images_per_prompt,
            output_type=output_type,
            progress=progress,
            run=run,
        )

    def _with_teacher(
        self, loop: FewStep, start: int, teacher: Any, own: Any, key: Array, cond: Any
    ) -> tuple[Array, Array]:
        student, pair = (self.forward, self.params), (teacher.forward, teacher.params)
        return _sample(loop.starts, start, loop, student, pair, own, cond, key)

    def _loop_of(self, teacher: Any, loop: FewStep) -> Any:
        """The loop of a teacher, which is found to fit."""
        if not isinstance(teacher, NextScalePipeline | NextTokenPipeline):
            raise ValueError(
                f"teacher is the pipeline of the model that the student learned from, got a "
                f"{type(teacher).__name__}"
            )
        own = teacher.sampler()
        loop.check_teacher(self.forward, teacher.forward, own)
        return own


@dataclasses.dataclass(frozen=True, repr=False)
class FewStepPipeline(FewCalls, ScalePipeline):
    """A student of a class-conditional model of scales, with the VQVAE of its codes.

    Call it with class indices or names to get images of these classes.

        pipe = effjax.pipeline("var-d16-distilled", dtype="bfloat16")
        images = pipe([207, 980], key=jax.random.key(0), num_inference_steps=1)
    """

    def loop(self, **options: Any) -> FewScales:
        return FewScales(self.vae, self.patch_nums, **{**self.calls, **options})


@dataclasses.dataclass(frozen=True, repr=False)
class FewTokenPipeline(FewCalls, ClassRasterPipeline):
    """A student of a class-conditional model of tokens, with the VQ model of its codes.

    It is called as `FewStepPipeline` is, and counts tokens where that counts scales.
    """

    def loop(self, **options: Any) -> FewTokens:
        return FewTokens(self.vae, self.grid, **{**self.calls, **options})


@partial(Program, static_argnums=(0, 1))
def _sample(
    starts: tuple[int, ...],
    start: int,
    loop: Any,
    student: Pair,
    teacher: Pair,
    own: NextScale | NextToken,
    labels: Array,
    key: Array,
) -> tuple[Array, Array]:
    known = dataclasses.replace(loop, starts=starts)
    return known.with_teacher(student, teacher, own, labels, key, start=start)
