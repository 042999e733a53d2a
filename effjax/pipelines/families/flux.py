"""FLUX.1: prompts pooled by CLIP and read by T5; the guidance scale is an input of the model."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.context import PyTree
from effjax.layers.joint import PooledEmbeddings
from effjax.models.clip import EncodedText
from effjax.pipelines.families.sd3 import tokens
from effjax.pipelines.family import DiffusionFamily, TextEncoder

GUIDANCE = 3.5


def pooled(text: EncodedText, mask: Bool[Array, "B T"]) -> Float[Array, "B P"]:
    """CLIP's vector of the whole text."""
    return text.pooled


def condition(
    encoded: Mapping[str, PyTree], config: Any, lengths: Mapping[str, int]
) -> PooledEmbeddings:
    """T5's tokens and CLIP's vector."""
    return PooledEmbeddings(encoded["text_encoder_2"], encoded["text_encoder"])


def embed_guidance(given: PooledEmbeddings, scale: float, config: Any) -> PooledEmbeddings:
    """Tell the scale to a model that takes one (dev).

    Raises:
        ValueError: for a scale that was chosen, and a model that takes none (schnell).
    """
    if config.guidance_embeds:
        return given._replace(guidance=jnp.full(given.pooled.shape[0], scale, jnp.float32))
    if scale not in (0.0, 1.0, GUIDANCE):
        raise ValueError(
            f"this FLUX was distilled to few steps and takes no guidance scale, got {scale}; leave "
            f"out guidance_scale"
        )
    return given


FAMILIES = (
    DiffusionFamily(
        name="FluxPipeline",
        pipeline="TextToImagePipeline",
        models=("Flux",),
        text_encoders=(
            TextEncoder(max_length=77, read=pooled, truncates=True, masked=False),
            TextEncoder(
                name="text_encoder_2",
                max_length=512,
                longest=512,
                read=tokens,
                masked=False,
                channels="caption_channels",
            ),
        ),
        steps=28,
        guidance=GUIDANCE,
        schedule={"spacing": "trailing"},
        condition=condition,
        embed_guidance=embed_guidance,
    ),
)
