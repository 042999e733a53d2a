"""How slots hold tokens: as floats, or as quantized values.

A cache decides which token goes to which slot; its `Storage` holds the tokens there. What is held
is a dictionary of arrays [B, C, K, ...] in which a token has the same place in all. So caches move
tokens (`take`, `put`, gathers) in one way, whatever the storage is.

With 8 or 4 bits, a slot holds quantized values with a scale and an offset for its token and head,
of keys as of values:

    x = qvalue scale + offset,      scale = (max x - min x) / (2^bits - 1) over the head's channels

KIVI shares the scales of keys among the tokens of a window instead, channel by channel, and seals a
window as a whole. That loses less where few channels are large for all tokens. It does not fit
slots whose tokens are chosen: heads keep tokens of their own, sequences keep different numbers of
them, and new tokens are written, rejected and overwritten one by one. Scales by token need none of
this, and take fewer bytes: 8 for the D keys of a token, where KIVI's take D / 4 at windows of 32.
"""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from effjax.caches.quantization import FLOAT, from_qvalues, pack, to_qvalues
from effjax.caches.slots import Held
from effjax.context import State


class Storage(nnx.Module):
    """Slots of a cache and the tokens in them.

    Args:
        bits: of keys and values: 16 (floats as they are), 8 or 4.
        leading: values are so many first channels of the keys, and floats are held once; None
            where they are not.
    """

    def __init__(self, bits: int = FLOAT, *, leading: int | None = None):
        self.bits = bits
        self.leading = None if self.quantized else leading
        parts = ("", "_scale", "_offset") if self.quantized else ("",)
        for name in (f"{of}{part}" for of in self.held for part in parts):
            setattr(self, name, State())

    @property
    def held(self) -> str:
        """Which of keys and values are held."""
        return "kv" if self.leading is None else "k"

    @property
    def quantized(self) -> bool:
        """Whether what is read is not exactly what was written."""
        return self.bits != FLOAT

    def of(self, k: Float[Array, "B S ... D"], v: Float[Array, "B S ... W"]) -> Held:
        """What slots hold of tokens, from their rotated keys and their values."""
        if self.leading is not None:
            return {"k": k}
        if not self.quantized:
            return {"k": k, "v": v}
        found = {}
        for name, x in (("k", k), ("v", v)):
            qvalues, scale, offset = to_qvalues(x, self.bits, axis=-1)
            found |= {name: pack(qvalues, self.bits)}
            found |= {f"{name}_scale": scale, f"{name}_offset": offset}
        return found

    def floats(
        self, held: Held, dtype: DTypeLike
    ) -> tuple[Float[Array, "B S ... D"], Float[Array, "B S ... W"]]:
        """The inverse of `of`: keys and values, rounded as they are held. An empty slot is 0."""
        if self.leading is not None:
            return held["k"], held["k"][..., : self.leading]
        if not self.quantized:
            return held["k"], held["v"]
        k, v = (
            from_qvalues(held[of], held[f"{of}_scale"], held[f"{of}_offset"], self.bits)
            for of in "kv"
        )
        return k.astype(dtype), v.astype(dtype)

    def read(self, like: Held, slots: int) -> Held:
        """What so many slots hold; shapes and dtypes of a token are those of other ones."""
        return {
            name: getattr(self, name).read((part.shape[0], slots, *part.shape[2:]), part.dtype)
            for name, part in like.items()
        }

    def write(self, held: Held) -> None:
        """Replace what all slots hold."""
        for name, part in held.items():
            getattr(self, name).write(part)
