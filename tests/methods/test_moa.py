"""MoA: sizes of spans, what prompts and new tokens see, both layouts, plans that do not fit."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.caches.quantization import unpack
from effjax.context import CacheLength
from effjax.cost import state_bytes
from effjax.generate import Reading, generate, prefill
from effjax.layers.attention import CausalCore
from effjax.methods import moa, round_to_nearest
from effjax.methods.cache.moa import plan_search, profile
from effjax.targets import Wrapper, wrap
from tests.caches.test_caches import TEXT, causal, expected, pieces, run

# Rules of the published plan for Vicuna-7B: (alpha, beta) and how many of 1,024 heads.
VICUNA = [
    (0, 0.125, 279),
    (0, 0.625, 183),
    (0, 0.75, 171),
    (0, 0.25, 122),
    (0, 0.875, 102),
    (-1024, 1, 75),
    (0, 0.5, 64),
    (0, 0.375, 17),
    (1024, 0.125, 11),
]
CACHES = {"grouped": moa.GroupedCache, "flat": moa.FlatCache}
PLAN = moa.MoAPlan(((0.0, 8.0),), ((0.375, 0.0),), block=4, sink=4, floor=8)
SLOTS = (12, 8)  # of the two key heads, for texts that become 26 tokens or up to 32


def vicuna():
    rules = [(a, b) for a, b, count in VICUNA for _ in range(count)]
    alphas, betas = (
        [[float(rule[i]) for rule in rules[32 * row : 32 * row + 32]] for row in range(32)]
        for i in range(2)
    )
    return {"alphas": alphas, "betas": betas}


@pytest.mark.parametrize(
    ("tokens", "share"), [(4096, 0.484375), (8192, 0.4921875), (16384, 0.49609375)]
)
def test_the_published_plan_keeps_its_share(tokens, share, tmp_path):
    (tmp_path / "plan.json").write_text(json.dumps(vicuna()))
    plan = moa.read_released(tmp_path / "plan.json")
    kept = sum(sum(plan.slots(layer, tokens)) for layer in range(32))
    assert kept / (1024 * tokens) == share
    assert plan.describe().startswith("279 heads 0 + 0.125 N, 183 heads 0 + 0.625 N")


def test_slots_are_clipped_floored_and_rounded():
    plan = moa.MoAPlan(((0.0, 100.0, 0.0, -10.0),), ((0.01, 2.0, 0.5, 0.2),))
    assert plan.slots(0, 1000) == (128, 1024, 512, 192)


@pytest.mark.parametrize("layout", CACHES)
def test_new_tokens_see_sinks_and_their_heads_ring(layout):
    calls = pieces(10, *[1] * 13)
    outputs, values = run(CACHES[layout], calls, plan=PLAN, rules=PLAN.rules(0))
    got = np.concatenate(outputs[1:], 1)
    for head, slots in enumerate(SLOTS):
        want = expected(causal(sinks=4, local=slots - 4))[:, 10:]
        own = slice(2 * head, 2 * head + 2)  # two query heads read each key head
        chex.assert_trees_all_close(got[:, :, own], want[:, :, own], atol=1e-5)
    lengths = 2 * 4  # an integer of every row
    assert sum(value.nbytes for value in values.values()) == 2 * 2 * sum(SLOTS) * 8 * 4 + lengths


@pytest.mark.parametrize("layout", CACHES)
def test_prompts_see_whole_blocks(layout):
    """The block rule of the paper: the sink's block and the last R / 4 blocks, and causal."""
    outputs, _ = run(CACHES[layout], pieces(16), plan=PLAN, rules=PLAN.rules(0))
    i, j = np.arange(TEXT)[:, None], np.arange(TEXT)[None]
    for head, slots in enumerate(SLOTS):
        local = (slots - 4) // 4
        seen = (j <= i) & ((j // 4 < 1) | (j // 4 >= i // 4 + 1 - local))
        own = slice(2 * head, 2 * head + 2)
        want = expected(seen)[:, :16, own]
        chex.assert_trees_all_close(outputs[0][:, :, own], want, atol=1e-5)


@pytest.mark.parametrize("layout", CACHES)
def test_padded_rows_are_what_they_are_alone(layout):
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 3, -1, p[:16] - 3)])
    calls = [(slice(0, 16), left), (slice(16, 17), np.array([[16], [13]]))]
    outputs, values = run(CACHES[layout], calls, plan=PLAN, rules=PLAN.rules(0))
    alone = [(slice(3, 16), np.stack([p[:13]] * 2)), (slice(16, 17), np.array([[13]] * 2))]
    single, own = run(CACHES[layout], alone, plan=PLAN, rules=PLAN.rules(0))
    chex.assert_trees_all_close(outputs[0][1, 3:], single[0][1], atol=1e-5)
    chex.assert_trees_all_close(outputs[1][1], single[1][1], atol=1e-5)
    for path, value in own.items():
        chex.assert_trees_all_close(values[path][1], value[1], atol=1e-5)


