"""Attention in parts that patches can replace alone: projections, core, merge."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.context import PyTree
from effjax.layers.linear import Linear
from effjax.layers.norms import RMSNorm, UnitNorm
from effjax.layers.rotary import Rotary
from effjax.targets import AttentionKind, Role, TargetModule, original, target_modules
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Causal, Rule, SinkLocal
from pallas_kernels.block_sparse_attention import block_sparse_attention

Heads = Float[Array, "B S H D"]
KeyHeads = Float[Array, "B T K D"]  # those of another sequence have another length
# What a core takes and gives: latents have queries, keys and values of three widths.
CoreHeads = Float[Array, "B S H _"]
CoreKeys = Float[Array, "B T K _"]
AnyKeys = Float[Array, "B T _ _"]
Values = Float[Array, "B T K W"]
Outputs = Float[Array, "B S H W"]
Positions = Int[Array, "B S"] | Int[Array, "B R S"]  # one row, or several, see `places`
Turns = Int[Array, "#B S"] | Int[Array, "#B R S"]  # positions that heads are rotated to


def places(
    positions: Positions,
) -> tuple[Int[Array, "B S"], Int[Array, "B S"] | Int[Array, "B N S"]]:
    """Places of tokens in their sequences, and the positions that they are rotated to.

    Of positions with several rows the first one says the places (-1 is padding), and the others say
    the rotation, one for each section of `Rotary`.
    """
    if positions.ndim == 2:
        return positions, positions
    return positions[:, 0], positions[:, 1:]


class AttentionCore(nnx.Module):
    """softmax(q k^T / sqrt(D)) v over all keys, logits and softmax in float32."""

    def __call__(self, q: Heads, k: Heads, v: Heads) -> Heads:
        # The scope lets effjax.cost tell attention from the other products.
        with jax.named_scope("attention"):
            return dense_attention(q, k, v)


class BiasedAttentionCore(nnx.Module):
    """softmax(scale q k^T + bias) v for short sequences, logits and softmax in float32.

    Args:
        scale: of the logits, 1 / sqrt(D) if None.
    """

    def __init__(self, *, scale: float | None = None):
        self.scale = scale

    def __call__(
        self,
        q: Heads,
        k: Float[Array, "B T H D"],
        v: Float[Array, "B T H D"],
        bias: Float[Array, "#B #H #S T"],
    ) -> Heads:
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale
        scaled = q * jnp.asarray(scale, q.dtype)
        logits = jnp.einsum("bshd,bthd->bhst", scaled, k, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits + bias, axis=-1).astype(v.dtype)
        out = jnp.einsum("bhst,bthd->bshd", weights, v, preferred_element_type=jnp.float32)
        return out.astype(v.dtype)


class Projections(nnx.Module):
    """The four projections of a multi-head attention: tokens to queries, keys, values and back.

    Args:
        kv_heads: heads of keys and values, `heads` if None; query head h reads head
            h // (heads / kv_heads) of them.
        bias, out_bias: of the first three projections, and of the last; None is as `bias`.
        k_bias: of the projection of keys, likewise.
        cross: whether keys and values come from another sequence, which the layers' roles say.
        norm_eps: of the RMS norms of queries' and keys' heads; None for no such norms.
        unit_norm: whether queries' and keys' heads have unit length instead, see `UnitNorm`.
        norms: of queries' and of keys' heads, in place of these.
        output: False for tokens that are attended to and get no output.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        heads: int,
        head_dim: int,
        kv_heads: int | None = None,
        bias: bool = True,
        out_bias: bool | None = None,
        k_bias: bool | None = None,
        cross: bool = False,
        norm_eps: float | None = None,
        unit_norm: bool = False,
        norms: tuple[nnx.Module, nnx.Module] | None = None,
        output: bool = True,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.kv_heads = kv_heads or heads
        self.head_dim = head_dim

        def linear(inputs: int, outputs: int, role: Role, bias: bool = bias) -> Linear:
            options: dict[str, Any] = {"param_dtype": param_dtype, "rngs": rngs}
            return Linear(inputs, outputs, role=role, bias=bias, **options)

        qkv: Role = "cross_qkv" if cross else "qkv"
        self.to_q = linear(hidden_size, heads * head_dim, qkv)
        k_bias = bias if k_bias is None else k_bias
        self.to_k = linear(hidden_size, self.kv_heads * head_dim, qkv, k_bias)
        self.to_v = linear(hidden_size, self.kv_heads * head_dim, qkv)
        out: Role = "cross_out" if cross else "out"
        bias = bias if out_bias is None else out_bias
        self.to_out = linear(heads * head_dim, hidden_size, out, bias) if output else None
        of_heads: Sequence[Any] = (None, None)
        if norms is not None:
            of_heads = norms
        elif unit_norm:
            of_heads = UnitNorm(heads, param_dtype=param_dtype), UnitNorm()
        elif norm_eps is not None:
            of_heads = [RMSNorm(head_dim, eps=norm_eps, param_dtype=param_dtype) for _ in range(2)]
        self.q_norm, self.k_norm = of_heads

    def split(self, x: Float[Array, "B S I"]) -> Float[Array, "B S K D"]:
        """Part the heads."""
        return x.reshape(*x.shape[:2], -1, self.head_dim)

    def heads_of(
        self, x: Float[Array, "B S C"], other: Float[Array, "B T C"] | None = None
    ) -> tuple[Heads, Float[Array, "B N K D"], Float[Array, "B N K D"]]:
        """Queries of tokens, keys and values of the same tokens or of others."""
        source = x if other is None else other
        return *self.compared(x, source), self.split(self.to_v(source))

    def compared(
        self, x: Float[Array, "B S C"], source: Float[Array, "B T C"]
    ) -> tuple[Heads, Float[Array, "B N K D"]]:
        """Queries of tokens and keys of a source, without values."""
        q, k = self.split(self.to_q(x)), self.split(self.to_k(source))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k

    def join(self, o: Heads) -> Float[Array, "B S C"]:
        """Join the heads and project out."""
        assert self.to_out is not None
        return self.to_out(o.reshape(*o.shape[:2], -1))


