"""Janus and Janus-Pro: transformers' `JanusForConditionalGeneration`.

What makes images is read: the language model with the embedding and the head of codes, and by
`part="vqmodel"` the VQ model of the codes. What reads images (vision tower, aligner) and the
language model's own head are known by their names, and left in the file.

Which tokens begin a text and an image is in generation_config.json. A file without config.json
tells the rest, but for heads of 128 channels and the rotation, which are those of all released
models; the size of the vision tower's images is that of the images made.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from converters import llama, vq_model
from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.names import Rule, Shape, Table, affine
from converters.sd3 import count
from effjax.fields import Count, Natural, naming
from effjax.models.janus import Janus, JanusConfig
from effjax.models.llama import LlamaConfig
from effjax.models.vq_model import VQModelConfig

_HEAD_DIM = 128
_TEXT, _VISION, _CODES = "text_config", "vision_config", "vq_config"

_CODE_KEYS: Keys = {
    "num_embeddings": ("vocab_size", 16384),
    "embed_dim": ("code_channels", 8),
}
_TOKENS = {
    "bos_token_id": "bos_token",
    "boi_token_id": "boi_token",
    "pad_token_id": "pad_token",
}
_VQ_KEYS: Keys = {
    "out_channels": ("out_channels", 3),
    "embed_dim": ("latent_channels", 8),
    "num_embeddings": ("vocab_size", 16384),
}


def _section(config: Json, name: str) -> Json:
    return read_value(config, name, Mapping[str, Any] | None) or {}


def read_config(config: Json) -> JanusConfig:
    """config.json, with what generation_config.json says, to the configuration."""
    text, codes = _section(config, _TEXT), _section(config, _CODES)
    require(text, model_type="llama")
    with naming(_TEXT):
        language = llama.read_config({**text, "model_type": "llama"})
    with naming(_CODES):
        require(codes, hidden_act="gelu", num_hidden_layers=2)
        found = read_keys(codes, JanusConfig, _CODE_KEYS)
    width = language.hidden_size
    for key in ("projection_dim", "image_token_embed_dim"):
        if (given := codes.get(key, 2048)) != width:
            raise ValueError(
                f"{_CODES}.{key} must be the hidden_size of {_TEXT}, {width}; got {given}"
            )
    tokens = {**config, **_section(config, "generation_kwargs")}
    own = {each.name: getattr(language, each.name) for each in dataclasses.fields(LlamaConfig)}
    return JanusConfig(
        **{**own, **found},
        text_vocab_size=language.vocab_size,
        grid=_grid(_section(config, _VISION)),
        **{ours: read_value(tokens, key, Natural | None) for key, ours in _TOKENS.items()},
    )


def _grid(vision: Json) -> int:
    """Codes of a row: an image that is made has as many as one that is read has patches."""
    with naming(_VISION):
        size, patch, tokens = (
            read_value(vision, key, Count, default)
            for key, default in (("image_size", 384), ("patch_size", 16), ("num_image_tokens", 576))
        )
    if (size // patch) ** 2 != tokens:
        raise ValueError(
            f"{_VISION}: images of {size} pixels in patches of {patch} are {size // patch} x "
            f"{size // patch} tokens, and num_image_tokens is {tokens}: they must agree"
        )
    return size // patch


def write_config(config: JanusConfig) -> dict[str, Any]:
    """The inverse of `read_config`; of the VQ model it says what both models have."""
    text = llama.write_config(config.decoder)
    del text["architectures"]
    width = config.hidden_size
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        _TEXT: {**text, "tie_word_embeddings": config.tied},
        _CODES: {
            **write_keys(config, _CODE_KEYS),
            "projection_dim": width,
            "image_token_embed_dim": width,
        },
        _VISION: {
            "image_size": 16 * config.grid,
            "patch_size": 16,
            "num_image_tokens": config.image_tokens,
        },
        **{key: getattr(config, ours) for key, ours in _TOKENS.items()},
    }


def read_codes(config: Json) -> VQModelConfig:
    """The VQ model's section of config.json to its configuration."""
    with naming(_CODES):
        return vq_model.read_section(_section(config, _CODES), _VQ_KEYS)


def _infer(shapes: Mapping[str, Shape]) -> JanusConfig:
    layer = "model.language_model.layers.0"
    text, width = shapes["model.language_model.embed_tokens.weight"]
    codes, channels = shapes["model.generation_embeddings.weight"]
    patches = shapes["model.vision_model.embeddings.position_embedding.weight"][0]
    return JanusConfig(
        vocab_size=codes,
        text_vocab_size=text,
        code_channels=channels,
        grid=math.isqrt(patches),
        hidden_size=width,
        intermediate_size=shapes[f"{layer}.mlp.gate_proj.weight"][0],
        num_layers=count(shapes, "model.language_model.layers."),
        num_heads=shapes[f"{layer}.self_attn.q_proj.weight"][0] // _HEAD_DIM,
        num_kv_heads=shapes[f"{layer}.self_attn.k_proj.weight"][0] // _HEAD_DIM,
        head_dim=_HEAD_DIM,
    )


def _within(name: str) -> str:
    """The name that a tensor of a language model has in a Janus."""
    return name.replace("model.", "model.language_model.", 1)


_TOWER = "model.vision_model"
_TOWER_LAYERS = (
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
    *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "projection_layer")),
    *("self_attn.q_norm", "self_attn.k_norm"),
)
_READS_IMAGES = (
    f"{_TOWER}.embeddings.patch_embedding",
    f"{_TOWER}.embeddings.position_embedding",
    *(f"{_TOWER}.encoder.layers.{{i}}.{layer}" for layer in _TOWER_LAYERS),
    f"{_TOWER}.post_layernorm",
    "model.aligner.fc1",
    "model.aligner.hidden_layers.{i}",
)
_UNREAD = (
    "lm_head.weight",
    *(f"{layer}.{kind}" for layer in _READS_IMAGES for kind in ("weight", "bias")),
)

TRANSFORMERS = Table(
    rules=(
        *(
            rule._replace(source=_within(rule.source))
            for rule in llama.TRANSFORMERS.rules
            if rule.source.startswith("model.")
        ),
        Rule("model.generation_embeddings.weight", "embed_codes"),
        *affine("model.generation_aligner.fc1", "aligner.fc1"),
        *affine("model.generation_aligner.hidden_layers.0", "aligner.fc2"),
        *affine("model.generation_head.proj_out", "head.fc1"),
        *affine("model.generation_head.vision_head", "head.fc2"),
    ),
    ignored=(
        *_UNREAD,
        *map(_within, llama.TRANSFORMERS.ignored),
        *(rule.source for rule in vq_model.JANUS.rules),
    ),
    infer=_infer,
    stem="model",
)

_PART = dataclasses.replace(
    vq_model.FAMILY,
    class_name="JanusVQVAE",
    read_config=read_codes,
    keys={
        "layers_per_block": f"{_CODES}.num_res_blocks",
        "block_out_channels": f"{_CODES}.channel_multiplier",
    },
    tables={
        "janus": dataclasses.replace(
            vq_model.JANUS,
            ignored=(*_UNREAD, *(rule.source for rule in TRANSFORMERS.rules)),
        )
    },
)

FAMILY = Family(
    class_name="JanusForConditionalGeneration",
    model=Janus,
    config=JanusConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"transformers": TRANSFORMERS},
    claims=lambda config: config.get("model_type") == "janus",
    keys={"num_layers": f"{_TEXT}.num_hidden_layers"},
    parts={"vqmodel": _PART},
    beside=("generation_config.json",),
    library="transformers",
)
