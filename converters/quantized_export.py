"""Quantized leaves as compressed-tensors has them, and those that it has not."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from converters.names import LAYOUTS, Binding
from converters.quantized import Scheme
from effjax.quant import QTensor


def without_orders(
    leaves: Mapping[str, Any], read: Callable[[str], Any], dtype: DTypeLike
) -> tuple[Mapping[str, Any], Callable[[str], Any]]:
    """Leaves and their reader, with floats where inputs stand in another order (`desc_act`).

    compressed-tensors has had no place for such an order since 0.19; a warning names them.
    """
    permuted = [
        name for name, leaf in leaves.items() if isinstance(leaf, QTensor) and leaf.perm is not None
    ]
    if not permuted:
        return leaves, read
    warnings.warn(
        f"{len(permuted)} layers are written as {dtype}, not as quantized values, for their "
        "inputs stand in "
        f"an order of their own (desc_act), which compressed-tensors no longer has; effjax.save "
        f"keeps their quantized values: {', '.join(permuted[:3])}{' ...' if permuted[3:] else ''}",
        stacklevel=4,
    )
    floats = {name: jax.ShapeDtypeStruct(leaves[name].shape, dtype) for name in permuted}

    def values(name: str) -> Any:
        if name not in floats:
            return read(name)
        return np.asarray(jax.tree.map(jnp.asarray, read(name)).restore().astype(dtype))

    return {**leaves, **floats}, values


def schemes(binding: Binding, leaves: Mapping[str, Any]) -> dict[str, Scheme]:
    """How the quantized leaves among parameters are written, by the source they are written as.

    Args:
        binding: of the table that is written.
        leaves: parameters by path; arrays or their shapes.

    Raises:
        ValueError: for leaves that compressed-tensors cannot say, all named at once.
    """
    found: dict[str, Scheme] = {}
    problems = {name: _fault(leaf) for name, leaf in leaves.items() if isinstance(leaf, QTensor)}
    problems = {name: fault for name, fault in problems.items() if fault}
    for source, pieces in binding.sources.items():
        held = [leaves[piece.target] for piece in pieces]
        if not any(isinstance(leaf, QTensor) for leaf in held):
            continue
        if pieces[0].layout is not LAYOUTS["linear"]:
            problems[pieces[0].target] = "quantized, which only linear layers can be"
        kinds = {
            _scheme(leaf, len(held) == 1) if isinstance(leaf, QTensor) else None for leaf in held
        }
        if len(kinds) > 1:
            for piece in pieces:
                problems.setdefault(
                    piece.target, f"is a part of {source}, and quantized in another way than others"
                )
            continue
        scheme = _scheme(held[0], len(held) == 1)
        _, outputs = scheme.block or (None, None)
        if len(held) > 1 and any(leaf.shape[1] % (outputs or 1) for leaf in held):
            problems[pieces[0].target] = f"is a part of {source}, and no whole number of its blocks"
        found[source] = scheme
    if problems:
        listed = "\n  ".join(f"{name}: {fault}" for name, fault in sorted(problems.items()))
        raise ValueError(
            f"compressed-tensors cannot hold these leaves ({len(problems)} problems); use "
            f"effjax.save, or quantize them otherwise:\n  {listed}"
        )
    return found


def _scheme(leaf: QTensor, alone: bool) -> Scheme:
    """As llm-compressor writes a leaf, alone or beside others that are one layer with it.

    That is int8 for int8 products by channel, words for all other integers.
    """
    if leaf.block is not None:
        (inputs, outputs), whole = leaf.block, leaf.block[0] >= leaf.rows
        block: tuple[int | None, int | None] = leaf.block
        if outputs == 1:
            block = (None if whole else inputs, 1)
        elif alone and whole and outputs >= leaf.shape[1]:
            block = (None, None)
        return Scheme("float-quantized", 8, None, True, leaf.activations, block=block)
    by_channel = leaf.group_size == leaf.shape[0]
    plain = leaf.bits == 8 and by_channel and leaf.activations is not None
    return Scheme(
        "int-quantized" if plain else "pack-quantized",
        leaf.bits,
        None if by_channel else leaf.group_size,
        leaf.zero_point is None,
        leaf.activations,
    )


def _fault(leaf: QTensor) -> str | None:
    """Why a leaf cannot be written."""
    if leaf.leading:
        count = math.prod(leaf.leading)
        return (
            f"is a stack of {count} matrices {list(leaf.shape)}, and the format knows only linear "
            f"layers of one matrix: each of the {count} would need a layer with a name of its own"
        )
    if leaf.bits not in (4, 8):
        return f"has {leaf.bits}-bit values, must be 4 or 8"
    if leaf.smoothing_scale is not None or leaf.rotation is not None:
        return "has inputs that are smoothed or rotated"
    if (inputs := leaf.activations) is not None:
        # What divides the ranges of tokens the format does not say: n + 1/2 here, n in vLLM.
        tokens = inputs.dynamic and (inputs.group_size is None or inputs.quantizer.floats)
        if not tokens or not inputs.quantizer.keeps_zero or inputs.quantizer.bits not in (4, 8):
            return f"has inputs with {inputs}, must be floats or 4 or 8 bits of each token's range"
    if isinstance(leaf.zero_point, jax.Array | np.ndarray):
        half, zeros = 2 ** (leaf.bits - 1), np.asarray(leaf.zero_point)
        if zeros.min() < -half or zeros.max() >= half:
            return f"has zero points beyond {-half} ... {half - 1}"
    return None
