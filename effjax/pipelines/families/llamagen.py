"""LlamaGen and its relatives: images of classes and of prompts, token by token or in groups.

Its students (Distilled Decoding) make all tokens in a call or two.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from effjax.context import PyTree
from effjax.models.llamagen import Caption
from effjax.models.pixart import PromptEmbeddings
from effjax.pipelines.family import CodesFamily, TextEncoder, lower_case


def left_padded(encoded: Mapping[str, PyTree], config: Any, lengths: Mapping[str, int]) -> Caption:
    """A prompt's states at the right of as many as the model reads, and zeros before them.

    Raises:
        ValueError: for a tokenizer that reads more tokens than the model.
    """
    embeds, mask = encoded["text_encoder"]
    rows, read, tokens = len(mask), mask.shape[1], config.caption_tokens
    if read > tokens:
        raise ValueError(
            f"the tokenizer makes {read} tokens of a prompt, and the model reads {tokens}: set its "
            f"model_max_length"
        )
    short = tokens - np.sum(np.asarray(mask), axis=1)[:, None]
    column = np.arange(tokens) - short
    places = np.maximum(column, 0) + np.argmax(np.asarray(mask), axis=1)[:, None]
    states = jnp.take_along_axis(embeds, jnp.asarray(places)[..., None], axis=1)
    own = jnp.asarray(column >= 0)
    return Caption(jnp.where(own[..., None], states, 0), own, jnp.zeros(rows, bool))


def _of_classes(model: str) -> CodesFamily:
    return CodesFamily(
        name=f"{model}Pipeline",
        pipeline="NextTokenPipeline",
        models=(model,),
        guidance=2.0,
        top_k=0,
        top_p=1.0,
    )


def _of_prompts(model: str) -> CodesFamily:
    return CodesFamily(
        name=f"{model}TextPipeline",
        pipeline="TextNextTokenPipeline",
        models=(model,),
        guidance=7.5,
        top_k=1000,
        top_p=1.0,
        text_encoders=(
            TextEncoder(
                max_length=120, truncates=True, read=PromptEmbeddings, channels="caption_channels"
            ),
        ),
        clean=lower_case,
        condition=left_padded,
    )


FAMILIES = (
    *(_of_classes(model) for model in ("LlamaGen", "NAR", "NBP")),
    *(_of_prompts(model) for model in ("LlamaGen", "NAR", "NBP")),
    CodesFamily(
        name="DistilledLlamaGenPipeline",
        pipeline="FewTokenPipeline",
        models=("DistilledLlamaGen",),
    ),
)
