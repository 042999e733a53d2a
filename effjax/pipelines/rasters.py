"""What pipelines share whose models predict codes row by row."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from effjax.buckets import by_parts
from effjax.executables import Program
from effjax.fields import naming
from effjax.forward import Forward, Params, abstract
from effjax.models import vq_model
from effjax.models.vq_model import VQModelConfig
from effjax.pipelines import arguments
from effjax.pipelines.base import INDEX
from effjax.pipelines.codes import CodesPipeline
from effjax.pipelines.family import CodesFamily
from effjax.pipelines.labels import OfClasses
from effjax.pipelines.loading import Components
from effjax.transform import Pair


@dataclasses.dataclass(frozen=True, repr=False)
class RasterPipeline(CodesPipeline):
    """A model that predicts the codes of a `VQModel` row by row: the base of its pipelines."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of an image."""
        return (self.forward.config.grid,) * 2

    @property
    def size(self) -> tuple[int, int, int]:
        """(height, width, channels) of an image in pixels."""
        config, (rows, columns) = self.vae[0].config, self.grid
        return config.downscale * rows, config.downscale * columns, config.in_channels

    def encode(self, images: Any) -> jax.Array:
        """Encode images to tokens int32[B, N], row by row.

        Args:
            images: PIL images, which are resized; or arrays [H, W, C] or [B, H, W, C] of the
                pipeline's `size`, uint8 or floats in 0 ... 1.

        Raises:
            ValueError: for other arrays.
        """
        return by_parts(partial(_encode, *self.vae), self.buckets, self.pixels(images))

    def latents(self, tokens: jax.Array | np.ndarray) -> jax.Array:
        """The latents float32[B, rows, columns, Z] of tokens [B, N].

        Raises:
            ValueError: for what is no tokens of whole images.
        """
        tokens, (rows, columns) = self.checked_tokens(tokens), self.grid
        if tokens.shape[1] != rows * columns:
            raise ValueError(
                f"an image has {rows} x {columns} = {rows * columns} tokens, got {tokens.shape[1]}"
            )
        return by_parts(partial(_latents, self.grid, *self.vae), self.buckets, tokens)


@dataclasses.dataclass(frozen=True, repr=False)
class ClassRasterPipeline(OfClasses, RasterPipeline):
    """One of classes.

    Attributes:
        forward, params: the model, possibly transformed.
        vae: forward and parameters of the VQ model.
        names: see `OfClasses`.
    """

    def __post_init__(self) -> None:
        model = self.forward.model.__name__
        if not self.forward.config.num_classes:
            raise ValueError(
                f"this {model} is conditioned on prompts: {INDEX} must name a {model}TextPipeline"
            )
        super().__post_init__()

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
        pair = sized(found, vae)
        return cls(*pair, vae, names=names, origin=found.origin, family=family)


def sized(found: Components, vae: Pair) -> Pair:
    """The model of a directory, for images of the size that its index says.

    The released files do not tell the size; what this library saves does.

    Raises:
        ValueError: for a released file without a size, or a size of no whole tokens.
    """
    family, index = found.family, found.index or {}
    pair, codes = found.model(family.model), vae[0].config
    if not isinstance(codes, VQModelConfig):
        raise ValueError(
            f"the vae of {found.folder.source} must be a VQModel, got a {vae[0].model.__name__}"
        )
    unit = codes.downscale
    given = index.get("image_size")
    if given is None:
        if found.file(family.model) is None:
            return pair
        raise ValueError(
            f"{INDEX} of {found.folder.source} must say image_size, in pixels (256, 384 or 512 of "
            f"the released models): {index[family.model]} does not tell it"
        )
    with naming(f"{found.folder.source}/{INDEX}"):
        side = arguments.count("image_size", given)
        if side % unit:
            raise ValueError(f"image_size must be a multiple of {unit} pixels, got {side}")
    forward, params = pair
    if forward.patches:
        return pair
    config = dataclasses.replace(forward.config, grid=side // unit)
    return abstract(forward.model, config)[0], params


@Program
def _encode(forward: Forward, params: Params, images: Array) -> Array:
    return vq_model.encode(forward, params, images)


@partial(Program, static_argnums=(0,))
def _latents(grid: tuple[int, int], forward: Forward, params: Params, tokens: Array) -> Array:
    return vq_model.latents_of(forward, params, tokens, grid)
