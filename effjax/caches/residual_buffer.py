"""Caches that seal windows: full ones in a smaller form, the one that is being filled as it is.

A sequence is cut in windows of W tokens. A token goes to the open window; the token that fills it
still sees the whole window as it is, and then the window is sealed and the next one is opened. So
between 1 and W last tokens are exact. The window is a residual buffer: it is emptied when it is
full, and does not slide.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from effjax.caches.inputs import AttentionInputs
from effjax.caches.protocol import KVCache
from effjax.caches.slots import Lengths, Places, lengths_after, put, take
from effjax.context import CacheLength, State
from effjax.layers.attention import Heads, Outputs
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.merge import merge

Tokens = Mapping[str, Shaped[Array, "B S ..."]]
Arrays = dict[str, Array]


class ResidualBufferCache(KVCache):
    """What caches with windows share.

    Args:
        window: W. In sequences that are not longer nothing is ever sealed.
        sealed: names of what `seal` makes.
        parts: names of what an open window holds beside keys `k` and values `v`.
    """

    def __init__(
        self,
        inner: nnx.Module,
        *,
        window: int,
        sealed: Sequence[str],
        parts: Sequence[str] = (),
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.window = min(window, cache_length.total)
        self.slots = cache_length.total // window * window if window < cache_length.total else 0
        self.names = tuple(sealed) if self.slots else ()
        self.parts = ("k", "v", *(parts if self.slots else ()))
        for name in (*self.names, *(f"{part}_open" for part in self.parts)):
            setattr(self, name, State())

    @property
    def rollback(self) -> bool:
        return self.slots == 0

    @property
    def exact_chunked_prefill(self) -> bool:
        return self.slots == 0

    def more(self, inputs: AttentionInputs) -> Arrays:
        """What an open window holds beside keys (rotated) and values, by name: [B, S, ...]."""
        return {}

    @abc.abstractmethod
    def seal(self, tokens: Tokens) -> Arrays:
        """Whole windows [B, n W, ...] in their smaller form.

        Returns:
            Arrays [B, n W, ...] or [B, n, ...] by name.
        """

    @abc.abstractmethod
    def attend_sealed(
        self, q: Heads, sealed: Arrays, lengths: Lengths
    ) -> tuple[Outputs, Float[Array, "B S H"]]:
        """Attention of one token to the first sealed ones, and its log-sum-exps."""

    def store(self, inputs: AttentionInputs) -> None:
        tokens, positions = self._tokens(inputs), inputs.positions
        lengths = lengths_after(positions)
        sealed, _ = self._read(tokens)
        if self.slots:
            slots = jnp.broadcast_to(jnp.arange(self.slots), (len(lengths), self.slots))
            wanted = jnp.where(slots < lengths[:, None], slots, -1)
            sealed = self.seal({n: take(part, positions, wanted) for n, part in tokens.items()})
        opened = self._open(lengths)
        self._write(sealed, {n: take(part, positions, opened) for n, part in tokens.items()})

    def append(self, inputs: AttentionInputs) -> Heads:
        q, tokens, positions = inputs.rotated_q, self._tokens(inputs), inputs.positions
        held = self._read(tokens)
        if q.shape[1] == 1:
            out, *held = self._one(q, tokens, positions, *held)
            self._write(*held)
            return out

        def step(held: Any, column: Any) -> tuple[Any, Array]:
            out, *held = self._one(*jax.tree.map(lambda part: part[:, None], column), *held)
            return tuple(held), out[:, 0]

        # One by one: a window may be sealed in between.
        columns = jax.tree.map(lambda part: part.swapaxes(0, 1), (q, tokens, positions))
        held, out = jax.lax.scan(step, held, columns)
        self._write(*held)
        return out.swapaxes(0, 1)

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        slots = jnp.arange(self.slots)
        full = (lengths // self.window * self.window)[:, None] if self.slots else 0
        sealed = jnp.where(slots < full, slots, -1)
        sealed = jnp.broadcast_to(sealed, (lengths.shape[0], self.slots))
        return jnp.concatenate([sealed, self._open(lengths)], axis=1)[:, None]

    def _one(
        self, q: Heads, tokens: Arrays, positions: Places, sealed: Arrays, opened: Arrays
    ) -> tuple[Outputs, Arrays, Arrays]:
        """Append a token to every row, attend, and seal the windows that it fills."""
        place = jnp.where(positions >= 0, positions % self.window, -1)
        opened = {name: put(opened[name], part, place) for name, part in tokens.items()}
        lengths = place[:, 0] + 1
        exact = decode_attention(q, opened["k"], opened["v"], lengths, return_lse=True)
        if not self.slots:
            return exact[0], sealed, opened
        past = jnp.where(positions[:, 0] >= 0, positions[:, 0] // self.window * self.window, 0)
        out = merge(*zip(self.attend_sealed(q, sealed, past), exact, strict=True))[0]
        new = {}
        for name, part in self.seal(opened).items():
            count = part.shape[1]  # 1 or W
            slots = (past * count // self.window)[:, None] + jnp.arange(count)
            slots = jnp.where((lengths == self.window)[:, None], slots, -1)
            new[name] = put(sealed[name], part, slots)
        return out, new, opened

    def _tokens(self, inputs: AttentionInputs) -> Arrays:
        more = self.more(inputs) if self.slots else {}
        return {"k": inputs.rotated_k, "v": inputs.v, **more}

    def _open(self, lengths: Lengths) -> Int[Array, "B W"]:
        """Positions of the tokens in the window that is being filled; -1 for an empty slot."""
        begin = lengths // self.window * self.window if self.slots else jnp.zeros_like(lengths)
        positions = begin[:, None] + jnp.arange(self.window)
        return jnp.where(positions < lengths[:, None], positions, -1)

    def _read(self, tokens: Arrays) -> tuple[Arrays, Arrays]:
        def shapes(count: int) -> Any:
            return {
                name: jax.ShapeDtypeStruct((part.shape[0], count, *part.shape[2:]), part.dtype)
                for name, part in tokens.items()
            }

        made = jax.eval_shape(self.seal, shapes(self.slots)) if self.slots else {}
        sealed = {name: getattr(self, name).read(s.shape, s.dtype) for name, s in made.items()}
        opened = {
            name: getattr(self, f"{name}_open").read(s.shape, s.dtype)
            for name, s in shapes(self.window).items()
        }
        return sealed, opened

    def _write(self, sealed: Arrays, opened: Arrays) -> None:
        for name, value in sealed.items():
            getattr(self, name).write(value)
        for name, value in opened.items():
            getattr(self, f"{name}_open").write(value)
