"""What an attention layer sees of the tokens of a call."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax.layers.attention import (
    CausalCore,
    CoreHeads,
    CoreKeys,
    Heads,
    KeyHeads,
    Positions,
    places,
)


@dataclasses.dataclass(frozen=True)
class AttentionInputs:
    """What caches store and scores go by.

    Attributes:
        q, k, v: heads before their rotation.
        x: the tokens they were projected from.
        positions: places of the tokens in their sequences; -1 is padding.
        angles: positions that queries and keys are rotated to: the same, or one row for each
            section of the frequencies.
        core: the original core, for its rotation and its window.
    """

    q: CoreHeads
    k: CoreKeys
    v: CoreKeys
    x: Float[Array, "B S C"]
    positions: Int[Array, "B S"]
    angles: Int[Array, "B S"] | Int[Array, "B N S"]
    core: CausalCore

    @classmethod
    def of(
        cls,
        q: CoreHeads,
        k: CoreKeys,
        v: CoreKeys,
        x: Float[Array, "B S C"],
        positions: Positions | None,
        core: CausalCore,
    ) -> AttentionInputs:
        """What a core is called with; without positions those of whole rows, 0, 1, 2, ..."""
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
        return cls(q, k, v, x, *places(positions), core)

    @property
    def reach(self) -> Int[Array, "B S"]:
        """The last place that each token sees: its own, or that of the last token beside it."""
        if not self.core.together:
            return self.positions
        last = jnp.max(self.positions, axis=1, keepdims=True)
        return jnp.where(self.positions >= 0, last, -1)

    @property
    def rotated_q(self) -> Heads:
        """Queries, rotated to the positions of their tokens."""
        return self.core.queries(self.q, self.angles)

    @property
    def rotated_k(self) -> KeyHeads:
        """Keys, rotated to the positions of their tokens."""
        return self.core.keys(self.k, self.angles)