@pytest.mark.parametrize("layout", CACHES)
def test_rows_use_the_spans_of_their_own_length(layout):
    """16 tokens are to become 32, and 6 become 22."""
    plan = moa.MoAPlan(((-12.0, -20.0),), ((1.0, 1.0),), block=4, sink=4, floor=8)
    assert [plan.slots(0, tokens) for tokens in (32, 22)] == [(20, 12), (12, 8)]
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 10, -1, p[:16] - 10)])
    calls = [(slice(0, 16), left)]
    calls += [(slice(i, i + 1), np.array([[i], [i - 10]])) for i in range(16, TEXT)]
    outputs, _ = run(CACHES[layout], calls, plan=plan, rules=plan.rules(0))
    later = np.concatenate(outputs[1:], 1)
    for head, (long, short) in enumerate(zip((20, 12), (12, 8))):
        own = slice(2 * head, 2 * head + 2)
        want = expected(causal(sinks=4, local=long - 4))[:, 16:, own]
        chex.assert_trees_all_close(later[0][:, own], want[0], atol=1e-5)
        seen = (p - 10 < 4) | (p[:, None] - p < short - 4)  # columns, and positions 10 below
        want = expected_from(10, seen & (p >= 10) & (p <= p[:, None]))[:, 16:, own]
        chex.assert_trees_all_close(later[1][:, own], want[1], atol=1e-5)
        # The prompt's blocks of four tokens: the sinks' and the last ones.
        i, j = (p - 10)[:, None] // 4, (p - 10) // 4
        seen = (j == 0) | (j >= i + 1 - (short - 4) // 4)
        want = expected_from(10, seen & (p >= 10) & (p <= p[:, None]))[:, 10:16, own]
        chex.assert_trees_all_close(outputs[0][1, 10:, own], want[1], atol=1e-5)


def expected_from(first, seen):
    """`expected`, of texts that begin in this column: rotation knows differences alone."""
    return expected(seen | np.diag(np.arange(TEXT) < first))


def test_sizes_of_rows_are_those_of_texts_alone():
    subject = testing.tiny_llama(num_heads=4, num_kv_heads=4)
    betas, alphas = ((0.31, 0.0, 1.0, 1.0),) * 2, ((0.0, 12.0, -16.0, 3.7),) * 2
    plan = moa.MoAPlan(alphas, betas, block=4, sink=4, floor=8)
    core = subject.forward.target_modules(subject.params, CausalCore)[0].module
    cache = moa.FlatCache(
        core, plan=plan, rules=plan.rules(0), first=True, cache_length=CacheLength(60, 40)
    )
    totals = np.arange(17, 101)
    cache.foreseen.set_value(jnp.asarray(totals))
    used = cache.used(len(totals))
    got = np.stack([used[rule] for rule in plan.rules(0)], axis=1)
    chex.assert_trees_all_equal(got, np.array([plan.slots(0, int(n)) for n in totals]))


def test_layouts_agree_and_take_what_they_say():
    subject = testing.tiny_llama(num_heads=4, num_kv_heads=4)
    reading = Reading(prompt=12, new=8)
    outputs, sizes = [], []
    betas = ((0.2, 0.9, 0.5, 0.2), (0.5, 0.5, 0.3, 0.9))
    for layout in moa.LAYOUTS:
        plan = moa.MoAPlan(((0.0,) * 4,) * 2, betas, block=2, sink=2, floor=4, layout=layout)
        forward, params = moa.transform(plan)(subject.forward, subject.params)
        outputs.append(jax.jit(reading)(forward, params, subject.cond))
        sizes.append(state_bytes(reading.init(forward, params, subject.cond).state))
        kept = sum(sum(plan.slots(layer, 20)) for layer in range(2))
    chex.assert_trees_all_close(*outputs, atol=1e-5)
    lengths = 2 * 2 * 4  # an integer of every layer and row
    assert sizes == [2 * 2 * 8 * 4 * kept + lengths] * 2


@pytest.mark.parametrize("layout", CACHES)
@pytest.mark.parametrize("bits", [8, 4])
def test_slots_of_quantized_values(bits, layout):
    """New tokens see keys and values rounded token by token; bytes are what values take."""
    plan = dataclasses.replace(PLAN, bits=bits)
    calls, kind = pieces(10, *[1] * 13), CACHES[layout]
    outputs, values = run(kind, calls, plan=plan, rules=plan.rules(0))
    exact, floating = run(kind, calls, plan=PLAN, rules=PLAN.rules(0))
    chex.assert_trees_all_equal(outputs[0], exact[0])  # the prompt sees floats
    later, floats = (np.concatenate(each[1:], axis=1) for each in (outputs, exact))
    error = np.abs(later - floats).max() / np.abs(floats).max()
    assert 0 < error < {8: 0.02, 4: 0.3}[bits]
    qvalues = sum(SLOTS) * 8 * bits // 8
    scales = sum(SLOTS) * 2 * 4
    assert sum(value.nbytes for value in values.values()) == 2 * 2 * (qvalues + scales) + 2 * 4
    # What a slot holds is its token's key and value, to half a step.
    for (*path, name), x in floating.items():
        if name == "foreseen":
            continue
        held, scale, offset = (values[*path, name + part] for part in ("", "_scale", "_offset"))
        restored = unpack(held, bits).astype(jnp.float32) * scale + offset
        chex.assert_trees_all_close(restored, x, atol=float(jnp.max(scale)) / 2 + 1e-6)


@pytest.mark.parametrize("devices", [1, 2])
def test_heads_in_another_order_are_the_same_model(devices):
    subject = testing.tiny_llama(num_heads=8, num_kv_heads=4, qkv_bias=True)
    betas = ((0.2, 0.9, 0.5, 0.2), (0.5, 0.5, 0.3, 0.9))
    plan = moa.MoAPlan(((0.0,) * 4,) * 2, betas, block=2, sink=2, floor=4)
    ordered, params = moa.order_heads(
        plan, subject.forward, subject.params, tokens=20, devices=devices
    )
    slots = [ordered.slots(layer, 20) for layer in range(2)]
    if devices == 1:
        assert slots == [(4, 4, 10, 18), (6, 10, 10, 18)]
        assert ordered.betas[0] == (0.2, 0.2, 0.5, 0.9)
    else:  # 22 and 14, since heads are shared out and not slots; then 24 and 20
        assert [sorted((sum(own[:2]), sum(own[2:]))) for own in slots] == [[14, 22], [20, 24]]
    reading = Reading(prompt=12, new=8)
    outputs = [
        jax.jit(reading)(*moa.transform(p)(subject.forward, w), subject.cond)
        for p, w in ((plan, subject.params), (ordered, params))
    ]
    chex.assert_trees_all_close(*outputs, atol=1e-5)


def test_orders_that_cannot_be():
    subject = testing.tiny_llama()
    plan = moa.uniform(2, 2)
    with pytest.raises(ValueError, match="2 key heads cannot be shared evenly by 3 devices"):
        moa.order_heads(plan, subject.forward, subject.params, tokens=200, devices=3)
    quantized = round_to_nearest.transform(round_to_nearest.uniform(8, 16))
    with pytest.raises(ValueError, match=r"to_q\.kernel is quantized: order the heads before"):
        moa.order_heads(plan, *quantized(subject.forward, subject.params), tokens=200)


def test_texts_are_generated():
    subject = testing.tiny_llama()
    plan = moa.METHOD.ladder(subject)[-1]
    forward, params = moa.transform(plan)(subject.forward, subject.params)
    prompts = [list(range(20)), list(range(9))]
    together = generate(forward, params, prompts, max_new_tokens=4)
    assert together.lengths.tolist() == [4, 4]
    prefix = prefill(forward, params, prompts, new=8)
    with pytest.raises(ValueError, match="appends one token in a call, not several"):
        generate(forward, params, [[1, 2]] * 2, prefix=prefix, max_new_tokens=2)
    with pytest.raises(ValueError, match="must see a prompt at once"):
        prefill(forward, params, prompts, new=8, chunk=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alphas": ((0.0,),), "betas": ((0.5, 0.5),)}, r"alphas have \[1\] heads and betas \[2\]"),
        ({"sink": 65}, "multiples of the block"),
        ({"floor": 64}, "floor=64 leaves no slot beside sink=64: take at least 128"),
        ({"betas": ((-0.5,),)}, "betas are shares of a sequence, 0 or more, .* least one is -0.5"),
        ({"layout": "round"}, "layout must be one of 'flat', 'grouped'"),
        ({"bits": 3}, "bits must be one of 4, 8, 16"),
    ],
)
def test_plans_that_cannot_be(untyped, options, message):
    with pytest.raises(ValueError, match=message):
        moa.MoAPlan(**{"alphas": ((0.0,),), "betas": ((0.5,),), **options})


