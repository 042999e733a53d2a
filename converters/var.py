"""VAR: `var_d16.pth` ... `var_d36.pth` as they were released (arXiv 2404.02905).

A file tells all: the number of blocks, the heads by the factors of their queries, the scales by the
number of tokens, and whether blocks share a modulation. The parts of a modulation have another
order there (gates, scales, shifts), and masks and level numbers are computed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.family import Family, Json, Keys, read_keys, write_keys
from converters.names import Layout, Rule, Shape, Table, affine
from converters.sd3 import count
from effjax.models.var import PATCH_NUMS, VAR, VARConfig

_ORDER = (4, 2, 0, 5, 3, 1)  # of shift, scale, gate (twice) among gates, scales and shifts


def _reordered(x: np.ndarray) -> np.ndarray:
    return x.reshape(6, -1, *x.shape[1:])[list(_ORDER)].reshape(x.shape)


def _as_released(x: np.ndarray) -> np.ndarray:
    return x.reshape(6, -1, *x.shape[1:])[np.argsort(_ORDER)].reshape(x.shape)


_LAYOUTS = {
    "six": Layout(_reordered, _as_released, lambda shape: shape),
    "six-linear": Layout(
        lambda x: _reordered(x).T, lambda x: _as_released(x.T), lambda shape: shape[::-1]
    ),
    "six-table": Layout(
        lambda x: _reordered(x[0, 0]), lambda x: _as_released(x)[None, None], lambda s: (1, 1, *s)
    ),
    # [1, H, 1, 1] <-> [H]
    "by-head": Layout(
        lambda x: x[0, :, 0, 0], lambda x: x[None, :, None, None], lambda shape: (1, *shape, 1, 1)
    ),
}

_KEYS: Keys = {
    "patch_nums": ("patch_nums", list(PATCH_NUMS[256])),
    "num_layers": ("num_layers", 16),
    "num_attention_heads": ("num_heads", 16),
    "attention_head_dim": ("head_dim", 64),
    "intermediate_size": ("intermediate_size", 4096),
    "num_classes": ("num_classes", 1000),
    "vocab_size": ("vocab_size", 4096),
    "code_channels": ("code_channels", 32),
    "shared_modulation": ("shared_modulation", False),
    "qk_norm": ("qk_norm", True),
    "norm_eps": ("norm_eps", 1e-6),
}


def read_config(config: Json) -> VARConfig:
    """config.json to the configuration; absent keys have VAR-d16's values."""
    return VARConfig(**read_keys(config, VARConfig, _KEYS))


def write_config(config: VARConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, _KEYS)


def _six(source: str, target: str) -> tuple[Rule, Rule]:
    """The rules of a projection to shifts, scales and gates."""
    return (
        Rule(f"{source}.weight", f"{target}.kernel", "six-linear"),
        Rule(f"{source}.bias", f"{target}.bias", "six"),
    )


def _rules() -> tuple[Rule, ...]:
    source, target = "blocks.{i}", "blocks.{i}"
    rules = [
        Rule("pos_start", "start", "first"),
        Rule("pos_1LC", "positions", "first"),
        Rule("lvl_embed.weight", "level_embed"),
        Rule("class_emb.weight", "label.embedding_table"),
        *affine("word_embed", "word_embed"),
        *_six("shared_ada_lin.1", "modulation"),
        *_six(f"{source}.ada_lin.1", f"{target}.modulation"),
        Rule(f"{source}.ada_gss", f"{target}.scale_shift_table", "six-table"),
        Rule(f"{source}.attn.scale_mul_1H11", f"{target}.attn.q_norm.scale", "by-head"),
        Rule(f"{source}.attn.q_bias", f"{target}.attn.to_q.bias"),
        Rule(f"{source}.attn.v_bias", f"{target}.attn.to_v.bias"),
        *affine(f"{source}.attn.proj", f"{target}.attn.to_out"),
        *affine(f"{source}.ffn.fc1", f"{target}.mlp.fc1"),
        *affine(f"{source}.ffn.fc2", f"{target}.mlp.fc2"),
        *affine("head_nm.ada_lin.1", "head.modulation", "swapped-linear"),
        *affine("head", "head.proj"),
    ]
    for number, part in enumerate("qkv"):
        kernel = f"{target}.attn.to_{part}.kernel"
        rules.append(Rule(f"{source}.attn.mat_qkv.weight", kernel, f"linear {number}/3"))
    return tuple(rules)


def _infer(shapes: Mapping[str, Shape]) -> VARConfig:
    width, channels = shapes["word_embed.weight"]
    scales, tokens = shapes["lvl_embed.weight"][0], shapes["pos_1LC"][1]
    known = [n for n in PATCH_NUMS.values() if (len(n), sum(p**2 for p in n)) == (scales, tokens)]
    if not known:
        sums = " or ".join(str(sum(p**2 for p in n)) for n in PATCH_NUMS.values())
        raise ValueError(
            f"cannot tell the sides of {scales} scales with {tokens} tokens (the released models "
            f"have 10 with {sums}); put a config.json with patch_nums beside the file"
        )
    factors = shapes.get("blocks.0.attn.scale_mul_1H11")
    if factors is None and width % 64:
        raise ValueError(
            f"cannot tell the number of heads from width {width}, as it is no multiple of 64; put "
            f"a config.json beside the file"
        )
    heads = width // 64 if factors is None else factors[1]
    return VARConfig(
        patch_nums=known[0],
        num_layers=count(shapes, "blocks."),
        num_heads=heads,
        head_dim=width // heads,
        intermediate_size=shapes["blocks.0.ffn.fc1.weight"][0],
        num_classes=shapes["class_emb.weight"][0] - 1,
        vocab_size=shapes["head.weight"][0],
        code_channels=channels,
        shared_modulation=any(name.endswith(".ada_gss") for name in shapes),
        qk_norm=factors is not None,
    )


ORIGINAL = Table(
    rules=_rules(),
    ignored=("lvl_1L", "attn_bias_for_masking", "blocks.{i}.attn.zero_k_bias"),
    infer=_infer,
    stem="model",
    layouts=_LAYOUTS,
)

FAMILY = Family(
    class_name="VAR",
    model=VAR,
    config=VARConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL},
    library="effjax",
)
