"""Sampling in groups: what the loops of NAR and NBP share.

A call reads the tokens of a group and draws those of the next one. All calls after the first have
the same shapes: groups are filled up to the widest one, W tokens, with padding that nobody sees and
that is not kept. So the loop is a table of which token stands in which column, and one scan.

FLOPs of an image, with n calls, d layers of width C, MLPs of width F, h heads of logits (1 or 2), b
branches of guidance, T tokens of the condition and L = T + (n - 1) W columns in all: 2 b L d (4 C^2
+ 3 C F) for linear layers, 2 b h C V for each column that is predicted from, and 4 b C d for each
column and slot of a dense cache that it attends to.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.autoregression.next_token import NextToken, Tokens
from effjax.context import PyTree, Step, is_static
from effjax.finite import token_or_none
from effjax.forward import Forward, Params
from effjax.generate.installed import cached as with_cache
from effjax.generate.installed import caches
from effjax.layers.groups import Groups
from effjax.loops import Carry
from effjax.models.llamagen import condition_tokens
from effjax.models.nbp import group_positions


class Calls(NamedTuple):
    """What each call reads and draws: int[calls, W], -1 for padding.

    Attributes:
        reads: numbers of the tokens that are read, in the order of groups; nothing for call 0,
            which reads the condition.
        draws: places in the raster of the tokens that are drawn, column by column.
        before: int[calls], how many tokens there are before.
    """

    reads: np.ndarray
    draws: np.ndarray
    before: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class NextGroup(NextToken, abc.ABC):
    """A loop whose calls draw a group of tokens each.

    Attributes:
        groups: the tokens of an image in the order in which they are drawn: those of the model.
    """

    CONFIG: ClassVar[type]  # of the models that it samples

    groups: Groups = dataclasses.field(kw_only=True)

    @property
    @abc.abstractmethod
    def table(self) -> Calls:
        """What each call reads and draws."""

    @property
    def rereads(self) -> bool:
        """Whether tokens are read again, in a group, after they were read alone."""
        return False

    @property
    def calls(self) -> int:
        return len(self.table.before)

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Any = None,
        *,
        uncond: PyTree = None,
    ) -> Carry:
        """No tokens, empty caches and the keys.

        Raises:
            ValueError: as for `NextToken`, and for caches that take tokens one by one.
        """
        carry = super().init(forward, params, cond, key, uncond=uncond)
        if self.groups.widest > 1:
            self._check_caches(self.cached(forward, self.read_at_once(cond)), params)
        return carry

    def _check_caches(self, forward: Forward, params: Params) -> None:
        methods = ", ".join(dict.fromkeys(name for name, _ in forward.recipe)) or "a patch"
        for cache in caches(forward, params).values():
            if not cache.joint_append:
                raise ValueError(
                    f"{methods} takes new tokens one by one ({type(cache).__name__}), and those of "
                    f"a {type(self).__name__} come in groups that see each other: take a method "
                    f"that keeps all of them, or the last ones, such as streaming_llm"
                )
            if self.rereads and not cache.rollback:
                raise ValueError(
                    f"the first block is made token by token and read again as a block, and the "
                    f"{type(cache).__name__} of {methods} cannot go back: give the first block, or "
                    f"use a cache that keeps all tokens"
                )

    def check(self, forward: Forward) -> None:
        super().check(forward)
        given = "decoder" if self.decoder is not None else "ids"
        if self.decoder is not None or self.ids is not None:
            raise ValueError(f"a {type(self).__name__} takes no {given}: leave it out")

    def cached(self, forward: Forward, condition: int) -> Forward:
        new = self.new_tokens - self.groups.sizes[-1]
        return with_cache(forward).with_cache_length(condition, new)

    def after(self, *given: Any, **options: Any) -> Carry:
        """Not for groups.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"a {type(self).__name__} does not go on from given tokens; NextBlock begins with a "
            f"given block, as Started(condition, tokens)"
        )

    def first_inputs(self, cond: PyTree) -> tuple[PyTree, Tokens | None]:
        """The condition, and tokens that are read with it."""
        return cond, None

    def inputs(self, x: Tokens, cond: PyTree, uncond: PyTree, step: Step) -> tuple[PyTree, ...]:
        """The condition in the first call, a group in others; positions, and the last columns."""
        (cond, tokens), (uncond, _) = self.first_inputs(cond), self.first_inputs(uncond)
        last = positions = None  # all columns; those of a sequence from its start
        if is_static(step) and int(step) == 0:
            count = 0 if tokens is None else tokens.shape[1]
            total = condition_tokens(cond) + count
            last = jnp.arange(total - (self.groups.sizes[0] if count else 1), total)
            last = jnp.broadcast_to(last, (x.shape[0], len(last)))
        else:
            numbers = row_of(self.table.reads, step)
            raster = jnp.asarray(self.groups.order)[jnp.maximum(numbers, 0)]
            tokens = x[:, raster]
            positions = group_positions(cond, numbers, raster)
            if self.joined is not None:
                away = group_positions(uncond, numbers, raster)
                positions = self.joined.join({"cond": positions, "uncond": away})
        if self.joined is not None:
            tokens, last = self.joined.duplicate((tokens, last))
            cond = self.joined.join({"cond": cond, "uncond": uncond})
        return (tokens, positions, last, None, None, cond if positions is None else None)

    def whole(self, carry: Carry, cond: PyTree, uncond: PyTree) -> tuple[PyTree, ...]:
        (cond, _), (uncond, _) = self.first_inputs(cond), self.first_inputs(uncond)
        tokens = carry.x[:, np.asarray(self.groups.order[: -self.groups.sizes[-1]])]
        if self.joined is not None:
            tokens = self.joined.duplicate(tokens)
            cond = self.joined.join({"cond": cond, "uncond": uncond})
        return (tokens, None, None, None, None, cond)

    def output(self, raw: Float[Array, "R W L"], x: Tokens, step: Step) -> Float[Array, "B W V"]:
        """The guided logits of a group."""
        out = self.predicted(raw, step)
        rows = out.shape[0] if self.joined is None else x.shape[0]
        before = row_of(self.table.before, step)
        return self.guide(out, jnp.broadcast_to(before, (rows, out.shape[1])))

    def predicted(self, raw: Float[Array, "R W L"], step: Step) -> Float[Array, "R W V"]:
        """The logits of the tokens that a call draws, from what the network gives."""
        return raw

    def update(self, carry: Carry, out: Float[Array, "B W V"], step: Step) -> Carry:
        """Draw the tokens of a group, each with noise of its own place."""
        places = row_of(self.table.draws, step)[: out.shape[1]]
        known = jnp.maximum(places, 0)
        keys = jax.vmap(lambda key: jax.vmap(lambda place: jax.random.fold_in(key, place))(known))
        logits = self.log_probs(out)
        drawn = jax.vmap(jax.vmap(jax.random.categorical))(keys(carry.keys), logits)
        drawn = token_or_none(drawn.astype(jnp.int32), logits)
        places = jnp.where(places < 0, carry.x.shape[1], places)
        return carry._replace(x=carry.x.at[:, places].set(drawn, mode="drop"))

    def check_order(self, forward: Forward) -> None:
        """Raise ValueError for a model that predicts other groups, or no groups."""
        if not isinstance(forward.config, self.CONFIG):
            raise ValueError(
                f"a {type(self).__name__} samples models with {self.CONFIG.__name__}, got a "
                f"{forward.model.__name__}"
            )
        if forward.config.groups != self.groups:
            raise ValueError(
                f"the groups of tokens of this {type(self).__name__} are not those that the model "
                f"predicts: give groups=forward.config.groups"
            )


def row_of(table: np.ndarray, step: Step) -> Int[Array, "..."]:
    """What a table has for a call."""
    return jnp.asarray(table, jnp.int32)[step]


def group_loss(logits: Float[Array, "B N V"], tokens: Tokens) -> Float[Array, ""]:
    """Mean cross entropy of tokens.

    Args:
        logits: of the same tokens, such as `NextDiagonal.logits` gives.
        tokens: row by row.
    """
    chosen = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.mean(jnp.take_along_axis(chosen, tokens[..., None], axis=-1))


def check_whole(tokens: Tokens, groups: Groups) -> None:
    """Raise ValueError for tokens that are not those of whole images."""
    if tokens.shape[1] != len(groups.order):
        raise ValueError(
            f"the logits of a model of groups are of whole images of {len(groups.order)} tokens, "
            f"got {tokens.shape[1]}"
        )
