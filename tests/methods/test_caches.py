"""Methods on caches: which tokens they keep and what they round, against plain formulas."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.caches import PressedCache, budgets
from effjax.caches.pressed import Highest
from effjax.context import CacheLength, states
from effjax.generate import Reading, caches, generate, prefill, score
from effjax.layers.attention import CausalCore
from effjax.layers.rotary import Rotary
from effjax.methods import expected_attention, kivi, knorm, snap_kv, streaming_llm
from effjax.registry import methods
from tests.caches.test_caches import TEXT, run, texts

ROTARY = Rotary(8, theta=100.0)


def rotated(x):
    return np.asarray(ROTARY(x, jnp.arange(x.shape[1])[None]))


def held(plan, keep, prompt=16):
    """Positions that a press keeps of a prompt, by sequence and head."""
    core = CausalCore(ROTARY)
    options = {"choose": Highest(plan.score), "keep": keep}
    cache = PressedCache(core, first=True, cache_length=CacheLength(16, 16), **options)
    for path, state in states(cache).items():
        state.set_metadata(path=str(path), creating=True)
    cache(*(part[:, :prompt] for part in texts()), None)
    return np.asarray(cache.positions(jnp.full(2, prompt)))[..., : min(keep, prompt)]


def best(scores, keep):
    """The places of the highest scores, in order; of equal ones the first."""
    order = np.argsort(-scores, axis=-1, kind="stable")[..., :keep]
    return np.sort(order, axis=-1)


def test_knorm_keeps_short_keys():
    k = np.asarray(texts()[1][:, :16])
    norms = np.linalg.norm(k, axis=-1).transpose(0, 2, 1)
    chex.assert_trees_all_equal(held(knorm.KnormPlan(), keep=6), best(-norms, 6))


def test_snap_kv_keeps_what_the_end_attends_to():
    q, k, _, _ = (part[:, :16] for part in texts())
    q, k = rotated(q), np.repeat(rotated(k), 2, axis=2)
    logits = np.einsum("bshd,bthd->bhst", q, k)[:, :, -4:] / np.sqrt(8)
    logits = np.where(np.arange(16) <= np.arange(12, 16)[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    scores = weights[..., :12].mean(2).reshape(2, 2, 2, 12).mean(2)
    padded = np.pad(scores, ((0, 0), (0, 0), (1, 1)))
    smooth = sum(padded[..., i : i + 12] for i in range(3)) / 3
    want = np.concatenate([best(smooth, 3), np.broadcast_to(np.arange(12, 16), (2, 2, 4))], -1)
    chex.assert_trees_all_equal(held(snap_kv.SnapKVPlan(window=4, kernel=3), keep=7), want)


def test_expected_attention_by_its_formula():
    """Mean and covariance of queries, mean rotation of positions to come, in float64."""
    q, _, v, _ = (np.asarray(part[:, :16], np.float64) for part in texts())
    future, sinks = 5, 2
    keys, values = rotated(texts()[1][:, :16]), v
    rates = np.asarray(ROTARY.frequencies)
    angles = np.arange(16, 16 + future)[:, None] * rates
    cos, sin = (np.diag(f(angles).mean(0)) for f in (np.cos, np.sin))
    turn = np.block([[cos, -sin], [sin, cos]])
    scores = np.full((2, 2, 16), np.inf)
    for b in range(2):
        for g in range(2):
            total = 0
            for h in (2 * g, 2 * g + 1):
                own = q[b, sinks:, h]
                mean, covariance = own.mean(0), np.cov(own.T, bias=True)
                mean, covariance = turn @ mean, turn @ covariance @ turn.T
                own = keys[b, sinks:, g]
                logits = own @ mean / np.sqrt(8) + np.sum(own @ covariance * own, -1) / 16
                total = total + np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            scores[b, g, sinks:] = total / 2 * np.linalg.norm(values[b, sinks:, g], axis=-1)
    got = held(expected_attention.ExpectedAttentionPlan(future=future, sinks=sinks), keep=7)
    chex.assert_trees_all_equal(got, best(scores, 7))


METHODS_OF_CACHES = {
    method.name: method
    for method in methods().values()
    if method.plan.__module__.startswith("effjax.methods.cache.")
}


@pytest.mark.parametrize("name", METHODS_OF_CACHES)
def test_answers_do_not_depend_on_the_batch(name):
    """A text of one token, shorter than any window, and one between the others: read, continued."""
    subject, method = testing.tiny_llama(num_layers=1), METHODS_OF_CACHES[name]
    plan = method.ladder(subject)[-1]
    if name == "moa":
        plan = dataclasses.replace(plan, alphas=plan.alphas[:1], betas=plan.betas[:1])
    forward, params = method.transform(plan)(subject.forward, subject.params)
    rng = np.random.default_rng(1)
    prompts = [rng.integers(3, 50, count) for count in (1, 9, 24)]
    question = None if name == "moa" else rng.integers(3, 50, (1, 3))

    def answers(prompts):
        prefix = prefill(forward, params, prompts, new=9)
        more = None if question is None else np.repeat(question, len(prompts), axis=0)
        return generate(forward, params, more, prefix=prefix, max_new_tokens=6)

    together = answers(prompts)
    # The shortest one for every method, another one for the kinds of caches.
    rows = 2 if name in ("moa", "kivi", "cskv", "snap_kv") else 1
    for row, prompt in enumerate(prompts[:rows]):
        alone = answers([prompt])
        assert alone.rows()[0] == together.rows()[row]
        chex.assert_trees_all_close(alone.log_probs[0], together.log_probs[row], atol=1e-5)


@pytest.mark.parametrize("name", ["streaming_llm", "moa", "snap_kv"])
def test_scores_do_not_depend_on_the_batch(name):
    """Sizes go by what each text has, not by what the longest one has; one ends in its context."""
    subject, method = testing.tiny_llama(), METHODS_OF_CACHES[name]
    forward, params = method.transform(method.ladder(subject)[-1])(subject.forward, subject.params)
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, 50, count) for count in (13, 30, 6)]
    together = score(forward, params, texts, context=10)
    for row, (text, context) in enumerate(zip(texts, (10, 10, 6), strict=True)):
        alone = score(forward, params, [text], context=context)[0]
        chex.assert_trees_all_close(together[row, 1 : len(text)], alone[1:], atol=1e-5)


@pytest.mark.parametrize("ratio", [0.1, 0.3, 0.5, 1 / 3, 0.7, 0.9, 0.999])
def test_budgets_of_rows_are_those_of_texts_alone(ratio):
    """Whole tokens of the float64 product, which float32 rounds otherwise."""
    lengths = np.arange(1, 3000)
    for always in (0, 5):
        kept, own = budgets(None, ratio, 3000, always=always)
        want = [min(max(int(n * (1 - ratio)), always + 1), n) for n in lengths.tolist()]
        assert own(jnp.asarray(lengths)).tolist() == want
        assert kept == max(int(3000 * (1 - ratio)), always + 1)
    assert budgets(7, ratio, 3000) == (7, None)
    assert budgets(None, 0.0, 3000) == (3000, None)


@pytest.mark.parametrize(
    ("plan", "own"),
    [
        (knorm.KnormPlan(), None),
        (snap_kv.SnapKVPlan(window=3, kernel=3), None),
        (expected_attention.ExpectedAttentionPlan(future=9, sinks=1), None),
        (knorm.KnormPlan(), lambda tokens: tokens - 5),
    ],
)
def test_padded_rows_keep_what_they_keep_alone(plan, own):
    """Row 1 has 9 tokens after 7 of padding; then it goes on."""
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 7, -1, p[:16] - 7)])
    calls = [(slice(0, 16), left), (slice(16, 18), np.array([[16, 17], [9, 10]]))]
    options = {"choose": Highest(plan.score), "keep": 6, "own": own}
    outputs, values = run(PressedCache, calls, **options)
    alone = [(slice(7, 16), np.stack([p[:9]] * 2)), (slice(16, 18), np.array([[9, 10]] * 2))]
    single, own = run(PressedCache, alone, **options)
    chex.assert_trees_all_close(outputs[1][1], single[1][1], atol=1e-5)
    for path, value in own.items():
        chex.assert_trees_all_close(values[path][1], value[1], atol=1e-5)


def test_evicted_tokens_are_not_seen():
    """Later tokens attend to what is kept and to themselves, by an explicit mask."""
    options = {"choose": Highest(knorm.KnormPlan().score), "keep": 6}
    outputs, values = run(PressedCache, [(slice(0, 16), None)], **options)
    (places,) = (value for path, value in values.items() if path[-1] == "held")
    positions = np.broadcast_to(np.arange(16, 23), (2, 7))
    outputs, _ = run(PressedCache, [(slice(0, 16), None), (slice(16, 23), positions)], **options)
    q, k, v, _ = texts()
    q, k = rotated(q), np.repeat(rotated(k), 2, axis=2)
    v = np.repeat(np.asarray(v), 2, axis=2)
    seen = np.zeros((2, 4, 7, TEXT), bool)
    for b in range(2):
        for h in range(4):
            seen[b, h][:, np.asarray(places)[b, h // 2]] = True
    seen |= (np.arange(TEXT) >= 16) & (np.arange(TEXT) <= np.arange(16, 23)[:, None])
    logits = np.einsum("bshd,bthd->bhst", q[:, 16:], k) / np.sqrt(8)
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    chex.assert_trees_all_close(outputs[1], np.einsum("bhst,bthd->bshd", weights, v), atol=1e-5)


@pytest.mark.parametrize(("bits", "near"), [(8, 0.02), (4, 0.3)])
@pytest.mark.parametrize("sizes", [(10,) + (1,) * 13, (9, 6, 8)], ids=str)
def test_quantized_values_stand_for_keys_and_values(bits, near, sizes):
    """Every token once, sealed or not, within half a step of its window's or its own scale."""
    from tests.caches.test_caches import causal, expected, pieces

    plan = kivi.KIVIPlan(bits, bits, group=4)
    outputs, values = run(kivi.KIVICache, pieces(*sizes), plan=plan)
    chex.assert_trees_all_close(jnp.concatenate(outputs, 1), expected(causal()), atol=near)
    named = {path[-1]: np.asarray(value) for path, value in values.items()}
    k, v = rotated(texts()[1]), np.asarray(texts()[2])
    if bits == 8:
        back = named["v"] * named["v_scale"] + named["v_offset"]
        chex.assert_trees_all_close(back[:, :20], v[:, :20], atol=named["v_scale"].max() / 2 + 1e-6)
        scale, offset = (np.repeat(named[f"k_{part}"], 4, axis=1) for part in ("scale", "offset"))
        back = named["k"] * scale + offset
        chex.assert_trees_all_close(back[:, :20], k[:, :20], atol=scale.max() / 2 + 1e-6)
    chex.assert_trees_all_equal(named["k_open"][:, :3], k[:, 20:])
    slots = np.asarray(
        kivi.KIVICache(
            CausalCore(ROTARY), plan=plan, first=True, cache_length=CacheLength(16, 16)
        ).positions(jnp.array([23, 5]))
    )[:, 0]
    assert sorted(slots[0][slots[0] >= 0]) == list(range(23))
    assert sorted(slots[1][slots[1] >= 0]) == list(range(5))


