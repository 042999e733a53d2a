"""Reorder the heads of a model for the layout "grouped": no gathers, and even shares of devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from effjax.forward import METHODS, Forward, Params, flatten_params, nest_params
from effjax.layers.attention import CausalAttention
from effjax.layers.folding import check_unlearned
from effjax.methods.cache.moa.plan import MoAPlan, Rule, check_fits
from effjax.quant import QTensor
from effjax.transform import check_by_layer


def order_heads(
    plan: MoAPlan, forward: Forward, params: Params, *, tokens: int, devices: int = 1
) -> tuple[MoAPlan, Params]:
    """Give each layer's key heads another order, and its query heads with them.

    The model computes the same. Use it for plans with the layout "grouped". On one device the heads
    with equally many slots then stand side by side, so that caches need not gather them. With
    several devices, each of which holds equally many heads, all devices have about equally many
    slots: the largest heads are placed first, each on the device with the fewest slots so far.

    Args:
        forward, params: a model whose projections are floats.
        tokens: length of the sequences for which slots are counted.
        devices: number of devices that share the heads.

    Returns:
        The plan and the parameters in the new order.

    Raises:
        ValueError: if devices do not divide the key heads, projections are quantized already, or
            parameters are stacked, or another method has parameters at projections.
    """
    check_by_layer("order_heads", params)
    config = forward.config
    kv_heads, group = config.num_kv_heads, config.num_heads // config.num_kv_heads
    check_fits(plan, config.num_layers, config.num_heads, kv_heads)
    if devices < 1 or kv_heads % devices:
        raise ValueError(f"{kv_heads} key heads cannot be shared evenly by {devices} devices")
    flat, alphas, betas = flatten_params(params), [], []
    learned = flatten_params(params.get(METHODS, {}))
    for layer, target in enumerate(forward.target_modules(params, CausalAttention)):
        layers = [f"{target.path}.to_{name}" for name in ("q", "k", "v", "out")]
        why = "whose heads keep their order: order the heads first, or merge them into the weights"
        check_unlearned(learned, layers, why)
        order = _order(plan.slots(layer, tokens), plan.rules(layer), devices)
        alphas.append(tuple(plan.alphas[layer][head] for head in order))
        betas.append(tuple(plan.betas[layer][head] for head in order))
        queries = (np.asarray(order)[:, None] * group + np.arange(group)).reshape(-1)
        for name, heads in {"q": queries, "k": order, "v": order, "out": queries}.items():
            for part in ("kernel", "bias"):
                path = f"{target.path}.to_{name}.{part}"
                if path not in flat or (name == "out" and part == "bias"):
                    continue
                if isinstance(flat[path], QTensor):
                    raise ValueError(f"{path} is quantized: order the heads before")
                axis = 0 if name == "out" else -1
                flat[path] = _reordered(flat[path], np.asarray(heads), axis)
    return dataclasses.replace(plan, alphas=tuple(alphas), betas=tuple(betas)), nest_params(flat)


def _order(slots: Sequence[int], rules: Sequence[Rule], devices: int) -> list[int]:
    """Heads in their new order: by device, and in each by slots and rules."""
    cache_length = len(slots) // devices
    held: list[list[int]] = [[] for _ in range(devices)]
    for head in sorted(range(len(slots)), key=lambda head: -slots[head]):
        free = [own for own in held if len(own) < cache_length]
        min(free, key=lambda own: sum(slots[each] for each in own)).append(head)
    return [
        head
        for own in held
        for head in sorted(own, key=lambda head: (slots[head], rules[head], head))
    ]


def _reordered(x: Array, heads: np.ndarray, axis: int) -> Array:
    """An array with its heads, which lie side by side on an axis, in this order."""
    parts = jnp.stack(jnp.split(x, len(heads), axis=axis))
    return jnp.concatenate(list(parts[heads]), axis=axis)
