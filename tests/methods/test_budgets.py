"""Budgets of layers and heads, and eviction while decoding, against plain formulas."""

from functools import partial

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.caches import PressedCache
from effjax.caches.evicting import EvictingCache
from effjax.caches.shared import SharedCache
from effjax.generate import cache_bytes, generate, prefill
from effjax.methods import ada_kv, chunk_kv, chunk_press, h2o, knorm, pyramid_kv, tova
from effjax.methods.cache.pyramid_kv import layer_budget
from tests.caches.test_caches import TEXT, pieces, run, texts
from tests.methods.test_caches import rotated


def heads_of():
    """Rotated queries and keys, and values, of two sequences of 23 tokens: [B, S, heads, 8]."""
    q, k, v, _ = texts()
    return rotated(q), rotated(k), np.asarray(v)


def attention(q, k):
    """Softmax of one query [D] over keys [T, D]."""
    logits = k @ q / np.sqrt(8)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


# Layers -------------------------------------------------------------------------------------------


def test_budgets_fall_linearly_over_the_layers():
    plan = pyramid_kv.PyramidKVPlan(ratio=0.5, beta=20, options=(("window", 64),))
    for layers in (2, 8, 32):
        got = [layer_budget(plan, 4096, layer, layers) for layer in range(layers)]
        assert (got[0], got[-1]) == (3994, 102)
        assert max(np.abs(got - np.linspace(3993.6, 102.4, layers))) <= 0.5
    assert layer_budget(plan, 1000, 31, 32) == 64  # most = 1000 - 64, least = 1000 - most
    assert layer_budget(plan, 120, 0, 32) == layer_budget(plan, 120, 31, 32) == 64  # no pyramid
    capped = pyramid_kv.PyramidKVPlan(capacity=2048, options=(("window", 64),))
    assert [layer_budget(capped, 4096, layer, 32) for layer in (0, 31)] == [3994, 102]
    assert [layer_budget(capped, 2000, layer, 32) for layer in (0, 31)] == [2000, 102]


def test_layers_have_slots_for_their_budgets():
    """16 tokens of capacity for 40: least 16 / 4, most 2 * 16 - 4."""
    subject = testing.tiny_llama(num_layers=3)
    plan = pyramid_kv.PyramidKVPlan(capacity=16, beta=4, options=(("window", 2),))
    forward, params = pyramid_kv.transform(plan)(subject.forward, subject.params)
    prefix = prefill(forward, params, [list(range(40))], new=3, buckets=None)
    slots = [state.shape[1] for path, state in prefix.state.items() if path.endswith(".k")]
    assert slots == [28 + 3, 16 + 3, 4 + 3]


# Heads --------------------------------------------------------------------------------------------

ADA = ada_kv.AdaKVPlan(press="knorm", floor=0.5)
SHARED = {"score": ADA.score, "choose": ADA.choose, "keep": 6}


