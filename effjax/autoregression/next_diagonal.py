"""Sampling diagonal by diagonal (NAR, arXiv 2503.10696): 2 n - 1 calls for n x n tokens.

    z(0, 0) = (right + below) / 2                       both heads at the condition's last token
    for k in 1 ... 2 n - 2, for all r + c = k:
        z(r, c) = (right of (r, c - 1) + below of (r - 1, c)) / 2       those of them that there are
        z = z_uncond + guidance (z_cond - z_uncond)
        token (r, c) = draw(top_p(top_k(z / temperature)))

With a `guidance_interval` of m a diagonal is guided if there are fewer than m tokens before it.

Cost: see `effjax.autoregression.next_group`, with n = 2 s - 1 calls of s columns for s x s tokens,
two heads, and one block more.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.autoregression.next_group import Calls, NextGroup, check_whole, row_of
from effjax.autoregression.next_token import DATA, STATIC
from effjax.context import PyTree, Step, is_static
from effjax.forward import Forward, Params
from effjax.layers.groups import Groups
from effjax.models.llamagen import condition_tokens
from effjax.models.nar import NARConfig, both, mixed


@partial(jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=(*STATIC, "groups"))
@dataclasses.dataclass(frozen=True, eq=False)
class NextDiagonal(NextGroup):
    """The loop that samples the tokens of an image diagonal by diagonal with a `NAR`.

    It is called as `NextToken` is, and has the same fields, of which `decoder` and `ids` stay None.
    Tokens are row by row.
    """

    CONFIG = NARConfig

    @property
    def table(self) -> Calls:
        return _table(self.groups)

    def predicted(self, raw: Float[Array, "R W L"], step: Step) -> Float[Array, "R W V"]:
        right, below = both(raw)
        if is_static(step) and int(step) == 0:  # of the condition
            return (right + below) / 2
        left, upper = (row_of(table, step) for table in _neighbors(self.groups, self.grid))
        right, below = (
            jnp.take(part, jnp.maximum(columns, 0), axis=1)
            for part, columns in ((right, left), (below, upper))
        )
        alone = jnp.where((upper < 0)[:, None], right, below)
        return jnp.where(((left < 0) | (upper < 0))[:, None], alone, (right + below) / 2)

    @staticmethod
    def logits(
        forward: Forward, params: Params, tokens: Int[Array, "B N"], cond: PyTree
    ) -> Float[Array, "B N V"]:
        """Logits of the given tokens of whole images, in one call, without guidance.

        Args:
            forward: a NAR without caches.
            params: its parameters.
            tokens: row by row.
            cond: labels, or captions.
        """
        groups, side = forward.config.groups, forward.config.grid
        check_whole(tokens, groups)
        first = condition_tokens(cond) - 1
        read = tokens[:, jnp.asarray(groups.order[:-1])]
        columns = jnp.broadcast_to(first + jnp.arange(len(groups.order)), tokens.shape)
        raw = forward(params, {}, read, None, columns, None, None, cond)[0]
        raw = jnp.pad(raw, ((0, 0), (0, 1), (0, 0)))  # nothing follows the last token
        raster = 1 + groups.numbers
        return mixed(raw[:, np.concatenate([[0], raster])], side)


@lru_cache(maxsize=16)
def _table(groups: Groups) -> Calls:
    numbers = np.stack([groups.numbers_of(group) for group in range(len(groups.sizes))])
    reads = np.concatenate([np.full_like(numbers[:1], -1), numbers[:-1]])
    return Calls(reads, groups.places(numbers), np.asarray(groups.starts[:-1]))


@lru_cache(maxsize=16)
def _neighbors(groups: Groups, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Column of the left and of the upper neighbor of each token that a call draws; -1 for none."""
    table = _table(groups)
    read, drawn = groups.places(table.reads), table.draws
    row, column = drawn // grid[1], drawn % grid[1]
    found = []
    for wanted, there in ((drawn - 1, column > 0), (drawn - grid[1], row > 0)):
        same = (read[:, None] == wanted[:, :, None]) & (there & (drawn >= 0))[:, :, None]
        found.append(np.where(same.any(-1), same.argmax(-1), -1))
    return found[0], found[1]
