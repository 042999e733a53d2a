"""Chameleon and Anole: transformers' `ChameleonForConditionalGeneration`.

The language model alone: transformers' files hold the encoder of the VQ model too, without the
decoder. Both are in the VQ model's original file, see `converters.vq_model`, which stands alone or,
as `part="vqmodel"`, beside the config.json of the language model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from converters import vq_model
from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.llama import TRANSFORMERS as LLAMA
from converters.names import Rule, Table
from effjax.fields import Count, naming
from effjax.models.chameleon import Chameleon, ChameleonConfig
from effjax.models.vq_model import VQModelConfig

_KEYS: Keys = {
    "vocab_size": ("vocab_size", 65536),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "num_key_value_heads": ("num_kv_heads", 32),
    "max_position_embeddings": ("max_positions", 4096),
    "rms_norm_eps": ("norm_eps", 1e-5),
    "tie_word_embeddings": ("tied", False),
    "attention_bias": ("attention_bias", False),
    "mlp_bias": ("mlp_bias", False),
    "swin_norm": ("swin_norm", False),
}
_IMAGE, _CODES = "IMGIMG", "vq_config"
_TOKENS = {  # of prompts, by their names in the vocabulary
    "<image>": "image_placeholder",
    "<s>": "bos_token",
    "<pad>": "pad_token",
    "<reserved08706>": "sep_token",
    "<racm3:break>": "boi_token",
}


def code_of(name: str) -> int:
    """The code that a token of an image names: its digits are letters, A for 0.

    >>> code_of("IMGIMGBCZ")
    12
    """
    return int("".join(str(ord(letter) - ord("A")) for letter in name[len(_IMAGE) : -1]))


def name_of(code: int) -> str:
    """The inverse of `code_of`."""
    return _IMAGE + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def read_config(config: Json) -> ChameleonConfig:
    """config.json to the configuration."""
    require(config, hidden_act="silu")
    found = read_keys(config, ChameleonConfig, _KEYS)
    rope = read_value(config, "rope_parameters", Mapping[str, Any] | None) or {}
    if rope.get("rope_type", "default") != "default" or config.get("rope_scaling"):
        raise ValueError("config.json asks for a stretched rotation, which no Chameleon has")
    base = {"rope_theta": rope.get("rope_theta", config.get("rope_theta", 10_000.0))}
    found |= read_keys(base, ChameleonConfig, {"rope_theta": ("rope_theta", None)})
    tokens = read_value(config, "vocabulary_map", Mapping[str, int] | None) or {}
    codes = {code_of(name): token for name, token in tokens.items() if name.startswith(_IMAGE)}
    if sorted(codes) != list(range(len(codes))):
        raise ValueError(
            f"vocabulary_map must name every code 0 ... {len(codes) - 1} of images once "
            f"({name_of(0)}, {name_of(1)}, ...)"
        )
    return ChameleonConfig(
        **found,
        grid=_grid(read_value(config, _CODES, Mapping[str, Any] | None) or {}),
        image_ids=tuple(codes[code] for code in range(len(codes))),
        **{ours: tokens[name] for name, ours in _TOKENS.items() if name in tokens},
    )


def _grid(section: Json) -> int:
    """Codes of a row."""
    with naming(_CODES):
        size = read_value(section, "resolution", Count, 512)
        levels = len(read_value(section, "channel_multiplier", tuple[Count, ...], [1, 1, 2, 2, 4]))
        if not levels or size % 2 ** (levels - 1):
            raise ValueError(
                f"resolution must be whole codes: {levels} levels halve it {levels - 1} times, got "
                f"{size}"
            )
    return size // 2 ** (levels - 1)


def read_codes(config: Json) -> VQModelConfig:
    """The VQ model's section of config.json to its configuration."""
    section = read_value(config, _CODES, Mapping[str, Any] | None) or {}
    attended = read_value(section, "attn_resolutions", tuple[Count, ...] | None) or ()
    with naming(_CODES):
        return vq_model.read_section(
            section, {}, level_attention=_grid(section) in attended, unit_codes=False
        )


def write_config(config: ChameleonConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    tokens = {name_of(code): token for code, token in enumerate(config.image_ids)}
    own = {name: getattr(config, ours) for name, ours in _TOKENS.items()}
    return {
        "architectures": ["ChameleonForConditionalGeneration"],
        "model_type": "chameleon",
        "hidden_act": "silu",
        **write_keys(config, _KEYS),
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "vocabulary_map": {**tokens, **{name: x for name, x in own.items() if x is not None}},
        _CODES: {"resolution": 16 * config.grid, "num_embeddings": max(len(config.image_ids), 1)},
    }


_NORMS = tuple(
    Rule(f"model.layers.{{i}}.self_attn.{norm}.{theirs}", f"blocks.{{i}}.attn.{norm}.{ours}")
    for norm in ("q_norm", "k_norm")
    for theirs, ours in (("weight", "scale"), ("bias", "bias"))
)

TRANSFORMERS = Table(
    rules=(*(rule for rule in LLAMA.rules if "_norm.weight" not in rule.source), *_NORMS),
    aliases=LLAMA.aliases,
    ignored=(
        *LLAMA.ignored,
        *(f"model.vqmodel.{rule.source}" for rule in vq_model.VQGAN.rules),
    ),
    stem="model",
)

_PART = dataclasses.replace(
    vq_model.FAMILY,
    class_name="ChameleonVQVAE",
    read_config=read_codes,
    keys={
        "layers_per_block": f"{_CODES}.num_res_blocks",
        "block_out_channels": f"{_CODES}.channel_multiplier",
    },
    tables={"vqgan": vq_model.VQGAN},
)

FAMILY = Family(
    class_name="ChameleonForConditionalGeneration",
    model=Chameleon,
    config=ChameleonConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"transformers": TRANSFORMERS},
    claims=lambda config: config.get("model_type") == "chameleon",
    keys={"num_layers": "num_hidden_layers"},
    parts={"vqmodel": _PART},
    library="transformers",
)