def test_fewer_bits_are_further_away():
    subject = testing.tiny_llama(num_layers=1, num_kv_heads=4)
    reading = Reading(prompt=12, new=8)
    run_ = jax.jit(reading)
    dense = run_(subject.forward, subject.params, subject.cond)
    errors = []
    for bits in (8, 4):
        plan = kivi.KIVIPlan(bits, bits, group=4)
        forward, params = kivi.transform(plan)(subject.forward, subject.params)
        errors.append(float(jnp.abs(run_(forward, params, subject.cond) - dense).max()))
    assert 0 < errors[0] < errors[1] / 4


def test_short_prompts_are_kept_whole():
    """A window longer than the prompt, and nothing to drop."""
    subject = testing.tiny_llama()
    dense = prefill(subject.forward, subject.params, subject.cond, new=4)
    forward, params = snap_kv.transform(snap_kv.SnapKVPlan(capacity=2048))(
        subject.forward, subject.params
    )
    kept = prefill(forward, params, subject.cond, new=4)
    chex.assert_trees_all_equal(kept.logits, dense.logits)


def test_caches_name_what_they_cannot():
    subject = testing.tiny_llama()
    prompt = [list(range(20))]
    for method, plan in (
        (snap_kv, snap_kv.SnapKVPlan(window=4)),
        (streaming_llm, streaming_llm.StreamingLLMPlan()),
        (kivi, kivi.KIVIPlan(group=4)),
    ):
        forward, params = method.transform(plan)(subject.forward, subject.params)
        with pytest.raises(ValueError, match="Cache must see a prompt at once"):
            prefill(forward, params, prompt, new=4, chunk=8)
        assert generate(forward, params, prompt, max_new_tokens=3).lengths.tolist() == [3]
        assert len(caches(forward.with_cache_length(20, 4), params)) == 2
    windowed = testing.tiny_llama(window=5)
    for method, plan in (
        (kivi, kivi.KIVIPlan()),
        (knorm, knorm.KnormPlan()),
        (streaming_llm, streaming_llm.StreamingLLMPlan()),
    ):
        forward, params = method.transform(plan)(windowed.forward, windowed.params)
        with pytest.raises(ValueError, match="layer 0 of this model sees the last 5 tokens only"):
            prefill(forward, params, prompt, new=4)


