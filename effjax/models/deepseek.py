"""DeepSeek-V2 and DeepSeek-V3: latent attention and experts in groups (2405.04434, 2412.19437).

Blocks are those of `effjax.models.moe_llama` with `effjax.layers.latent` for the attention; the
first layers are dense, and a shared MLP stands beside the experts without a gate. They differ in:

    DeepSeek-V2, V2-Lite   softmax scores as they are, times a factor; groups by their best expert
    DeepSeek-V3            sigmoid scores that sum to a factor, chosen with a correction bias;
                           groups by their two best experts

Parity target: transformers' `DeepseekV2ForCausalLM` and `DeepseekV3ForCausalLM`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import jax.numpy as jnp
from flax import nnx

from effjax.fields import Count, Positive
from effjax.layers.folding import Fold
from effjax.layers.latent import LatentAttention
from effjax.layers.mlp import FeedForward
from effjax.layers.moe import MoE, Routing
from effjax.layers.rotary import AdjacentRotary, Rotary
from effjax.models.llama import LlamaBlock
from effjax.models.moe_llama import MoEBlock, MoELlama, MoELlamaConfig


@dataclasses.dataclass(frozen=True)
class DeepSeekConfig(MoELlamaConfig):
    """Shape and numerics of a DeepSeek; the defaults are DeepSeek-V3.

    Attributes, beside those of `MoELlamaConfig`, of which `head_dim` is that of rotated channels:
        q_lora_rank: channels that queries are made of, None for all of a token's (V2-Lite).
        kv_lora_rank: of a token's latent.
        qk_nope_head_dim: channels of a head's queries and keys that are not rotated.
        v_head_dim: of a head's values.
        rope_interleave: rotated channels stand in adjacent pairs.
        scoring_func: of experts.
        n_group, topk_group: groups of experts, and how many of them a token takes experts of.
        routed_scaling_factor: times the weights of experts.
    """

    vocab_size: Count = 129280
    hidden_size: Count = 7168
    intermediate_size: Count = 18432
    num_layers: Count = 61
    num_heads: Count = 128
    num_kv_heads: Count = 128
    head_dim: Count = 64
    max_positions: Count = 4096
    rope_theta: float = 1e4
    norm_eps: Positive = 1e-6
    num_experts: Count = 256
    num_experts_per_tok: Count = 8
    moe_intermediate_size: Count = 2048
    shared_expert_intermediate_size: Count = 2048
    q_lora_rank: Count | None = 1536
    kv_lora_rank: Count = 512
    qk_nope_head_dim: Count = 128
    v_head_dim: Count = 128
    rope_interleave: bool = True
    scoring_func: Literal["softmax", "sigmoid"] = "sigmoid"
    n_group: Count = 8
    topk_group: Count = 4
    routed_scaling_factor: Positive = 2.5

    @property
    def routing(self) -> Routing:
        return Routing(
            self.num_experts,
            self.num_experts_per_tok,
            self.scoring_func,
            normalize=self.norm_topk_prob,
            scale=self.routed_scaling_factor,
            groups=self.n_group,
            top_groups=self.topk_group,
            group_score="top2" if self.scoring_func == "sigmoid" else "max",
        )

    @property
    def attention_scale(self) -> float:
        """Of the scores: one over the root of a head's channels, and YaRN's temperature twice."""
        options: dict[str, Any] = dict(self.rope_scaling)
        scale = (self.qk_nope_head_dim + self.head_dim) ** -0.5
        weight, factor = options.get("mscale_all_dim"), options.get("factor", 1.0)
        if not weight or factor <= 1:
            return scale
        return scale * (0.1 * weight * math.log(factor) + 1.0) ** 2


class DeepSeekBlock(MoEBlock):
    """A block of latent attention and a dense MLP, or experts beside a shared one."""

    def __init__(self, config: DeepSeekConfig, layer: int, *, rngs: nnx.Rngs):
        super().__init__(config, layer, rngs=rngs)
        reads = "attn.to_q" if config.q_lora_rank is None else "attn.q_a"
        own = [Fold((reads, "attn.kv_a"), "norm1", "norm")]
        if config.q_lora_rank is not None:
            own.append(Fold(("attn.q_b",), "attn.q_norm", "norm"))
        mlp = [fold for fold in self.folds if not fold.readers[0].startswith("attn.")]
        self.folds = (*own, *mlp)

    def attention(self, config: DeepSeekConfig, layer: int, *, rngs: nnx.Rngs, **_: Any) -> Any:
        kind = AdjacentRotary if config.rope_interleave else Rotary
        return LatentAttention(
            config.hidden_size,
            rotary=kind(config.head_dim, theta=config.rope_theta, scaling=config.rope_scaling),
            heads=config.num_heads,
            rank=config.kv_lora_rank,
            plain=config.qk_nope_head_dim,
            values=config.v_head_dim,
            q_rank=config.q_lora_rank,
            scale=config.attention_scale,
            bias=config.qkv_bias,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )

    def feed_forward(self, config: DeepSeekConfig, layer: int, rngs: nnx.Rngs) -> FeedForward:
        if not config.sparse(layer):
            return LlamaBlock.feed_forward(self, config, layer, rngs)
        return MoE(
            config.hidden_size,
            config.moe_intermediate_size,
            routing=config.routing,
            shared_size=config.shared_expert_intermediate_size,
            correction=config.scoring_func == "sigmoid",
            wide=True,
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )


class DeepSeek(MoELlama):
    """The network: logits of the next token from token ids."""

    Config: ClassVar[type] = DeepSeekConfig

    def block(self, layer: int, rngs: nnx.Rngs) -> Any:
        return DeepSeekBlock(self.config, layer, rngs=rngs)


MODEL = DeepSeek
