"""The VQVAE of VAR: `vae_ch160v4096z32.pth` as it was released (arXiv 2404.02905).

The file tells all but the groups of the norms, which are 32 in every model of this code. The
decoder's levels are numbered from full to lowest resolution there, and run the other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.family import Family, Json, Keys, read_keys, write_keys
from converters.names import Rule, Shape, Table, affine
from converters.sd3 import count
from effjax.models.vqvae import VQVAE, VQVAEConfig

LEVELS = 5  # of the released model: images are 16 times as wide as latents

_KEYS: Keys = {
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 32),
    "vocab_size": ("vocab_size", 4096),
    "block_out_channels": ("block_out_channels", [160, 160, 320, 320, 640]),
    "layers_per_block": ("layers_per_block", 2),
    "norm_num_groups": ("norm_groups", 32),
    "num_refinements": ("num_refinements", 4),
    "refinement": ("refinement", 0.5),
}


def read_config(config: Json) -> VQVAEConfig:
    """config.json to the configuration; absent keys have the released model's values."""
    return VQVAEConfig(**read_keys(config, VQVAEConfig, _KEYS))


def write_config(config: VQVAEConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, _KEYS)


def norm(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a group norm."""
    return (
        Rule(f"{source}.weight", f"{target}.scale"),
        Rule(f"{source}.bias", f"{target}.bias"),
    )


def residual_block(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a residual block."""
    return (
        *norm(f"{source}.norm1", f"{target}.norm1"),
        *affine(f"{source}.conv1", f"{target}.conv1", "conv"),
        *norm(f"{source}.norm2", f"{target}.norm2"),
        *affine(f"{source}.conv2", f"{target}.conv2", "conv"),
        *affine(f"{source}.nin_shortcut", f"{target}.shortcut", "conv"),
    )


def attention(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of an attention whose projections are convolutions, queries to values in one."""
    rules = [*norm(f"{source}.norm", f"{target}.norm")]
    for number, part in enumerate("qkv"):
        rules += affine(f"{source}.qkv", f"{target}.attn.to_{part}", "pointwise", f"{number}/3")
    return (*rules, *affine(f"{source}.proj_out", f"{target}.attn.to_out", "pointwise"))


def _coder(coder: str) -> tuple[Rule, ...]:
    """The rules of what encoder and decoder have in common."""
    source, target = f"{coder}.mid", f"{coder}.mid"
    return (
        *affine(f"{coder}.conv_in", f"{coder}.conv_in", "conv"),
        *residual_block(f"{source}.block_1", f"{target}.block1"),
        *attention(f"{source}.attn_1", f"{target}.attention"),
        *residual_block(f"{source}.block_2", f"{target}.block2"),
        *norm(f"{coder}.norm_out", f"{coder}.norm_out"),
        *affine(f"{coder}.conv_out", f"{coder}.conv_out", "conv"),
    )


def _level(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a level's blocks."""
    block = f"{target}.blocks.{{j}}"
    return (
        *residual_block(f"{source}.block.{{j}}", block),
        *attention(f"{source}.attn.{{j}}", f"{block}.attention"),
    )


def _levels() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    for level in range(LEVELS):
        down, up, own = f"encoder.down.{level}", f"decoder.up.{level}", LEVELS - 1 - level
        rules += [
            *_level(down, f"encoder.levels.{level}"),
            *affine(f"{down}.downsample.conv", f"encoder.levels.{level}.resample", "conv"),
            *_level(up, f"decoder.levels.{own}"),
            *affine(f"{up}.upsample.conv", f"decoder.levels.{own}.resample.conv", "conv"),
        ]
    return tuple(rules)


def _infer(shapes: Mapping[str, Shape]) -> VQVAEConfig:
    vocabulary, latents = shapes["quantize.embedding.weight"]
    levels = count(shapes, "encoder.down.")
    return VQVAEConfig(
        in_channels=shapes["encoder.conv_in.weight"][1],
        out_channels=shapes["decoder.conv_out.weight"][0],
        latent_channels=latents,
        vocab_size=vocabulary,
        block_out_channels=tuple(
            shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(levels)
        ),
        layers_per_block=count(shapes, "encoder.down.0.block."),
        num_refinements=count(shapes, "quantize.quant_resi.qresi_ls."),
    )


ORIGINAL = Table(
    rules=(
        *_coder("encoder"),
        *_coder("decoder"),
        *_levels(),
        *affine("quant_conv", "quant_conv", "conv"),
        *affine("post_quant_conv", "post_quant_conv", "conv"),
        Rule("quantize.embedding.weight", "quantizer.codebook"),
        *affine("quantize.quant_resi.qresi_ls.{i}", "quantizer.phi.{i}", "conv"),
    ),
    ignored=("quantize.ema_vocab_hit_SV",),
    infer=_infer,
    stem="model",
)

FAMILY = Family(
    class_name="VQVAE",
    model=VQVAE,
    config=VQVAEConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL},
    library="effjax",
)
