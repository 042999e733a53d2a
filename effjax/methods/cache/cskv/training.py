"""Training of the factors, layer by layer, without touching the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax import capture
from effjax.caches.quantization import FLOAT, to_qvalues
from effjax.forward import Forward, Params
from effjax.layers.attention import CausalCore
from effjax.layers.linear import dot
from effjax.methods.cache.cskv.decomposition import attentions, features, grouped
from effjax.methods.cache.cskv.plan import CSKVPlan, Factors


def fit(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    start: Factors,
    batches: Callable[[int], Iterator[Any]],
    *,
    steps: int,
    learning_rate: float = 5e-5,
    checkpoints: Path | None = None,
    progress: bool = True,
) -> tuple[Factors, dict[str, Any]]:
    """Train factors to rebuild keys and values, each layer from its own exact inputs.

    The loss is the sum over layers of the mean squared errors of keys and of values. Keys are
    compared before their rotation, which changes no length.

    Args:
        forward, params: the model, without a cache; it stays as it is.
        start: of `factors`.
        batches: token ids int32[B, S] of all steps from the one with this number on; S is a
            multiple of the window if the plan has bits.
        steps, learning_rate: of AdamW, falling linearly to 0.
        checkpoints: folder of orbax checkpoints; a second run with the same plan and model resumes.
            None keeps none.
        progress: show a bar.

    Returns:
        The trained factors, and the log of `effjax.training.train`.

    Raises:
        ValueError: for sequences that are no whole windows, and for checkpoints of another plan or
            model.
    """
    import optax  # not wanted by those who only decode

    from effjax.training import digest, same_run, train

    if checkpoints is not None:
        same_run(Path(checkpoints), {"model": digest(params), "plan": plan.to_json()})

    def loss(trained: Factors, batch: Array, key: Array, params: Params) -> Array:
        return reconstruction_loss(plan, forward, params, trained, batch)

    schedule = optax.linear_schedule(learning_rate, 0.0, steps)
    trained = train(
        loss,
        start,
        batches,
        steps=steps,
        key=jax.random.key(0),
        transform=optax.adamw(schedule),
        constants=(params,),
        checkpoints=None if checkpoints is None else Path(checkpoints) / "training",
        progress=progress,
    )
    return trained.params, trained.log


def reconstruction_loss(
    plan: CSKVPlan,
    forward: Forward,
    params: Params,
    trained: Factors,
    tokens: Int[Array, "B S"],
) -> Float[Array, ""]:
    """Sum over layers of the mean squared errors of rebuilt keys and values.

    Raises:
        ValueError: for sequences that are no whole windows, if the plan has bits.
    """
    if plan.bits != FLOAT and tokens.shape[1] % plan.window:
        raise ValueError(
            f"sequences of {tokens.shape[1]} tokens are no whole windows of {plan.window}; cut them"
        )
    inputs = capture.tap(forward, params, (tokens,), kind=CausalCore, what="input3")
    total = jnp.float32(0.0)
    for path, attn in attentions(forward, params).items():
        x = inputs[path]
        for name, layer in {"k": attn.to_k, "v": attn.to_v}.items():
            c = features(x, trained[path][f"down_{name}"], constant=forward.config.qkv_bias)
            if plan.bits != FLOAT:
                c = rounded(c, plan, attn.kv_heads, keys=name == "k")
            rebuilt = dot(c, trained[path][f"up_{name}"])
            total += jnp.mean(jnp.square((layer(x) - rebuilt).astype(jnp.float32)))
    return total


def rounded(
    c: Float[Array, "B S R"], plan: CSKVPlan, heads: int, *, keys: bool
) -> Float[Array, "B S R"]:
    """Rounded features, with gradients straight through but at the ends of each group's range."""
    groups, axis = grouped(c, plan, heads, keys=keys)
    qvalues, scale, offset = to_qvalues(groups, plan.bits, axis=axis)
    nearest = (qvalues.astype(jnp.float32) * scale + offset).astype(c.dtype)
    ends = (f(groups, axis, keepdims=True) for f in (jnp.min, jnp.max))
    inside = jnp.logical_not(jnp.logical_or(*(groups == end for end in ends)))
    passed = jnp.where(inside, groups, jax.lax.stop_gradient(groups))
    return (passed + jax.lax.stop_gradient(nearest - groups)).reshape(c.shape)
