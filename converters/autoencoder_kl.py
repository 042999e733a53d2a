"""AutoencoderKL in diffusers' layout, with the attention's names of today and of 2022.

No layout tells the scaling factor of the latents, so a file without its config.json is refused.
"""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table, affine
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig

_FIXED = {"act_fn": "silu", "latents_mean": None, "latents_std": None}

_KEYS: Keys = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 4),
    "block_out_channels": ("block_out_channels", [64]),
    "layers_per_block": ("layers_per_block", 1),
    "norm_num_groups": ("norm_groups", 32),
    "sample_size": ("sample_size", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
    "shift_factor": ("shift_factor", 0.0),
    "use_quant_conv": ("use_quant_conv", True),
    "use_post_quant_conv": ("use_post_quant_conv", True),
    "mid_block_add_attention": ("mid_block_add_attention", True),
    "force_upcast": ("force_upcast", True),
}


def read_config(config: Json) -> AutoencoderKLConfig:
    """config.json of an `AutoencoderKL` to the configuration; absent keys have their defaults."""
    found = read_keys(config, AutoencoderKLConfig, _KEYS, null=["shift_factor"])
    require(config, **_FIXED, **_block_types(len(found["block_out_channels"])))
    return AutoencoderKLConfig(**found)


def write_config(config: AutoencoderKLConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        **_FIXED,
        **_block_types(len(config.block_out_channels)),
        **write_keys(config, _KEYS),
        "shift_factor": config.shift_factor or None,
    }


def _block_types(levels: int) -> dict[str, list[str]]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def _norm(source: str, target: str) -> tuple[Rule, ...]:
    return (
        Rule(f"{source}.weight", f"{target}.scale"),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def _residual_block(source: str, target: str) -> tuple[Rule, ...]:
    return (
        *_norm(f"{source}.norm1", f"{target}.norm1"),
        *affine(f"{source}.conv1", f"{target}.conv1", "conv"),
        *_norm(f"{source}.norm2", f"{target}.norm2"),
        *affine(f"{source}.conv2", f"{target}.conv2", "conv"),
        *affine(f"{source}.conv_shortcut", f"{target}.shortcut", "conv"),
    )


def _coder(coder: str, levels: str, projections: tuple[str, ...]) -> tuple[Rule, ...]:
    """Rules of encoder or decoder, whose `levels` are "down_blocks" or "up_blocks"."""
    attention = zip(projections, ("to_q", "to_k", "to_v", "to_out"))
    mid, attn = f"{coder}.mid_block", f"{coder}.mid_block.attentions.0"
    return (
        *affine(f"{coder}.conv_in", f"{coder}.conv_in", "conv"),
        *_residual_block(
            f"{coder}.{levels}.{{i}}.resnets.{{j}}", f"{coder}.levels.{{i}}.blocks.{{j}}"
        ),
        *_residual_block(f"{mid}.resnets.0", f"{coder}.mid.block1"),
        *_norm(f"{attn}.group_norm", f"{coder}.mid.attention.norm"),
        *(
            rule
            for source, target in attention
            for rule in affine(f"{attn}.{source}", f"{coder}.mid.attention.attn.{target}")
        ),
        *_residual_block(f"{mid}.resnets.1", f"{coder}.mid.block2"),
        *_norm(f"{coder}.conv_norm_out", f"{coder}.norm_out"),
        *affine(f"{coder}.conv_out", f"{coder}.conv_out", "conv"),
    )


def _table(*projections: str) -> Table:
    """The layout in which the attention's q, k, v and output have these names."""
    down, up = "down_blocks.{i}.downsamplers.0.conv", "up_blocks.{i}.upsamplers.0.conv"
    return Table(
        rules=(
            *_coder("encoder", "down_blocks", projections),
            *affine(f"encoder.{down}", "encoder.levels.{i}.resample", "conv"),
            *_coder("decoder", "up_blocks", projections),
            *affine(f"decoder.{up}", "decoder.levels.{i}.resample.conv", "conv"),
            *affine("quant_conv", "quant_conv", "conv"),
            *affine("post_quant_conv", "post_quant_conv", "conv"),
        )
    )


FAMILY = Family(
    class_name="AutoencoderKL",
    model=AutoencoderKL,
    config=AutoencoderKLConfig,
    read_config=read_config,
    write_config=write_config,
    tables={
        "diffusers": _table("to_q", "to_k", "to_v", "to_out.0"),
        "diffusers-2022": _table("query", "key", "value", "proj_attn"),
    },
)