def test_plans_of_other_models_are_named():
    subject = testing.tiny_llama(num_layers=3)
    with pytest.raises(ValueError, match=r"2 layers of \[2\] heads, the model has 3 layers"):
        moa.transform(moa.uniform(2, 2))(subject.forward, subject.params)
    with pytest.raises(ValueError, match="2 query heads share a key head"):
        moa.transform(moa.uniform(3, 4))(subject.forward, subject.params)
    short = moa.uniform(3, 2, alpha=-16.0, beta=1.0)
    forward, params = moa.transform(short)(subject.forward, subject.params)
    for prompts in ([[1, 2]], [[1, 2], list(range(30))]):
        with pytest.raises(ValueError, match="6 tokens is no span; this plan is for longer seq"):
            generate(forward, params, prompts, max_new_tokens=4)
    with pytest.raises(ValueError, match="has alphas and betas, this one has"):
        moa.read_released({"spans": []})
    with pytest.raises(ValueError, match=r"alphas .* lists \[layer\]\[head\], got \[1.0\]"):
        moa.read_released({"alphas": [1.0], "betas": [[0.5]]})


# The search -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class MaskOne:
    """Patch: one head does not see one key from one query."""

    head: int
    query: int
    key: int

    def __call__(self, module, context):
        wrap(module, "blocks.0.attn.core", OneMasked, self)


