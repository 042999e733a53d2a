"""Caches of low-rank features."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effjax.caches import AttentionInputs, Caches, Kind, Lengths, ResidualBufferCache
from effjax.caches.install import Place
from effjax.caches.quantization import FLOAT, pack, to_qvalues, unpack
from effjax.caches.residual_buffer import Arrays, Tokens
from effjax.context import CacheLength, Context
from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.attention import CausalCore, Heads, Outputs
from effjax.methods.cache.cskv.decomposition import check_factors, factors, features, grouped
from effjax.methods.cache.cskv.plan import NAME, CSKVPlan, Factors
from effjax.targets import target_modules
from effjax.transform import Pair, Transform
from pallas_kernels.decode_attention import low_rank_decode_attention


def transform(plan: CSKVPlan, learned: Factors | None = None) -> Transform:
    """Give every attention layer a cache of low-rank features.

    Args:
        learned: of `factors` or `fit`; None decomposes the projections as they are, without
            statistics: a baseline.

    Raises:
        ValueError: as `factors`, and for factors of another plan or model.
    """

    def apply(forward: Forward, params: Params) -> Pair:
        shapes = jax.eval_shape(lambda params: factors(plan, forward, params), params)
        given = factors(plan, forward, params) if learned is None else learned
        check_factors(given, shapes)
        methods = {**params.get(METHODS, {}), NAME: nest_params(given)}
        return forward.patch(_Patch(plan, forward.config.qkv_bias)), {**params, METHODS: methods}

    return Transform(NAME, plan, apply)


@dataclasses.dataclass(frozen=True)
class _Patch:
    """Caches, each with the factors of its layer."""

    plan: CSKVPlan
    constant: bool
    caches: ClassVar[bool] = True

    def __call__(self, module: nnx.Module, context: Context) -> None:
        learned = flatten_params(context.learned[NAME])
        paths = [target.path for target in target_modules(module, CausalCore)]

        def choose(plan: CSKVPlan, place: Place) -> Kind:
            names = ("down_k", "up_k", "down_v", "up_v")
            factors = {name: learned[f"{paths[place.layer]}.{name}"] for name in names}
            return CSKVCache, {"plan": plan, "factors": factors, "constant": self.constant}

        Caches(choose, self.plan)(module, context)


class CSKVCache(ResidualBufferCache):
    """Sealed windows as features of keys and values.

    Args:
        plan: bits and window.
        factors: of the layer.
        constant: whether the last feature is 1.
    """

    takes_latents = False

    def __init__(
        self,
        inner: Any,
        *,
        plan: CSKVPlan,
        factors: Mapping[str, Array],
        constant: bool,
        first: bool,
        cache_length: CacheLength,
    ):
        names = ["k_features", "v_features"]
        if plan.bits != FLOAT:
            names += [f"{of}_{part}" for of in "kv" for part in ("scale", "offset")]
        super().__init__(
            inner,
            window=plan.window,
            sealed=names,
            parts=("k_features", "v_features"),
            first=first,
            cache_length=cache_length,
        )
        self.plan = plan
        self.constant = constant
        self.factors = nnx.Dict({name: nnx.Variable(leaf) for name, leaf in factors.items()})

    def factor(self, name: str, dtype: jax.typing.DTypeLike) -> Array:
        """One of the layer's four matrices."""
        return self.factors[name].get_value().astype(dtype)

    def more(self, inputs: AttentionInputs) -> Arrays:
        if inputs.angles.ndim == 3:
            raise ValueError(
                "cskv rotates rebuilt keys to their places in the sequence; positions of several "
                "rows say others. Use kivi, or a method that chooses tokens."
            )
        x = inputs.x
        downs = {name: self.factor(f"down_{name}", x.dtype) for name in "kv"}
        return {
            f"{name}_features": features(x, down, constant=self.constant)
            for name, down in downs.items()
        }

    def seal(self, tokens: Tokens) -> Arrays:
        found = {name: tokens[name] for name in ("k_features", "v_features")}
        if self.plan.bits == FLOAT:
            return found
        heads = tokens["k"].shape[2]
        for name in "kv":
            c = found[f"{name}_features"]
            groups, axis = grouped(c, self.plan, heads, keys=name == "k")
            qvalues, scale, offset = to_qvalues(groups, self.plan.bits, axis=axis)
            found[f"{name}_features"] = pack(qvalues.reshape(c.shape), self.plan.bits)
            found[f"{name}_scale"], found[f"{name}_offset"] = (
                jnp.squeeze(part, axis) for part in (scale, offset)
            )
        return found

    def attend_sealed(
        self, q: Heads, sealed: Arrays, lengths: Lengths
    ) -> tuple[Outputs, Float[Array, "B S H"]]:
        k, v = (self._restored(sealed, name, q.dtype) for name in "kv")
        up_k, up_v = (self.factor(f"up_{name}", q.dtype) for name in "kv")
        rotary = self.core.rotary
        out, log_sum_exps = low_rank_decode_attention(
            q,
            k,
            up_k * jnp.asarray(rotary.factor, q.dtype),
            v,
            lengths,
            frequencies=jnp.asarray(rotary.frequencies, jnp.float32),
            return_lse=True,
        )
        batch, queries, heads, width = q.shape
        up_v = up_v.reshape(up_v.shape[0], -1, width)
        grouped = out.reshape(batch, queries, up_v.shape[1], -1, up_v.shape[0])
        values = jnp.einsum(
            "bskgr,rkd->bskgd", grouped, up_v, preferred_element_type=jnp.float32
        ).astype(up_v.dtype)
        return values.reshape(batch, queries, heads, -1), log_sum_exps

    def _restored(
        self, sealed: Arrays, name: str, dtype: jax.typing.DTypeLike
    ) -> Float[Array, "B T R"]:
        c = sealed[f"{name}_features"]
        if self.plan.bits == FLOAT:
            return c
        qvalues = unpack(c, self.plan.bits).astype(jnp.float32)
        scale, offset = (sealed[f"{name}_{part}"] for part in ("scale", "offset"))
        groups, axis = grouped(qvalues, self.plan, scale.shape[2], keys=name == "k")
        scale, offset = (jnp.expand_dims(part, axis) for part in (scale, offset))
        return (groups * scale + offset).reshape(qvalues.shape).astype(dtype)