@pytest.mark.parametrize(("ratio", "window", "kept"), [(0.5, 32, 20), (0.9, 4, 5), (0.5, 4, 10)])
def test_short_prompts_keep_what_is_always_kept(ratio, window, kept):
    subject = testing.tiny_llama()
    plan = snap_kv.SnapKVPlan(ratio=ratio, window=window)
    forward, params = snap_kv.transform(plan)(subject.forward, subject.params)
    state = prefill(forward, params, [list(range(20))], new=3, buckets=None).state
    slots = [value.shape[1] for path, value in state.items() if path.endswith(".k")]
    assert slots == [kept + 3] * 2
    out = generate(forward, params, [list(range(20))], max_new_tokens=3)
    assert out.lengths.tolist() == [3]


def test_a_plan_that_says_nothing_drops_half():
    for plan in (knorm.KnormPlan(), streaming_llm.StreamingLLMPlan()):
        assert (plan.capacity, plan.ratio) == (None, 0.5)
    held = knorm.KnormPlan(capacity=9)
    assert (held.capacity, held.ratio) == (9, None)
    assert knorm.KnormPlan.from_json(held.to_json()) == held


@pytest.mark.parametrize(
    ("plan", "options", "message"),
    [
        (
            knorm.KnormPlan,
            {"ratio": 1.0},
            "ratio must be a finite number of at least 0 and below 1",
        ),
        (knorm.KnormPlan, {"capacity": 0}, "capacity must be a whole number of at least 1"),
        (snap_kv.SnapKVPlan, {"kernel": 4}, "kernel must be odd, got 4"),
        (snap_kv.SnapKVPlan, {"capacity": 20}, "capacity=20 leaves no token beside window=32"),
        (streaming_llm.StreamingLLMPlan, {"capacity": 4}, "take a capacity of at least 5"),
        (
            expected_attention.ExpectedAttentionPlan,
            {"capacity": 3},
            "capacity=3 leaves no token beside sinks=4",
        ),
        *(
            (plan, {"capacity": 90, "ratio": 0.5}, "capacity=90 and ratio=0.5 cannot both be given")
            for plan in (
                knorm.KnormPlan,
                snap_kv.SnapKVPlan,
                streaming_llm.StreamingLLMPlan,
                expected_attention.ExpectedAttentionPlan,
            )
        ),
        (
            streaming_llm.StreamingLLMPlan,
            {"sinks": -1},
            "sinks must be a whole number of at least 0",
        ),
        (expected_attention.ExpectedAttentionPlan, {"future": 0}, "future must be a whole number"),
        (kivi.KIVIPlan, {"key_bits": 3}, "key_bits must be one of 4, 8, got 3"),
        (kivi.KIVIPlan, {"group": 0}, "group must be a whole number of at least 1"),
    ],
)
def test_plans_that_cannot_be(untyped, plan, options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)