class Attention(abc.ABC):
    """What every attention is made of: four parts that patches may use or replace alone.

    y = merge(core(*rotate(q, k), v), x)   with   q, k, v = project(x, ...)

    A wrapper that replaces internals uses these; one around `core` sees heads.

    Attributes:
        kind: what it attends to.
        core: attends; its inputs are queries, keys and values by head, and what the kind adds.
    """

    kind: ClassVar[AttentionKind]
    core: nnx.Module

    @abc.abstractmethod
    def project(self, x: PyTree, *others: PyTree) -> tuple[Heads, KeyHeads, KeyHeads]:
        """Queries, keys and values by head, before any rotation."""

    def rotate(self, q: Heads, k: KeyHeads, *positions: Array) -> tuple[Heads, KeyHeads]:
        """Apply the positions; nothing where tokens carry them."""
        return q, k

    @abc.abstractmethod
    def merge(self, o: Heads, like: PyTree) -> PyTree:
        """Join the heads and project them to what `project` was given first."""


def attentions(module: nnx.Module, *kinds: AttentionKind) -> tuple[TargetModule, ...]:
    """The attention modules of these kinds, in the order of the model."""
    return tuple(
        target
        for target in target_modules(module)
        if isinstance(target.module, Attention) and target.module.kind in kinds
    )


def required_attentions(
    module: nnx.Module, *kinds: AttentionKind, needed_by: str
) -> tuple[TargetModule, ...]:
    """The same, of a model that must have some.

    Raises:
        ValueError: for a model without them, with the name of what needs them.
    """
    found = attentions(module, *kinds)
    if not found:
        own = [
            target.module.kind
            for target in target_modules(module)
            if isinstance(target.module, Attention)
        ]
        raise ValueError(
            f"{needed_by} is for models with {' or '.join(kinds)} attention; that of "
            f"{type(original(module)).__name__} is {', '.join(dict.fromkeys(own)) or 'none'}. "
            f"`effjax methods` lists methods for other models."
        )
    return found


