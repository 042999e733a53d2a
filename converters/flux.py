"""FLUX.1: diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table, affine
from converters.sd3 import conditions, dual_block
from effjax.models.flux import Flux, FluxConfig

_FIXED = {"patch_size": 1}  # images are packed before the model there

_KEYS: Keys = {
    "in_channels": ("in_channels", 64),
    "num_layers": ("num_layers", 19),
    "num_single_layers": ("num_single_layers", 38),
    "num_attention_heads": ("num_heads", 24),
    "attention_head_dim": ("head_dim", 128),
    "joint_attention_dim": ("caption_channels", 4096),
    "pooled_projection_dim": ("pooled_channels", 768),
    "guidance_embeds": ("guidance_embeds", False),
    "axes_dims_rope": ("axes", (16, 56, 56)),
}


def read_config(config: Json) -> FluxConfig:
    """config.json of a `FluxTransformer2DModel` to the configuration."""
    require(config, **_FIXED)
    found = read_keys(config, FluxConfig, _KEYS)
    if config.get("out_channels") is not None:
        require(config, out_channels=found["in_channels"])
    return FluxConfig(**found)


def write_config(config: FluxConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {**_FIXED, **write_keys(config, _KEYS), "out_channels": None}


_SINGLE, _OWN = "single_transformer_blocks.{i}", "single_blocks.{i}"

DIFFUSERS = Table(
    rules=(
        *affine("x_embedder", "embed"),
        *conditions(),
        *affine("time_text_embed.guidance_embedder.linear_1", "guidance.fc1"),
        *affine("time_text_embed.guidance_embedder.linear_2", "guidance.fc2"),
        *affine("context_embedder", "caption"),
        *dual_block("transformer_blocks.{i}", "blocks.{i}"),
        *affine(f"{_SINGLE}.norm.linear", f"{_OWN}.modulation"),
        *(
            rule
            for part in "qkv"
            for rule in affine(f"{_SINGLE}.attn.to_{part}", f"{_OWN}.attn.to_{part}")
        ),
        Rule(f"{_SINGLE}.attn.norm_q.weight", f"{_OWN}.attn.q_norm.scale"),
        Rule(f"{_SINGLE}.attn.norm_k.weight", f"{_OWN}.attn.k_norm.scale"),
        *affine(f"{_SINGLE}.proj_mlp", f"{_OWN}.up"),
        # One matrix on attention and feed-forward layer beside each other, and one bias.
        Rule(f"{_SINGLE}.proj_out.weight", f"{_OWN}.attn.to_out.kernel", "linear columns 0/5"),
        Rule(f"{_SINGLE}.proj_out.weight", f"{_OWN}.down.kernel", "linear columns 1:5/5"),
        Rule(f"{_SINGLE}.proj_out.bias", f"{_OWN}.down.bias"),
        *affine("norm_out.linear", "final.modulation"),
        *affine("proj_out", "final.proj"),
    ),
)

FAMILY = Family(
    class_name="FluxTransformer2DModel",
    model=Flux,
    config=FluxConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS},
)
