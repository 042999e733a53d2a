"""Masks of blocks: from masses or next to the diagonal, packed in bits, checked."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from effjax.methods.attention.paro_attention.plan import NAME, Blocks, Masks, ParoAttentionPlan


def pack(keep: np.ndarray) -> np.ndarray:
    """bool[..., M] as uint8[..., ceil(M / 8)], the first block in the highest bit."""
    return np.packbits(keep, axis=-1)


def unpack(bits: jax.Array, blocks: int) -> jax.Array:
    """The inverse of `pack` on a device: bool[..., blocks]."""
    return jnp.unpackbits(bits, axis=-1, count=blocks).astype(bool)


def best(
    masses: np.ndarray, blocks: Blocks, kept: np.ndarray, width: int, least: int
) -> np.ndarray:
    """Keep a number of blocks for each head: those of the largest mass.

    Args:
        masses: float[..., M, M].
        blocks: of the sequence; what is always kept counts.
        kept: int[...], how many blocks there will be.
        width: most blocks of a row without text.
        least: of such a row, blocks without text that are kept whatever their mass.

    Returns:
        bool[..., M, M].
    """
    rank = ranks(masses, blocks)
    always = blocks.always
    allowed = ~always & (rank < width - blocks.fixed.sum())
    # First what each row keeps anyway, then by mass.
    worth = np.where(rank < least, np.inf, masses)
    worth = np.where(allowed, worth, -np.inf).reshape(*masses.shape[:-2], -1)
    order = np.argsort(-worth, axis=-1, kind="stable")
    chosen = np.arange(order.shape[-1]) < (kept - always.sum())[..., None]
    keep = np.zeros(worth.shape, bool)
    np.put_along_axis(keep, order, chosen, axis=-1)
    return keep.reshape(masses.shape) | always


def required(masses: np.ndarray, blocks: Blocks, least: int) -> np.ndarray:
    """Blocks that are kept whatever their mass: `least` of each row, and those always kept."""
    return (ranks(masses, blocks) < least) | blocks.always


def equal_rows(
    density: float, sequences: Sequence[Blocks], heads: Sequence[int], least: int
) -> tuple[int, list[int]]:
    """The most blocks of each row, equally many in all, that a density allows.

    Args:
        density: kept blocks as a share of all, at most.
        sequences, heads: of each layer.
        least: blocks of a row beside those that are always kept.

    Returns:
        Blocks of a row, and of a head by layer.

    Raises:
        ValueError: if there are not so many.
    """
    most = max(blocks.count for blocks in sequences)
    fixed = max(int(blocks.fixed.sum()) for blocks in sequences)
    total = sum(h * blocks.count**2 for h, blocks in zip(heads, sequences))
    found = None
    for width in range(max(fixed + least, 1), most + 1):
        counts = [sum(blocks.widths(width)) for blocks in sequences]
        if sum(h * count for h, count in zip(heads, counts)) <= density * total + 1e-6:
            found = width, counts
    if found is None:
        raise ValueError(
            f"a density of {density} leaves no block for rows of {most} blocks beside those of "
            f"text and of an incomplete end, of which there are {fixed}. Ask for more, or take "
            f"smaller blocks."
        )
    return found


def ranks(masses: np.ndarray, blocks: Blocks) -> np.ndarray:
    """The place of each block in its row by mass, 0 for the largest; those always kept are last."""
    masses = np.where(blocks.always, -np.inf, masses)
    order = np.argsort(-masses, axis=-1, kind="stable")
    return np.argsort(order, axis=-1, kind="stable")


def diagonal(blocks: Blocks) -> np.ndarray:
    """Masses that fall with the distance from the diagonal, float64[M, M]."""
    place = np.arange(blocks.count)
    return -np.abs(place[:, None] - place).astype(np.float64)


def diagonal_masks(plan: ParoAttentionPlan, paths: list[str]) -> Masks:
    """The masks of a plan that needs no data, packed."""
    found = {}
    for layer, path in enumerate(paths):
        blocks = plan.blocks(layer)
        kept = np.array([slot[layer] for slot in plan.kept])
        masses = np.broadcast_to(diagonal(blocks), (*kept.shape, blocks.count, blocks.count))
        keep = best(masses, blocks, kept, plan.width, plan.least)
        found[f"{path}.keep"] = jnp.asarray(pack(keep))
    return found


def shapes(plan: ParoAttentionPlan, paths: list[str]) -> dict[str, tuple[int, ...]]:
    """The shapes of all packed masks, by name."""
    counts = [plan.blocks(layer).count for layer in range(plan.layers)]
    return {
        f"{path}.keep": (plan.slots, len(row), size, -(-size // 8))
        for path, row, size in zip(paths, plan.orders, counts)
    }


def check_masks(plan: ParoAttentionPlan, paths: list[str], masks: Masks) -> None:
    """Check that packed masks are those of a plan.

    Raises:
        ValueError: for masks that are missing, misshapen or unknown, set bits behind the last
            block, rows longer than the plan's width, blocks left out that are always kept, and
            other numbers of kept blocks. All layers that are wrong are named.
    """
    wanted = shapes(plan, paths)
    problems = [f"{name} is missing" for name in wanted if name not in masks]
    problems += [f"{name} is no mask of this model" for name in masks if name not in wanted]
    for layer, (name, shape) in enumerate(wanted.items()):
        if name not in masks:
            continue
        given = masks[name]
        if tuple(given.shape) != shape or given.dtype != np.uint8:
            problems.append(f"{name} is {given.dtype}{list(given.shape)}, must be uint8{[*shape]}")
        elif not isinstance(given, Tracer):
            problems += [f"{name} {text}" for text in _wrong_bits(plan, layer, np.asarray(given))]
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(
            f"these masks do not fit the plan of {NAME} ({len(problems)} problems):\n  {listed}\n"
            f"Take those that `find` or `calibrate` made with it."
        )


def _wrong_bits(plan: ParoAttentionPlan, layer: int, packed: np.ndarray) -> list[str]:
    blocks = plan.blocks(layer)
    bits = np.unpackbits(packed, axis=-1).astype(bool)
    keep = bits[..., : blocks.count]
    found = []
    if bits[..., blocks.count :].any():
        found.append(f"has bits set behind its {blocks.count} blocks of keys")
    rows = keep.sum(-1)
    if (rows > np.asarray(blocks.widths(plan.width))).any():
        longest = int(rows[..., ~blocks.fixed].max())
        found.append(f"keeps {longest} blocks in a row, the plan's width is {plan.width}")
    if (~keep & blocks.always).any():
        found.append("leaves out blocks of text or of the incomplete end, which are always kept")
    kept = np.array([slot[layer] for slot in plan.kept])
    if (keep.sum((-1, -2)) != kept).any():
        found.append("keeps other numbers of blocks than the plan says")
    return found
