"""The factors of the projections of keys and values, before they are trained.

`magnitudes` measures the inputs of the projections, and `factors` decomposes the projections by
these. `features` are what the first factor makes of tokens: what a cache holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from effjax import capture
from effjax.context import PyTree
from effjax.forward import METHODS, Forward, Params, flatten_params
from effjax.layers.attention import CausalAttention, CausalCore, required_attentions
from effjax.layers.folding import check_unlearned
from effjax.layers.linear import dot
from effjax.layers.rotary import Rotary
from effjax.methods.cache.cskv.plan import NAME, CSKVPlan, Factors
from effjax.quant import QTensor
from effjax.targets import original


def magnitudes(
    forward: Forward, params: Params, batches: Iterable[np.ndarray | Array]
) -> dict[str, Array]:
    """Measure the mean magnitudes of the inputs of the projections of keys and values.

    Args:
        forward, params: the model, without a cache.
        batches: token ids int32[B, S].

    Returns:
        float32[C] by the path of an attention core.
    """
    attentions(forward, params)  # or there are none
    inputs = ((jnp.asarray(tokens),) for tokens in batches)
    found = capture.statistics(forward, params, inputs, kind=CausalCore, what="input3")
    return {path: each.absmean for path, each in found.items()}


def factors(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    magnitudes: Mapping[str, Array] | None = None,
    *,
    alpha: float = 0.5,
) -> Factors:
    """Decompose the projections: what `fit` starts from, and a baseline without training.

    Args:
        plan: how many features there are.
        forward, params: the model.
        magnitudes: mean magnitudes of the inputs, see the function of that name. With None all
            inputs have the same weight (a plain singular value decomposition).
        alpha: exponent of the magnitudes.

    Raises:
        ValueError: for ranks above those of the projections, statistics of another model, or a
            model whose keys are normalized, or whose projections another method has parameters at.
    """
    made: Factors = {}
    learned = flatten_params(params.get(METHODS, {}))
    for path, attn in attentions(forward, params).items():
        layers = [f"{path.removesuffix('core')}{name}" for name in plan.decomposes]
        check_unlearned(
            learned, layers, "which factors of the weights leave out: merge them into the weights"
        )
        if attn.q_norm is not None:
            raise ValueError(
                "this model normalizes keys after their projection (qk_norm), which low-rank "
                "features do not rebuild; use kivi or snap_kv"
            )
        core = original(attn.core)
        if isinstance(core, CausalCore) and type(core.rotary) is not Rotary:
            raise ValueError(
                "cskv rotates rebuilt keys by their places in a text, and the rotary positions of "
                "this model have other axes; use kivi, or a method that chooses tokens"
            )
        if magnitudes is None:
            weights = None
        elif path in magnitudes and magnitudes[path].shape == (attn.to_k.kernel.shape[0],):
            weights = (magnitudes[path] + 1e-6) ** alpha
        else:
            raise ValueError(f"the magnitudes are those of another model: {path} does not fit")
        made[path] = {}
        ranks = plan.ranks(attn.head_dim, attn.kv_heads)
        for name, layer, rank in zip("kv", (attn.to_k, attn.to_v), ranks, strict=True):
            if rank > min(layer.kernel.shape):
                raise ValueError(
                    f"rank {rank} is above that of {path}'s projection {layer.kernel.shape}; take "
                    f"a lower {name}_density"
                )
            bias = None if layer.bias is None else layer.bias.get_value()
            pair = _decompose(layer.kernel.get_value(), bias, weights, rank)
            down, up = (part.astype(forward.config.param_dtype) for part in pair)
            made[path] |= {f"down_{name}": down, f"up_{name}": up}
    return made


@partial(jax.jit, static_argnums=3)
def _decompose(
    kernel: Float[Array, "I O"] | QTensor,
    bias: Float[Array, " O"] | None,
    weights: Float[Array, " I"] | None,
    rank: int,
) -> tuple[Float[Array, "I R"], Float[Array, "R O"]]:
    matrix = kernel.restore() if isinstance(kernel, QTensor) else kernel.astype(jnp.float32)
    scales = jnp.ones(matrix.shape[0]) if weights is None else weights
    left, singular, right = jnp.linalg.svd(scales[:, None] * matrix, full_matrices=False)
    root = jnp.sqrt(singular[:rank])
    down, up = left[:, :rank] * root / scales[:, None], root[:, None] * right[:rank]
    if bias is not None:  # the last feature is 1
        down, up = down.at[:, -1].set(0.0), up.at[-1].set(bias.astype(jnp.float32))
    return down, up


def check_factors(given: Factors, shapes: PyTree) -> None:
    """Raise ValueError for factors of another plan or model."""
    wrong = [
        f"{path}.{name} is {found.get(name)}, must be {list(shape.shape)}"
        for path, own in shapes.items()
        for found in [{n: list(leaf.shape) for n, leaf in given.get(path, {}).items()}]
        for name, shape in own.items()
        if found.get(name) != list(shape.shape)
    ]
    if wrong or set(given) != set(shapes):
        raise ValueError(
            "the factors are those of another plan or model:\n  "
            + "\n  ".join(wrong or [str(sorted(set(given) ^ set(shapes)))])
        )


def attentions(forward: Forward, params: Params) -> dict[str, CausalAttention]:
    """The attention layers, by path of their cores.

    Raises:
        ValueError: for a model without causal attention, or with latents already.
    """
    found = required_attentions(forward.module(params), "causal", needed_by=NAME)
    if not all(isinstance(target.module, CausalAttention) for target in found):
        raise ValueError(
            f"{NAME} makes keys and values of narrow features, and those of a "
            f"{forward.model.__name__} are made of latents as they are"
        )
    return {
        f"{target.path}.core": target.module
        for target in found
        if isinstance(target.module, CausalAttention)
    }


def features(
    x: Float[Array, "B S C"], down: Float[Array, "C R"], *, constant: bool
) -> Float[Array, "B S R"]:
    """What a matrix makes of tokens; with biases (`constant`) the last feature is 1."""
    c = dot(x, down)
    return c.at[..., -1].set(1) if constant else c


def grouped(
    c: Float[Array, "B S R"], plan: CSKVPlan, heads: int, *, keys: bool
) -> tuple[Float[Array, "B N W G"], int]:
    """Features with those that share a scale along the axis that is returned.

    Keys: the tokens of a window; alone in it, a token is quantized as values are: a head's
        features.
    """
    batch, tokens, rank = c.shape
    if keys and plan.window > 1:
        return c.reshape(batch, tokens // plan.window, plan.window, rank), 2
    return c.reshape(batch, tokens, heads, rank // heads), 3