class OneMasked(Wrapper):
    def __init__(self, inner, which):
        super().__init__(inner)
        self.which = which

    def __call__(self, q, k, v, x, positions):
        turns = jnp.arange(q.shape[1])[None]
        q, k = self.inner.rotary(q, turns), self.inner.rotary(k, turns)
        k, v = (jnp.repeat(part, q.shape[2] // part.shape[2], axis=2) for part in (k, v))
        logits = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[3] ** -0.5
        seen = jnp.tril(jnp.ones(logits.shape[2:], bool))[None].repeat(q.shape[2], 0)
        which = self.which
        if which.head >= 0:
            seen = seen.at[which.head, which.query, which.key].set(False)
        weights = jax.nn.softmax(jnp.where(seen, logits, -jnp.inf), axis=-1)
        return jnp.einsum("bhst,bthd->bshd", weights, v)


def samples(length, count=2, vocabulary=50, answers=5):
    """Random texts whose last tokens are answers."""
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, vocabulary, (count, length)).astype(np.int32)
    weights = np.broadcast_to(np.arange(length) >= length - answers, tokens.shape)
    return tokens, weights.astype(np.float32)


def test_influence_predicts_what_masking_costs():
    """Against the loss with one element masked, where it carries little weight."""
    subject = testing.tiny_llama(num_layers=1, num_kv_heads=4)
    forward, params = subject.forward, subject.params
    one = samples(40, count=1, answers=20)
    profile = moa.influence(forward, params, one, block=1, progress=False)[0]
    assert profile.shape == (4, 40, 40)
    assert np.all(np.triu(profile, 1) == 0)
    assert np.all(profile[:, 39] == 0)  # nothing follows the last token

    def loss(*which):
        return moa.response_loss(forward.patch(MaskOne(*which)), params, one)

    base, rng, checked = loss(-1, 0, 0), np.random.default_rng(0), 0
    while checked < 5:
        head, query = int(rng.integers(4)), int(rng.integers(20, 39))
        key = int(rng.integers(query))
        if 1e-4 < profile[head, query, key] < 2e-3:
            change = abs(loss(head, query, key) - base)
            assert profile[head, query, key] == pytest.approx(change, rel=0.1)
            checked += 1
    # Blocks are sums of elements.
    blocks = moa.influence(forward, params, one, block=4, progress=False)[0]
    sums = profile.reshape(4, 10, 4, 10, 4).sum((2, 4))
    chex.assert_trees_all_close(blocks, sums, rtol=1e-3, atol=1e-7)


def test_influence_where_one_element_is_nearly_all():
    """A_11 = 1 - 2^-16: with an epsilon of 1e-6 in place of float32's, 5.5 % less."""
    rest = 2.0**-16
    gap = np.log((1 - rest) / rest)
    q, gradient = jnp.ones((2, 1, 1)), jnp.ones((2, 1, 1))
    k, v, out = (
        jnp.asarray(pair, jnp.float32).reshape(2, 1, 1) for pair in ((0, gap), (1, 0), (1, rest))
    )
    found = np.asarray(profile._blocks(q, k, v, out, gradient, 1))[0]
    want = (1 - rest) * rest / (rest + 2.0**-23)
    assert found[1, 1] == pytest.approx(want, rel=0.01)
    assert found[0].tolist() == [1, 0]  # the first row's element has nothing to take its weight


def test_a_key_heads_influence_is_its_queries_largest():
    wide = testing.tiny_llama(num_layers=1)
    one = samples(8, count=1)
    found = moa.influence(wide.forward, wide.params, one, block=8, progress=False)
    assert found.shape == (1, 2, 1, 1)


def test_the_papers_grid_has_48_rules():
    rules = moa.rule_grid([2048, 4096, 8192], [16384])
    assert len(rules) == 48
    spans = [alpha + beta * 16384 for alpha, beta in rules]
    assert spans == sorted(spans)


def test_plans_keep_their_density_and_few_rules_a_layer():
    rng = np.random.default_rng(0)
    profiles = {n: rng.random((3, 4, n // 16, n // 16)) for n in (128, 256)}
    rules = moa.rule_grid([128, 256], [512], step=64)
    plans = moa.candidates(
        profiles, extend=[512], rules=rules, block=16, sink=16, floor=32, progress=False
    )
    assert len(plans) == len(set(plans)) >= 1

    def loss(plan):
        chosen = [rules.index(rule) for row in zip(plan.alphas, plan.betas) for rule in zip(*row)]
        return [
            plan_search._losses(profiles[n], rules, block=16, sink=16)[np.arange(12), chosen].sum()
            for n in profiles
        ]

    for plan in plans:
        for alphas, betas in zip(plan.alphas, plan.betas):
            assert len(set(zip(alphas, betas))) <= 2
        for n in (128, 256, 512):
            kept = [
                plan_search._kept(rule, n, block=16, sink=16)
                for row in zip(plan.alphas, plan.betas)
                for rule in zip(*row)
            ]
            assert 0.45 <= sum(kept) / len(kept) / (n / 16) <= 0.5
    # None is better than another at both lengths.
    losses = [loss(plan) for plan in plans]
    assert not any(a != b and all(x <= y for x, y in zip(a, b)) for a in losses for b in losses)


def test_the_search_beats_chance_and_runs():
    subject = testing.tiny_llama(num_kv_heads=4)
    forward, params = subject.forward, subject.params
    options = {"block": 4, "sink": 4, "floor": 8, "progress": False}
    rules = moa.rule_grid([16, 32], step=8, shares=5)
    plan = moa.search(
        forward,
        params,
        {n: samples(n) for n in (16, 32)},
        validation=samples(24),
        density=0.6,
        rules=rules,
        **options,
    )
    assert (plan.block, plan.sink, plan.floor) == (4, 4, 8)
    small, _ = moa.transform(plan)(forward, params)
    assert generate(small, params, [list(range(24))], max_new_tokens=4).lengths.tolist() == [4]
    profile = moa.influence(forward, params, samples(32), block=4, progress=False)
    table = plan_search._losses(profile, rules, block=4, sink=4)
    chosen = [rules.index(r) for row in zip(plan.alphas, plan.betas) for r in zip(*row)]
    rng = np.random.default_rng(0)
    mine = table[np.arange(8), chosen].sum()
    shuffled = [table[np.arange(8), rng.permutation(chosen)].sum() for _ in range(200)]
    assert mine <= np.median(shuffled)


def test_samples_are_prompts_with_the_models_own_answers():
    subject = testing.tiny_llama()
    forward, params = subject.forward, subject.params
    prompts = [list(range(12)), list(range(7, 19))]
    tokens, weights = moa.answered(forward, params, prompts, new=4)
    assert tokens[:, :12].tolist() == prompts
    assert (
        tokens[:, 12:].tolist()
        == generate(forward, params, prompts, max_new_tokens=4).tokens.tolist()
    )
    assert weights.tolist() == [[0.0] * 12 + [1.0] * 4] * 2
    with pytest.raises(ValueError, match=r"of one length, prompts have \[3, 4\] tokens"):
        moa.answered(forward, params, [[1, 2, 3], [1, 2, 3, 4]], new=2)


def test_texts_of_the_search_are_whole_blocks():
    subject = testing.tiny_llama()
    with pytest.raises(ValueError, match="no whole blocks of 5"):
        moa.influence(subject.forward, subject.params, samples(12), block=5, progress=False)
    profiles = {64: np.ones((1, 2, 4, 4))}
    with pytest.raises(ValueError, match="no choice sums to"):
        moa.candidates(
            profiles, rules=[(64.0, 0.0)], density=0.1, block=16, sink=16, floor=32, progress=False
        )
