"""KIVI: keys and values as codes of 8 or 4 bits, keys by channel and values by token.

Buys: a quarter to a seventh of the bytes of a float32 cache (half to two sevenths of bfloat16), and
as much of the traffic when a token attends to it. Keys have channels that are large for all tokens,
so that a scale for each channel loses little; values do not.

    a window of G tokens of a text is sealed when it is full:
        k = (code + 2^(b-1)) s_c + min_c    for each channel c, over the window's tokens
        v = (code + 2^(b-1)) s_t + min_t    for each token t, over a head's channels
    the tokens of the window that is not full yet stay as they are

Static: bits and G. Dynamic: scales. The prompt itself attends to all of itself, exactly; later
tokens see codes. Cost: (b_k + b_v) / 2 / 16 of a bfloat16 cache, and for G tokens of each head two
float32 a channel (keys) and two a token (values), and one window of floats.

Source: KIVI, arXiv 2402.02750, with a residual that is sealed as a whole (its Algorithm 1, R = G).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from effjax import testing
from effjax.context import Room, State
from effjax.forward import Forward, Params
from effjax.layers.attention import CausalCore, Heads, KeyHeads, Positions
from effjax.layers.kv_cache import Caches, Kind, KVCache, Lengths, lengths_after, put, take
from effjax.transform import Method, Pair, Plan, Transform
from pallas_kernels.decode_attention import (
    decode_attention,
    pack_int4,
    quantized_decode_attention,
)
from pallas_kernels.merge import merge


@dataclasses.dataclass(frozen=True)
class KIVIPlan(Plan):
    """Bits of keys and values.

    Attributes:
        key_bits, value_bits: 8 or 4.
        group: tokens of a window: those that share the scales of the keys, and the most that stay
            floats.
    """

    key_bits: int = 4
    value_bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if self.key_bits not in (4, 8) or self.value_bits not in (4, 8):
            raise ValueError(
                f"keys and values have 4 or 8 bits, got {self.key_bits} and {self.value_bits}"
            )
        if self.group < 1:
            raise ValueError(f"group must be at least 1 token, got {self.group}")


def transform(plan: KIVIPlan) -> Transform:
    """Give every attention layer a cache of codes."""

    def apply(forward: Forward, params: Params) -> Pair:
        return forward.edit(Caches(_choose, plan)), params

    return Transform(METHOD.name, plan, apply)


def _choose(plan: KIVIPlan, core: CausalCore, room: Room, layer: int) -> Kind:
    if core.window is not None:
        raise ValueError(
            f"KIVI holds all tokens, but this model's layers see the last {core.window} only: its "
            f"own ring is smaller"
        )
    return KIVICache, {"plan": plan}


class KIVICache(KVCache):
    """Sealed windows of codes, and a window of floats that is being filled."""

    def __init__(self, inner: Any, *, plan: KIVIPlan, first: bool, room: Room):
        super().__init__(inner, first=first, room=room)
        self.plan = plan
        self.group = min(plan.group, room.total)
        self.sealed = room.total // self.group * self.group if plan.group < room.total else 0
        self.k, self.v = State(), State()  # codes
        self.k_scale, self.k_offset = State(), State()
        self.v_scale, self.v_offset = State(), State()
        self.k_open, self.v_open = State(), State()  # the window that is being filled

    @property
    def rollback(self) -> bool:
        return self.sealed == 0

    @property
    def exact_chunked_prefill(self) -> bool:
        return self.sealed == 0

    def store(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> None:
        k = self.core.rotary(k, positions)
        codes, _ = self._read(k)
        lengths = lengths_after(positions)
        slots = jnp.broadcast_to(jnp.arange(self.sealed), (k.shape[0], self.sealed))
        wanted = jnp.where(slots < lengths[:, None], slots, -1)
        if self.sealed:
            codes = self._codes(take(k, positions, wanted), take(v, positions, wanted))
        opened = self._open(lengths)
        self._write(codes, (take(k, positions, opened), take(v, positions, opened)))

    def append(
        self, q: Heads, k: KeyHeads, v: KeyHeads, x: Float[Array, "B S C"], positions: Positions
    ) -> Heads:
        q, k = self.core.rotary(q, positions), self.core.rotary(k, positions)
        codes, windows = self._read(k)
        if q.shape[1] == 1:
            out, codes, windows = self._one(q, k, v, positions, codes, windows)
            self._write(codes, windows)
            return out

        def step(held: Any, token: Any) -> tuple[Any, Array]:
            one = (part[:, None] for part in token)
            out, *held = self._one(*one, *held)
            return tuple(held), out[:, 0]

        # One by one: a window may be sealed in between.
        tokens = tuple(part.swapaxes(0, 1) for part in (q, k, v, positions))
        (codes, windows), out = jax.lax.scan(step, (codes, windows), tokens)
        self._write(codes, windows)
        return out.swapaxes(0, 1)

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        slots = jnp.arange(self.sealed)
        full = (lengths // self.group * self.group)[:, None] if self.sealed else 0
        sealed = jnp.where(slots < full, slots, -1)
        sealed = jnp.broadcast_to(sealed, (lengths.shape[0], self.sealed))
        return jnp.concatenate([sealed, self._open(lengths)], axis=1)[:, None]

    def _one(
        self,
        q: Heads,
        k: KeyHeads,
        v: KeyHeads,
        positions: Positions,
        codes: dict[str, Any],
        windows: tuple[Array, Array],
    ) -> tuple[Heads, dict[str, Any], tuple[Array, Array]]:
        """Append a token to every row, attend, and seal the windows that it fills."""
        place = jnp.where(positions >= 0, positions % self.group, -1)
        opened = put(windows[0], k, place), put(windows[1], v, place)
        lengths = place[:, 0] + 1
        if not self.sealed:
            out = decode_attention(q, *opened, lengths)
            assert isinstance(out, jax.Array)
            return out, codes, opened
        past = jnp.where(positions[:, 0] >= 0, positions[:, 0] // self.group * self.group, 0)
        parts = (
            quantized_decode_attention(q, lengths=past, return_lse=True, **codes),
            decode_attention(q, *opened, lengths, return_lse=True),
        )
        out = merge(*zip(*parts, strict=True))[0]
        filled = lengths == self.group
        new = self._codes(*opened)
        tokens = past[:, None] + jnp.arange(self.group)
        where = {
            name: jnp.where(filled[:, None], past[:, None] // self.group, -1)
            if name in ("k_scale", "k_offset")
            else jnp.where(filled[:, None], tokens, -1)
            for name in codes
        }
        codes = {name: put(codes[name], new[name], where[name]) for name in codes}
        return out, codes, opened

    def _codes(self, k: KeyHeads, v: KeyHeads) -> dict[str, Any]:
        """Whole windows as codes, by the names that the kernel takes."""
        batch, _, heads, width = k.shape
        by_window = k.reshape(batch, -1, self.group, heads, width)
        k_codes, k_scale, k_offset = _quantize(by_window, self.plan.key_bits, axis=2)
        v_codes, v_scale, v_offset = _quantize(v, self.plan.value_bits, axis=3)
        return {
            "k": _pack(k_codes.reshape(k.shape), self.plan.key_bits),
            "v": _pack(v_codes, self.plan.value_bits),
            "k_scale": k_scale[:, :, 0],
            "k_offset": k_offset[:, :, 0],
            "v_scale": v_scale,
            "v_offset": v_offset,
        }

    def _open(self, lengths: Lengths) -> Int[Array, "B G"]:
        """Positions of the tokens in the window that is being filled; -1 for an empty slot."""
        begin = lengths // self.group * self.group if self.sealed else jnp.zeros_like(lengths)
        positions = begin[:, None] + jnp.arange(self.group)
        return jnp.where(positions < lengths[:, None], positions, -1)

    def _read(self, k: KeyHeads) -> tuple[dict[str, Any], tuple[Array, Array]]:
        batch, _, heads, width = k.shape
        codes: dict[str, Any] = {}
        if self.sealed:
            bits = {"k": self.plan.key_bits, "v": self.plan.value_bits}
            for name, of in bits.items():
                shape = (batch, self.sealed, heads, width * of // 8)
                dtype = jnp.uint8 if of == 4 else jnp.int8
                codes[name] = getattr(self, name).read(shape, dtype)
            shapes = {
                "k_scale": (batch, self.sealed // self.group, heads, width),
                "v_scale": (batch, self.sealed, heads, 1),
            }
            for name, shape in shapes.items():
                for each in (name, name.replace("scale", "offset")):
                    codes[each] = getattr(self, each).read(shape, jnp.float32)
        shape = (batch, self.group, heads, width)
        return codes, (self.k_open.read(shape, k.dtype), self.v_open.read(shape, k.dtype))

    def _write(self, codes: dict[str, Any], windows: tuple[Array, Array]) -> None:
        for name, value in codes.items():
            getattr(self, name).write(value)
        self.k_open.write(windows[0])
        self.v_open.write(windows[1])


def _quantize(x: Array, bits: int, *, axis: int) -> tuple[Array, Array, Array]:
    """Codes int8, and scale and offset float32 with x = code scale + offset, one along an axis."""
    x = x.astype(jnp.float32)
    low, high = jnp.min(x, axis, keepdims=True), jnp.max(x, axis, keepdims=True)
    scale = jnp.maximum((high - low) / (2**bits - 1), 1e-8)
    half = 2 ** (bits - 1)
    codes = jnp.clip(jnp.round((x - low) / scale), 0, 2**bits - 1) - half
    return codes.astype(jnp.int8), scale, low + half * scale


def _pack(codes: Array, bits: int) -> Array:
    return pack_int4(codes) if bits == 4 else codes


def _identity(subject: testing.Subject) -> KIVIPlan:
    return KIVIPlan(group=1 << 20)  # no window is ever full


def _ladder(subject: testing.Subject) -> tuple[KIVIPlan, ...]:
    return tuple(KIVIPlan(k, v, group=4) for k, v in ((8, 8), (8, 4), (4, 4)))


METHOD = Method(
    name="kivi",
    paper="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache, arXiv 2402.02750",
    seams=("edits",),
    plan=KIVIPlan,
    transform=transform,
    search=None,
    identity=_identity,
    ladder=_ladder,
    tiny=testing.tiny_llama,
)
