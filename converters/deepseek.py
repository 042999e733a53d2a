"""DeepSeek-V2 and V3: transformers' `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`.

Layouts are those of `converters.moe_llama`. The released V3 holds one more layer, which predicts a
second token (`num_nextn_predict_layers`); it is read past.

Source: the configurations and models of transformers 5.24; the released checkpoints' config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from converters import llama, moe_llama
from converters.family import Family, Json, Keys, read_keys, read_value, require, write_keys
from converters.llama import KEYS, read_decoder
from converters.names import Rule, Table, affine
from effjax.fields import Count, Natural
from effjax.models.deepseek import DeepSeek, DeepSeekConfig

_CLASSES = {"deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM"}

# What transformers takes where a config.json leaves something out.
_DEFAULTS: Mapping[str, Json] = {
    "deepseek_v2": {
        "vocab_size": 102400,
        "max_position_embeddings": 2048,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "routed_scaling_factor": 1.0,
        "moe_intermediate_size": 1407,
    },
    "deepseek_v3": {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "max_position_embeddings": 4096,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "kv_lora_rank": 512,
        "q_lora_rank": 1536,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
}

_KEYS: Keys = {
    "n_routed_experts": ("num_experts", None),
    "num_experts_per_tok": ("num_experts_per_tok", None),
    "moe_intermediate_size": ("moe_intermediate_size", None),
    "q_lora_rank": ("q_lora_rank", None),
    "kv_lora_rank": ("kv_lora_rank", None),
    "qk_nope_head_dim": ("qk_nope_head_dim", None),
    "v_head_dim": ("v_head_dim", None),
    "routed_scaling_factor": ("routed_scaling_factor", 1.0),
}


def read_config(config: Json) -> DeepSeekConfig:
    """config.json of one of these models to the configuration."""
    kind = config["model_type"]
    second = kind == "deepseek_v2"
    config = {**_DEFAULTS[kind], **config}
    config["head_dim"] = config["qk_rope_head_dim"]
    fixed: dict[str, Any] = {"moe_layer_freq": 1, "mlp_bias": False}
    if second:
        # transformers never divides by the sum; the original code does so in place of scaling.
        fixed |= {"scoring_func": "softmax", "norm_topk_prob": False}
    else:
        fixed |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    require(config, **fixed)
    grouped = not second or _method(config) == "group_limited_greedy"
    found = read_decoder(config, KEYS) | read_keys(config, DeepSeekConfig, _KEYS)
    dense = read_value(config, "first_k_dense_replace", Natural, 0)
    shared = read_value(config, "n_shared_experts", Count)
    biased = read_value(config, "attention_bias", bool, False)
    sparse = tuple(layer >= dense for layer in range(found["num_layers"]))
    return DeepSeekConfig(
        **found,
        qkv_bias=biased,
        out_bias=biased,
        shared_expert_intermediate_size=shared * found["moe_intermediate_size"],
        norm_topk_prob=False if second else read_value(config, "norm_topk_prob", bool),
        sparse_layers=() if all(sparse) else sparse,
        rope_interleave=second or read_value(config, "rope_interleave", bool, True),
        scoring_func="softmax" if second else "sigmoid",
        n_group=read_value(config, "n_group", Count) if grouped else 1,
        topk_group=read_value(config, "topk_group", Count) if grouped else 1,
    )


def _method(config: Json) -> str:
    """How DeepSeek-V2 chooses experts."""
    method = read_value(config, "topk_method", str | None) or "greedy"
    if method not in ("greedy", "group_limited_greedy"):
        raise ValueError(
            f"topk_method must be greedy or group_limited_greedy in a DeepSeek-V2, got {method!r}"
        )
    return method


def write_config(config: DeepSeekConfig) -> dict[str, Any]:
    """The inverse of `read_config`."""
    second = config.scoring_func == "softmax"
    kind = "deepseek_v2" if second else "deepseek_v3"
    dense = sum(not config.sparse(layer) for layer in range(config.num_layers))
    size, shared = config.moe_intermediate_size, config.shared_expert_intermediate_size
    faults = {
        "shared_expert_intermediate_size": shared % size,
        "sparse_layers": any(config.sparse(layer) for layer in range(dense)),
        "norm_topk_prob": second and config.norm_topk_prob,
        "out_bias": config.out_bias != config.qkv_bias,
        "rope_interleave": second and not config.rope_interleave,
    }
    if wrong := [name for name, fault in faults.items() if fault]:
        raise ValueError(f"no class of transformers has this {', '.join(wrong)}; use effjax.save")
    written: dict[str, Any] = {
        **llama.write_common(config, kind, _CLASSES[kind]),
        **write_keys(config, _KEYS),
        "num_key_value_heads": config.num_heads,
        "qk_rope_head_dim": config.head_dim,
        "n_shared_experts": shared // size,
        "first_k_dense_replace": dense,
        "attention_bias": config.qkv_bias,
        "norm_topk_prob": config.norm_topk_prob,
        "n_group": config.n_group,
        "topk_group": config.topk_group,
    }
    if second:
        grouped = config.n_group > 1
        return {**written, "topk_method": "group_limited_greedy" if grouped else "greedy"}
    return {
        **written,
        "rope_interleave": config.rope_interleave,
        "num_nextn_predict_layers": 0,
    }


_LAYER = "model.layers.{i}"
_ATTENTION = f"{_LAYER}.self_attn"
_OWN = (
    *affine(f"{_ATTENTION}.q_a_proj", "blocks.{i}.attn.q_a"),
    Rule(f"{_ATTENTION}.q_a_layernorm.weight", "blocks.{i}.attn.q_norm.scale"),
    Rule(f"{_ATTENTION}.q_b_proj.weight", "blocks.{i}.attn.q_b.kernel", "linear"),
    Rule(f"{_ATTENTION}.q_proj.weight", "blocks.{i}.attn.to_q.kernel", "linear"),
    *affine(f"{_ATTENTION}.kv_a_proj_with_mqa", "blocks.{i}.attn.kv_a"),
    Rule(f"{_ATTENTION}.kv_a_layernorm.weight", "blocks.{i}.attn.kv_norm.scale"),
    Rule(f"{_ATTENTION}.kv_b_proj.weight", "blocks.{i}.attn.core.kv_b.kernel", "linear"),
    *affine(f"{_ATTENTION}.o_proj", "blocks.{i}.attn.to_out"),
    Rule(f"{_LAYER}.mlp.gate.e_score_correction_bias", "blocks.{i}.mlp.router.correction"),
    *(
        Rule(
            f"{_LAYER}.mlp.shared_experts.{name}_proj.weight",
            f"blocks.{{i}}.mlp.shared.{name}.kernel",
            "linear",
        )
        for name in ("gate", "up", "down")
    ),
)


FAMILY = Family(
    class_name="DeepseekForCausalLM",
    model=DeepSeek,
    config=DeepSeekConfig,
    read_config=read_config,
    write_config=write_config,
    tables={
        name: Table(
            rules=(
                *_OWN,
                *(
                    rule
                    for rule in moe_llama.FAMILY.tables[name].rules
                    if ".attn." not in rule.target
                ),
            ),
            aliases=llama.TRANSFORMERS.aliases,
            ignored=llama.TRANSFORMERS.ignored,
            stem="model",
        )
        for name in ("transformers", "fused")
    },
    claims=lambda config: config.get("model_type") in _CLASSES,
    keys={"num_layers": "num_hidden_layers"},
    beyond=lambda config: f"model.layers.{config.num_layers}.",
)
