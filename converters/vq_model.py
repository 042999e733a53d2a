"""VQ models: LlamaGen's `vq_ds16_c2i.pt`, `vq_ds16_t2i.pt` and `vq_ds8_c2i.pt` as released.

The file tells all but the groups of the norms, which are 32 in every model of this code, and the
length of codes, which is one there. Decoder levels are numbered from lowest to full resolution, as
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.family import Family, Json, Keys, read_keys, write_keys
from converters.names import Rule, Shape, Table, affine
from converters.sd3 import count
from converters.vqvae import norm, residual_block
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


def _infer(shapes: Mapping[str, Shape]) -> VQModelConfig:
    vocabulary, latents = shapes["quantize.embedding.weight"]
    levels = count(shapes, "encoder.conv_blocks.")
    return VQModelConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latents,
        encoder_channels=shapes["encoder.conv_out.weight"][0],
        vocab_size=vocabulary,
        block_out_channels=tuple(
            shapes[f"encoder.conv_blocks.{level}.res.0.conv1.weight"][0] for level in range(levels)
        ),
        layers_per_block=count(shapes, "encoder.conv_blocks.0.res."),
        level_attention=any(".attn." in name for name in shapes),
    )


ORIGINAL = Table(
    rules=(
        *_coder("encoder", "downsample", "resample"),
        *_coder("decoder", "upsample", "resample.conv"),
        *affine("quant_conv", "quant_conv", "conv"),
        *affine("post_quant_conv", "post_quant_conv", "conv"),
        Rule("quantize.embedding.weight", "quantizer.codebook"),
    ),
    ignored=("quantize.codebook_used",),
    infer=_infer,
    stem="model",
)

FAMILY = Family(
    class_name="VQModel",
    model=VQModel,
    config=VQModelConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL},
    library="effjax",
)
