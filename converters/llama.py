"""Llama and its relatives: transformers' `LlamaForCausalLM`, `Mistral...`, `Qwen2...`, `Qwen3...`.

One model serves them all; which class a configuration is written as follows from its switches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.names import Rule, Table, affine
from effjax.fields import Count, Natural, tuples
from effjax.layers.rotary import Scaling
from effjax.models.llama import Llama, LlamaConfig

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


# With transformers' defaults, where a config.json leaves something out.
KEYS: Keys = {
    "vocab_size": ("vocab_size", 32000),
    "hidden_size": ("hidden_size", 4096),
    "intermediate_size": ("intermediate_size", 11008),
    "num_hidden_layers": ("num_layers", 32),
    "num_attention_heads": ("num_heads", 32),
    "max_position_embeddings": ("max_positions", 2048),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tied", False),
}

_LAYER_TYPES = tuple[Literal["full_attention", "sliding_attention"], ...] | None


def read_config(config: Json) -> LlamaConfig:
    """config.json of one of these models to the configuration."""
    kind = config["model_type"]
    found = read_decoder(config, KEYS)
    window, window_layers = read_window(kind, config, found["num_layers"])
    biased = read_value(config, "attention_bias", bool, False) and kind != "mistral"
    return LlamaConfig(
        **found,
        window=window,
        window_layers=window_layers,
        qkv_bias=kind == "qwen2" or biased,
        out_bias=biased,
        mlp_bias=read_value(config, "mlp_bias", bool, False) and kind == "llama",
        qk_norm=kind == "qwen3",
    )


def read_decoder(config: Json, keys: Keys) -> dict[str, Any]:
    """Sizes and rotation, which all relatives of Llama say alike.

    Args:
        config: config.json.
        keys: of this kind, with their defaults.
    """
    require(config, hidden_act="silu", partial_rotary_factor=1.0)
    found = read_keys(config, LlamaConfig, keys)
    width, heads = found["hidden_size"], found["num_heads"]
    more: Keys = {
        "num_key_value_heads": ("num_kv_heads", heads),
        "head_dim": ("head_dim", width // heads),
    }
    found |= read_keys(config, LlamaConfig, more, null=more)
    found["rope_theta"], found["rope_scaling"] = _read_rope(config)
    return found


def _read_rope(config: Json) -> tuple[float, Scaling]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    keys = ("rope_parameters", "rope_scaling")
    found = [read_value(config, key, Mapping[str, Any] | None) for key in keys]
    rope = dict(found[0] or found[1] or {})
    base = {"rope_theta": rope.pop("rope_theta", config.get("rope_theta", 10_000.0))}
    theta = read_keys(base, LlamaConfig, {"rope_theta": ("rope_theta", None)})["rope_theta"]
    kind = rope.pop("type", None)  # the name of `rope_type` in old files
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] == "default":
        return theta, ()
    if rope["rope_type"] in ("llama3", "yarn"):
        own = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        rope.setdefault("original_max_position_embeddings", own)
        if rope.get("factor") is None and rope["rope_type"] == "yarn":
            longest = read_value(config, "max_position_embeddings", Count)
            original = read_value(rope, "original_max_position_embeddings", Count)
            rope["factor"] = longest / original
    return theta, tuple(sorted((name, tuples(value)) for name, value in rope.items()))


def read_window(kind: str, config: Json, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    window = read_value(config, "sliding_window", Count | None)
    if kind == "llama" or window is None:
        return None, ()
    if kind == "mistral":
        return window, ()
    if not read_value(config, "use_sliding_window", bool, False):
        return None, ()
    kinds = read_value(config, "layer_types", _LAYER_TYPES)
    first = read_value(config, "max_window_layers", Natural, 28)
    sliding = (
        tuple(each == "sliding_attention" for each in kinds)
        if kinds
        else tuple(layer >= first for layer in range(layers))
    )
    if not any(sliding):
        return None, ()
    return window, () if all(sliding) else sliding


def _kind(config: LlamaConfig) -> str:
    """The `model_type` that has these switches."""
    switches = {
        "qk_norm": config.qk_norm,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "window": config.window is not None,
        "window_layers": bool(config.window_layers),
        "rope_sections": bool(config.rope_sections),
    }
    own = {name for name, on in switches.items() if on}
    both = {"qkv_bias", "out_bias"}
    if own <= both | {"mlp_bias"} and own & both in (both, set()):
        return "llama"
    if own == {"window"}:
        return "mistral"
    if "qk_norm" in own and own <= {"qk_norm", "window", "window_layers", *both}:
        return "qwen3"
    if "qkv_bias" in own and own <= {"qkv_bias", "window", "window_layers"}:
        return "qwen2"
    raise ValueError(
        f"no class of transformers has this combination: {', '.join(sorted(own))}; use effjax.save"
    )


def write_common(config: LlamaConfig, kind: str, class_name: str) -> dict[str, Any]:
    """What `read_decoder` reads, and what a model is."""
    return {
        "architectures": [class_name],
        "model_type": kind,
        "hidden_act": "silu",
        **write_keys(config, KEYS),
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) or None,
    }


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    kind = _kind(config)
    written = write_common(config, kind, _CLASSES[kind])
    if kind in ("llama", "qwen3"):
        written["attention_bias"] = config.out_bias
    if kind == "llama":
        written["mlp_bias"] = config.mlp_bias
    else:
        written["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3"):
        names = {True: "sliding_attention", False: "full_attention"}
        layers = range(config.num_layers)
        sliding = [config.layer_window(layer) is not None for layer in layers]
        written["use_sliding_window"] = any(sliding)
        written["layer_types"] = [names[each] for each in sliding]
    return written


_LAYER = "model.layers.{i}"

TRANSFORMERS = Table(
    rules=(
        Rule("model.embed_tokens.weight", "embed_tokens"),
        Rule(f"{_LAYER}.input_layernorm.weight", "blocks.{i}.norm1.scale"),
        *affine(f"{_LAYER}.self_attn.q_proj", "blocks.{i}.attn.to_q"),
        *affine(f"{_LAYER}.self_attn.k_proj", "blocks.{i}.attn.to_k"),
        *affine(f"{_LAYER}.self_attn.v_proj", "blocks.{i}.attn.to_v"),
        *affine(f"{_LAYER}.self_attn.o_proj", "blocks.{i}.attn.to_out"),
        Rule(f"{_LAYER}.self_attn.q_norm.weight", "blocks.{i}.attn.q_norm.scale"),
        Rule(f"{_LAYER}.self_attn.k_norm.weight", "blocks.{i}.attn.k_norm.scale"),
        Rule(f"{_LAYER}.post_attention_layernorm.weight", "blocks.{i}.norm2.scale"),
        *affine(f"{_LAYER}.mlp.gate_proj", "blocks.{i}.mlp.gate"),
        *affine(f"{_LAYER}.mlp.up_proj", "blocks.{i}.mlp.up"),
        *affine(f"{_LAYER}.mlp.down_proj", "blocks.{i}.mlp.down"),
        Rule("model.norm.weight", "norm.scale"),
        Rule("lm_head.weight", "lm_head.kernel", "linear"),
    ),
    # Tied models may hold their embedding under both names.
    aliases={"lm_head.weight": "model.embed_tokens.weight"},
    # Frequencies of the rotation, kept by old versions of transformers.
    ignored=(f"{_LAYER}.self_attn.rotary_emb.inv_freq",),
    stem="model",
)

FAMILY = Family(
    class_name="LlamaForCausalLM",
    model=Llama,
    config=LlamaConfig,
    read_config=read_config,
    write_config=write_config,
    tables={"transformers": TRANSFORMERS},
    claims=lambda config: config.get("model_type") in _CLASSES,
    keys={"num_layers": "num_hidden_layers"},
)
