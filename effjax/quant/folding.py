"""Where factors of a layer's inputs can stand instead: in what makes those inputs.

    x m = (norm(h) (1 + scale) + shift) m     adaLN: scale' = (1 + scale) m - 1, shift' = shift m
    x m = norm(h) w m                         a norm with learned scale
    x m = (h W + b) m                         a linear layer, also through softmax(q k^T) v

so that a smoothing scale costs nothing when the model runs. All layers that read the same inputs
share it. Nothing folds through a GELU, and adaLN-single (PixArt) adds a vector that all blocks
share.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Literal

import jax.numpy as jnp
from jax import Array


@dataclasses.dataclass(frozen=True)
class Fold:
    """One place where factors can go; paths are relative to a block, or whole.

    Attributes:
        readers: linear layers that read the inputs.
        source: what makes them.
        kind: which of the formulas.
        part: of adaLN's projection, which of its `parts` equal parts is the shift; the scale is the
            next one.
        parts: of adaLN's projection.
    """

    readers: tuple[str, ...]
    source: str
    kind: Literal["adaln", "norm", "linear"]
    part: int = 0
    parts: int = 6

    def within(self, block: str) -> Fold:
        """The same with whole paths."""
        readers = tuple(f"{block}.{reader}" for reader in self.readers)
        return dataclasses.replace(self, readers=readers, source=f"{block}.{self.source}")


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")

# By the class of a block.
FOLDS: Mapping[str, tuple[Fold, ...]] = {
    "DiTBlock": (
        Fold(_QKV, "modulation", "adaln", 0),
        Fold(("mlp.fc1",), "modulation", "adaln", 3),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
    ),
    "PixArtBlock": (
        Fold(("attn.to_out",), "attn.to_v", "linear"),
        Fold(("cross.to_out",), "cross.to_v", "linear"),
    ),
    "T5Block": (
        Fold(_QKV, "norm1", "norm"),
        Fold(("mlp.gate", "mlp.up"), "norm2", "norm"),
        Fold(("attn.to_out",), "attn.to_v", "linear"),
        Fold(("mlp.down",), "mlp.up", "linear"),
    ),
    "LlamaBlock": (
        Fold(_QKV, "norm1", "norm"),
        Fold(("mlp.gate", "mlp.up"), "norm2", "norm"),
        Fold(("attn.to_out",), "attn.to_v", "linear"),  # without grouped keys
        Fold(("mlp.down",), "mlp.up", "linear"),
    ),
}


def folds(blocks: Iterable[tuple[str, str]], pattern: str = ".*") -> tuple[Fold, ...]:
    """The folds of blocks, given as (path, name of its class), whose readers all match."""
    found = (fold.within(path) for path, kind in blocks for fold in FOLDS.get(kind, ()))
    return tuple(
        fold for fold in found if all(re.fullmatch(pattern, reader) for reader in fold.readers)
    )


def fits(leaves: Mapping[str, Array], where: Fold) -> bool:
    """Whether what makes the inputs is as wide as they are: values of grouped heads are not."""
    if where.kind != "linear":
        return True
    made = leaves[f"{where.source}.kernel"].shape[-1]
    return all(leaves[f"{reader}.kernel"].shape[0] == made for reader in where.readers)


def fold(leaves: Mapping[str, Array], where: Fold, smoothing_scale: Array) -> dict[str, Array]:
    """The leaves of which the readers' inputs come out multiplied by a smoothing scale.

    The readers themselves are left as they are: divide their rows by the smoothing scale.

    Args:
        leaves: parameters by path.
        where: with whole paths.
        smoothing_scale: float32[I].
    """
    out = dict(leaves)

    def scale(name: str, factor: Array) -> None:
        if name in out:
            out[name] = (out[name].astype(jnp.float32) * factor).astype(out[name].dtype)

    if where.kind == "norm":
        scale(f"{where.source}.scale", smoothing_scale)
        return out
    if where.kind == "linear":
        scale(f"{where.source}.kernel", smoothing_scale)
        scale(f"{where.source}.bias", smoothing_scale)
        return out
    width = smoothing_scale.shape[0]
    factor = (
        jnp.ones((where.parts, width))
        .at[where.part : where.part + 2]
        .set(smoothing_scale)
        .reshape(-1)
    )
    scale(f"{where.source}.kernel", factor)
    scale(f"{where.source}.bias", factor)
    name = f"{where.source}.bias"  # 1 + scale is multiplied, and 1 stands in no leaf
    gain = slice((where.part + 1) * width, (where.part + 2) * width)
    out[name] = out[name].at[gain].add((smoothing_scale - 1).astype(out[name].dtype))
    return out
