"""T5's encoder: transformers' `T5EncoderModel` and `T5ForConditionalGeneration` without a decoder.

transformers describes a model by `architectures` and `model_type`, not by `_class_name`.
"""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table
from effjax.models.t5 import T5Config, T5Encoder

_KEYS: Keys = {
    "vocab_size": ("vocab_size", 32128),
    "d_model": ("hidden_size", 512),
    "d_kv": ("head_dim", 64),
    "d_ff": ("intermediate_size", 2048),
    "num_layers": ("num_layers", 6),
    "num_heads": ("num_heads", 8),
    "relative_attention_num_buckets": ("buckets", 32),
    "relative_attention_max_distance": ("max_distance", 128),
    "layer_norm_epsilon": ("norm_eps", 1e-6),
}


def read_config(config: Json) -> T5Config:
    """config.json of a `T5EncoderModel` to the configuration."""
    require(config, feed_forward_proj="gated-gelu")
    if "feed_forward_proj" not in config:
        raise ValueError(
            "config.json lacks feed_forward_proj, so this is T5 1.0 with ReLU; only version 1.1 "
            "('gated-gelu') can be loaded"
        )
    return T5Config(**read_keys(config, T5Config, _KEYS))


def write_config(config: T5Config) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": False,
        "use_cache": False,
        **write_keys(config, _KEYS),
        "dropout_rate": 0.0,
    }


_ATTENTION = "encoder.block.{i}.layer.0.SelfAttention"
_MLP = "encoder.block.{i}.layer.1.DenseReluDense"

TRANSFORMERS = Table(
    rules=(
        Rule("shared.weight", "embed_tokens"),
        Rule("encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "positions"),
        Rule("encoder.block.{i}.layer.0.layer_norm.weight", "blocks.{i}.norm1.scale"),
        Rule(f"{_ATTENTION}.q.weight", "blocks.{i}.attn.to_q.kernel", "linear"),
        Rule(f"{_ATTENTION}.k.weight", "blocks.{i}.attn.to_k.kernel", "linear"),
        Rule(f"{_ATTENTION}.v.weight", "blocks.{i}.attn.to_v.kernel", "linear"),
        Rule(f"{_ATTENTION}.o.weight", "blocks.{i}.attn.to_out.kernel", "linear"),
        Rule("encoder.block.{i}.layer.1.layer_norm.weight", "blocks.{i}.norm2.scale"),
        Rule(f"{_MLP}.wi_0.weight", "blocks.{i}.mlp.gate.kernel", "linear"),
        Rule(f"{_MLP}.wi_1.weight", "blocks.{i}.mlp.up.kernel", "linear"),
        Rule(f"{_MLP}.wo.weight", "blocks.{i}.mlp.down.kernel", "linear"),
        Rule("encoder.final_layer_norm.weight", "norm.scale"),
    ),
    aliases={"encoder.embed_tokens.weight": "shared.weight"},
    stem="model",
)

FAMILY = Family(
    class_name="T5EncoderModel",
    model=T5Encoder,
    config=T5Config,
    read_config=read_config,
    write_config=write_config,
    tables={"transformers": TRANSFORMERS},
    claims=lambda config: config.get("model_type") == "t5",
)
