"""DiT: diffusers' `DiTTransformer2DModel`, and the original code's `.pt` files (arXiv 2212.09748).

The two compute slightly different functions of the same weights: the original has time frequencies
without shift and 1e-6 in every norm. A configuration keeps which is meant; in a config.json the key
`time_shift`, unknown to diffusers, is written only where it differs from diffusers' 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Buffer, Rule, Shape, Table, affine
from effjax.layers.embeddings import sincos_2d
from effjax.models.dit import DiT, DiTConfig

_FIXED = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
}


_KEYS: Keys = {
    "sample_size": ("sample_size", 32),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 4),
    "num_layers": ("num_layers", 28),
    "num_attention_heads": ("num_heads", 16),
    "attention_head_dim": ("head_dim", 72),
    "num_embeds_ada_norm": ("num_classes", 1000),
    "norm_eps": ("norm_eps", 1e-5),
}


def read_config(config: Json) -> DiTConfig:
    """config.json of a `DiTTransformer2DModel` (or of its legacy class) to the configuration."""
    require(config, **_FIXED)
    more: Keys = {
        "out_channels": ("out_channels", config.get("in_channels", 4)),  # and where it is null
        "time_shift": ("time_shift", 1.0),
    }
    return DiTConfig(**read_keys(config, DiTConfig, {**_KEYS, **more}, null=["out_channels"]))


def write_config(config: DiTConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    shift = {} if config.time_shift == 1.0 else {"time_shift": config.time_shift}
    return {
        **_FIXED,
        **shift,
        **write_keys(config, _KEYS),
        "out_channels": config.out_channels,
        "norm_num_groups": 32,
        "dropout": 0.0,
        "upcast_attention": False,
    }


def positions(config: DiTConfig) -> np.ndarray:
    """The fixed position table [1, tokens, hidden_size] that some checkpoints store."""
    return sincos_2d(config.hidden_size, config.grid, config.grid)[None]


def positions_shape(config: DiTConfig) -> Shape:
    """Of `positions`."""
    return (1, config.grid**2, config.hidden_size)


_BLOCK = "transformer_blocks.{i}"
_EMBEDDER = f"{_BLOCK}.norm1.emb"  # one copy in every block

DIFFUSERS = Table(
    rules=(
        *affine("pos_embed.proj", "patch", "conv"),
        *affine(f"{_EMBEDDER}.timestep_embedder.linear_1", "time.fc1"),
        *affine(f"{_EMBEDDER}.timestep_embedder.linear_2", "time.fc2"),
        Rule(f"{_EMBEDDER}.class_embedder.embedding_table.weight", "label.embedding_table"),
        *affine(f"{_BLOCK}.norm1.linear", "blocks.{i}.modulation"),
        *affine(f"{_BLOCK}.attn1.to_q", "blocks.{i}.attn.to_q"),
        *affine(f"{_BLOCK}.attn1.to_k", "blocks.{i}.attn.to_k"),
        *affine(f"{_BLOCK}.attn1.to_v", "blocks.{i}.attn.to_v"),
        *affine(f"{_BLOCK}.attn1.to_out.0", "blocks.{i}.attn.to_out"),
        *affine(f"{_BLOCK}.ff.net.0.proj", "blocks.{i}.mlp.fc1"),
        *affine(f"{_BLOCK}.ff.net.2", "blocks.{i}.mlp.fc2"),
        *affine("proj_out_1", "final.modulation"),
        *affine("proj_out_2", "final.proj"),
    ),
    buffers=(Buffer("pos_embed.pos_embed", positions, positions_shape, written=False),),
)


def _infer(shapes: Mapping[str, Shape]) -> DiTConfig:
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    heads = {384: 6, 768: 12, 1024: 16, 1152: 16}  # S, B, L, XL
    if width not in heads:
        raise ValueError(
            f"cannot tell the number of heads from width {width} (known: {sorted(heads)}); put a "
            f"config.json beside the file, with num_attention_heads, attention_head_dim, norm_eps "
            f"(1e-6 in the original code) and time_shift (0.0)"
        )
    return DiTConfig(
        sample_size=math.isqrt(shapes["pos_embed"][1]) * patch,
        patch_size=patch,
        in_channels=in_channels,
        out_channels=shapes["final_layer.linear.bias"][0] // patch**2,
        num_layers=len({name.split(".")[1] for name in shapes if name.startswith("blocks.")}),
        num_heads=heads[width],
        head_dim=width // heads[width],
        num_classes=shapes["y_embedder.embedding_table.weight"][0] - 1,
        norm_eps=1e-6,
        time_shift=0.0,
    )


ORIGINAL = Table(
    rules=(
        *affine("x_embedder.proj", "patch", "conv"),
        *affine("t_embedder.mlp.0", "time.fc1"),
        *affine("t_embedder.mlp.2", "time.fc2"),
        Rule("y_embedder.embedding_table.weight", "label.embedding_table"),
        *affine("blocks.{i}.adaLN_modulation.1", "blocks.{i}.modulation"),
        *affine("blocks.{i}.attn.qkv", "blocks.{i}.attn.to_q", part="0/3"),
        *affine("blocks.{i}.attn.qkv", "blocks.{i}.attn.to_k", part="1/3"),
        *affine("blocks.{i}.attn.qkv", "blocks.{i}.attn.to_v", part="2/3"),
        *affine("blocks.{i}.attn.proj", "blocks.{i}.attn.to_out"),
        *affine("blocks.{i}.mlp.fc1", "blocks.{i}.mlp.fc1"),
        *affine("blocks.{i}.mlp.fc2", "blocks.{i}.mlp.fc2"),
        *affine("final_layer.adaLN_modulation.1", "final.modulation"),
        *affine("final_layer.linear", "final.proj"),
    ),
    buffers=(Buffer("pos_embed", positions, positions_shape),),
    infer=_infer,
    stem="model",
)

FAMILY = Family(
    class_name="DiTTransformer2DModel",
    model=DiT,
    config=DiTConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS, "original": ORIGINAL},
    # Older diffusers saved every transformer under one class name.
    claims=lambda config: (
        config.get("_class_name") == "Transformer2DModel"
        and config.get("norm_type") == "ada_norm_zero"
    ),
)
