"""What pipelines share whose models have a loop of their own: token by token, or in maps."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.buckets import cut, joined, rows
from effjax.context import PyTree
from effjax.executables import Program
from effjax.finite import warn_unless_finite
from effjax.forward import Forward, Params
from effjax.loops import Loop
from effjax.pipelines import arguments
from effjax.pipelines.base import AnyPipeline, BasePipeline
from effjax.pipelines.diffusion import Images, OnStepEnd
from effjax.pipelines.images import finished
from effjax.samplers import check_keys, keys_of
from effjax.transform import Pair

_ADVICE = (
    'Load the pipeline with dtype="float32" or "bfloat16", or with check_finite=True, which finds '
    "damaged weights."
)


@dataclasses.dataclass(frozen=True, repr=False)
class LoopPipeline(BasePipeline, abc.ABC):
    """A model and the loop that samples its latents.

    Attributes:
        forward, params: the model, possibly transformed.
    """

    MAKES: ClassVar[str] = "images"
    OUTPUTS: ClassVar[tuple[str, ...]]  # what an output_type may be

    @abc.abstractmethod
    def conditions(self, asked: Any, /) -> tuple[PyTree, None]:
        """Make the conditions `cond` and `uncond` that a sampler takes for labels or prompts."""

    @abc.abstractmethod
    def example_condition(self) -> PyTree:
        """A condition of one image."""

    @abc.abstractmethod
    def decode(self, x: jax.Array) -> jax.Array:
        """Decode latents [B, Y, X, Z] into images, float32 in about -1 ... 1."""

    def transform(self: AnyPipeline, *transforms: Callable[[Forward, Params], Pair]) -> AnyPipeline:
        """Return a copy of this pipeline with a transformed model.

        Args:
            transforms: functions `(forward, params) -> (forward, params)`, applied in order.

        Raises:
            ValueError: for methods that do not apply to such a model.
        """
        made: Any = super().transform(*transforms)
        if made.forward.patches:  # shapes alone are traced
            cond, loop, forward = made.example_condition(), made.sampler(), made.forward
            key = jax.random.key(0)
            jax.eval_shape(lambda params: loop.init(forward, params, cond, key), made.params)
        return made

    def drawn(
        self,
        loop: Any,
        asked: Sequence[Any],
        *,
        key: jax.Array,
        repeats: int,
        output_type: str,
        progress: bool,
        callback: OnStepEnd | None = None,
        run: Callable[[PyTree], tuple[Array, PyTree]] | None = None,
    ) -> Images:
        """Images of labels or prompts, in parts of a few sizes.

        Args:
            loop: what samples.
            asked: the labels or prompts.
            key: as it was given.
            repeats: images of each.
            output_type: one of `OUTPUTS`.
            progress: show a bar over the parts.
            callback: called with each step and its latents, which are then programs of their own.
            run: makes latents and tokens of repeated conditions in place of the loop's program.
        """
        arguments.one_of("output_type", output_type, self.OUTPUTS)
        arguments.callback(callback)
        repeats = arguments.count("num_images_per_prompt", repeats)
        check_keys(key, repeats * len(asked))
        made, _ = self.conditions(asked)
        cond = jax.tree.map(lambda x: jnp.asarray(np.repeat(np.asarray(x), repeats, axis=0)), made)
        if callback is not None:
            x, tokens = loop.stepwise(self.forward, self.params, cond, key, callback=callback)
        else:
            x, tokens = self._sampled(loop, cond, key, progress) if run is None else run(cond)
        if output_type == "tokens":
            return tokens
        outputs = x if output_type == "latent" else self.decode(x)
        warn_unless_finite("sampled images", outputs, _ADVICE)
        return finished(outputs, output_type)

    def _sampled(
        self, loop: Loop, cond: PyTree, key: jax.Array, progress: bool
    ) -> tuple[jax.Array, PyTree]:
        """Latents, and tokens if there are any."""
        from tqdm.auto import tqdm

        batch = len(jax.tree.leaves(cond)[0])
        sizes = cut(batch, self.buckets, cond, key)
        starts = itertools.accumulate(sizes, initial=0)
        parts = [
            _sample(
                loop,
                self.forward,
                self.params,
                rows(cond, start, size) if len(sizes) > 1 else cond,
                keys_of(key, batch, start, size),
            )
            for start, size in tqdm(list(zip(starts, sizes)), "sampling", disable=not progress)
        ]
        x, tokens = zip(*parts)
        return joined(x, batch), jax.tree.map(lambda *each: joined(each, batch), *tokens)


@Program
def _sample(
    loop: Any, forward: Forward, params: Params, cond: PyTree, key: Array
) -> tuple[Array, PyTree]:
    return loop.sample(forward, params, cond, key)
