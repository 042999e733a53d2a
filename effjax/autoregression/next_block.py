"""Sampling block by block (next-block prediction, arXiv 2502.07737): b tokens in each call.

    first block: given, or made token by token from the condition
    for i in 1 ... N / b - 1:
        z_0 ... z_(b-1) = model(block i - 1)            all before it is in a KV cache
        token j of block i = draw(z_j),  with guidance, top-k and top-p as for `NextToken`

Images of N tokens take N / b calls, less one for each block that is given; a first block that is
made token by token takes b of its own in place of one: it is read again as a block. Blocks of one
token are LlamaGen. Tokens of a block are drawn independently of each other, so larger blocks want a
lower temperature. With a `guidance_interval` of m a block is guided if there are fewer than m
tokens before it.

Cost: see `effjax.autoregression.next_group`, with one head. Calls of a token have b columns too.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from effjax.autoregression.next_group import Calls, NextGroup, check_whole
from effjax.autoregression.next_token import DATA, STATIC, Tokens
from effjax.context import PyTree
from effjax.forward import Forward, Params
from effjax.layers.groups import Groups
from effjax.loops import Carry
from effjax.models.llamagen import Condition, condition_tokens
from effjax.models.nbp import NBPConfig


class Started(NamedTuple):
    """A condition, and the first blocks of images, such as a frame of a video.

    Attributes:
        condition: labels, or captions.
        tokens: of the blocks that are given, one block after the other.
    """

    condition: Condition
    tokens: Int[Array, "B S"]


jax.export.register_namedtuple_serialization(Started, serialized_name="effjax.Started")


@partial(
    jax.tree_util.register_dataclass, data_fields=DATA, meta_fields=(*STATIC, "groups", "given")
)
@dataclasses.dataclass(frozen=True, eq=False)
class NextBlock(NextGroup):
    """The loop that samples the tokens of an image or a video block by block with an `NBP`.

    It is called as `NextToken` is, and has the same fields, of which `decoder` and `ids` stay None.
    `grid` has the rows of all frames and the columns; latents of frames stand below each other.

    Attributes:
        given: blocks that are not drawn: conditions are `Started` then.
    """

    CONFIG = NBPConfig

    given: int = dataclasses.field(default=0, kw_only=True)

    @property
    def table(self) -> Calls:
        return _table(self.groups, self.given)

    @property
    def rereads(self) -> bool:
        return not self.given

    @property
    def given_tokens(self) -> int:
        """Tokens of the blocks that are given."""
        return self.given * self.groups.sizes[0]

    @property
    def new_tokens(self) -> int:
        return self.tokens_of_image - self.given_tokens

    def read_at_once(self, cond: PyTree) -> int:
        return condition_tokens(self.first_inputs(cond)[0]) + self.given_tokens

    def unconditional(self, forward: Forward, cond: PyTree, uncond: PyTree = None) -> PyTree:
        if self.guided and uncond is None and isinstance(cond, Started):
            return cond._replace(condition=forward.config.null_condition(cond.condition))
        return super().unconditional(forward, cond, uncond)

    def first_inputs(self, cond: PyTree) -> tuple[PyTree, Tokens | None]:
        if not self.given:
            return cond, None
        return (None, None) if cond is None else (cond.condition, cond.tokens)

    def check(self, forward: Forward) -> None:
        super().check(forward)
        count = len(self.groups.sizes)
        if not 0 <= self.given < count:
            raise ValueError(
                f"given must be 0 ... {count - 1} of the {count} blocks, got {self.given}"
            )

    def init(
        self,
        forward: Forward,
        params: Params,
        cond: PyTree,
        key: Any = None,
        *,
        uncond: PyTree = None,
    ) -> Carry:
        """The given tokens, empty caches and the keys.

        Raises:
            ValueError: as for `NextToken`, for conditions that are `Started` where no blocks are
                given, or hold others, and for caches that take tokens one by one.
        """
        self.check(forward)
        held = cond.tokens.shape[1] if isinstance(cond, Started) else None
        if held != (self.given_tokens or None):
            wanted = f"Started(condition, tokens [B, {self.given_tokens}])"
            raise ValueError(
                f"a loop of given={self.given} blocks of {self.groups.sizes[0]} tokens takes "
                f"{wanted if self.given else 'labels or captions'}, got "
                f"{'a condition alone' if held is None else f'{held} tokens'}"
            )
        carry = super().init(forward, params, cond, key, uncond=uncond)
        if held is None:
            return carry
        places = jnp.asarray(self.groups.order[:held])
        return carry._replace(x=carry.x.at[:, places].set(cond.tokens))

    @staticmethod
    def logits(
        forward: Forward, params: Params, tokens: Int[Array, "B N"], cond: PyTree
    ) -> Float[Array, "B N V"]:
        """Logits of the given tokens of whole images, without guidance.

        All but those of the first block are made in one call. The first block is read token by
        token, in a call of its own, if it has several.

        Args:
            forward: an NBP without caches.
            params: its parameters.
            tokens: row by row, frame by frame.
            cond: labels, or captions.
        """
        groups = forward.config.groups
        check_whole(tokens, groups)
        size, first = groups.sizes[0], condition_tokens(cond) - 1

        def read(count: int, start: int, stop: int) -> Array:
            """Logits in the columns of some of the first tokens; -1 is the condition."""
            order = jnp.asarray(groups.order[:count], jnp.int32)
            columns = first + 1 + jnp.arange(start, stop)
            columns = jnp.broadcast_to(columns, (len(tokens), stop - start))
            given = tokens[:, order] if count else None
            return forward(params, {}, given, None, columns, None, None, cond)[0]

        whole = read(len(groups.order) - size, -1, len(groups.order) - size)
        parts = [whole[:, :1], whole[:, 1:]]
        if size > 1:  # an incomplete block is causal
            parts.insert(1, read(size - 1, 0, size - 1))
        return jnp.concatenate(parts, axis=1)[:, groups.numbers]


@lru_cache(maxsize=16)
def _table(groups: Groups, given: int) -> Calls:
    numbers = np.stack([groups.numbers_of(block) for block in range(len(groups.sizes))])
    single = np.full_like(numbers[0], -1)
    draws, before = [*numbers[max(given, 1) :]], [*groups.starts[max(given, 1) : -1]]
    reads = [single, *numbers[given:-1]] if given else [*numbers[:-1]]
    if not given:  # the first block: token by token
        alone = [np.append(number, single[1:]) for number in range(groups.sizes[0])]
        draws, before = [*alone, *draws], [*range(groups.sizes[0]), *before]
        reads = [single, *alone[:-1], *reads]
    return Calls(np.stack(reads), groups.places(np.stack(draws)), np.asarray(before))
