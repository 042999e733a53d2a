"""Llamas whose feed-forward layers are mixtures of experts (arXiv 2401.04088, 2409.02060).

Blocks, positions and caches are those of `effjax.models.llama`; the feed-forward layers of some or
all layers are `effjax.layers.moe.MoE`. The family differs in switches of the configuration:

    Mixtral      experts alone, weights of the chosen ones sum to 1
    Qwen2-MoE    `qkv_bias`, a shared expert behind a gate, weights as they are
    Qwen3-MoE    `qk_norm`, weights sum to 1
    OLMoE        `qk_norm` and `qk_norm_joined`, weights as they are

Parity target: transformers' `MixtralForCausalLM`, `Qwen2MoeForCausalLM`, `Qwen3MoeForCausalLM` and
`OlmoeForCausalLM`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx

from effjax.fields import Count, Natural
from effjax.layers.folding import Fold
from effjax.layers.mlp import FeedForward
from effjax.layers.moe import MoE, Routing
from effjax.layers.norms import JoinedHeadsRMSNorm
from effjax.models.llama import ATTENTION_FOLDS, Llama, LlamaBlock, LlamaConfig


@dataclasses.dataclass(frozen=True)
class MoELlamaConfig(LlamaConfig):
    """Shape and numerics of a Llama with experts; the defaults are Mixtral 8x7B.

    Attributes, beside those of `LlamaConfig`:
        num_experts: of every mixture.
        num_experts_per_tok: experts that a token takes.
        moe_intermediate_size: channels inside an expert; `intermediate_size` is that of dense
            layers.
        shared_expert_intermediate_size: of an MLP that all tokens share, behind a gate; 0 for none.
        norm_topk_prob: whether the weights of a token's experts sum to 1.
        round_topk_prob: whether they are rounded to `dtype`.
        sparse_layers: whether each layer has experts, () for all.
        qk_norm_joined: norms of queries and keys are over all heads together.
    """

    intermediate_size: Count = 14336
    num_kv_heads: Count = 8
    max_positions: Count = 32768
    rope_theta: float = 1e6
    num_experts: Count = 8
    num_experts_per_tok: Count = 2
    moe_intermediate_size: Count = 14336
    shared_expert_intermediate_size: Natural = 0
    norm_topk_prob: bool = True
    round_topk_prob: bool = False
    sparse_layers: tuple[bool, ...] = ()
    qk_norm_joined: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.routing
        if self.sparse_layers and len(self.sparse_layers) != self.num_layers:
            raise ValueError(
                f"sparse_layers must name all {self.num_layers} layers or none, got "
                f"{len(self.sparse_layers)}"
            )
        if self.qk_norm_joined and not self.qk_norm:
            raise ValueError("qk_norm_joined says how the norms of qk_norm are, which is False")

    @property
    def routing(self) -> Routing:
        """How tokens choose experts."""
        return Routing(
            self.num_experts,
            self.num_experts_per_tok,
            normalize=self.norm_topk_prob,
            floats=not self.round_topk_prob,
        )

    def sparse(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return not self.sparse_layers or self.sparse_layers[layer]


class MoEBlock(LlamaBlock):
    """A block of a Llama, with experts in some layers."""

    def __init__(self, config: MoELlamaConfig, layer: int, *, rngs: nnx.Rngs):
        norms = None
        if config.qk_norm_joined:
            eps, dtype = config.norm_eps, jnp.dtype(config.param_dtype)
            sizes = [heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)]
            q, k = (JoinedHeadsRMSNorm(size, eps=eps, param_dtype=dtype) for size in sizes)
            norms = q, k
        super().__init__(config, layer, norms=norms, rngs=rngs)
        if isinstance(self.mlp, MoE):
            self.folds = _folds(self.mlp)

    def feed_forward(self, config: MoELlamaConfig, layer: int, rngs: nnx.Rngs) -> FeedForward:
        if not config.sparse(layer):
            return super().feed_forward(config, layer, rngs)
        shared = config.shared_expert_intermediate_size
        return MoE(
            config.hidden_size,
            config.moe_intermediate_size,
            routing=config.routing,
            shared_size=shared,
            shared_gate=bool(shared),
            param_dtype=jnp.dtype(config.param_dtype),
            rngs=rngs,
        )


def _folds(mlp: MoE) -> tuple[Fold, ...]:
    readers = ["experts.gate", "experts.up", "router.scores"]
    inner = [Fold(("mlp.experts.down",), "mlp.experts.up", "linear")]
    if mlp.shared is not None:
        readers += ["shared.gate", "shared.up"]
        inner += [Fold(("mlp.shared.down",), "mlp.shared.up", "linear")]
    if mlp.shared_gate is not None:
        readers.append("shared_gate")
    whole = Fold(tuple(f"mlp.{each}" for each in readers), "norm2", "norm")
    return (*ATTENTION_FOLDS, whole, *inner)


class MoELlama(Llama):
    """The network: logits of the next token from token ids, with a few experts for every token."""

    Config: ClassVar[type] = MoELlamaConfig

    def block(self, layer: int, rngs: nnx.Rngs) -> Any:
        return MoEBlock(self.config, layer, rngs=rngs)


MODEL = MoELlama