class OneStream(Projections, Attention):
    """Attention of one stream of tokens [B, S, C]."""

    def project(
        self, x: Float[Array, "B S C"], *others: PyTree
    ) -> tuple[Heads, KeyHeads, KeyHeads]:
        return self.heads_of(x)

    def merge(self, o: Heads, like: PyTree = None) -> Float[Array, "B S C"]:
        return self.join(o)


class SelfAttention(OneStream):
    """Multi-head self-attention on tokens [B, S, C]."""

    kind = "self"

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, **options)
        self.core = AttentionCore()

    def __call__(self, x: Float[Array, "B S C"], *positions: Array) -> Float[Array, "B S C"]:
        q, k, v = self.project(x)
        return self.merge(self.core(*self.rotate(q, k, *positions), v))


class BiasedAttention(OneStream):
    """Self-attention with biases on its logits, as text encoders have it.

    Args:
        scale: of the logits, 1 / sqrt(D) if None.
    """

    kind = "self"

    def __init__(self, hidden_size: int, *, scale: float | None = None, **options: Any):
        super().__init__(hidden_size, **options)
        self.core = BiasedAttentionCore(scale=scale)

    def __call__(
        self, x: Float[Array, "B S C"], bias: Float[Array, "#B #H S S"]
    ) -> Float[Array, "B S C"]:
        q, k, v = self.project(x)
        with jax.named_scope("attention"):
            return self.merge(self.core(q, k, v, bias))


class CrossAttention(OneStream):
    """Multi-head attention of tokens [B, S, C] to a text [B, T, C] with a mask [B, T].

    Padding takes part with -10000 added to its logits, as in diffusers: a text without any token
    is attended to evenly.
    """

    kind = "cross"

    def __init__(self, hidden_size: int, **options: Any):
        super().__init__(hidden_size, cross=True, **options)
        self.core = BiasedAttentionCore()

    def project(
        self, x: Float[Array, "B S C"], *others: Float[Array, "B T C"]
    ) -> tuple[Heads, Float[Array, "B N K D"], Float[Array, "B N K D"]]:
        return self.heads_of(x, others[0])

    def __call__(
        self,
        x: Float[Array, "B S C"],
        text: Float[Array, "B T C"],
        mask: Bool[Array, "B T"],
    ) -> Float[Array, "B S C"]:
        q, k, v = self.project(x, text)
        bias = jnp.where(mask, 0.0, -10_000.0)[:, None, None]
        # Not "attention": cost reports of self-attention leave it out.
        with jax.named_scope("cross_attention"):
            return self.merge(self.core(q, k, v, bias))


class JointAttention(nnx.Module, Attention):
    """Attention of several streams to the tokens of all of them (MM-DiT, arXiv 2403.03206).

    Each stream has projections of its own, under its name. Tokens stand in the order of `streams`.

    Args:
        streams: names; `x` is a dictionary of tokens [B, S_name, C].
        silent: those that are attended to and get no output.
        options: of `Projections`.
    """

    kind = "joint"

    def __init__(
        self,
        hidden_size: int,
        *,
        streams: tuple[str, ...] = ("image", "text"),
        silent: tuple[str, ...] = (),
        **options: Any,
    ):
        self.streams = streams
        self.outputs = tuple(name for name in streams if name not in silent)
        for name in streams:
            setattr(self, name, Projections(hidden_size, output=name not in silent, **options))
        self.core = AttentionCore()

    def project(
        self, x: Mapping[str, Float[Array, "B _ C"]], *others: PyTree
    ) -> tuple[Heads, KeyHeads, KeyHeads]:
        heads = [getattr(self, name).heads_of(x[name]) for name in self.streams]
        q, k, v = (jnp.concatenate(parts, axis=1) for parts in zip(*heads, strict=True))
        return q, k, v

    def merge(
        self, o: Heads, like: Mapping[str, Float[Array, "_ _ C"]]
    ) -> dict[str, Float[Array, "_ _ C"]]:
        ends = list(itertools.accumulate(like[name].shape[1] for name in self.streams))
        parts = jnp.split(o, ends[:-1], axis=1)
        return {
            name: getattr(self, name).join(part)
            for name, part in zip(self.streams, parts, strict=True)
            if name in self.outputs
        }

    def __call__(
        self, x: Mapping[str, Float[Array, "B _ C"]], *positions: Array
    ) -> dict[str, Array]:
        """Attend; `positions` are what `rotate` takes, nothing where tokens carry them."""
        q, k, v = self.project(x)
        return self.merge(self.core(*self.rotate(q, k, *positions), v), x)


