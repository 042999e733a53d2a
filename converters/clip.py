"""CLIP's text encoder: transformers' `CLIPTextModel` and `CLIPTextModelWithProjection`.

transformers 5 writes a `CLIPTextModel` without the prefix `text_model.`, and reads both; versions
before know the prefix only. Configurations of both classes have a `projection_dim`: which of them a
model is, `architectures` says.
"""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, Keys, read_keys, read_value, write_keys
from converters.names import Rule, Table, affine
from effjax.fields import Count
from effjax.models.clip import CLIPText, CLIPTextConfig

_PROJECTED = "CLIPTextModelWithProjection"


_KEYS: Keys = {
    "vocab_size": ("vocab_size", 49408),
    "hidden_size": ("hidden_size", 512),
    "intermediate_size": ("intermediate_size", 2048),
    "num_hidden_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 8),
    "max_position_embeddings": ("max_positions", 77),
    "hidden_act": ("activation", "quick_gelu"),
    "layer_norm_eps": ("norm_eps", 1e-5),
    "eos_token_id": ("end_token", 49407),
}


def read_config(config: Json) -> CLIPTextConfig:
    """config.json of one of these classes to the configuration; absent keys have their defaults."""
    classes = read_value(config, "architectures", tuple[str, ...] | None) or ()
    projection = read_value(config, "projection_dim", Count, 512)
    return CLIPTextConfig(
        **read_keys(config, CLIPTextConfig, _KEYS),
        projection=projection if _PROJECTED in classes else None,
    )


def write_config(config: CLIPTextConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    projected = config.projection is not None
    return {
        "architectures": [_PROJECTED if projected else "CLIPTextModel"],
        "model_type": "clip_text_model",
        **write_keys(config, _KEYS),
        "projection_dim": config.projection if projected else config.hidden_size,
        "attention_dropout": 0.0,
    }


def _norm(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.scale"), Rule(f"{source}.bias", f"{target}.bias")


def _table(prefix: str) -> Table:
    """The layout in which the encoder's names begin so."""
    layer = f"{prefix}encoder.layers.{{i}}"
    return Table(
        rules=(
            Rule(f"{prefix}embeddings.token_embedding.weight", "embed_tokens"),
            Rule(f"{prefix}embeddings.position_embedding.weight", "positions"),
            *_norm(f"{layer}.layer_norm1", "blocks.{i}.norm1"),
            *affine(f"{layer}.self_attn.q_proj", "blocks.{i}.attn.to_q"),
            *affine(f"{layer}.self_attn.k_proj", "blocks.{i}.attn.to_k"),
            *affine(f"{layer}.self_attn.v_proj", "blocks.{i}.attn.to_v"),
            *affine(f"{layer}.self_attn.out_proj", "blocks.{i}.attn.to_out"),
            *_norm(f"{layer}.layer_norm2", "blocks.{i}.norm2"),
            *affine(f"{layer}.mlp.fc1", "blocks.{i}.mlp.fc1"),
            *affine(f"{layer}.mlp.fc2", "blocks.{i}.mlp.fc2"),
            *_norm(f"{prefix}final_layer_norm", "norm"),
            Rule("text_projection.weight", "proj.kernel", "linear"),
        ),
        ignored=(f"{prefix}embeddings.position_ids",),  # 0, 1, 2, ..., in old files
        stem="model",
    )


FAMILY = Family(
    class_name="CLIPTextModel",
    model=CLIPText,
    config=CLIPTextConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"transformers": _table("text_model."), "transformers-5": _table("")},
    claims=lambda config: config.get("model_type") == "clip_text_model",
    keys={"num_layers": "num_hidden_layers"},
)
