"""FLUX.1: diffusers' `FluxTransformer2DModel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.family import Family, Json, Keys, read_keys, require, write_keys
from converters.names import Rule, Table, affine
from converters.sd3 import conditions, count, dual_block, fused, originals
from effjax.models.flux import Flux, FluxConfig
from effjax.storage import Shape

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
        *affine("norm_out.linear", "final.modulation", "swapped-linear"),
        *affine("proj_out", "final.proj"),
    ),
)


def _original(prefix: str) -> Table:
    dual, single = f"{prefix}double_blocks.{{i}}", f"{prefix}single_blocks.{{i}}"
    rules = [
        *affine(f"{prefix}img_in", "embed"),
        *affine(f"{prefix}txt_in", "caption"),
        *affine(f"{prefix}final_layer.adaLN_modulation.1", "final.modulation"),
        *affine(f"{prefix}final_layer.linear", "final.proj"),
        *affine(f"{single}.modulation.lin", f"{_OWN}.modulation"),
        # Queries, keys, values and the four times wider feed-forward layer, in and out.
        *fused(f"{single}.linear1", f"{_OWN}.attn", parts=7),
        *affine(f"{single}.linear1", f"{_OWN}.up", part="3:7/7"),
        Rule(f"{single}.linear2.weight", f"{_OWN}.attn.to_out.kernel", "linear columns 0/5"),
        Rule(f"{single}.linear2.weight", f"{_OWN}.down.kernel", "linear columns 1:5/5"),
        Rule(f"{single}.linear2.bias", f"{_OWN}.down.bias"),
        Rule(f"{single}.norm.query_norm.scale", f"{_OWN}.attn.q_norm.scale"),
        Rule(f"{single}.norm.key_norm.scale", f"{_OWN}.attn.k_norm.scale"),
    ]
    for source, target in (
        ("time_in", "time"),
        ("guidance_in", "guidance"),
        ("vector_in", "pooled"),
    ):
        rules += affine(f"{prefix}{source}.in_layer", f"{target}.fc1")
        rules += affine(f"{prefix}{source}.out_layer", f"{target}.fc2")
    for source, stream in (("img", "image"), ("txt", "text")):
        theirs, own = f"{dual}.{source}", f"blocks.{{i}}.{stream}"
        attention = f"blocks.{{i}}.attn.{stream}"
        rules += affine(f"{theirs}_mod.lin", f"{own}.modulation")
        rules += fused(f"{theirs}_attn.qkv", attention)
        rules += affine(f"{theirs}_attn.proj", f"{attention}.to_out")
        rules += affine(f"{theirs}_mlp.0", f"{own}.mlp.fc1")
        rules += affine(f"{theirs}_mlp.2", f"{own}.mlp.fc2")
        rules.append(Rule(f"{theirs}_attn.norm.query_norm.scale", f"{attention}.q_norm.scale"))
        rules.append(Rule(f"{theirs}_attn.norm.key_norm.scale", f"{attention}.k_norm.scale"))

    def infer(shapes: Mapping[str, Shape]) -> FluxConfig:
        width, channels = shapes[f"{prefix}img_in.weight"]
        (head_dim,) = shapes[f"{prefix}single_blocks.0.norm.query_norm.scale"]
        if head_dim != 128 or width % head_dim:
            raise ValueError(
                f"cannot tell which channels of a head of {head_dim} are rotated by rows and which "
                f"by columns (known: those of 128); put a config.json beside the file"
            )
        return FluxConfig(
            in_channels=channels,
            num_layers=count(shapes, f"{prefix}double_blocks."),
            num_single_layers=count(shapes, f"{prefix}single_blocks."),
            num_heads=width // head_dim,
            head_dim=head_dim,
            caption_channels=shapes[f"{prefix}txt_in.weight"][1],
            pooled_channels=shapes[f"{prefix}vector_in.in_layer.weight"][1],
            guidance_embeds=f"{prefix}guidance_in.in_layer.weight" in shapes,
        )

    return Table(tuple(rules), infer=infer, stem="model")


FAMILY = Family(
    class_name="FluxTransformer2DModel",
    model=Flux,
    config=FluxConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"diffusers": DIFFUSERS, **originals(_original)},
)