class CausalCore(nnx.Module):
    """Rotary attention of every token to itself and the tokens before it.

    The place of a KV cache: a cache wraps it, gets all that it gets, and remembers keys and values
    between calls. Keys come in before their rotation, and with the tokens they are made of, because
    some caches keep those.

    Args:
        rotary: turns queries and keys.
        window: how many of the last tokens a query sees, its own included; None for all.

    Attributes:
        together: whether the tokens of a call that follows others see each other, all of them.
        leading: values are so many first channels of the keys, latents of all heads; None if
            heads have keys and values of their own.
    """

    together: ClassVar[bool] = False
    leading: int | None = None

    def __init__(self, rotary: Rotary, *, window: int | None = None):
        self.rotary = rotary
        self.window = window

    @property
    def rule(self) -> Rule:
        """What a query sees, as kernels read it."""
        return Causal() if self.window is None else SinkLocal(sinks=0, local=self.window)

    def __call__(
        self,
        q: CoreHeads,
        k: CoreKeys,
        v: CoreKeys,
        x: Float[Array, "B S C"],
        positions: Positions | None,
    ) -> CoreHeads:
        """Attend within the call.

        Args:
            q, k, v: heads before their rotation.
            x: the tokens they were projected from; not used here.
            positions: of the tokens, rising along a row; -1 is padding, which nobody attends to and
                whose output means nothing. None for 0, 1, 2, ... in every row, without padding.
                With several rows [B, R, S] see `places`.
        """
        segments = None
        if positions is None:
            turns = jnp.arange(q.shape[1])[None]
        else:
            place, turns = places(positions)
            valid = (place >= 0).astype(jnp.int32)
            segments = valid, valid
        with jax.named_scope("attention"):
            q, k, v = self.within(q, k, v, turns)
            return block_sparse_attention(q, k, v, self.rule, segments=segments)

    def within(
        self, q: CoreHeads, k: CoreKeys, v: CoreKeys, angles: Turns
    ) -> tuple[CoreHeads, AnyKeys, AnyKeys]:
        """What attends within a call: heads rotated to angles."""
        return self.queries(q, angles), self.keys(k, angles), v

    # What a cache attends with: it holds `keys` and values, asks them with `queries`, and gives
    # what it finds to `finish`.

    def queries(self, q: CoreHeads, angles: Turns) -> CoreHeads:
        """Queries rotated to angles."""
        return self.rotary(q, angles)

    def keys(self, k: CoreKeys, angles: Turns) -> CoreKeys:
        """Keys rotated to angles."""
        return self.rotary(k, angles)

    def finish(self, o: CoreHeads) -> CoreHeads:
        """The output of the heads."""
        return o


class CausalAttention(OneStream):
    """Self-attention of a decoder: rotary positions, grouped keys, optionally normalized heads.

    Keys are rotated in the core, because some caches keep them as they were before.

    Args:
        rotary, window: see `CausalCore`.
        options: of `Projections`; `norm_eps` gives the norms of Qwen3.
    """

    kind = "causal"

    def __init__(
        self, hidden_size: int, *, rotary: Rotary, window: int | None = None, **options: Any
    ):
        super().__init__(hidden_size, **options)
        self.core = CausalCore(rotary, window=window)

    def rotate(self, q: Heads, k: KeyHeads, *positions: Array) -> tuple[Heads, KeyHeads]:
        core = original(self.core)
        assert isinstance(core, CausalCore)
        _, angles = places(positions[0])
        return core.queries(q, angles), core.keys(k, angles)

    def __call__(
        self, x: Float[Array, "B S C"], positions: Positions | None
    ) -> Float[Array, "B S C"]:
        return self.merge(self.core(*self.project(x), x, positions))
