"""What pipelines share whose models predict codes: images as tokens, latents and pixels."""

from __future__ import annotations

import abc
import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.buckets import by_parts, cut, joined, rows
from effjax.context import PyTree
from effjax.executables import Program
from effjax.finite import warn_unless_finite
from effjax.forward import Forward, Params
from effjax.loops import Loop
from effjax.pipelines import arguments
from effjax.pipelines.base import AnyPipeline, BasePipeline
from effjax.pipelines.diffusion import Images
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.images import finished, prepared
from effjax.samplers import check_keys, keys_of
from effjax.transform import Pair

OutputType = Literal["pil", "np", "latent", "tokens"]

_ADVICE = (
    'Load the pipeline with dtype="float32" or "bfloat16", or with check_finite=True, which finds '
    "damaged weights."
)


@dataclasses.dataclass(frozen=True, repr=False)
class CodesPipeline(BasePipeline, abc.ABC):
    """A model that predicts codes, with the autoencoder whose codes they are.

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the autoencoder.
    """

    vae: Pair
    family: CodesFamily = dataclasses.field(default=cast(Any, None), kw_only=True, repr=False)

    MAKES: ClassVar[str] = "images"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loop().check(self.forward)

    @abc.abstractmethod
    def loop(self, **options: Any) -> Any:
        """The loop with these fields, without guidance and with all codes to draw among."""

    @abc.abstractmethod
    def example_condition(self) -> PyTree:
        """A condition of one image."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image in pixels."""

    def transform(self: AnyPipeline, *transforms: Callable[[Forward, Params], Pair]) -> AnyPipeline:
        """Return a copy of this pipeline with a transformed model.

        Args:
            transforms: functions `(forward, params) -> (forward, params)`, applied in order.

        Raises:
            ValueError: for methods that do not apply to a model of codes.
        """
        made: Any = super().transform(*transforms)
        if made.forward.patches:  # shapes alone are traced
            cond, loop, forward = made.example_condition(), made.sampler(), made.forward
            key = jax.random.key(0)
            jax.eval_shape(lambda params: loop.init(forward, params, cond, key), made.params)
        return made

    def drawing(self, top_k: int | None, top_p: float | None) -> dict[str, Any]:
        """Fields of a loop that say among which codes it draws; None takes the family's.

        Raises:
            ValueError: for numbers out of range.
        """
        codes = self.forward.config.vocab_size
        top_k = min(self.family.top_k, codes) if top_k is None else top_k
        if top_k != 0 or isinstance(top_k, bool):
            top_k = arguments.count("top_k", top_k)
        top_p = arguments.scale("top_p", self.family.top_p if top_p is None else top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {top_p}")
        return {"top_k": top_k or None, "top_p": None if top_p == 1 else top_p}

    def drawn(
        self,
        loop: Loop,
        conditions: Callable[[], PyTree],
        count: int,
        *,
        key: jax.Array,
        repeats: int,
        output_type: OutputType,
        progress: bool,
        run: Callable[[PyTree], tuple[Array, Array]] | None = None,
    ) -> Images:
        """Images of conditions, in parts of a few sizes.

        Args:
            loop: what samples.
            conditions: makes the conditions [B, ...].
            count: how many there are.
            key: as it was given.
            repeats: images of each.
            output_type: "pil", "np", "latent" or "tokens".
            progress: show a bar over the parts.
            run: makes latents and tokens of repeated conditions in place of the loop's program.
        """
        repeats = arguments.count("num_images_per_prompt", repeats)
        check_keys(key, repeats * count)
        made = conditions()
        cond = jax.tree.map(lambda x: jnp.asarray(np.repeat(np.asarray(x), repeats, axis=0)), made)
        x, tokens = self._sampled(loop, cond, key, progress) if run is None else run(cond)
        if output_type == "tokens":
            return tokens
        outputs = x if output_type == "latent" else self.decode(x)
        warn_unless_finite("sampled images", outputs, _ADVICE)
        return finished(outputs, output_type)

    def _sampled(
        self, loop: Loop, cond: PyTree, key: jax.Array, progress: bool
    ) -> tuple[jax.Array, jax.Array]:
        """Latents and tokens."""
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
        return joined(x, batch), joined(tokens, batch)

    def decode(self, x: jax.Array) -> jax.Array:
        """Decode latents [B, Y, X, Z] into images, float32 in about -1 ... 1."""
        return by_parts(partial(_decode, *self.vae), self.buckets, x)

    def pixels(self, images: Any) -> np.ndarray:
        """Images to encode as float32[B, H, W, C] in -1 ... 1.

        Args:
            images: PIL images, which are resized; or arrays [H, W, C] or [B, H, W, C] of the
                pipeline's `size`, uint8 or floats in 0 ... 1.

        Raises:
            ValueError: for other arrays.
        """
        many = isinstance(images, list | tuple) or getattr(images, "ndim", 3) == 4
        return prepared("images", images, len(images) if many else 1, self.size)

    def checked_tokens(self, given: Any) -> jax.Array:
        """Tokens int32[B, L] that are codes.

        Raises:
            ValueError: for what is none.
        """
        tokens, codes = np.asarray(given), self.vae[0].config.vocab_size
        if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.size:
            raise ValueError(f"tokens must be whole numbers [images, L], got {given!r:.200}")
        if tokens.min() < 0 or tokens.max() >= codes:
            raise ValueError(
                f"tokens are codes 0 ... {codes - 1}, got {tokens.min()} ... {tokens.max()}"
            )
        return jnp.asarray(tokens, jnp.int32)


def check_output(output_type: Any) -> None:
    """Raise ValueError for what is no `OutputType`."""
    types = get_args(OutputType)
    if not isinstance(output_type, str) or output_type not in types:
        raise ValueError(f"output_type must be one of {', '.join(types)}; got {output_type!r}")


def check_same(tokens: jax.Array, cond: PyTree, what: str) -> None:
    """Raise ValueError for tokens of another number of images than there are conditions."""
    count = len(jax.tree.leaves(cond)[0])
    if count != len(tokens):
        raise ValueError(f"there are tokens of {len(tokens)} images and {count} {what}")


@Program
def _sample(
    loop: Any, forward: Forward, params: Params, cond: PyTree, key: Array
) -> tuple[Array, Array]:
    return loop.sample(forward, params, cond, key)


@Program
def _decode(forward: Forward, params: Params, latents: Array) -> Array:
    return forward(params, {}, latents)[0].astype(jnp.float32)
