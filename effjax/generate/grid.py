"""Images as texts: which places of a sequence of tokens are what."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from effjax.fields import Checked, Count, Natural

Places = Int[Array, "..."] | Int[np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Grid(Checked):
    """The tokens of one image in raster order, and those that stand between and behind its rows.

    Places count from 0, the first token of the image. What a model gives for structural tokens is
    not used: they are forced.

    Attributes:
        width: tokens of a row.
        height: rows.
        first: the lowest id of an image's tokens.
        codes: how many ids there are from that one on; None for all that the model knows.
        row_end: the token behind every row; None for none.
        tail: tokens behind the last row.
    """

    width: Count
    height: Count
    first: Natural = 0
    codes: Count | None = None
    row_end: Natural | None = None
    tail: tuple[Natural, ...] = ()

    @property
    def pitch(self) -> int:
        """Places of a row, that of its end included."""
        return self.width + (self.row_end is not None)

    @property
    def tokens(self) -> int:
        """Places of an image."""
        return self.pitch * self.height + len(self.tail)

    def column(self, place: Places) -> Places:
        """Column of a place, 0 for the first token of a row."""
        return place % self.pitch

    def forced(self, place: Places) -> Int[Array, "..."]:
        """The structural token of a place, -1 where the model chooses."""
        last = self.pitch * self.height
        end = -1 if self.row_end is None else self.row_end
        forced = jnp.where((place < last) & (self.column(place) == self.width), end, -1)
        if not self.tail:
            return forced
        behind = jnp.asarray(np.asarray(self.tail, np.int32))
        return jnp.where(place < last, forced, behind[jnp.clip(place - last, 0, len(behind) - 1)])

    def pixels(self) -> Int[np.ndarray, "H W"]:
        """The places of the image's own tokens, by row and column."""
        return np.arange(self.height)[:, None] * self.pitch + np.arange(self.width)

    def check(self, vocabulary: int, new: int) -> None:
        """Raise ValueError for ids that a model does not have, or more tokens than an image's."""
        ends = [] if self.row_end is None else [self.row_end]
        highest = max([self.first + (self.codes or 1) - 1, *ends, *self.tail])
        if highest >= vocabulary:
            raise ValueError(
                f"the grid has the token {highest}, and the model knows 0 ... {vocabulary - 1}"
            )
        if new > self.tokens:
            raise ValueError(
                f"a grid of {self.height} x {self.width} has {self.tokens} tokens; got "
                f"max_new_tokens={new}"
            )
