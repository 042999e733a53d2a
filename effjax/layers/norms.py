"""Normalizations: statistics in float32, result in the input's dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


def _standardize(x: Float[Array, "..."], axes: tuple[int, ...], eps: float) -> Float[Array, "..."]:
    mean = jnp.mean(x, axes, keepdims=True)
    variance = jnp.mean(jnp.square(x - mean), axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps)


def modulate(
    x: Float[Array, "B S C"], shift: Float[Array, "B *S C"], scale: Float[Array, "B *S C"]
) -> Float[Array, "B S C"]:
    """Adaptive norm's affine map x (1 + scale) + shift, one of each for a sample or for a token."""
    wide, shift, scale = (y.astype(jnp.float32) for y in (x, shift, scale))
    if shift.ndim < x.ndim:
        shift, scale = shift[:, None], scale[:, None]
    return (wide * (1 + scale) + shift).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last axis without learned scale and shift (DiT: adaLN brings them)."""

    def __init__(self, *, eps: float = 1e-6):
        self.eps = eps

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return _standardize(x.astype(jnp.float32), (-1,), self.eps).astype(x.dtype)


class AffineLayerNorm(nnx.Module):
    """Layer norm over the last axis with a learned scale and shift."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        y = _standardize(x.astype(jnp.float32), (-1,), self.eps)
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467)."""

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))

    def __call__(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + self.eps)
        return (y * self.scale.get_value().astype(jnp.float32)).astype(x.dtype)


class JoinedHeadsRMSNorm(RMSNorm):
    """`RMSNorm` over the channels of all heads together (OLMoE's queries and keys)."""

    def __call__(self, x: Float[Array, "*B H D"]) -> Float[Array, "*B H D"]:
        return super().__call__(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)


class HeadLayerNorm(nnx.Module):
    """Layer norm of each head over its own channels, with a learned scale and shift for each."""

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        eps: float = 1e-5,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((heads, head_dim), param_dtype))
        self.bias = nnx.Param(jnp.zeros((heads, head_dim), param_dtype))

    def __call__(self, x: Float[Array, "B S H D"]) -> Float[Array, "B S H D"]:
        y = _standardize(x.astype(jnp.float32), (-1,), self.eps)
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)


class UnitNorm(nnx.Module):
    """Heads of length 1: x / |x|; those of queries times exp(min(s, log 100)) sqrt(D).

    s is learned, one for each head. sqrt(D) undoes what attention divides logits by, so that these
    are cosines times exp(s).

    Args:
        heads: of queries; None for keys, which have no factor.
    """

    def __init__(
        self, heads: int | None = None, *, param_dtype: jax.typing.DTypeLike = jnp.float32
    ):
        scale = None if heads is None else jnp.full((heads,), jnp.log(4.0), jnp.dtype(param_dtype))
        self.scale = None if scale is None else nnx.Param(scale)

    def __call__(self, x: Float[Array, "B S H D"]) -> Float[Array, "B S H D"]:
        y = x.astype(jnp.float32)
        y = y / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(y), -1, keepdims=True)), 1e-12)
        if self.scale is not None:
            scale = jnp.minimum(self.scale.get_value().astype(jnp.float32), jnp.log(100.0))
            y = y * (jnp.exp(scale)[:, None] * x.shape[-1] ** 0.5)
        return y.astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group norm with scale and shift over an NHWC image; groups are runs of channels."""

    def __init__(
        self,
        channels: int,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
    ):
        if channels % groups:
            raise ValueError(f"{channels} channels do not divide into {groups} groups")
        self.groups = groups
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x: Float[Array, "B *S C"]) -> Float[Array, "B *S C"]:
        grouped = x.astype(jnp.float32).reshape(
            x.shape[0], -1, self.groups, x.shape[-1] // self.groups
        )
        y = _standardize(grouped, (1, 3), self.eps).reshape(x.shape)
        scale, bias = (p.get_value().astype(jnp.float32) for p in (self.scale, self.bias))
        return (y * scale + bias).astype(x.dtype)
