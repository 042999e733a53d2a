"""Llamas with experts: transformers' `MixtralForCausalLM`, `Qwen2Moe`, `Qwen3Moe`, `Olmoe...`.

Checkpoints hold a tensor for each matrix of each expert ("transformers", and "mixtral" with
Mixtral's names). transformers 5 holds the experts of a layer in two tensors in memory, gate and up
in one ("fused"); such state dictionaries are read too.

Source: the configurations and models of transformers 5.24, and its `conversion_mapping.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters import llama
from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.llama import KEYS, read_decoder, read_window
from converters.names import Rule, Table
from effjax.fields import Natural
from effjax.models.moe_llama import MoELlama, MoELlamaConfig

_CLASSES = {
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "olmoe": "OlmoeForCausalLM",
}

# What transformers takes where a config.json leaves something out.
_DEFAULTS: Mapping[str, Json] = {
    "mixtral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096 * 32,
        "rms_norm_eps": 1e-5,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "qwen2_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
    },
    "qwen3_moe": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    "olmoe": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "num_experts_per_tok": 8,
        "num_experts": 64,
    },
}

_ALIKE: Keys = {"num_experts_per_tok": ("num_experts_per_tok", None)}
_MIXTRAL: Keys = {
    **_ALIKE,
    "intermediate_size": ("moe_intermediate_size", None),
    "num_local_experts": ("num_experts", None),
}
_OLMOE: Keys = {
    **_ALIKE,
    "intermediate_size": ("moe_intermediate_size", None),
    "num_experts": ("num_experts", None),
    "norm_topk_prob": ("norm_topk_prob", False),
}
_QWEN3: Keys = {
    **_OLMOE,
    "moe_intermediate_size": ("moe_intermediate_size", None),
}
del _QWEN3["intermediate_size"]
_QWEN2: Keys = {
    **_QWEN3,
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size", None),
}
_KEYS: Mapping[str, Keys] = {
    "mixtral": _MIXTRAL,
    "qwen2_moe": _QWEN2,
    "qwen3_moe": _QWEN3,
    "olmoe": _OLMOE,
}


def read_config(config: Json) -> MoELlamaConfig:
    """config.json of one of these models to the configuration."""
    kind = config["model_type"]
    config = {**_DEFAULTS[kind], **_counted(config)}
    found = read_decoder(config, KEYS) | read_keys(config, MoELlamaConfig, _KEYS[kind])
    biased = kind != "mixtral" and read_value(config, "attention_bias", bool, False)
    if kind in ("mixtral", "olmoe"):
        window, window_layers = read_window("mistral", config, found["num_layers"])
        sparse: tuple[bool, ...] = ()
        require(config, clip_qkv=None)
    else:
        window, window_layers = _window(kind, config, found["num_layers"])
        sparse = _sparse(config, found["num_layers"])
    return MoELlamaConfig(
        **found,
        window=window,
        window_layers=window_layers,
        qkv_bias=biased or (kind == "qwen2_moe" and read_value(config, "qkv_bias", bool)),
        out_bias=biased and kind != "qwen2_moe",
        qk_norm=kind in ("qwen3_moe", "olmoe"),
        qk_norm_joined=kind == "olmoe",
        round_topk_prob=kind != "mixtral",
        sparse_layers=() if all(sparse) else sparse,
    )


def _counted(config: Json) -> Json:
    """The number of experts under both of its names; transformers 5.24 writes Qwen3-MoE's as
    `num_local_experts`, which no file before it did.
    """
    names = ("num_experts", "num_local_experts")
    said = {name: config[name] for name in names if config.get(name) is not None}
    if len({*map(str, said.values())}) > 1:
        raise ValueError(f"config.json counts experts in two ways: {said}")
    return {**config, **dict.fromkeys(names, next(iter(said.values())))} if said else config


def _window(kind: str, config: Json, layers: int) -> tuple[int | None, tuple[bool, ...]]:
    """The window, and which layers have it."""
    if not read_value(config, "use_sliding_window", bool, False):
        return None, ()  # transformers writes a window of 0 then
    if kind == "qwen3_moe":  # all layers, whatever stands in `layer_types`
        return read_window("mistral", config, layers)
    if config.get("layer_types") is None:
        first = read_value(config, "max_window_layers", Natural, 28)
        names = ("full_attention", "sliding_attention")
        kinds = [names[i % 2 == 0 and i < first] for i in range(layers)]
        config = {**config, "layer_types": kinds}
    return read_window("qwen2", config, layers)


def _sparse(config: Json, layers: int) -> tuple[bool, ...]:
    """Whether each layer has experts."""
    dense = read_value(config, "mlp_only_layers", tuple[int, ...] | None) or ()
    every = read_value(config, "decoder_sparse_step", int, 1)
    if every < 1:
        raise ValueError(f"decoder_sparse_step must be at least 1, got {every}")
    return tuple(i not in dense and (i + 1) % every == 0 for i in range(layers))


def _kind(config: MoELlamaConfig) -> str:
    """The `model_type` that has these switches."""
    switches = {
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size > 0,
        "qk_norm": config.qk_norm,
        "qk_norm_joined": config.qk_norm_joined,
        "qkv_bias": config.qkv_bias,
        "out_bias": config.out_bias,
        "mlp_bias": config.mlp_bias,
        "round_topk_prob": config.round_topk_prob,
        "norm_topk_prob": config.norm_topk_prob,
        "sparse_layers": bool(config.sparse_layers),
        "window": config.window is not None,
        "window_layers": bool(config.window_layers),
        "rope_sections": bool(config.rope_sections),
    }
    own = {name for name, on in switches.items() if on}
    free = {"norm_topk_prob", "sparse_layers", "window"}
    both = {"qkv_bias", "out_bias"}
    if own - {"window"} == {"norm_topk_prob"}:
        return "mixtral"
    if own - free - both == {"round_topk_prob", "qk_norm"} and own & both in (both, set()):
        return "qwen3_moe"
    olmoe = {"round_topk_prob", "qk_norm", "qk_norm_joined"}
    if own - {"norm_topk_prob"} - both == olmoe and own & both in (both, set()):
        return "olmoe"
    qwen2 = {"round_topk_prob", "shared_expert_intermediate_size"}
    if own - free - {"qkv_bias", "window_layers"} == qwen2:
        return "qwen2_moe"
    raise ValueError(
        f"no class of transformers has this combination: {', '.join(sorted(own))}; use effjax.save"
    )


def write_config(config: MoELlamaConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    kind = _kind(config)
    written: dict[str, Any] = {
        **llama.write_common(config, kind, _CLASSES[kind]),
        **write_keys(config, _KEYS[kind]),
    }
    if kind == "mixtral":
        return {**written, "sliding_window": config.window}
    if kind == "qwen2_moe":
        written["qkv_bias"] = config.qkv_bias
    else:
        written["attention_bias"] = config.out_bias
    if kind == "olmoe":
        return written
    layers = range(config.num_layers)
    sliding = [config.layer_window(layer) is not None for layer in layers]
    names = {True: "sliding_attention", False: "full_attention"}
    return {
        **written,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer in layers if not config.sparse(layer)],
        "use_sliding_window": any(sliding),
        "sliding_window": config.window,
        **({"layer_types": [names[each] for each in sliding]} if kind == "qwen2_moe" else {}),
    }


_LAYER, _EXPERTS = "model.layers.{i}", "blocks.{i}.mlp.experts"
_SHARED = "blocks.{i}.mlp.shared"
_DENSE = llama.TRANSFORMERS.rules


def _each(source: str, target: str) -> Rule:
    return Rule(f"{_LAYER}.{source}.weight", f"{_EXPERTS}.{target}.kernel", "linear each e")


_BESIDE = (
    Rule(f"{_LAYER}.mlp.gate.weight", "blocks.{i}.mlp.router.scores.kernel", "linear"),
    Rule(f"{_LAYER}.mlp.shared_expert_gate.weight", f"{_SHARED}_gate.kernel", "linear"),
    *(
        Rule(f"{_LAYER}.mlp.shared_expert.{name}_proj.weight", f"{_SHARED}.{name}.kernel", "linear")
        for name in ("gate", "up", "down")
    ),
)
_TABLES = {
    "transformers": (
        *_BESIDE,
        *(_each(f"mlp.experts.{{e}}.{name}_proj", name) for name in ("gate", "up", "down")),
    ),
    "mixtral": (
        Rule(
            f"{_LAYER}.block_sparse_moe.gate.weight",
            "blocks.{i}.mlp.router.scores.kernel",
            "linear",
        ),
        _each("block_sparse_moe.experts.{e}.w1", "gate"),
        _each("block_sparse_moe.experts.{e}.w3", "up"),
        _each("block_sparse_moe.experts.{e}.w2", "down"),
    ),
    "fused": (
        *_BESIDE,
        Rule(
            f"{_LAYER}.mlp.experts.gate_up_proj", f"{_EXPERTS}.gate.kernel", "linears columns 0/2"
        ),
        Rule(f"{_LAYER}.mlp.experts.gate_up_proj", f"{_EXPERTS}.up.kernel", "linears columns 1/2"),
        Rule(f"{_LAYER}.mlp.experts.down_proj", f"{_EXPERTS}.down.kernel", "linears"),
    ),
}

FAMILY = Family(
    class_name="MoELlamaForCausalLM",
    model=MoELlama,
    config=MoELlamaConfig,
    read_config=read_config,
    write_config=write_config,
    tables={
        name: Table(
            rules=(*_DENSE, *rules),
            aliases=llama.TRANSFORMERS.aliases,
            ignored=llama.TRANSFORMERS.ignored,
            stem="model",
        )
        for name, rules in _TABLES.items()
    },
    claims=lambda config: config.get("model_type") in _CLASSES,
    keys={"num_layers": "num_hidden_layers"},
    writes=lambda config: "mixtral" if _kind(config) == "mixtral" else "transformers",
)
