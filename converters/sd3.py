"""Stable Diffusion 3: diffusers' `SD3Transformer2DModel` (arXiv 2403.03206)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table, affine
from effjax.models.sd3 import SD3, SD3Config
from effjax.storage import Shape

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
        *affine(
            f"{source}.norm1_context.linear", f"{target}.text.last_modulation", "swapped-linear"
        ),
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
        *affine("norm_out.linear", "final.modulation", "swapped-linear"),
        *affine("proj_out", "final.proj"),
    ),
)


def fused(source: str, target: str, parts: int = 3) -> tuple[Rule, ...]:
    """The rules of queries, keys and values in one matrix."""
    return tuple(
        rule
        for number, part in enumerate("qkv")
        for rule in affine(source, f"{target}.to_{part}", part=f"{number}/{parts}")
    )


def _original(prefix: str) -> Table:
    block = f"{prefix}joint_blocks.{{i}}"
    rules = [
        Rule(f"{prefix}pos_embed", "positions", "first"),
        *affine(f"{prefix}x_embedder.proj", "patch", "conv"),
        *affine(f"{prefix}context_embedder", "caption"),
        *affine(f"{prefix}final_layer.adaLN_modulation.1", "final.modulation"),
        *affine(f"{prefix}final_layer.linear", "final.proj"),
        *fused(f"{block}.x_block.attn2.qkv", "blocks.{i}.attn2"),
        *affine(f"{block}.x_block.attn2.proj", "blocks.{i}.attn2.to_out"),
    ]
    for source, target in (("t_embedder", "time"), ("y_embedder", "pooled")):
        rules += affine(f"{prefix}{source}.mlp.0", f"{target}.fc1")
        rules += affine(f"{prefix}{source}.mlp.2", f"{target}.fc2")
    for source, stream in (("x_block", "image"), ("context_block", "text")):
        theirs, own = f"{block}.{source}", f"blocks.{{i}}.{stream}"
        for name in ("modulation", "last_modulation"):
            rules += affine(f"{theirs}.adaLN_modulation.1", f"{own}.{name}")
        rules += fused(f"{theirs}.attn.qkv", f"blocks.{{i}}.attn.{stream}")
        rules += affine(f"{theirs}.attn.proj", f"blocks.{{i}}.attn.{stream}.to_out")
        rules += affine(f"{theirs}.mlp.fc1", f"{own}.mlp.fc1")
        rules += affine(f"{theirs}.mlp.fc2", f"{own}.mlp.fc2")
        for part in "qk":
            norm = f"blocks.{{i}}.attn.{stream}.{part}_norm.scale"
            rules.append(Rule(f"{theirs}.attn.ln_{part}.weight", norm))
    for part in "qk":
        norm = f"blocks.{{i}}.attn2.{part}_norm.scale"
        rules.append(Rule(f"{block}.x_block.attn2.ln_{part}.weight", norm))

    def infer(shapes: Mapping[str, Shape]) -> SD3Config:
        width, channels, patch, _ = shapes[f"{prefix}x_embedder.proj.weight"]
        if width % 64:
            raise ValueError(
                f"cannot tell the number of heads from width {width}, as it is no multiple of 64; "
                f"put a config.json beside the file"
            )
        layers = count(shapes, f"{prefix}joint_blocks.")
        dual = f"{prefix}joint_blocks.{{}}.x_block.attn2.qkv.weight"
        return SD3Config(
            patch_size=patch,
            in_channels=channels,
            out_channels=shapes[f"{prefix}final_layer.linear.bias"][0] // patch**2,
            num_layers=layers,
            num_heads=width // 64,
            head_dim=64,
            caption_channels=shapes[f"{prefix}context_embedder.weight"][1],
            pooled_channels=shapes[f"{prefix}y_embedder.mlp.0.weight"][1],
            max_grid=math.isqrt(shapes[f"{prefix}pos_embed"][1]),
            qk_norm=f"{prefix}joint_blocks.0.x_block.attn.ln_q.weight" in shapes,
            dual_layers=tuple(i for i in range(layers) if dual.format(i) in shapes),
        )

    return Table(tuple(rules), infer=infer, stem="model")


def count(names: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow a prefix of names."""
    return len({name[len(prefix) :].split(".")[0] for name in names if name.startswith(prefix)})


def originals(table: Callable[[str], Table]) -> dict[str, Table]:
    """The original code's layout alone, and in one file with other models, by its name."""
    return {"original": table(""), "all-in-one": table("model.diffusion_model.")}


FAMILY = Family(
    class_name="SD3Transformer2DModel",
    model=SD3,
    config=SD3Config,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS, **originals(_original)},
)
