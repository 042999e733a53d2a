"""Slots of quantized values: every kind of cache attends to what it holds, rounded."""

import dataclasses

import chex
import numpy as np
import pytest

from effjax import testing
from effjax.caches import DenseCache, PressedCache, RingCache
from effjax.caches.evicting import EvictingCache
from effjax.caches.pressed import Highest
from effjax.caches.shared import SharedCache
from effjax.cost import state_bytes
from effjax.generate import prefill, sequence_bytes
from effjax.methods import ada_kv, chunk_kv, knorm, pyramid_kv, snap_kv, streaming_llm, tova
from effjax.registry import methods
from tests.caches.test_caches import pieces, run
from tests.methods.test_budgets import (
    EVICTING,
    SHARED,
    attention,
    heads_of,
    options_of,
    shared_sets,
    simulated,
)
from tests.methods.test_caches import METHODS_OF_CACHES, best

PROMPT = 14
KNORM = {"choose": Highest(knorm.KnormPlan().score), "keep": 6}


def rounded(x, bits):
    """Each token's and head's channels on 2^bits places from the least to the largest."""
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = (high - low) / (2**bits - 1)
    return np.round((x - low) / scale) * scale + low


def kept_by_norm(tokens):
    """Places that the heads of both rows keep of a prompt."""
    _, k, _ = heads_of()
    return best(-np.linalg.norm(k[:, :tokens], axis=-1).transpose(0, 2, 1), 6)


KINDS = {  # cache, options, and what a token at a place sees in a row under a key head
    DenseCache: ({}, lambda row, head, place: range(place + 1)),
    RingCache: (
        {"sinks": 2, "ring": 5},
        lambda row, head, place: [0, 1, *range(place - 4, place + 1)],
    ),
    PressedCache: (
        KNORM,
        lambda row, head, place: [*kept_by_norm(PROMPT)[row, head], *range(PROMPT, place + 1)],
    ),
    SharedCache: (
        SHARED,
        lambda row, head, place: [*shared_sets(PROMPT)[row][head], *range(PROMPT, place + 1)],
    ),
}


@pytest.mark.parametrize(
    ("kind", "sizes", "bits"),
    [*((kind, (1, 8), 4) for kind in KINDS), (PressedCache, (9,), 8), (SharedCache, (9,), 8)],
)
def test_new_tokens_attend_to_what_is_held(kind, sizes, bits):
    """Few at once and many, which take another path; their own keys and values included."""
    options, seen = KINDS[kind]
    outputs, _ = run(kind, pieces(PROMPT, *sizes), bits=bits, **options)
    got = np.concatenate(outputs[1:], axis=1)
    q, k, v = heads_of()
    k, v = rounded(k, bits), rounded(v, bits)
    for row, new, head in np.ndindex(got.shape[:3]):
        place, mine = PROMPT + new, head // 2
        held = list(seen(row, mine, place))
        want = attention(q[row, place, head], k[row, held, mine]) @ v[row, held, mine]
        chex.assert_trees_all_close(got[row, new, head], want, atol=1e-5)


@pytest.mark.parametrize("name", EVICTING)
def test_scores_of_slots_follow_attention_to_what_is_held(name):
    plan, recent, first, change = EVICTING[name]
    want, held = simulated(10, 6, recent, first, change, held_as=lambda x: rounded(x, 4))
    calls = pieces(10, 1, 8, 4)
    outputs, values = run(EvictingCache, calls, bits=4, **options_of(plan, 6))
    chex.assert_trees_all_close(np.concatenate(outputs[1:], axis=1), want, atol=1e-5)
    got = values["held",].tolist()
    assert [[sorted(own) for own in row] for row in got] == [
        [sorted(own) for own in row] for row in held
    ]


