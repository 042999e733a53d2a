"""The student of Distilled Decoding for VAR (arXiv 2412.17153): all tokens in one call.

A sequence is a start, made of the label, and then a slot for every token. A slot holds the code of
its token, if that is known, and else the noise that the token follows from (see
`effjax.autoregression.flow_map`). The network predicts the tokens of all slots that hold noise.

    x      = word_embed(slots) + positions + level + mark(data or noise)
    x      = block(x + mark_b(data or noise))       VAR's; a slot sees itself and scales before it
    logits = head(LN(x) (1 + scale) + shift)        of the codes, as VAR's
    codes  = proj(LN(x) (1 + scale) + shift)        vectors; both behind x + mark(data or noise)

Tokens of a scale do not see each other: in VAR they are independent, given the scales before.
Slots hold codes themselves and not the latents that they add up to.

FLOPs of an image: 24 L C^2 d for the linear layers of d blocks on L slots with the start, 4 P C d
for attention to P visible pairs, 2 (L - 1) C V for the head. There is no guidance, since that is in
what the student learns.

Differs from the released code, which gives a row of the table of labels new values where it means
the new row of the table of levels.
"""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from effjax.context import Layout
from effjax.fields import Natural, Positive
from effjax.layers.linear import Linear
from effjax.layers.norms import LayerNorm, modulate
from effjax.layers.scales import Scales, SlotCore, levels, token_starts
from effjax.models.var import SharedModulationBlock, VARBlock, VARConfig, VARParts

NEW = nnx.initializers.truncated_normal(0.02)  # of what a VAR does not have


@dataclasses.dataclass(frozen=True)
class DistilledVARConfig(VARConfig):
    """Shape and numerics of a student, and how it is sampled.

    Attributes:
        starts: the first scale that each call predicts, 0 for the first call. It is trained for
            these.
        split: the first scale whose tokens stay vectors; those of the scales before become codes.
            The number of scales for none.
        noise_std: standard deviation of the noise in slots, that of the pairs it was trained with.
    """

    starts: tuple[Natural, ...] = (0,)
    split: Natural = 5
    noise_std: Positive = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_starts(self.starts, self.split, len(self.patch_nums), "scales")

    @property
    def slot_sides(self) -> tuple[int, ...]:
        """Sides of the maps of a sequence; the first one is the start."""
        return (1, *self.patch_nums)


def check_starts(starts: tuple[int, ...], split: int, count: int, units: str) -> None:
    """Check how a student is sampled.

    Raises:
        ValueError: for calls that do not begin at 0 and go on, and what lies beyond the last unit.

    Warns:
        UserWarning: if the last call reads vectors of an earlier one.
    """
    rising = all(a < b for a, b in itertools.pairwise(starts))
    if not starts or starts[0] != 0 or not rising or starts[-1] >= count:
        raise ValueError(
            f"starts are the first of the {units} that each call predicts: 0 for the first call, "
            f"rising, and below {count}; got {starts}"
        )
    if split > count:
        raise ValueError(f"split is at most {count}, the number of {units}; got {split}")
    if split < starts[-1]:
        warnings.warn(
            f"the last call predicts from {starts[-1]} on and reads vectors, not codes, of the "
            f"{units} from {split} on: take a split of at least {starts[-1]}",
            stacklevel=4,
        )


