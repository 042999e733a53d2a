"""What pipelines share whose models predict maps of codes of classes, from coarse to fine."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from effjax.buckets import by_parts
from effjax.executables import Program
from effjax.forward import Forward, Params
from effjax.layers.scales import Sides, whole_scales
from effjax.models import vqvae
from effjax.pipelines.codes import CodesPipeline
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.labels import OfClasses
from effjax.pipelines.loading import Components


@dataclasses.dataclass(frozen=True, repr=False)
class ScalePipeline(OfClasses, CodesPipeline):
    """A class-conditional model of scales with the VQVAE of its codes.

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQVAE.
        names: see `OfClasses`.
    """

    @classmethod
    def of(cls, found: Components) -> Any:
        """Load from components.

        Raises:
            ValueError: for components that are missing or belong to different models.
        """
        family = found.family
        assert isinstance(family, CodesFamily)
        found.require(family.model, family.vae)
        names, vae = cls.names_of(found), found.model(family.vae)
        pair = found.model(family.model)
        return cls(*pair, vae, names=names, origin=found.origin, family=family)

    @property
    def patch_nums(self) -> Sides:
        """Sides of the maps of tokens, from coarse to fine."""
        return self.forward.config.patch_nums

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image in pixels."""
        config = self.vae[0].config
        side = config.downscale * self.patch_nums[-1]
        return side, side, config.in_channels

    def encode(self, images: Any) -> jax.Array:
        """Encode images to the tokens int32[B, L] of all scales.

        Args:
            images: PIL images, which are resized; or arrays [H, W, C] or [B, H, W, C] of the
                pipeline's `size`, uint8 or floats in 0 ... 1.

        Raises:
            ValueError: for other arrays.
        """
        run = partial(_encode, self.patch_nums, *self.vae)
        return by_parts(run, self.buckets, self.pixels(images))

    def latents(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """The latents float32[B, S, S, Z] of tokens [B, L], which may be of the first scales alone.

        Raises:
            ValueError: for what is no tokens of whole scales.
        """
        tokens = self._tokens(tokens)
        return by_parts(partial(_latents, self.patch_nums, *self.vae), self.buckets, tokens)

    def _tokens(self, given: Any) -> jax.Array:
        tokens = self.checked_tokens(given)
        whole_scales(self.patch_nums, tokens.shape[1])
        return tokens


@partial(Program, static_argnums=(0,))
def _encode(patch_nums: Sides, forward: Forward, params: Params, images: Array) -> Array:
    return vqvae.encode(forward, params, images, patch_nums)


@partial(Program, static_argnums=(0,))
def _latents(patch_nums: Sides, forward: Forward, params: Params, tokens: Array) -> Array:
    return vqvae.latents_of(forward, params, tokens, patch_nums)
