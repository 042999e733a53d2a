"""PixArt-Sigma: diffusers' `PixArtTransformer2DModel` (arXiv 2403.04692)."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.names import Buffer, Rule, Shape, Table, affine
from effjax.fields import Count
from effjax.layers.embeddings import sincos_2d
from effjax.models.pixart import PixArt, PixArtConfig

_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
}

_KEYS: Keys = {
    "sample_size": ("sample_size", 128),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "num_layers": ("num_layers", 28),
    "num_attention_heads": ("num_heads", 16),
    "attention_head_dim": ("head_dim", 72),
    "caption_channels": ("caption_channels", None),
    "norm_eps": ("norm_eps", 1e-6),
}


def read_config(config: Json) -> PixArtConfig:
    """config.json of a `PixArtTransformer2DModel` to the configuration."""
    require(config, **_FIXED)
    # null stands for diffusers' own choice
    given = {key: value for key, value in config.items() if value is not None}
    found = read_keys(given, PixArtConfig, _KEYS)
    size, channels = found["sample_size"], found["in_channels"]
    more: Keys = {
        "out_channels": ("out_channels", channels if "out_channels" in config else 8),
        "interpolation_scale": ("interpolation", max(size // 64, 1)),
    }
    found |= read_keys(given, PixArtConfig, more)
    if read_value(given, "use_additional_conditions", bool, size == 128):
        raise ValueError(
            "config.json asks for use_additional_conditions, the size conditions of PixArt-alpha "
            "at 1024 pixels (diffusers' default at sample_size 128), which PixArt-Sigma does not "
            "have; only models without them can be loaded"
        )
    width = found["num_heads"] * found["head_dim"]
    if read_value(given, "cross_attention_dim", Count, 1152) != width:
        raise ValueError(
            f"cross_attention_dim must be num_attention_heads * attention_head_dim ({width}), got "
            f"{given.get('cross_attention_dim', 1152)}"
        )
    return PixArtConfig(**found)


def write_config(config: PixArtConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    scale = config.interpolation
    return {
        **_FIXED,
        **write_keys(config, _KEYS),
        "out_channels": config.out_channels,
        "cross_attention_dim": config.hidden_size,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "use_additional_conditions": False,
        "num_embeds_ada_norm": 1000,
        "norm_num_groups": 32,
        "dropout": 0.0,
        "upcast_attention": False,
    }


def positions(config: PixArtConfig) -> np.ndarray:
    """The fixed position table [1, tokens, hidden_size] that some checkpoints store."""
    grid = config.sample_size // config.patch_size
    table = sincos_2d(config.hidden_size, grid, grid, base=grid, interpolation=config.interpolation)
    return table[None]


def positions_shape(config: PixArtConfig) -> Shape:
    """Of `positions`."""
    return (1, (config.sample_size // config.patch_size) ** 2, config.hidden_size)


_BLOCK = "transformer_blocks.{i}"

DIFFUSERS = Table(
    rules=(
        *affine("pos_embed.proj", "patch", "conv"),
        *affine("adaln_single.emb.timestep_embedder.linear_1", "time.embed.fc1"),
        *affine("adaln_single.emb.timestep_embedder.linear_2", "time.embed.fc2"),
        *affine("adaln_single.linear", "time.proj"),
        *affine("caption_projection.linear_1", "caption_projection.fc1"),
        *affine("caption_projection.linear_2", "caption_projection.fc2"),
        Rule(f"{_BLOCK}.scale_shift_table", "blocks.{i}.scale_shift_table"),
        *affine(f"{_BLOCK}.attn1.to_q", "blocks.{i}.attn.to_q"),
        *affine(f"{_BLOCK}.attn1.to_k", "blocks.{i}.attn.to_k"),
        *affine(f"{_BLOCK}.attn1.to_v", "blocks.{i}.attn.to_v"),
        *affine(f"{_BLOCK}.attn1.to_out.0", "blocks.{i}.attn.to_out"),
        *affine(f"{_BLOCK}.attn2.to_q", "blocks.{i}.cross.to_q"),
        *affine(f"{_BLOCK}.attn2.to_k", "blocks.{i}.cross.to_k"),
        *affine(f"{_BLOCK}.attn2.to_v", "blocks.{i}.cross.to_v"),
        *affine(f"{_BLOCK}.attn2.to_out.0", "blocks.{i}.cross.to_out"),
        *affine(f"{_BLOCK}.ff.net.0.proj", "blocks.{i}.mlp.fc1"),
        *affine(f"{_BLOCK}.ff.net.2", "blocks.{i}.mlp.fc2"),
        Rule("scale_shift_table", "final.scale_shift_table"),
        *affine("proj_out", "final.proj"),
    ),
    buffers=(Buffer("pos_embed.pos_embed", positions, positions_shape, written=False),),
)

FAMILY = Family(
    class_name="PixArtTransformer2DModel",
    model=PixArt,
    config=PixArtConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS},
    # Older diffusers saved every transformer under one class name.
    claims=lambda config: (
        config.get("_class_name") == "Transformer2DModel"
        and config.get("norm_type") == "ada_norm_single"
    ),
)
