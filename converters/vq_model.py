"""VQ models: LlamaGen's `vq_ds16_c2i.pt`, ..., Chameleon's `vqgan.ckpt`, and Janus' `JanusVQVAE`.

A file tells all but the groups of the norms, which are 32 in every model of this code, and the
length of codes, which is one in LlamaGen's. Decoder levels are numbered from lowest to full
resolution in LlamaGen's files and in transformers' of Janus, as here, and the other way in those of
VQGAN's code (Chameleon's). Those of Janus are a part of a whole model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.names import Rule, Shape, Table, affine
from converters.sd3 import count
from converters.vqvae import LEVELS, norm, residual_block
from effjax.fields import Count
from effjax.models.vq_model import VQModel, VQModelConfig

_KEYS: Keys = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 8),
    "encoder_channels": ("encoder_channels", 256),
    "vocab_size": ("vocab_size", 16384),
    "block_out_channels": ("block_out_channels", [128, 128, 256, 256, 512]),
    "layers_per_block": ("layers_per_block", 2),
    "norm_num_groups": ("norm_groups", 32),
    "level_attention": ("level_attention", True),
    "unit_codes": ("unit_codes", True),
}


def read_config(config: Json) -> VQModelConfig:
    """config.json to the configuration; absent keys have VQ-16's values."""
    return VQModelConfig(**read_keys(config, VQModelConfig, _KEYS))


def write_config(config: VQModelConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, _KEYS)


_PART_KEYS: Keys = {
    "in_channels": ("in_channels", 3),
    "embed_dim": ("latent_channels", 256),
    "latent_channels": ("encoder_channels", 256),
    "num_embeddings": ("vocab_size", 8192),
    "num_res_blocks": ("layers_per_block", 2),
}


def read_section(section: Json, keys: Keys, **fields: Any) -> VQModelConfig:
    """What config.json of a larger model says of its VQ model to the configuration.

    Args:
        section: that part of it.
        keys: those that this kind of model has besides, or with other values where they are absent.
        fields: of the configuration, which it does not say.
    """
    require(section, double_latent=False)
    found = read_keys(section, VQModelConfig, {**_PART_KEYS, **keys})
    base = read_value(section, "base_channels", Count, 128)
    factors = read_value(section, "channel_multiplier", tuple[Count, ...], [1, 1, 2, 2, 4])
    widths = tuple(base * factor for factor in factors)
    return VQModelConfig(**found, **fields, block_out_channels=widths)


_WITHIN = "model.vqmodel."  # of a Janus

_SHARED = (
    *affine("quant_conv", "quant_conv", "conv"),
    *affine("post_quant_conv", "post_quant_conv", "conv"),
    Rule("quantize.embedding.weight", "quantizer.codebook"),
)