def test_rejected_tokens_leave_no_trace():
    """A token has scales of its own: what was there before does not change them."""
    straight, _ = run(PressedCache, pieces(PROMPT, 1, 1), bits=4, **KNORM)
    rejected = (slice(18, 22), np.broadcast_to(np.arange(PROMPT, 18), (2, 4)))
    calls = [*pieces(PROMPT), rejected, *pieces(PROMPT, 1, 1)[1:]]
    outputs, _ = run(PressedCache, calls, bits=4, **KNORM)
    chex.assert_trees_all_close(outputs[-1], straight[-1], atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("method", [knorm, ada_kv, tova, streaming_llm])
def test_bytes_are_those_of_values_and_scales(method, bits):
    """Two rows, two layers, two key heads of 8 channels, 20 tokens and 4 new ones."""
    subject = testing.tiny_llama()
    options = {streaming_llm: {"sinks": 1}, ada_kv: {"press": "knorm"}}.get(method, {})
    plan = method.METHOD.plan(capacity=12, bits=bits, **options)
    forward, params = method.transform(plan)(subject.forward, subject.params)
    state = forward.with_cache_length(20, 4).init(params, subject.cond[:2, :1])
    token = 2 * (8 * bits // 8 + 2 * 4)
    slots = 12 if method in (tova, streaming_llm) else 12 + 4
    held = sum(x.nbytes for path, x in state.items() if {"tokens", "flat"} & set(path.split(".")))
    assert held == 2 * 2 * 2 * slots * token
    # Beside them positions, for TOVA scores, and counts of rows and heads: int32 or float32.
    numbers = {knorm: 12, ada_kv: 12, tova: 2 * 12, streaming_llm: 0}[method]
    counts = {knorm: 1, ada_kv: 1 + 2, tova: 0, streaming_llm: 0}[method]
    total = held + 4 * (2 * 2 * 2 * numbers + 2 * 2 * counts)
    assert state_bytes(state) == total  # as `effjax bench` counts
    if method is knorm and bits == 4:  # as `effjax apply` does: one row without new tokens
        alone = sequence_bytes(forward, params, 20)
        assert alone.allocated == alone.useful == 2 * (2 * 12 * (token + 4) + 4)


def test_all_budgets_take_bits():
    """Whatever cache a plan chooses, its slots are of these bits."""
    found = 0
    for method in METHODS_OF_CACHES.values():
        if "capacity" not in {field.name for field in dataclasses.fields(method.plan)}:
            continue
        subject, found = testing.tiny_llama(num_layers=1), found + 1
        for plan in (method.identity(subject), method.ladder(subject)[0]):
            plan = dataclasses.replace(plan, bits=8)
            forward, params = method.transform(plan)(subject.forward, subject.params)
            forward = forward.with_cache_length(12, 4)
            state = forward.init(params, subject.cond[:, :1])
            keys = [x for path, x in state.items() if path.endswith(".k")]
            assert keys
            assert {str(x.dtype) for x in keys} == {"int8"}, method.name
    assert found >= 10


def test_chunks_of_a_prompt_would_see_quantized_values():
    subject = testing.tiny_llama(num_layers=1)
    for method, plan, name in (
        (knorm, knorm.KnormPlan(ratio=0.0, bits=8), "DenseCache"),
        (streaming_llm, streaming_llm.StreamingLLMPlan(ratio=0.0, bits=8), "RingCache"),
    ):
        forward, params = method.transform(plan)(subject.forward, subject.params)
        with pytest.raises(ValueError, match=f"{name} must see a prompt at once"):
            prefill(forward, params, [list(range(20))], new=4, chunk=8)


def test_what_wrappers_take_of_others_is_their_score(untyped):
    said = "'snap_kv' depends on; bits must be said of the plan"
    for method in (pyramid_kv, ada_kv, chunk_kv):
        with pytest.raises(ValueError, match=said):
            method.METHOD.plan(options=(("window", 2), ("bits", 4)))
    with pytest.raises(ValueError, match="bits must be one of 4, 8, 16, got 3"):
        snap_kv.SnapKVPlan(bits=3)
    assert methods()["snap_kv"].plan(bits=16) == snap_kv.SnapKVPlan()
