"""What pipelines share whose models predict codes: images as tokens, latents and pixels."""

from __future__ import annotations

import abc
import dataclasses
from functools import partial
from typing import Any, Literal, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.buckets import by_parts
from effjax.context import PyTree
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.pipelines import arguments
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.images import prepared
from effjax.pipelines.looped import LoopPipeline
from effjax.transform import Pair

OutputType = Literal["pil", "np", "latent", "tokens"]


@dataclasses.dataclass(frozen=True, repr=False)
class CodesPipeline(LoopPipeline):
    """A model that predicts codes, with the autoencoder whose codes they are.

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the autoencoder.
    """

    vae: Pair
    family: CodesFamily = dataclasses.field(default=cast(Any, None), kw_only=True, repr=False)

    OUTPUTS = get_args(OutputType)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.loop().check(self.forward)

    @abc.abstractmethod
    def loop(self, **options: Any) -> Any:
        """The loop with these fields, without guidance and with all codes to draw among."""

    @property
    @abc.abstractmethod
    def size(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image in pixels."""

    def drawing(self, top_k: int | None, top_p: float | None) -> dict[str, Any]:
        """Fields of a loop that say among which codes it draws; None takes the family's.

        Raises:
            ValueError: for numbers out of range.
        """
        codes = self.vae[0].config.vocab_size
        top_k = min(self.family.top_k, codes) if top_k is None else top_k
        top_k = arguments.count("top_k", top_k, least=0)
        top_p = arguments.scale("top_p", self.family.top_p if top_p is None else top_p)
        if not 0 < top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (all tokens), got {top_p}")
        return {"top_k": top_k or None, "top_p": None if top_p == 1 else top_p}

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


def check_same(tokens: jax.Array, cond: PyTree, what: str) -> None:
    """Raise ValueError for tokens of another number of images than there are conditions."""
    count = len(jax.tree.leaves(cond)[0])
    if count != len(tokens):
        raise ValueError(f"there are tokens of {len(tokens)} images and {count} {what}")


@Program
def _decode(forward: Forward, params: Params, latents: Array) -> Array:
    return forward(params, {}, latents)[0].astype(jnp.float32)