def attention(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of an attention whose projections are convolutions, each by itself."""
    rules = [*norm(f"{source}.norm", f"{target}.norm")]
    for part in "qkv":
        rules += affine(f"{source}.{part}", f"{target}.attn.to_{part}", "pointwise")
    return (*rules, *affine(f"{source}.proj_out", f"{target}.attn.to_out", "pointwise"))


def _coder(coder: str, change: str, resample: str) -> tuple[Rule, ...]:
    """The rules of encoder or decoder.

    Args:
        coder: its name.
        change: what changes the resolution behind a level there, and `resample` here.
    """
    source, target = f"{coder}.conv_blocks.{{i}}", f"{coder}.levels.{{i}}"
    block = f"{target}.blocks.{{j}}"
    return (
        *affine(f"{coder}.conv_in", f"{coder}.conv_in", "conv"),
        *residual_block(f"{coder}.mid.0", f"{coder}.mid.block1"),
        *attention(f"{coder}.mid.1", f"{coder}.mid.attention"),
        *residual_block(f"{coder}.mid.2", f"{coder}.mid.block2"),
        *residual_block(f"{source}.res.{{j}}", block),
        *attention(f"{source}.attn.{{j}}", f"{block}.attention"),
        *affine(f"{source}.{change}.conv", f"{target}.{resample}", "conv"),
        *norm(f"{coder}.norm_out", f"{coder}.norm_out"),
        *affine(f"{coder}.conv_out", f"{coder}.conv_out", "conv"),
    )


def _ends(coder: str) -> tuple[Rule, ...]:
    """The rules of what VQGAN's code has before and behind the levels of encoder or decoder."""
    return (
        *affine(f"{coder}.conv_in", f"{coder}.conv_in", "conv"),
        *residual_block(f"{coder}.mid.block_1", f"{coder}.mid.block1"),
        *attention(f"{coder}.mid.attn_1", f"{coder}.mid.attention"),
        *residual_block(f"{coder}.mid.block_2", f"{coder}.mid.block2"),
        *norm(f"{coder}.norm_out", f"{coder}.norm_out"),
        *affine(f"{coder}.conv_out", f"{coder}.conv_out", "conv"),
    )


def _vqgan() -> tuple[Rule, ...]:
    """The rules of encoder and decoder as VQGAN's code has them."""
    rules: list[Rule] = [*_ends("encoder"), *_ends("decoder")]
    for level in range(LEVELS):
        down, up, own = f"encoder.down.{level}", f"decoder.up.{level}", LEVELS - 1 - level
        for source, target in ((down, f"encoder.levels.{level}"), (up, f"decoder.levels.{own}")):
            block = f"{target}.blocks.{{j}}"
            rules += residual_block(f"{source}.block.{{j}}", block)
            rules += attention(f"{source}.attn.{{j}}", f"{block}.attention")
        rules += affine(f"{down}.downsample.conv", f"encoder.levels.{level}.resample", "conv")
        rules += affine(f"{up}.upsample.conv", f"decoder.levels.{own}.resample.conv", "conv")
    return (*rules, *_SHARED)


def _janus() -> tuple[Rule, ...]:
    """The rules of `JanusVQVAE`, by the names that it has in a Janus."""
    rules: list[Rule] = [*_ends("encoder"), *_ends("decoder"), *_SHARED]
    for source, target, change, resample in (
        ("encoder.down.{i}", "encoder.levels.{i}", "downsample", "resample"),
        ("decoder.up.{i}", "decoder.levels.{i}", "upsample", "resample.conv"),
    ):
        block = f"{target}.blocks.{{j}}"
        rules += residual_block(f"{source}.block.{{j}}", block)
        rules += attention(f"{source}.attn.{{j}}", f"{block}.attention")
        rules += affine(f"{source}.{change}.conv", f"{target}.{resample}", "conv")
    return tuple(rule._replace(source=f"{_WITHIN}{rule.source}") for rule in rules)


def _infer_vqgan(shapes: Mapping[str, Shape]) -> VQModelConfig:
    levels = count(shapes, "encoder.down.")
    if levels != LEVELS:
        raise ValueError(f"VQ models of this code have {LEVELS} levels, got {levels}")
    widths = [shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)]
    return dataclasses.replace(
        _common(shapes, widths),
        layers_per_block=count(shapes, "encoder.down.0.block."),
        level_attention=any(name.startswith("encoder.down.4.attn.") for name in shapes),
        unit_codes=False,
    )


def _infer(shapes: Mapping[str, Shape]) -> VQModelConfig:
    levels = count(shapes, "encoder.conv_blocks.")
    widths = [
        shapes[f"encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in range(levels)
    ]
    return dataclasses.replace(
        _common(shapes, widths),
        layers_per_block=count(shapes, "encoder.conv_blocks.0.res."),
        level_attention=any(name.startswith("encoder.") and ".attn." in name for name in shapes),
    )


def _infer_janus(shapes: Mapping[str, Shape]) -> VQModelConfig:
    own = {name.removeprefix(_WITHIN): shape for name, shape in shapes.items()}
    levels = range(count(own, "encoder.down."))
    widths = [own[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in levels]
    return dataclasses.replace(
        _common(own, widths), layers_per_block=count(own, "encoder.down.0.block.")
    )


def _common(shapes: Mapping[str, Shape], widths: Sequence[int]) -> VQModelConfig:
    """What both layouts tell in the same way."""
    vocabulary, latents = shapes["quantize.embedding.weight"]
    return VQModelConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latents,
        encoder_channels=shapes["encoder.conv_out.weight"][0],
        vocab_size=vocabulary,
        block_out_channels=tuple(widths),
    )


ORIGINAL = Table(
    rules=(
        *_coder("encoder", "downsample", "resample"),
        *_coder("decoder", "upsample", "resample.conv"),
        *_SHARED,
    ),
    ignored=("quantize.codebook_used",),
    infer=_infer,
    stem="model",
)

VQGAN = Table(rules=_vqgan(), infer=_infer_vqgan, stem="model")

JANUS = Table(rules=_janus(), infer=_infer_janus, stem="model")

FAMILY = Family(
    class_name="VQModel",
    model=VQModel,
    config=VQModelConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL, "vqgan": VQGAN, "janus": JANUS},
    library="effjax",
)
