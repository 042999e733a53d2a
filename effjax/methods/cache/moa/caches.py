"""Caches whose heads have sinks and rings of their own sizes, in two layouts."""

from __future__ import annotations

import abc
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from effjax.caches import AttentionInputs, Caches, Kind, KVCache, Lengths
from effjax.caches.attention import decode
from effjax.caches.install import Place
from effjax.caches.slots import (
    Places,
    foresee,
    left_aligned,
    lengths_after,
    put_all,
    ring_positions,
    ring_slot,
    take,
)
from effjax.caches.storage import Storage
from effjax.context import CacheLength, State
from effjax.forward import Forward, Params
from effjax.layers.attention import Heads, KeyHeads, Positions, required_attentions
from effjax.methods.cache.moa.plan import MoAPlan, Rule, check_fits
from effjax.transform import Pair, Transform
from pallas_kernels.block_mask import SinkLocal
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.decode_attention import flat_decode_attention

NAME = "moa"


def transform(plan: MoAPlan) -> Transform:
    """Give every attention layer heads of their own spans."""

    def apply(forward: Forward, params: Params) -> Pair:
        required_attentions(forward.module(params), "causal", needed_by=NAME)
        config = forward.config
        check_fits(plan, config.num_layers, config.num_heads, config.num_kv_heads)
        return forward.patch(Caches(_choose, plan)), params

    return Transform(NAME, plan, apply)


def _choose(plan: MoAPlan, place: Place) -> Kind:
    kind = {"grouped": GroupedCache, "flat": FlatCache}[plan.layout]
    plan.slots(place.layer, place.cache_length.total)  # names a head that has no span
    return kind, {"rules": plan.rules(place.layer), "plan": plan}


@lru_cache(maxsize=1024)
def _lengths_of_blocks(plan: MoAPlan, rule: Rule, most: int) -> np.ndarray:
    """The least length, up to `most`, at which a head has each of its blocks beyond the floor."""
    slots = plan.span(rule, np.arange(most + 1))
    blocks = np.arange(plan.floor, slots[-1], plan.block)
    return np.searchsorted(slots, blocks, side="right").astype(np.int32)


class SpanCache(KVCache):
    """Heads with sinks and rings of their own sizes: what both layouts share.

    A row uses as many of its slots as a sequence of its length has.

    Args:
        plan: how spans are cut into blocks and stored.
        rules: of the layer's heads.
    """

    takes_latents = False

    def __init__(
        self,
        inner: Any,
        *,
        plan: MoAPlan,
        rules: tuple[Rule, ...],
        first: bool,
        cache_length: CacheLength,
    ):
        super().__init__(inner, first=first, cache_length=cache_length)
        self.plan = plan
        self.rules = rules
        self.slots = plan.slots_of(rules, cache_length.total)
        self.foreseen = State()
        self.sink = plan.sink

    @property
    def multi_token_append(self) -> bool:
        return False

    @property
    def rollback(self) -> bool:
        return False

    @property
    def exact_chunked_prefill(self) -> bool:
        return False

    def used(self, batch: int) -> dict[Rule, Lengths]:
        """Slots that heads use in every row, by their rule."""
        tokens = self.foreseen.read((batch,), jnp.int32)[:, None]
        found = {}
        for rule in dict.fromkeys(self.rules):
            lengths = jnp.asarray(_lengths_of_blocks(self.plan, rule, self.cache_length.total))
            blocks = jnp.sum(tokens >= lengths, axis=1, dtype=jnp.int32)
            found[rule] = self.plan.floor + self.plan.block * blocks
        return found

    def store(self, inputs: AttentionInputs) -> None:
        foresee(self.foreseen, inputs.positions, self.cache_length)
        self.fill(inputs.rotated_k, inputs.v, inputs.positions)

    @abc.abstractmethod
    def fill(self, k: KeyHeads, v: KeyHeads, positions: Places) -> None:
        """Store what slots hold of a sequence's first tokens, keys rotated."""

    def attend_prompt(self, inputs: AttentionInputs, positions: Positions | None) -> Heads:
        """Attend within spans of whole blocks."""
        batch, columns, heads, _ = inputs.q.shape
        lengths, group = np.arange(columns + 1), heads // inputs.k.shape[2]
        if all((self.plan.span(rule, lengths) >= lengths).all() for rule in self.rules):
            return super().attend_prompt(inputs, positions)

        def rule(slots: tuple[int, ...]) -> SinkLocal:
            local = tuple(each - self.sink for each in slots for _ in range(group))
            return SinkLocal(self.sink, local, granularity=self.plan.block)

        q, k, v = inputs.rotated_q, inputs.rotated_k, inputs.v
        with jax.named_scope("attention"):
            if positions is None:
                slots = self.plan.slots_of(self.rules, columns + self.cache_length.new)
                return block_sparse_attention(q, k, v, rule(slots))
            used = self.used(batch)
            local = jnp.stack([used[each] - self.sink for each in self.rules], axis=1)
            spans = jnp.stack([jnp.full_like(local, self.sink), local], axis=2)
            # Blocks count from a sequence's first token, wherever its row begins.
            q, k, v = (left_aligned(part, inputs.positions) for part in (q, k, v))
            count = lengths_after(inputs.positions)[:, None]
            valid = (jnp.arange(columns) < count).astype(jnp.int32)
            out = block_sparse_attention(
                *(q, k, v, rule(self.slots)),
                segments=(valid, valid),
                by_row=jnp.repeat(spans, group, axis=1),
            )
        places = jnp.maximum(inputs.positions, 0)[:, :, None, None]
        return jnp.take_along_axis(out, places, axis=1)

    def positions(self, lengths: Lengths) -> Int[Array, "B G C"]:
        """Heads with fewer slots than the most have -1 at the end."""
        used, most = self.used(lengths.shape[0]), max(self.slots)
        held = [
            ring_positions(lengths, self.sink, used[rule] - self.sink, slots=most)
            for rule in self.rules
        ]
        return jnp.stack(held, axis=1)

    def filled(self, lengths: Lengths) -> Float[Array, ""]:
        slots = lengths.shape[0] * sum(self.slots)
        return jnp.sum(self.positions(lengths) >= 0).astype(jnp.float32) / slots


