"""Mixtures of experts: a router chooses a few of many feed-forward layers for every token.

    s = scores(x W_router)            the k best experts e of a token, with weights w_e
    y = sum_e w_e down_e(f(gate_e(x)) * up_e(x))  [+ shared(x)]

Experts are stacks of matrices [E, in, out]. Tokens are sorted by expert, and each expert multiplies
its own rows (`pallas_kernels.grouped_matmul`): k experts' FLOPs a token, none dropped.

Sources: Mixtral (arXiv 2401.04088), DeepSeekMoE (2401.06066), DeepSeek-V2 and V3 (2405.04434,
2412.19437).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.fields import Checked, Count, Positive
from effjax.layers.linear import Linear, dot_grouped
from effjax.layers.mlp import ACTIVATIONS, FeedForward, GatedMLP
from effjax.targets import Wrapper

NOT_ALLOWED = -jnp.inf


@dataclasses.dataclass(frozen=True)
class Routing(Checked):
    """How tokens choose experts; static.

    Attributes:
        experts: how many there are.
        top_k: how many a token takes.
        scores: of all experts, from the router's outputs in float32.
        normalize: divide the weights by their sum.
        scale: times the weights, at last.
        groups: consecutive experts stand in so many groups of equal size.
        top_groups: a token takes experts of so many groups only.
        group_score: of a group, the best score in it, or the sum of the two best.
        floats: weights stay float32; else they are rounded to the dtype of the tokens.

    Raises:
        ValueError: for more experts of a token than there are in its groups, and for groups of
            different sizes.
    """

    experts: Count
    top_k: Count
    scores: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = True
    scale: Positive = 1.0
    groups: Count = 1
    top_groups: Count = 1
    group_score: Literal["max", "top2"] = "max"
    floats: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts % self.groups or self.top_groups > self.groups:
            raise ValueError(
                f"{self.experts} experts cannot stand in {self.groups} equal groups of which a "
                f"token takes {self.top_groups}"
            )
        if self.top_k > (most := self.experts // self.groups * self.top_groups):
            raise ValueError(
                f"a token takes {self.top_k} experts, and there are {most} in the "
                f"{self.top_groups} groups that it may take"
            )
        if self.group_score == "top2" and self.experts // self.groups < 2:
            raise ValueError("groups of one expert have no two best scores")

    def choose(self, logits: Float[Array, "T E"], bias: Float[Array, " E"] | None = None) -> Routed:
        """The experts of every token, best first; of equal scores the first one.

        Args:
            logits: the router's outputs.
            bias: added to the scores for the choice alone (DeepSeek-V3's correction).
        """
        logits = logits.astype(jnp.float32)
        scores = jax.nn.softmax(logits) if self.scores == "softmax" else jax.nn.sigmoid(logits)
        choice = scores if bias is None else scores + bias.astype(jnp.float32)
        if self.groups > 1:
            choice = jnp.where(self._allowed(choice), choice, NOT_ALLOWED)
        experts = jax.lax.top_k(choice, self.top_k)[1]
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.normalize:
            # What is added is below float32's resolution of any sum of softmax scores.
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + 1e-20
        return Routed(weights * self.scale, experts)

    def _allowed(self, choice: Float[Array, "T E"]) -> Array:
        """Whether an expert stands in one of the groups of a token, bool[T, E]."""
        groups = choice.reshape(-1, self.groups, self.experts // self.groups)
        best = jax.lax.top_k(groups, 2 if self.group_score == "top2" else 1)[0].sum(axis=-1)
        taken = jax.lax.top_k(best, self.top_groups)[1]
        allowed = jnp.any(taken[..., None] == jnp.arange(self.groups), axis=1)
        return jnp.repeat(allowed, self.experts // self.groups, axis=1)


class Routed(NamedTuple):
    """What tokens chose.

    Attributes:
        weights: float32[T, k].
        experts: int32[T, k].
    """

    weights: Array
    experts: Array


class Router(nnx.Module):
    """Scores experts, and chooses some for every token.

    Args:
        routing: how.
        correction: whether the choice has a bias of its own, float32[E].
        wide: compute in float32, whatever the tokens' dtype.
    """

    def __init__(
        self,
        hidden_size: int,
        routing: Routing,
        *,
        correction: bool = False,
        wide: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.routing, self.wide = routing, wide
        dtype = jnp.float32 if wide else param_dtype
        options: dict[str, Any] = {"bias": False, "param_dtype": dtype, "rngs": rngs}
        self.scores = Linear(hidden_size, routing.experts, role="router", **options)
        self.correction = nnx.Param(jnp.zeros(routing.experts, jnp.float32)) if correction else None

    def __call__(self, x: Float[Array, "T C"]) -> Routed:
        logits = self.scores(x.astype(jnp.float32) if self.wide else x)
        bias = None if self.correction is None else self.correction.get_value()
        routed = self.routing.choose(logits, bias)
        if self.routing.floats:
            return routed
        return Routed(routed.weights.astype(x.dtype).astype(jnp.float32), routed.experts)


class Experts(nnx.Module):
    """Gated MLPs in stacks: f(x W_gate) * (x W_up), then W_down, each [E, in, out].

    Args:
        experts: how many there are.
        activation: f, a key of `ACTIVATIONS`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        experts: int,
        activation: str = "silu",
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        options: dict[str, Any] = {"bias": False, "param_dtype": param_dtype, "rngs": rngs}
        self.activation = activation
        self.gate = Linear(hidden_size, intermediate_size, role="up", stack=experts, **options)
        self.up = Linear(hidden_size, intermediate_size, role="up", stack=experts, **options)
        self.down = Linear(intermediate_size, hidden_size, role="down", stack=experts, **options)

    @property
    def watched(self) -> bool:
        """Whether a method looks at single layers, which then get every expert's tokens apart."""
        return any(isinstance(layer, Wrapper) for layer in (self.gate, self.up, self.down))

    def inner(self, gate: Array, up: Array) -> Array:
        """f(gate) * up in float32, rounded once."""
        wide = ACTIVATIONS[self.activation](gate.astype(jnp.float32)) * up.astype(jnp.float32)
        return wide.astype(gate.dtype)

    def sorted_rows(self, x: Float[Array, "M C"], sizes: Int[Array, " E"]) -> Float[Array, "M C"]:
        """Apply each expert to its rows, which stand in the order of the experts."""
        gate, up = (dot_grouped(x, each.kernel.get_value(), sizes) for each in (self.gate, self.up))
        return dot_grouped(self.inner(gate, up), self.down.kernel.get_value(), sizes)

    def every(self, x: Float[Array, "E *B C"]) -> Float[Array, "E *B C"]:
        """Apply each expert to tokens of its own."""
        return self.down(self.inner(self.gate(x), self.up(x)))


class MoE(FeedForward):
    """A router with its experts, and perhaps an MLP that all tokens share.

    Args:
        intermediate_size: of an expert.
        routing: how tokens choose.
        shared_size: inner channels of the shared MLP, 0 for none.
        shared_gate: whether the shared MLP's output is times sigmoid(x w).
        router: further options of `Router`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        *,
        routing: Routing,
        activation: str = "silu",
        shared_size: int = 0,
        shared_gate: bool = False,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **router: Any,
    ):
        options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
        self.router = Router(hidden_size, routing, **router, **options)
        own = {"activation": activation, **options}
        self.experts = Experts(hidden_size, intermediate_size, experts=routing.experts, **own)
        self.shared = GatedMLP(hidden_size, shared_size, **own) if shared_size else None
        gate = {"role": "router", "bias": False, **options}
        self.shared_gate = Linear(hidden_size, 1, **gate) if shared_gate else None

    def whole(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        routed = self.router(x.reshape(-1, x.shape[-1]))
        y = self._apart(x, routed) if self.experts.watched else self._sorted(x, routed)
        if self.shared is None:
            return y
        shared = self.shared(x)
        if self.shared_gate is not None:
            gate = jax.nn.sigmoid(self.shared_gate(x).astype(jnp.float32))
            shared = (gate * shared.astype(jnp.float32)).astype(x.dtype)
        return y + shared

    def _sorted(self, x: Float[Array, "*B C"], routed: Routed) -> Float[Array, "*B C"]:
        """Every expert multiplies the rows of its tokens."""
        tokens, (weights, experts) = x.reshape(-1, x.shape[-1]), routed
        top_k = experts.shape[1]
        flat = experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=self.router.routing.experts)
        made = self.experts.sorted_rows(tokens[order // top_k], sizes)
        # Back in the order of the tokens: no sum depends on what other tokens chose.
        made = made[jnp.argsort(order)].reshape(*experts.shape, -1).astype(jnp.float32)
        return jnp.einsum("tkc,tk->tc", made, weights).astype(x.dtype).reshape(x.shape)

    def _apart(self, x: Float[Array, "*B C"], routed: Routed) -> Float[Array, "*B C"]:
        """Every expert gets its own tokens, and zeros in the place of the others: the same sum."""
        chosen = routed.experts[..., None] == jnp.arange(self.router.routing.experts)
        share = jnp.sum(jnp.where(chosen, routed.weights[..., None], 0), axis=1).T
        own = jnp.any(chosen, axis=1).T.reshape(-1, *x.shape[:-1], 1)
        made = self.experts.every(jnp.where(own, x, 0)).astype(jnp.float32)
        return jnp.sum(made * share.reshape(own.shape), axis=0).astype(x.dtype)
