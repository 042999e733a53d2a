"""PixArt-Sigma: diffusers' `PixArtTransformer2DModel` (arXiv 2403.04692)."""

from __future__ import annotations

from typing import Any

import numpy as np

from converters.family import Family, Json, read_fields, require
from converters.names import Buffer, Rule, Shape, Table, affine
from effjax.layers.embeddings import sincos_2d
from effjax.models.pixart import PixArt, PixArtConfig

_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_single",
}


def read_config(config: Json) -> PixArtConfig:
    """config.json of a `PixArtTransformer2DModel` to the configuration."""
    require(config, **_FIXED)
    # None stands for diffusers' own choice
    fields = read_fields(
        {key: value for key, value in config.items() if value is not None},
        sample_size=128,
        patch_size=2,
        in_channels=4,
        out_channels=config.get("in_channels", 4) if config.get("out_channels", 8) is None else 8,
        num_layers=28,
        num_attention_heads=16,
        attention_head_dim=72,
        caption_channels=0,
        cross_attention_dim=1152,
        interpolation_scale=float(max(config.get("sample_size", 128) // 64, 1)),
        norm_eps=1e-6,
        use_additional_conditions=config.get("sample_size", 128) == 128,
    )
    width = fields["num_attention_heads"] * fields["attention_head_dim"]
    if fields.pop("use_additional_conditions"):
        raise ValueError(
            "config.json asks for use_additional_conditions, the size conditions of PixArt-alpha "
            "at 1024 pixels (diffusers' default at sample_size 128), which PixArt-Sigma does not "
            "have; only models without them can be loaded"
        )
    if fields.pop("cross_attention_dim") != width or fields["caption_channels"] < 1:
        raise ValueError(
            f"config.json must have caption_channels, and cross_attention_dim equal to "
            f"num_attention_heads * attention_head_dim ({width}); got "
            f"caption_channels={config.get('caption_channels')}, "
            f"cross_attention_dim={config.get('cross_attention_dim', 1152)}"
        )
    return PixArtConfig(
        num_heads=fields.pop("num_attention_heads"),
        head_dim=fields.pop("attention_head_dim"),
        interpolation=float(fields.pop("interpolation_scale")),
        **fields,
    )


def write_config(config: PixArtConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    scale = config.interpolation
    return {
        **_FIXED,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "caption_channels": config.caption_channels,
        "cross_attention_dim": config.width,
        "interpolation_scale": int(scale) if scale == int(scale) else scale,
        "norm_eps": config.norm_eps,
        "use_additional_conditions": False,
        "num_embeds_ada_norm": 1000,
        "norm_num_groups": 32,
        "dropout": 0.0,
        "upcast_attention": False,
    }


def positions(config: PixArtConfig) -> np.ndarray:
    """The fixed position table [1, tokens, width] that some checkpoints store."""
    grid = config.sample_size // config.patch_size
    table = sincos_2d(config.width, grid, grid, base=grid, interpolation=config.interpolation)
    return table[None]


def positions_shape(config: PixArtConfig) -> Shape:
    """Of `positions`."""
    return (1, (config.sample_size // config.patch_size) ** 2, config.width)


_BLOCK = "transformer_blocks.{i}"

DIFFUSERS = Table(
    rules=(
        *affine("pos_embed.proj", "patch", "conv"),
        *affine("adaln_single.emb.timestep_embedder.linear_1", "time.embed.fc1"),
        *affine("adaln_single.emb.timestep_embedder.linear_2", "time.embed.fc2"),
        *affine("adaln_single.linear", "time.proj"),
        *affine("caption_projection.linear_1", "caption.fc1"),
        *affine("caption_projection.linear_2", "caption.fc2"),
        Rule(f"{_BLOCK}.scale_shift_table", "blocks.{i}.table"),
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
        Rule("scale_shift_table", "final.table"),
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