class GroupedCache(SpanCache):
    """Arrays [B, C, heads, ...] for the heads that have one rule, and so equally many slots."""

    def __init__(self, inner: Any, **options: Any):
        super().__init__(inner, **options)
        kinds = sorted(set(zip(self.slots, self.rules, strict=True)))
        self.groups = tuple(
            (slots, rule, tuple(head for head, each in enumerate(self.rules) if each == rule))
            for slots, rule in kinds
        )
        self.tokens = nnx.List([Storage(self.plan.bits) for _ in kinds])

    def fill(self, k: KeyHeads, v: KeyHeads, positions: Places) -> None:
        lengths = lengths_after(positions)
        used = self.used(lengths.shape[0])
        for group, (slots, rule, heads) in enumerate(self.groups):
            held = ring_positions(lengths, self.sink, used[rule] - self.sink, slots=slots)
            own = (take(x[:, :, _of_heads(heads)], positions, held) for x in (k, v))
            self.tokens[group].write(self.tokens[group].of(*own))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, k, v, positions = inputs.rotated_q, inputs.rotated_k, inputs.v, inputs.positions
        lengths = lengths_after(positions)
        batch, _, heads, width = q.shape
        q = q.reshape(batch, 1, v.shape[2], -1, width)
        parts, order, used = [], [], self.used(batch)
        for group, (slots, rule, own) in enumerate(self.groups):
            chosen, tokens = _of_heads(own), self.tokens[group]
            place = ring_slot(positions, self.sink, (used[rule] - self.sink)[:, None])
            new = tokens.of(k[:, :, chosen], v[:, :, chosen])
            held = put_all(tokens.read(new, slots), new, place)
            tokens.write(held)
            valid = jnp.minimum(lengths, used[rule])
            out = decode(q[:, :, chosen].reshape(batch, 1, -1, width), held, valid)
            parts.append(out.reshape(batch, 1, len(own), -1, v.shape[3]))
            order += own
        out = jnp.concatenate(parts, axis=2)
        if order != sorted(order):
            out = out[:, :, jnp.argsort(jnp.asarray(order))]
        return out.reshape(batch, 1, heads, -1)


def _of_heads(heads: tuple[int, ...]) -> slice | Array:
    """Heads as an index: a slice if they stand side by side."""
    if heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return jnp.asarray(heads)


class FlatCache(SpanCache):
    """Arrays [B, sum of C, ...] with a stretch of slots for each head."""

    def __init__(self, inner: Any, **options: Any):
        super().__init__(inner, **options)
        self.start = tuple(sum(self.slots[:head]) for head in range(len(self.slots)))
        self.flat = Storage(self.plan.bits)

    def fill(self, k: KeyHeads, v: KeyHeads, positions: Places) -> None:
        lengths = lengths_after(positions)
        used = self.used(lengths.shape[0])
        held = [
            ring_positions(lengths, self.sink, used[rule] - self.sink, slots=slots)
            for rule, slots in zip(self.rules, self.slots, strict=True)
        ]

        def own(x: KeyHeads) -> Float[Array, "B N D"]:
            heads = [take(x[:, :, head], positions, each) for head, each in enumerate(held)]
            return jnp.concatenate(heads, axis=1)

        self.flat.write(self.flat.of(own(k), own(v)))

    def append(self, inputs: AttentionInputs) -> Heads:
        q, k, v, positions = inputs.rotated_q, inputs.rotated_k, inputs.v, inputs.positions
        used = self.used(q.shape[0])
        own = [
            ring_slot(positions, self.sink, (used[rule] - self.sink)[:, None]) + start
            for rule, start in zip(self.rules, self.start, strict=True)
        ]
        places = jnp.where(positions >= 0, jnp.concatenate(own, axis=1), -1)
        slots = jnp.stack([used[rule] for rule in self.rules], axis=1)
        new = self.flat.of(k[:, 0], v[:, 0])
        held = put_all(self.flat.read(new, sum(self.slots)), new, places)
        self.flat.write(held)
        out = flat_decode_attention(
            q,
            lengths=jnp.minimum(lengths_after(positions)[:, None], slots),
            head_start=self.start,
            head_capacity=self.slots,
            **held,
        )
        assert isinstance(out, jax.Array)
        return out
