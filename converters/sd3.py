"""Stable Diffusion 3: diffusers' `SD3Transformer2DModel` (arXiv 2403.03206)."""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table, affine
from effjax.models.sd3 import SD3, SD3Config

_KEYS: Keys = {
    "sample_size": ("sample_size", 128),
    "patch_size": ("patch_size", 2),
    "in_channels": ("in_channels", 16),
    "num_layers": ("num_layers", 18),
    "num_attention_heads": ("num_heads", 18),
    "attention_head_dim": ("head_dim", 64),
    "joint_attention_dim": ("caption_channels", 4096),
    "pooled_projection_dim": ("pooled_channels", 2048),
    "pos_embed_max_size": ("max_grid", 96),
    "dual_attention_layers": ("dual_layers", ()),
}


def read_config(config: Json) -> SD3Config:
    """config.json of an `SD3Transformer2DModel` to the configuration."""
    found = read_keys(config, SD3Config, _KEYS)
    out: Keys = {"out_channels": ("out_channels", found["in_channels"])}
    found |= read_keys(config, SD3Config, out, null=("out_channels",))
    if config.get("qk_norm") is not None:
        require(config, qk_norm="rms_norm")
    size = found["num_heads"] * found["head_dim"]
    require(config, caption_projection_dim=size)
    return SD3Config(**found, qk_norm=config.get("qk_norm") is not None)


def write_config(config: SD3Config) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return {
        **write_keys(config, _KEYS),
        "out_channels": config.out_channels,
        "caption_projection_dim": config.hidden_size,
        "qk_norm": "rms_norm" if config.qk_norm else None,
    }


def dual_block(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of one kind of joint blocks, with or without norms of heads, second attentions."""
    rules = [
        *affine(f"{source}.norm1.linear", f"{target}.image.modulation"),
        *affine(f"{source}.norm1_context.linear", f"{target}.text.modulation"),
        *affine(f"{source}.attn.to_out.0", f"{target}.attn.image.to_out"),
        *affine(f"{source}.attn.to_add_out", f"{target}.attn.text.to_out"),
        *affine(f"{source}.attn2.to_out.0", f"{target}.attn2.to_out"),
    ]
    for part in "qkv":
        rules += affine(f"{source}.attn.to_{part}", f"{target}.attn.image.to_{part}")
        rules += affine(f"{source}.attn.add_{part}_proj", f"{target}.attn.text.to_{part}")
        rules += affine(f"{source}.attn2.to_{part}", f"{target}.attn2.to_{part}")
    for part in "qk":
        rules += [
            Rule(f"{source}.attn.norm_{part}.weight", f"{target}.attn.image.{part}_norm.scale"),
            Rule(
                f"{source}.attn.norm_added_{part}.weight", f"{target}.attn.text.{part}_norm.scale"
            ),
            Rule(f"{source}.attn2.norm_{part}.weight", f"{target}.attn2.{part}_norm.scale"),
        ]
    for stream, layer in (("image", "ff"), ("text", "ff_context")):
        rules += affine(f"{source}.{layer}.net.0.proj", f"{target}.{stream}.mlp.fc1")
        rules += affine(f"{source}.{layer}.net.2", f"{target}.{stream}.mlp.fc2")
    return tuple(rules)


def conditions(source: str = "time_text_embed") -> tuple[Rule, ...]:
    """The rules of times and pooled texts."""
    return tuple(
        rule
        for part, target in (("timestep_embedder", "time"), ("text_embedder", "pooled"))
        for layer in "12"
        for rule in affine(f"{source}.{part}.linear_{layer}", f"{target}.fc{layer}")
    )


DIFFUSERS = Table(
    rules=(
        Rule("pos_embed.pos_embed", "positions", "first"),
        *affine("pos_embed.proj", "patch", "conv"),
        *conditions(),
        *affine("context_embedder", "caption"),
        *dual_block("transformer_blocks.{i}", "blocks.{i}"),
        *affine("norm_out.linear", "final.modulation"),
        *affine("proj_out", "final.proj"),
    ),
)

FAMILY = Family(
    class_name="SD3Transformer2DModel",
    model=SD3,
    config=SD3Config,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS},
)