def shared_sets(tokens=16, keep=6, floor=3):
    """Kept positions by sequence and head: the best of all heads after a floor for each."""
    norms = np.linalg.norm(np.asarray(texts()[1][:, :tokens]), axis=-1).transpose(0, 2, 1)
    kept = []
    for scores in -norms:
        scores = scores.copy()
        for own in scores:
            own[np.argsort(-own, kind="stable")[:floor]] = np.inf
        order = np.argsort(-scores.reshape(-1), kind="stable")[: 2 * keep]
        kept.append([np.sort(order[order // tokens == h] % tokens) for h in range(2)])
    return kept


@pytest.mark.parametrize("sizes", [(1,) * 7, (3, 4), (1, 6), (7,)], ids=str)
def test_new_tokens_see_what_their_head_keeps(sizes):
    """In a cache without masks: as many slots as both heads keep together."""
    if len(sizes) == 1:  # many at once take another path
        sizes = (9,)
    calls = [(slice(0, 14), None), *pieces(14, *sizes)[1:]]
    outputs, values = run(SharedCache, calls, **SHARED)
    kept, (q, k, v) = shared_sets(tokens=14), heads_of()
    got = np.concatenate(outputs[1:], axis=1)
    assert {len(own) for row in kept for own in row} != {6}  # heads differ
    for b, s, h in np.ndindex(got.shape[:3]):
        seen = [*kept[b][h // 2], *range(14, 14 + s + 1)]
        weights = attention(q[b, 14 + s, h], k[b, seen, h // 2])
        chex.assert_trees_all_close(got[b, s, h], weights @ v[b, seen, h // 2], atol=1e-5)
    assert values["flat", "k"].shape == values["flat", "v"].shape == (2, 2 * 6, 8)
    assert values["counts",].tolist() == [[len(own) for own in row] for row in kept]


def test_rows_share_slots_as_if_they_were_alone():
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 7, -1, p[:16] - 7)])
    options = {**SHARED, "own": lambda tokens: tokens - 5}
    calls = [(slice(0, 16), left), (slice(16, 18), np.array([[16, 17], [9, 10]]))]
    outputs, _ = run(SharedCache, calls, **options)
    alone = [(slice(7, 16), np.stack([p[:9]] * 2)), (slice(16, 18), np.array([[9, 10]] * 2))]
    single, _ = run(SharedCache, alone, **options)
    chex.assert_trees_all_close(outputs[1][1], single[1][1], atol=1e-5)


def test_shared_slots_take_the_bytes_of_a_uniform_budget():
    subject = testing.tiny_llama()
    taken = []
    for method, plan in (
        (ada_kv, ada_kv.AdaKVPlan(ratio=0.5, press="knorm")),
        (knorm, knorm.KnormPlan(ratio=0.5)),
    ):
        forward, params = method.transform(plan)(subject.forward, subject.params)
        prefix = prefill(forward, params, [list(range(40))] * 2, new=8, buckets=None)
        floats = [leaf for leaf in prefix.state.values() if leaf.dtype == jnp.float32]
        taken.append(sum(leaf.nbytes for leaf in floats))
        held = cache_bytes(params, prefix)
        assert held.useful / held.allocated == pytest.approx(20 / 28, abs=1e-3)
    assert taken == [2 * 2 * 2 * 2 * (20 + 8) * 8 * 4] * 2  # k and v, layers, rows, key heads


# Chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan",
    [
        chunk_press.ChunkPressPlan(ratio=0.5, chunk=5),
        chunk_kv.ChunkKVPlan(ratio=0.5, press="knorm", chunk=4),
        chunk_kv.ChunkKVPlan(ratio=0.5, press="knorm", chunk=10),  # row 1 is shorter than one
    ],
    ids=["chunk_press", "chunk_kv", "chunk_kv short"],
)
def test_chunks_count_from_the_first_token_of_a_row(plan):
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 7, -1, p[:16] - 7)])
    calls = [(slice(0, 16), left), (slice(16, 18), np.array([[16, 17], [9, 10]]))]
    alone = [(slice(7, 16), np.stack([p[:9]] * 2)), (slice(16, 18), np.array([[9, 10]] * 2))]
    options = {"choose": plan.choose, "keep": 10}
    outputs, _ = run(PressedCache, calls, **options)
    single, _ = run(PressedCache, alone, **options)
    chex.assert_trees_all_close(outputs[1][1], single[1][1], atol=1e-5)


# While decoding -----------------------------------------------------------------------------------


def simulated(prompt, slots, recent, first, change, held_as=lambda x: x):
    """Outputs of all tokens after a prompt, by lists of held tokens, for one key head each.

    The prompt is scored with exact keys; new tokens see keys and values as they are held.
    """
    q, k, v = heads_of()
    outputs = np.zeros((2, TEXT - prompt, 4, 8), np.float32)
    scores = first(q, k, prompt)  # [B, K, S]
    k, v = held_as(k), held_as(v)
    held = [[[] for _ in range(2)] for _ in range(2)]
    for b, h in np.ndindex(2, 2):
        own = scores[b, h].copy()
        own[prompt - recent :] = np.inf
        held[b][h] = sorted(np.argsort(-own, kind="stable")[:slots].tolist())
    marks = [[{t: scores[b, h, t] for t in held[b][h]} for h in range(2)] for b in range(2)]
    for p in range(prompt, TEXT):
        for b in range(2):
            weights = np.zeros((4, TEXT))
            for h in range(2):
                if len(held[b][h]) == slots:
                    can = [t for t in held[b][h] if t < p - recent]
                    least = min(marks[b][h][t] for t in can)
                    gone = max(t for t in can if marks[b][h][t] == least)
                    held[b][h].remove(gone)
                    del marks[b][h][gone]
                held[b][h].append(p)
                marks[b][h][p] = 0.0
                for query in (2 * h, 2 * h + 1):
                    own = attention(q[b, p, query], k[b, held[b][h], h])
                    weights[query, held[b][h]] = own
                    outputs[b, p - prompt, query] = own @ v[b, held[b][h], h]
            for h in range(2):
                new = change(weights, h)
                for t in held[b][h]:
                    marks[b][h][t] = new[t] + marks[b][h][t] * change.sums
    return outputs, held


def prompt_weights(q, k, prompt, rows):
    weights = np.zeros((2, 4, len(rows), prompt))
    for b, h, i in np.ndindex(2, 4, len(rows)):
        weights[b, h, i, : rows[i] + 1] = attention(q[b, rows[i], h], k[b, : rows[i] + 1, h // 2])
    return weights


def tova_first(q, k, prompt):
    return np.repeat(prompt_weights(q, k, prompt, [prompt - 1]).mean((1, 2))[:, None], 2, axis=1)


def h2o_first(q, k, prompt):
    sums = prompt_weights(q, k, prompt, range(prompt)).sum(2)
    return sums.reshape(2, 2, 2, prompt).mean(2)


def tova_change(weights, head):
    return weights.mean(0)


def h2o_change(weights, head):
    return weights[2 * head : 2 * head + 2].mean(0)


tova_change.sums, h2o_change.sums = 0.0, 1.0
EVICTING = {
    "tova": (tova.TOVAPlan(), 1, tova_first, tova_change),
    "h2o": (h2o.H2OPlan(), 3, h2o_first, h2o_change),
}


def options_of(plan, slots, own=None):
    recent = partial(plan.last, slots)
    score, observe = plan.score, plan.observe
    return {"score": score, "observe": observe, "slots": slots, "recent": recent, "own": own}


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("sizes", [(10,) + (1,) * 13, (10, 9, 4), (4, 1, 18)], ids=str)
def test_what_is_held_follows_the_attention(name, sizes):
    """Before and after slots are full; several tokens of a call come one by one."""
    plan, recent, first, change = EVICTING[name]
    want, held = simulated(sizes[0], 6, recent, first, change)
    outputs, values = run(EvictingCache, pieces(*sizes), **options_of(plan, 6))
    chex.assert_trees_all_close(np.concatenate(outputs[1:], axis=1), want, atol=1e-5)
    (got,) = (value for path, value in values.items() if path[-1] == "held")
    assert [[sorted(own) for own in row] for row in got.tolist()] == [
        [sorted(own) for own in row] for row in held
    ]


@pytest.mark.parametrize("name", EVICTING)
def test_padded_rows_evict_as_if_they_were_alone(name):
    plan = EVICTING[name][0]

    def own(tokens):  # 32 are to come in row 0, and 25 in row 1
        return tokens // 4

    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 7, -1, p[:16] - 7)])
    calls = [(slice(0, 16), left), (slice(16, 19), np.array([[16, 17, 18], [9, 10, -1]]))]
    outputs, _ = run(EvictingCache, calls, **options_of(plan, 8, own))
    alone = [(slice(7, 16), np.stack([p[:9]] * 2)), (slice(16, 18), np.array([[9, 10]] * 2))]
    single, _ = run(EvictingCache, alone, **options_of(plan, 8, own))
    chex.assert_trees_all_close(outputs[1][1, :2], single[1][1], atol=1e-5)


def test_of_equal_scores_the_latest_goes():
    """Without any preference the first tokens stay, and the last one."""
    same = {"score": lambda inputs: jnp.zeros((2, 2, inputs.k.shape[1]))}
    same |= {"observe": lambda scores, weights: jnp.zeros_like(scores)}
    options = options_of(tova.TOVAPlan(), 5) | same
    _, values = run(EvictingCache, pieces(9, 1, 1, 1), **options)
    (held,) = (value for path, value in values.items() if path[-1] == "held")
    assert sorted(held[0, 0].tolist()) == [0, 1, 2, 10, 11]


@pytest.mark.parametrize("method", [tova, h2o])
def test_long_answers_stay_within_their_slots(method):
    subject = testing.tiny_llama(num_layers=1)
    forward, params = method.transform(method.METHOD.plan(capacity=8))(
        subject.forward, subject.params
    )
    prefix = prefill(forward, params, [list(range(12)), [5, 6]], new=30, buckets=None)
    assert [v.shape for path, v in prefix.state.items() if path.endswith(".k")] == [(2, 8, 2, 8)]
    made = generate(forward, params, prefix=prefix, max_new_tokens=30)
    assert made.lengths.tolist() == [30, 30]
    with pytest.raises(ValueError, match="EvictingCache must see a prompt at once"):
        prefill(forward, params, [list(range(12))], new=4, chunk=4)


# Wrappers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (ada_kv.AdaKVPlan, {"press": "kivi"}, "method with a score, such as .* got 'kivi'"),
        (ada_kv.AdaKVPlan, {"press": "nothing"}, "got 'nothing'"),
        (ada_kv.AdaKVPlan, {"press": "chunk_kv"}, "'chunk_kv' takes another one's"),
        (ada_kv.AdaKVPlan, {"options": (("speed", 3),)}, r"unknown fields \['speed'\]"),
        (ada_kv.AdaKVPlan, {"options": (("kernel", 4),)}, "kernel must be odd, got 4"),
        (ada_kv.AdaKVPlan, {"capacity": 20}, "capacity=20 leaves no token beside window=32"),
        (chunk_press.ChunkPressPlan, {"capacity": 20}, "capacity=20 is for whole prompts"),
        (h2o.H2OPlan, {"recent": 1.0}, "recent must be a finite number of at least 0 and below 1"),
    ],
)
def test_plans_that_cannot_be(untyped, plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)
