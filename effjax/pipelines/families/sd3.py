"""Stable Diffusion 3 and 3.5: prompts read by two CLIP encoders and, if it is there, T5."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from effjax.context import PyTree
from effjax.guidance import Guidance
from effjax.layers.joint import PooledEmbeddings
from effjax.models.clip import EncodedText
from effjax.pipelines.family import DiffusionFamily, TextEncoder


def last_but_one(
    text: EncodedText, mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T C"], Float[Array, "B P"]]:
    """Tokens before CLIP's last block, and the pooled text."""
    return text.states[-2], text.pooled


def tokens(states: Float[Array, "B T C"], mask: Bool[Array, "B T"]) -> Float[Array, "B T C"]:
    """What T5 makes of all tokens; padding counts."""
    return states


def condition(
    encoded: Mapping[str, PyTree], config: Any, lengths: Mapping[str, int]
) -> PooledEmbeddings:
    """CLIP's channels side by side and widened with zeros, then T5's tokens; zeros without T5."""
    clip, pooled = (
        jnp.concatenate(parts, axis=-1)
        for parts in zip(encoded["text_encoder"], encoded["text_encoder_2"], strict=True)
    )
    missing = config.caption_channels - clip.shape[-1]
    clip = jnp.pad(clip, ((0, 0), (0, 0), (0, missing)))
    t5 = encoded["text_encoder_3"]
    if t5 is None:
        tokens = lengths["text_encoder_3"]
        t5 = jnp.zeros((clip.shape[0], tokens, config.caption_channels), clip.dtype)
    return PooledEmbeddings(jnp.concatenate([clip, t5.astype(clip.dtype)], axis=1), pooled)


_CLIP = TextEncoder(max_length=77, read=last_but_one, truncates=True, masked=False)

FAMILIES = (
    DiffusionFamily(
        name="StableDiffusion3Pipeline",
        pipeline="TextToImagePipeline",
        models=("SD3",),
        text_encoders=(
            _CLIP,
            TextEncoder(
                name="text_encoder_2",
                max_length=77,
                read=last_but_one,
                truncates=True,
                masked=False,
            ),
            TextEncoder(
                name="text_encoder_3",
                max_length=256,
                longest=512,
                read=tokens,
                masked=False,
                channels="caption_channels",
                optional=True,
            ),
        ),
        steps=28,
        guidance=7.0,
        arrangement=Guidance(("uncond", "cond")),
        condition=condition,
    ),
)
