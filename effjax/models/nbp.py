"""NBP: next-block prediction, LlamaGens that predict a block in each call (arXiv 2502.07737).

A grid of frames, rows and columns of tokens is cut into equal blocks of b tokens, such as rows. The
tokens of a block see each other and all blocks before it, and token j of a block predicts token j
of the next one:

    mask(q, k) = block(q) >= block(k)        blocks of one token are LlamaGen

Parameters are those of a LlamaGen: what differs is the mask, and what a token predicts. Tokens
stand block after block (`Groups`) and are rotated by their rows and columns; rows of a video are
counted through all frames.

`effjax.autoregression.NextBlock` is the loop that samples, `group_loss` what training minimizes. No
weights are public.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Int

from effjax.context import Layout
from effjax.fields import Count
from effjax.layers.attention import CausalCore, Positions, places
from effjax.layers.groups import GroupCore, Groups, blocks
from effjax.models.llama import LlamaBlock
from effjax.models.llamagen import (
    Condition,
    LlamaGen,
    LlamaGenConfig,
    condition_tokens,
    positions_of,
)


@dataclasses.dataclass(frozen=True)
class NBPConfig(LlamaGenConfig):
    """Shape and numerics of an NBP; the defaults are those of LlamaGen-B, in blocks of one row.

    Attributes:
        frames: of a video; 1 for images.
        block: frames, rows and columns of a block, which divide the grid's.
    """

    frames: Count = 1
    block: tuple[Count, Count, Count] = (1, 1, 16)

    def __post_init__(self) -> None:
        super().__post_init__()
        blocks((self.frames, self.grid, self.grid), self.block)

    @property
    def image_tokens(self) -> int:
        """Tokens of an image, or of a video."""
        return self.frames * self.grid**2

    @property
    def groups(self) -> Groups:
        """The blocks."""
        return blocks((self.frames, self.grid, self.grid), self.block)


class GroupedLlamaGen(LlamaGen):
    """A LlamaGen that predicts groups of tokens: what NBP and NAR share.

    It is called as a LlamaGen is, with tokens in the order of its `config.groups`; their positions,
    where a call gives them, are `group_positions`.
    """

    def block(self, layer: int, rngs: nnx.Rngs) -> LlamaBlock:
        made = super().block(layer, rngs)
        core, config = made.attn.core, self.config
        assert isinstance(core, CausalCore)
        made.attn.core = GroupCore(
            core.rotary, condition=config.condition_tokens, sizes=config.groups.sizes
        )
        return made

    def layout(self, tokens: Array | None, *others: Any) -> Layout:
        """Tokens in another order than the raster's."""
        given = others[3] if tokens is None and len(others) > 3 else tokens
        return dataclasses.replace(
            super().layout(tokens, *others),
            grid=None,
            loose=0 if given is None else given.shape[1],
            changed_by="the order of groups",
        )

    def positions(self, condition: Condition, columns: int) -> Positions:
        count = columns - condition_tokens(condition)
        return sequence_positions(self.config.groups, condition, count)


def sequence_positions(groups: Groups, condition: Condition, count: int) -> Positions:
    """Positions of a condition and the first tokens of an image, in the order of groups."""
    read = condition_tokens(condition)
    first = positions_of(condition, 0, read, read)
    if not count:
        return first
    first = jnp.stack(places(first), axis=1) if first.ndim == 2 else first
    numbers = jnp.arange(count)
    angles = jnp.asarray(groups.order[:count])
    return jnp.concatenate([first, group_positions(condition, numbers, angles)], axis=2)


def group_positions(
    condition: Condition, numbers: Int[Array, " S"], raster: Int[Array, " S"]
) -> Int[Array, "B 2 S"]:
    """Positions of tokens of an image: their places in the sequence, and what they are rotated to.

    Args:
        condition: what the sequences begin with.
        numbers: of the tokens in the order of groups; -1 for padding.
        raster: their places in the raster, row by row.
    """
    read = condition_tokens(condition)
    place, _ = places(positions_of(condition, 0, read, read))
    before = jnp.max(place, axis=1)[:, None] + 1
    place = jnp.where(numbers < 0, -1, before + numbers)
    angles = jnp.where(numbers < 0, -1, read + raster)
    return jnp.stack([place, jnp.broadcast_to(angles, place.shape)], axis=1).astype(jnp.int32)


class NBP(GroupedLlamaGen):
    """The network: computes the logits of the tokens of the next block."""

    Config: ClassVar[type] = NBPConfig
    systems = ("Next-block prediction",)


MODEL = NBP
