"""Llama and its relatives: transformers' `LlamaForCausalLM`, `Mistral...`, `Qwen2...`, `Qwen3...`.

One model serves them all; which class a configuration is written as follows from its switches.
"""

from __future__ import annotations

from typing import Any

from converters.family import Family, Json, read_fields, require
from converters.names import Rule, Table, affine
from effjax.models.llama import Llama, LlamaConfig

# Defaults of transformers' configurations, where a config.json leaves something out.
_EPS = {"llama": 1e-6, "mistral": 1e-6, "qwen2": 1e-6, "qwen3": 1e-6}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


def read_config(config: Json) -> LlamaConfig:
    """config.json of one of these models to the configuration."""
    kind = config["model_type"]
    require(config, hidden_act="silu", partial_rotary_factor=1.0)
    fields = read_fields(
        config,
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        rms_norm_eps=_EPS[kind],
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        use_sliding_window=False,
    )
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    theta, scaling = _read_rope(config)
    window, window_layers = _read_window(kind, config, layers)
    biased = fields["attention_bias"] and kind != "mistral"
    return LlamaConfig(
        vocab_size=fields["vocab_size"],
        width=fields["hidden_size"],
        hidden=fields["intermediate_size"],
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or fields["hidden_size"] // heads,
        max_positions=fields["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        window=window,
        window_layers=window_layers,
        qkv_bias=kind == "qwen2" or biased,
        out_bias=biased,
        mlp_bias=fields["mlp_bias"] and kind == "llama",
        qk_norm=kind == "qwen3",
        tied=fields["tie_word_embeddings"],
        norm_eps=fields["rms_norm_eps"],
    )


def _read_rope(config: Json) -> tuple[float, tuple[tuple[str, Any], ...]]:
    """Base and scaling, from `rope_theta` and `rope_scaling` or from `rope_parameters`."""
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.pop("type", None)  # the name of `rope_type` in old files
    rope.setdefault("rope_type", kind or "default")
    if rope["rope_type"] == "default":
        return float(theta), ()
    if rope["rope_type"] in ("llama3", "yarn"):
        own = config.get("original_max_position_embeddings", config.get("max_position_embeddings"))
        rope.setdefault("original_max_position_embeddings", own)
        if rope.get("factor") is None and rope["rope_type"] == "yarn":
            longest = config.get("max_position_embeddings")
            rope["factor"] = longest / rope["original_max_position_embeddings"]
    return float(theta), tuple(sorted(rope.items()))


def _read_window(kind: str, config: Json, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    window = config.get("sliding_window")
    if kind == "llama" or window is None:
        return None, ()
    if kind == "mistral":
        return window, ()
    if not config.get("use_sliding_window", False):
        return None, ()
    kinds = config.get("layer_types")
    first = config.get("max_window_layers", 28)
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


def write_config(config: LlamaConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    kind = _kind(config)
    written: dict[str, Any] = {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.hidden,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": dict(config.rope_scaling) or None,
        "tie_word_embeddings": config.tied,
    }
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
        Rule("model.embed_tokens.weight", "table"),
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
        Rule("lm_head.weight", "head.kernel", "linear"),
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
