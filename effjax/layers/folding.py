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
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import jax.numpy as jnp
from jax import Array

from effjax.layers.stack import Stack
from effjax.targets import TargetModule, original


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


QKV = ("attn.to_q", "attn.to_k", "attn.to_v")


def folds(targets: Sequence[TargetModule], pattern: str = ".*") -> tuple[Fold, ...]:
    """Where the blocks of a model say that factors can go, for readers that all match.

    A block says it as `folds`, a tuple of `Fold`s with paths relative to itself.

    Args:
        targets: all modules of a model.
        pattern: regular expression that the whole path of every reader must match.

    Raises:
        ValueError: if the blocks of the model do not say it.
    """
    silent = {
        type(original(block)).__name__
        for target in targets
        if isinstance(target.module, Stack)
        for block in target.module
        if not hasattr(original(block), "folds")
    }
    if silent:
        raise ValueError(
            f"{', '.join(sorted(silent))} does not say where factors on its layers' inputs can go "
            f"instead: give the class `folds`, a tuple of effjax.layers.folding.Fold (empty if "
            f"there is no place), or leave out folding"
        )
    found = (
        fold.within(target.path)
        for target in targets
        for fold in getattr(target.module, "folds", ())
    )
    return tuple(
        fold for fold in found if all(re.fullmatch(pattern, reader) for reader in fold.readers)
    )


def fits(leaves: Mapping[str, Array], where: Fold) -> bool:
    """Whether what makes the inputs is as wide as they are: values of grouped heads are not."""
    if where.kind != "linear":
        return True
    *leading, _, made = leaves[f"{where.source}.kernel"].shape
    return all(
        leaves[f"{reader}.kernel"].shape[:-1] == (*leading, made) for reader in where.readers
    )


def check_untouched(learned: Iterable[str], where: Fold) -> None:
    """Check that no method has learned something about the layers between which factors move.

    Args:
        learned: names below `params["methods"]`, such as "lora.blocks.0.attn.to_q.style.down".
        where: with whole paths.

    Raises:
        ValueError: if one has; it would see other inputs than it was made for.
    """
    check_unlearned(
        learned,
        (where.source, *where.readers),
        "which factors on its inputs or outputs would make wrong: quantize without folding "
        "(ViDiT-Q: fold=False; GPTQ and round to nearest fold nothing), or merge them into the "
        "weights first",
    )


def check_unlearned(learned: Iterable[str], layers: Sequence[str], why: str) -> None:
    """Check that no method has learned something about layers whose weights another one reads.

    Args:
        learned: as for `check_untouched`.
        layers: their paths.
        why: what would be wrong, and what to do.

    Raises:
        ValueError: if one has.
    """
    for name in learned:
        method, _, rest = name.partition(".")
        if touched := [layer for layer in layers if rest.startswith(f"{layer}.")]:
            raise ValueError(f"{method} has parameters of its own at {touched[0]}, {why}")


def fold(leaves: Mapping[str, Array], where: Fold, smoothing_scale: Array) -> dict[str, Array]:
    """The leaves of which the readers' inputs come out multiplied by a smoothing scale.

    The readers themselves are left as they are: divide their rows by the smoothing scale.

    Args:
        leaves: parameters by path.
        where: with whole paths.
        smoothing_scale: float32[I]; [*E, I] for a linear source that is a stack of matrices.
    """
    out = dict(leaves)

    def scale(name: str, factor: Array) -> None:
        if name in out:
            out[name] = (out[name].astype(jnp.float32) * factor).astype(out[name].dtype)

    if where.kind == "norm":
        scale(f"{where.source}.scale", smoothing_scale)
        return out
    if where.kind == "linear":
        scale(f"{where.source}.kernel", smoothing_scale[..., None, :])
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