class SharedSlotBlock(SharedModulationBlock):
    """A block of VAR that is told which slots hold data, and sees scales before a slot's own."""

    def __init__(self, config: VARConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.attn.core = SlotCore()
        self.mark = _mark(config, rngs)

    def __call__(
        self,
        x: Float[Array, "B S C"],
        c: Float[Array, "B ... C"],
        scales: Scales,
        marks: Float[Array, "B 2 C"],
        data: Bool[Array, "B S"],
    ) -> Float[Array, "B S C"]:
        return super().__call__(x + chosen(self.mark(marks), data), c, scales)


class SlotBlock(SharedSlotBlock, VARBlock):
    """The same with a modulation of its own."""


def _mark(config: VARConfig, rngs: nnx.Rngs) -> Linear:
    size = config.hidden_size
    dtype = config.param_dtype
    return Linear(size, size, role="embedding", param_dtype=dtype, init=NEW, rngs=rngs)


def chosen(marks: Float[Array, "B 2 C"], data: Bool[Array, "B S"]) -> Float[Array, "B S C"]:
    """Of every slot the mark of noise (0) or of data (1)."""
    return jnp.where(data[..., None], marks[:, 1:], marks[:, :1])


def holding(
    slots: Float[Array, "B L Z"], known: Int[Array, " B"], tokens: int, channels: int
) -> Bool[Array, "B S"]:
    """Of the start and of every slot whether it holds data, as the start and the known ones do.

    Raises:
        ValueError: for another number of slots, or vectors of another width.
    """
    if slots.shape[1:] != (tokens, channels):
        raise ValueError(
            f"this student has a slot of {channels} channels for each of {tokens} tokens; got "
            f"{list(slots.shape)}"
        )
    return jnp.arange(1 + tokens) < 1 + known[:, None]


class VectorHead(nnx.Module):
    """Adaptive norm and projection to vectors, in float32."""

    def __init__(self, config: Any, *, rngs: nnx.Rngs):
        size, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        self.scale_shift_table = nnx.Param(NEW(rngs.params(), (2, size), dtype))
        self.norm = LayerNorm(eps=config.norm_eps)
        options: dict[str, Any] = {"param_dtype": dtype, "init": NEW, "rngs": rngs}
        self.proj = Linear(size, config.code_channels, role="head", **options)

    def __call__(self, x: Float[Array, "B S C"], c: Float[Array, "B C"]) -> Float[Array, "B S Z"]:
        table = self.scale_shift_table.get_value().astype(jnp.float32)
        shift, scale = jnp.moveaxis(table + c.astype(jnp.float32)[:, None], 1, 0)
        return self.proj(modulate(self.norm(x.astype(jnp.float32)), shift, scale))


class DistilledVAR(VARParts):
    """The network: predicts the tokens of slots that hold noise."""

    Config = DistilledVARConfig

    def __init__(self, config: DistilledVARConfig, *, rngs: nnx.Rngs):
        super().__init__(
            config,
            start=1,
            positions=1 + config.tokens,
            levels=1 + len(config.patch_nums),
            blocks=(SlotBlock, SharedSlotBlock),
            rngs=rngs,
        )
        dtype = jnp.dtype(config.param_dtype)
        self.marks = nnx.Param(NEW(rngs.params(), (2, config.hidden_size), dtype))
        self.mark = _mark(config, rngs)
        self.vectors = VectorHead(config, rngs=rngs)

    def example_inputs(self) -> tuple[Any, ...]:
        config = self.config
        slots = jax.ShapeDtypeStruct((2, config.tokens, config.code_channels), jnp.float32)
        return slots, *(jax.ShapeDtypeStruct((2,), jnp.int32),) * 2

    def layout(self, slots: Array, labels: Array, known: Array) -> Layout:
        return Layout(
            grid=None, loose=1 + slots.shape[1], changed_by="a sequence of several scales"
        )

    def __call__(
        self,
        slots: Float[Array, "B L Z"],
        labels: Int[Array, " B"],
        known: Int[Array, " B"],
    ) -> tuple[Float[Array, "B L V"], Float[Array, "B L Z"]]:
        """Run the network.

        Args:
            slots: codes of the first tokens, and the noise of all that follow.
            labels: class of each image.
            known: how many slots hold codes.

        Returns:
            Of every slot the logits of its token, float32[B, L, vocab_size], and the code that is
            expected, float32[B, L, code_channels].

        Raises:
            ValueError: for another number of slots, or vectors of another width.
        """
        config = self.config
        scales = Scales(config.slot_sides, 0, len(config.slot_sides))
        data = holding(slots, known, config.tokens, config.code_channels)
        embedded = self.label(labels)
        positions, by_level, start = self.tables()
        first = embedded[:, None] + start
        x = jnp.concatenate([first, self.word_embed(slots.astype(jnp.float32))], axis=1)
        x = x + positions + by_level[np.asarray(levels(scales))]
        marks = self.marks.get_value().astype(jnp.float32)
        marks = jnp.broadcast_to(marks, (slots.shape[0], *marks.shape))
        x = (x + chosen(marks, data)).astype(config.dtype)
        c, marks = embedded.astype(config.dtype), marks.astype(config.dtype)
        x = self.blocks(x, self.for_blocks(c), scales, marks, data)
        x = (x + chosen(self.mark(marks), data))[:, 1:]
        return self.head(x, c), self.vectors(x, c)


def grown(name: str, given: Any, new: Any, config: VARConfig) -> Any:
    """A table of a VAR with what the start of its student takes of it, and new rows.

    Slots of the first scale have no place in a VAR, whose start stands there; all others have.

    Args:
        name: of the parameter.
        given: the VAR's; None if it has none.
        new: what a new student has.
        config: the VAR's.
    """
    if name == "start":
        return given[:1]
    own = {"positions": token_starts(config.patch_nums)[1], "level_embed": 1}.get(name)
    if own is None:
        return new if given is None else given
    return jnp.concatenate([given[:1], new[1 : 1 + own].astype(given.dtype), given[own:]])


MODEL = DistilledVAR
