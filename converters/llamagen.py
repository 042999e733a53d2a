"""LlamaGen: `c2i_B_256.pt` ... `t2i_XL_stage2_512.pt` as they were released (arXiv 2406.06525).

A file tells all but the number of heads, which follows from the width in every released model, and
the size of the images: 16 x 16 tokens unless a config.json or a pipeline's index says another.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters.family import Family, Json, Keys, read_keys, write_keys
from converters.names import Rule, Shape, Table
from converters.sd3 import count
from effjax.models.llamagen import LlamaGen, LlamaGenConfig

# Of the released code, by hidden size; the last two are its larger configurations.
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32, 2048: 32, 4096: 32}

KEYS: Keys = {
    "grid": ("grid", 16),
    "num_layers": ("num_layers", 12),
    "num_attention_heads": ("num_heads", 12),
    "attention_head_dim": ("head_dim", 64),
    "intermediate_size": ("intermediate_size", 2048),
    "vocab_size": ("vocab_size", 16384),
    "num_classes": ("num_classes", 1000),
    "caption_channels": ("caption_channels", 0),
    "caption_tokens": ("caption_tokens", 120),
    "rope_theta": ("rope_theta", 10_000.0),
    "norm_eps": ("norm_eps", 1e-5),
}


def read_config(config: Json) -> LlamaGenConfig:
    """config.json to the configuration; absent keys have LlamaGen-B's values."""
    return LlamaGenConfig(**read_keys(config, LlamaGenConfig, KEYS))


def write_config(config: LlamaGenConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    return write_keys(config, KEYS)


def block_rules(source: str, target: str) -> tuple[Rule, ...]:
    """The rules of a block."""
    linear = {
        "attention.wo": "attn.to_out",
        "feed_forward.w1": "mlp.gate",
        "feed_forward.w3": "mlp.up",
        "feed_forward.w2": "mlp.down",
    }
    return (
        *(
            Rule(
                f"{source}.attention.wqkv.weight",
                f"{target}.attn.to_{part}.kernel",
                f"linear {n}/3",
            )
            for n, part in enumerate("qkv")
        ),
        *(
            Rule(f"{source}.{theirs}.weight", f"{target}.{ours}.kernel", "linear")
            for theirs, ours in linear.items()
        ),
        Rule(f"{source}.attention_norm.weight", f"{target}.norm1.scale"),
        Rule(f"{source}.ffn_norm.weight", f"{target}.norm2.scale"),
    )


RULES = (
    Rule("tok_embeddings.weight", "embed_tokens"),
    Rule("cls_embedding.embedding_table.weight", "label.embedding_table"),
    Rule("cls_embedding.uncond_embedding", "caption.null_states"),
    Rule("cls_embedding.cap_proj.fc1.weight", "caption.proj.fc1.kernel", "linear"),
    Rule("cls_embedding.cap_proj.fc2.weight", "caption.proj.fc2.kernel", "linear"),
    *block_rules("layers.{i}", "blocks.{i}"),
    Rule("norm.weight", "norm.scale"),
    Rule("output.weight", "lm_head.kernel", "linear"),
)


def infer(shapes: Mapping[str, Shape]) -> LlamaGenConfig:
    """The configuration, from the tensors' shapes."""
    vocabulary, width = shapes["tok_embeddings.weight"]
    if width not in _HEADS:
        raise ValueError(
            f"cannot tell the number of heads from width {width} (the released models have "
            f"{', '.join(map(str, _HEADS))}); put a config.json beside the file"
        )
    table = shapes.get("cls_embedding.embedding_table.weight")
    tokens, channels = (120, 0) if table else shapes["cls_embedding.uncond_embedding"]
    return LlamaGenConfig(
        num_layers=count(shapes, "layers."),
        num_heads=_HEADS[width],
        head_dim=width // _HEADS[width],
        intermediate_size=shapes["layers.0.feed_forward.w1.weight"][0],
        vocab_size=vocabulary,
        num_classes=table[0] - 1 if table else 0,
        caption_channels=channels,
        caption_tokens=tokens,
    )


ORIGINAL = Table(rules=RULES, infer=infer, stem="model")

FAMILY = Family(
    class_name="LlamaGen",
    model=LlamaGen,
    config=LlamaGenConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"original": ORIGINAL},
    library="effjax",
)
