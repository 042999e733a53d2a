"""NAR: neighboring autoregression, LlamaGens that predict diagonals of an image (arXiv 2503.10696).

All tokens at one distance row + column from the first token are predicted in one call, so that n x
n tokens take 2 n - 1 calls. A token sees the condition and all tokens that are no farther than
itself, and it has two heads:

    h = blocks(x)                      right = head(norm(h))
    g = below(h)                       below = below_head(below_norm(g))

A token's logits are the mean of `right` of its left neighbor and `below` of its upper one; those of
the first row and column have one of them, and the first token's are the mean of both heads at the
last token of the condition. `mixed` does this for whole images.

Tokens stand diagonal after diagonal (`Groups`), and are rotated by their rows and columns.
`effjax.autoregression.NextDiagonal` is the loop that samples, `group_loss` what training minimizes.

Parity target: the code that the checkpoints were released with.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.layers.attention import Positions
from effjax.layers.groups import Groups, diagonals
from effjax.layers.linear import Linear
from effjax.layers.norms import RMSNorm
from effjax.models.llamagen import LlamaGenConfig
from effjax.models.nbp import GroupedLlamaGen


@dataclasses.dataclass(frozen=True)
class NARConfig(LlamaGenConfig):
    """Shape and numerics of a NAR, as for a LlamaGen.

    The block before the lower head is not among the `num_layers`.
    """

    @property
    def groups(self) -> Groups:
        """The diagonals."""
        return diagonals(self.grid, self.grid)


class NAR(GroupedLlamaGen):
    """The network: computes the logits of right and lower neighbors."""

    Config: ClassVar[type] = NARConfig
    systems = ("NAR",)

    def __init__(self, config: NARConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        width, dtype = config.hidden_size, jnp.dtype(config.param_dtype)
        self.below = self.block(config.num_layers, rngs)
        self.below_norm = RMSNorm(width, eps=config.norm_eps, param_dtype=dtype)
        self.below_head = Linear(
            width, config.vocab_size, role="head", bias=False, param_dtype=dtype, rngs=rngs
        )

    def outputs(
        self,
        x: Float[Array, "B S C"],
        positions: Positions | None,
        logits_to_keep: Int[Array, "B N"] | None,
        labels: Int[Array, "B N"] | None,
    ) -> Float[Array, "B N W"]:
        """Logits of the token to the right, and after them those of the one below: W = 2 V.

        Raises:
            ValueError: for labels: a token's logits are made of those of two others.
        """
        if labels is not None:
            raise ValueError("a NAR makes a token's logits of those of two others: use group_loss")
        hidden = x, self.below(x, positions)
        if logits_to_keep is not None:
            columns = logits_to_keep[:, :, None]
            hidden = tuple(jnp.take_along_axis(each, columns, axis=1) for each in hidden)
        right = self.logits(self.norm(hidden[0]))
        below = self.below_head(self.below_norm(hidden[1]))
        return jnp.concatenate([right, below], axis=2)


def both(raw: Float[Array, "B N W"]) -> tuple[Float[Array, "B N V"], Float[Array, "B N V"]]:
    """Logits of right and of lower neighbors, from what the network gives."""
    right, below = jnp.split(raw, 2, axis=-1)
    return right, below


def mixed(raw: Float[Array, "B N W"], side: int) -> Float[Array, "B L V"]:
    """Logits of all tokens of square images, row by row.

    Args:
        raw: of the last token of the condition, and of all tokens of the image in raster order.
        side: rows, and columns.
    """
    right, below = both(raw)
    first = (right[:, 0] + below[:, 0]) / 2
    right, below = (part[:, 1:].reshape(len(raw), side, side, -1) for part in (right, below))
    right, below = jnp.roll(right, 1, axis=2), jnp.roll(below, 1, axis=1)
    row, column = np.indices((side, side))[..., None]
    out = jnp.where(row == 0, right, jnp.where(column == 0, below, (right + below) / 2))
    return out.at[:, 0, 0].set(first).reshape(len(raw), side * side, -1)


MODEL = NAR
