"""PAROAttention: orders, masks and formulas written down once more, searches, errors."""

import dataclasses
import itertools
import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.context import Layout
from effjax.cost import sampler_cost, weight_bytes
from effjax.methods import dit_fast_attn, even_steps, round_to_nearest
from effjax.methods.attention.paro_attention import (
    INVERSES,
    METHOD,
    ORDERS,
    Blocks,
    Diagonal,
    Goals,
    Options,
    attention_flops,
    calibrate,
    candidates,
    diagonal,
    find,
    order_scores,
    paro_attention,
    permute,
    slots_of_steps,
    transform,
    unpermute,
)
from effjax.methods.attention.paro_attention.masks import best, pack, unpack
from effjax.methods.attention.paro_attention.statistics import (
    OrderMetrics,
    Statistics,
    block_statistics,
    order_metrics,
)
from effjax.samplers import DDIM, Sampler
from pallas_kernels import use_implementation

GRID = (2, 3, 5)
TOKENS = math.prod(GRID)


def heads(tokens, *, count=6, width=8, batch=2, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [jax.random.normal(key, (batch, tokens, count, width)) for key in keys]


def attend(q, k, v, seen=None, *, renormalize=True):
    """Attention with a mask [H, S, T], in plain numpy."""
    q, k, v = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v))
    logits = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    whole = weights.sum(-1, keepdims=True)
    if seen is not None:
        weights = weights * seen
    total = weights.sum(-1, keepdims=True) if renormalize else whole
    return (weights / np.where(total > 0, total, 1) @ v).swapaxes(1, 2)


def options(grid, size, *, text=0, text_first=False, width=None, **more):
    blocks = Blocks(math.prod(grid) + text, text, text_first, size)
    return Options(grid, blocks, blocks.widths(width or blocks.count), **more)


def run(q, k, v, keep, orders, own):
    attend = jax.jit(lambda q, k, v, keep: paro_attention(q, k, v, keep, orders, own))
    return attend(q, k, v, jnp.asarray(keep))


# ---- orders ----


def test_orders_nest_the_axes_as_their_names_say():
    names = ("FHW", "FWH", "HWF", "HFW", "WHF", "WFH")
    raster = list(itertools.product(*map(range, GRID)))
    tokens = jnp.arange(TOKENS, dtype=jnp.float32)[None, :, None, None]
    for number, name in enumerate(names):
        axes = ["FHW".index(letter) for letter in name]
        assert ORDERS[number] == tuple(axes)
        expected = sorted(range(TOKENS), key=lambda i: [raster[i][axis] for axis in axes])
        np.testing.assert_array_equal(permute(tokens, (number,), GRID)[0, :, 0, 0], expected)
    assert INVERSES == ((0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 0, 2), (2, 1, 0), (1, 2, 0))
    assert candidates((13, 30, 45)) == (0, 1, 2, 3, 4, 5)
    assert candidates((1, 8, 6)) == (0, 1)


def by_hand(order, text=0, text_first=False):
    """Which token stands at each place: int[S]."""
    raster = np.arange(TOKENS).reshape(GRID).transpose(ORDERS[order]).reshape(-1)
    if text_first:
        return np.concatenate([np.arange(text), text + raster])
    return np.concatenate([raster, TOKENS + np.arange(text)])


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (4, False), (4, True)])
def test_going_back_undoes_every_order(text, text_first):
    x, *_ = heads(TOKENS + text)
    place = {"text": text, "text_first": text_first}
    for orders in [(2, 5, 0, 3, 4, 1), (5,) * 6, (0,) * 6, (2, 2, 2, 5, 5, 5)]:
        moved = jax.jit(lambda x, o=orders: permute(x, o, GRID, **place))(x)
        back = jax.jit(lambda x, o=orders: unpermute(x, o, GRID, **place))(moved)
        chex.assert_trees_all_equal(back, x)
        for head, order in enumerate(orders):
            expected = np.asarray(x)[:, by_hand(order, **place), head]
            np.testing.assert_array_equal(moved[:, :, head], expected)


# ---- (a) identities ----


@pytest.mark.parametrize(("text", "text_first"), [(0, False), (5, False), (5, True)])
def test_all_blocks_are_dense_attention_in_every_order(text, text_first):
    q, k, v = heads(TOKENS + text)
    own = options(GRID, 8, text=text, text_first=text_first)
    keep = jnp.ones((6, own.blocks.count, own.blocks.count), bool)
    found = run(q, k, v, keep, (0, 1, 2, 3, 4, 5), own)
    np.testing.assert_allclose(found, attend(q, k, v), atol=1e-5)


@pytest.mark.parametrize("renormalize", [True, False])
def test_kept_blocks_follow_the_formula(renormalize):
    """Masks of tokens from masks of blocks and orders by hand; a row without any block is zero."""
    q, k, v = heads(TOKENS + 5)
    orders = (2, 5, 0, 3, 4, 1)
    own = options(GRID, 8, text=5, text_first=True, renormalize=renormalize)
    keep = (np.random.default_rng(0).random((6, 5, 5)) < 0.5) | np.eye(5, dtype=bool)
    keep[0, 2] = False
    seen = np.zeros((6, 35, 35), bool)
    for head, order in enumerate(orders):
        block = np.empty(35, int)
        block[by_hand(order, 5, True)] = np.arange(35) // 8
        seen[head] = keep[head][block[:, None], block]
    found = run(q, k, v, keep, orders, own)
    expected = attend(q, k, v, seen, renormalize=renormalize)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (np.asarray(found[:, :, 0])[:, ~seen[0].any(1)] == 0).all()
    assert (~seen[0].any(1)).sum() == 8


def test_integers_that_are_quantized_values_already_are_exact():
    q, k, v = (jnp.round(20 * x) for x in heads(TOKENS))
    q, k, v = (x.at[..., 0].set(127.0) for x in (q, k, v))
    q, k = q / 64, k / 64  # a power of two: scales stay exact
    own = options(GRID, 8, bits=8)
    keep = jnp.ones((6, 4, 4), bool)
    found = run(q, k, v, keep, (0, 1, 2, 3, 4, 5), own)
    np.testing.assert_allclose(found, attend(q, k, v), rtol=1e-4, atol=1e-4)


def test_integer_attention_is_near_and_nearer_with_more_bits():
    q, k, v = heads(TOKENS)
    keep = jnp.ones((6, 4, 4), bool)
    exact = attend(q, k, v)

    def error(**more):
        found = run(q, k, v, keep, (0, 1, 2, 3, 4, 5), options(GRID, 8, **more))
        return np.linalg.norm(found - exact) / np.linalg.norm(exact)

    assert error() < 1e-6
    assert error(bits=8) < error(bits=8, values=8) < 0.03
    assert 0.03 < error(bits=4, values=4) < 0.4


# ---- plans: slots, blocks, bits ----


def test_slots():
    even = [math.floor(step * 10 / 30) for step in range(30)]
    np.testing.assert_array_equal(slots_of_steps(30, 10, "even"), even)
    half = [*range(15), *[15] * 15]
    np.testing.assert_array_equal(slots_of_steps(30, 16, "half"), half)
    np.testing.assert_array_equal(slots_of_steps(5, 4, "half"), [0, 1, 2, 3, 3])
    np.testing.assert_array_equal(slots_of_steps(8, 3, "half"), [0, 0, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(slots_of_steps(3, 1, "half"), [0, 0, 0])


def test_blocks_begin_at_multiples_of_the_whole_sequence():
    """CogVideoX: 226 tokens of text and 30 of the image in the first four blocks of 64."""
    blocks = Blocks(17_776, 226, True, 64)
    assert blocks.count == 278
    np.testing.assert_array_equal(np.flatnonzero(blocks.fixed), [0, 1, 2, 3, 277])
    last = Blocks(69, 5, False, 8)
    np.testing.assert_array_equal(np.flatnonzero(last.fixed), [8])
    assert not Blocks(64, 0, False, 8).fixed.any()
    assert Blocks(100, 0, False, 16).widths(3) == (3,) * 6 + (7,)
    assert Blocks(17_776, 226, True, 64).always.sum() == 2 * 5 * 278 - 25


def test_bits_are_packed_and_unpacked_on_a_device():
    keep = np.random.default_rng(0).random((3, 2, 11, 11)) < 0.5
    packed = pack(keep)
    assert packed.shape == (3, 2, 11, 2)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(jax.jit(lambda bits: unpack(bits, 11))(packed), keep)


# ---- (b) costs ----


def plan_of(density=0.5, *, calls=4, block=8, **more):
    orders, layout = ((0, 1), (1, 0)), Layout(grid=(1, 8, 8))
    plan = diagonal(density, orders, (False, False), layout, steps=calls, block=block)
    return dataclasses.replace(plan, **more)


def test_costs_in_closed_form():
    subject = testing.tiny_dit()
    plan = plan_of(0.5)
    assert plan.mean_density == 0.5
    assert plan.mask_bytes == 2 * 2 * 8 * 1
    forward, params = transform(plan)(subject.forward, subject.params)
    dense, sparse = (
        sampler_cost(subject.sampler, *pair, subject.cond).scope("attention")
        for pair in ((subject.forward, subject.params), (forward, params))
    )
    batch, tokens, width = 4, 64, 16
    assert dense.flops == 4 * 2 * 4 * batch * tokens**2 * width
    assert sparse.flops == sparse.useful_flops == dense.flops // 2
    flops = attention_flops(plan, batch=batch, head_dim=8)
    assert flops.sum() == sparse.flops
    assert weight_bytes(params) - weight_bytes(subject.params) == plan.mask_bytes


def test_calls_say_what_they_compute():
    """The slot of each call says its share; plans of another number of calls say nothing."""
    plan = plan_of(calls=4)
    assert plan.computed(4) == {"attention": [0.5] * 4}
    assert plan.computed(5) == {}
    subject = testing.tiny_dit(steps=4)
    plan, *_ = found_for(subject, density=0.4, thresholds="slot", slots=2, sharing="even")
    shares = np.concatenate(plan.density, axis=1).mean(1)
    np.testing.assert_allclose(plan.computed(4)["attention"], np.repeat(shares, 2))


def test_costs_of_a_plan_with_uneven_rows():
    """Kernels do the work of the kept blocks; XLA that of as many as any row keeps."""
    subject = testing.tiny_dit()
    plan, masks, *_ = found_for(subject, density=0.4)
    forward, params = transform(plan, masks)(subject.forward, subject.params)
    cost = sampler_cost(subject.sampler, forward, params, subject.cond).scope("attention")
    flops = attention_flops(plan, batch=4, head_dim=8).sum()
    assert cost.useful_flops == pytest.approx(flops, rel=0.01)
    assert cost.flops == 4 * 2 * 4 * 4 * 2 * 8 * 8**2 * 8 * plan.width


# ---- (c) synthetic heads ----


def synthetic(grid, axis, *, sharpness=12.0):
    """Heads whose attention falls with the distance along all axes but one, and values -7 ... 7.

    Logits are sharpness (cos x + cos y) of the angles between places: near exp(-distance^2).
    """
    places = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    angles = np.delete(places, axis, 1) * (np.pi / 8)
    x = np.concatenate([np.cos(angles), np.sin(angles)], 1) * (sharpness * 2) ** 0.5
    v = np.random.default_rng(0).integers(-7, 8, (len(x), 8))
    v[0] = 7
    return tuple(jnp.asarray(each, jnp.float32)[None, :, None] for each in (x, x, v))


def metrics_of(q, k, grid, size):
    blocks = Blocks(math.prod(grid), 0, False, size)

    @jax.jit
    def metrics(q, k):
        return order_metrics(block_statistics(q, k, blocks, 1e-3), blocks, 0.9)

    orders = [[permute(x, (order,), grid) for x in (q, k)] for order in range(6)]
    found = [metrics(*each) for each in orders]
    return OrderMetrics(*(np.stack([np.asarray(x)[0] for x in each]) for each in zip(*found)))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_score_puts_the_uniform_axis_fastest(axis):
    grid = (8, 8, 8)
    q, k, _ = synthetic(grid, axis)
    metrics = metrics_of(q, k, grid, 16)
    fastest = [number for number, order in enumerate(ORDERS) if order[2] == axis]
    slowest = [number for number, order in enumerate(ORDERS) if order[0] == axis]
    best = int(np.argmin(order_scores(metrics, 0.5)[:, 0]))
    assert best in fastest
    assert metrics.mass[best, 0] > 0.9
    assert metrics.mass[slowest].max() < metrics.mass[best, 0] - 0.2


def test_statistics_are_those_of_the_whole_map():
    q, k, _ = heads(21, count=2)
    blocks = Blocks(21, 0, False, 8)
    found = jax.jit(lambda q, k: block_statistics(q, k, blocks, 0.02))(q, k)
    logits = np.einsum("bshd,bthd->bhst", q, k) * 8**-0.5
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    for m, n in itertools.product(range(3), range(3)):
        part = weights[..., 8 * m : 8 * m + 8, 8 * n : 8 * n + 8]
        np.testing.assert_allclose(found.sums[..., m, n], part.sum((2, 3)), rtol=1e-5)
        np.testing.assert_allclose(found.largest[..., m, n], part.max((2, 3)), rtol=1e-5)
        if max(m, n) < 2:
            np.testing.assert_allclose(found.small[..., m, n], (part < 0.02).mean((2, 3)))
    metrics = order_metrics(found, blocks, 0.3)
    sums, small, largest = (np.asarray(x)[..., :2, :2] for x in found)
    np.testing.assert_allclose(metrics.sparse, (small >= 0.3).mean((2, 3)))
    np.testing.assert_allclose(metrics.peaky, (largest / (sums / 64)).mean((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(metrics.mass, sums.max((2, 3)) / sums.sum((2, 3)), rtol=1e-5)


def test_a_block_without_attention_has_no_peak():
    nothing = jnp.zeros((1, 1, 4, 4))
    metrics = order_metrics(Statistics(nothing, nothing + 1, nothing), Blocks(32, 0, False, 8), 0.9)
    assert (float(metrics.sparse[0, 0]), float(metrics.peaky[0, 0])) == (1.0, 1.0)


def test_the_printed_score_prefers_fewer_blocks_to_skip():
    metrics = OrderMetrics(*(np.array(x)[:, None] for x in ([0.0, 0.8], [3.0, 2.9], [0.3, 0.9])))
    assert np.argmin(order_scores(metrics, 0.5)[:, 0]) == 1
    assert np.argmin(order_scores(metrics, 0.5, "printed")[:, 0]) == 0
    corrected = [0.5 * 1.0 / 1.2 + 0.5 * 3.0 / 5.9, 0.5 * 0.2 / 1.2 + 0.5 * 2.9 / 5.9]
    np.testing.assert_allclose(order_scores(metrics, 0.5)[:, 0], corrected)


def test_four_bits_lose_less_in_blocks_of_a_good_order():
    """Blocks of probabilities after the reorder, in the raster, and whole rows of them."""
    grid = (8, 8, 8)
    q, k, v = synthetic(grid, 0)
    exact = attend(q, k, v)

    def error(order, size):
        blocks = Blocks(512, 0, False, 64)
        own = Options(grid, blocks, (8,) * 8, bits=8, values=4, unit="tile", scales=(1, 1))
        if size == "row":
            own = own._replace(
                blocks=dataclasses.replace(blocks, size=512), widths=(1,), unit="query"
            )
        keep = jnp.ones((1, len(own.widths), len(own.widths)), bool)
        found = run(q, k, v, keep, (order,), own)
        return np.linalg.norm(found - exact)

    reordered, raster, rows = error(2, "block"), error(0, "block"), error(0, "row")
    assert reordered < raster
    assert reordered < rows


def test_a_mask_after_the_reorder_loses_less():
    """As many blocks of most mass, in the raster and in the head's order."""
    grid = (8, 8, 8)
    q, k, v = synthetic(grid, 0)
    exact = attend(q, k, v)
    blocks = Blocks(512, 0, False, 64)

    def error(order):
        one, two = (permute(x, (order,), grid) for x in (q, k))
        masses = np.asarray(block_statistics(one, two, blocks, 1e-3).sums[0])
        keep = best(masses, blocks, np.array([round(0.3 * 64)]), 8, 1)
        own = Options(grid, blocks, (8,) * 8)
        return np.linalg.norm(run(q, k, v, keep, (order,), own) - exact) / np.linalg.norm(exact)

    assert error(2) < 0.5 * error(0)


# ---- searches ----


def found_for(subject, **goals):
    goals = Goals(**{"block": 8, **goals})
    data = subject.data(METHOD.data)
    return find(goals, subject.forward, subject.params, data, progress=False)


def sample(subject, pair, key=3):
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    with use_implementation("xla"):
        return jax.jit(subject.sampler)(*pair, subject.cond, jax.random.key(key), **options)


SD3 = partial(testing.tiny_sd3, num_layers=1)
FLUX = partial(testing.tiny_flux, num_layers=1, num_single_layers=1)


@pytest.mark.parametrize("make", [testing.tiny_dit, SD3, FLUX])
def test_searches_find_plans_that_run_and_load_as_they_were(make, tmp_path):
    """Text last (SD3, with an attention of the image alone), text first (FLUX), and none."""
    subject = make()
    plan, masks, metrics, scores = found_for(subject, density=0.7, bits=8, values=8)
    again = METHOD.plan.from_json(plan.to_json())
    assert again == plan
    assert plan.mean_density <= 0.7
    assert plan.mean_density > 0.6
    assert plan.slots == 3
    assert (plan.text, plan.text_first) == {"DiT": (0, False), "SD3": (5, False)}.get(
        subject.forward.model.__name__, (5, True)
    )
    assert "the best fifth" in plan.describe()
    if plan.text_first:
        data = subject.data(METHOD.data)
        repeated = calibrate(plan, subject.forward, subject.params, data, progress=False)
        chex.assert_trees_all_equal(repeated, masks)
    for layer, path in enumerate(metrics):
        np.testing.assert_array_equal(scores[path].argmin(0), plan.orders[layer])
        assert (metrics[path].mass <= 1 + 1e-6).all()
        blocks = plan.blocks(layer)
        keep = np.unpackbits(masks[f"{path}.keep"], axis=-1, count=blocks.count).astype(bool)
        assert keep[..., blocks.always].all()
        assert keep.any(-1).all()
        np.testing.assert_allclose(keep.mean((-1, -2)), plan.density[layer])
    forward, params = transform(plan, masks)(subject.forward, subject.params)
    chex.assert_tree_all_finite(sample(subject, (forward, params)))
    effjax.save(tmp_path / "model", forward, params)
    loaded = effjax.load(tmp_path / "model")
    assert loaded[0] == forward
    chex.assert_trees_all_equal(loaded[1], params)


def test_rows_of_equal_length_and_thresholds_by_slot():
    subject = testing.tiny_dit()
    plan, masks, *_ = found_for(subject, density=0.5, rule="row")
    keep = np.unpackbits(masks["blocks.0.attn.keep"], axis=-1, count=8)
    assert (keep.sum(-1) == 4).all()
    assert plan.width == 4
    plan, masks, *_ = found_for(subject, density=0.5, thresholds="slot", slots=2, sharing="even")
    kept = np.array(plan.kept).sum((1, 2)) / (4 * 64)
    assert (kept <= 0.5).all()
    assert (kept > 0.45).all()
    assert len(set(plan.taus)) == 2


def test_the_step_is_data_and_every_slot_has_its_mask():
    """One program for all steps, equal to those of static steps."""
    subject = testing.tiny_dit()
    plan, masks, *_ = found_for(subject, density=0.4, thresholds="slot", slots=4, sharing="even")
    forward, params = transform(plan, masks)(subject.forward, subject.params)
    inputs = jax.random.normal(jax.random.key(0), (2, 16, 16, 4)), jnp.ones(2), subject.cond
    traces = []

    @jax.jit
    def call(params, step):
        traces.append(None)
        return forward(params, {}, *inputs, step=step)[0]

    outs = [call(params, step) for step in range(4)]
    assert len(traces) == 1
    for step, out in enumerate(outs):
        static = jax.jit(lambda p, s=step: forward(p, {}, *inputs, step=s)[0])(params)
        chex.assert_trees_all_close(out, static, atol=1e-5)
    assert max(float(jnp.abs(a - b).max()) for a, b in itertools.pairwise(outs)) > 1e-4


SHARED = dit_fast_attn.transform(
    dit_fast_attn.uniform((1, 0, 1), layers=2, calls=4, tokens=64)  # AST, FULL, AST
)
CACHED = even_steps.transform(even_steps.EvenStepsPlan(steps=4, every=2))


def test_it_composes_with_quantized_layers(tmp_path):
    """In both orders the same model."""
    subject = testing.tiny_dit()
    plan, masks, *_ = found_for(subject, density=0.5, bits=8, values=8)
    rounded = round_to_nearest.transform(round_to_nearest.uniform(8, 8))
    own = transform(plan, masks)
    one = effjax.chain(own, rounded)(subject.forward, subject.params)
    two = effjax.chain(rounded, own)(subject.forward, subject.params)
    chex.assert_trees_all_equal(one[1], two[1])
    chex.assert_trees_all_close(sample(subject, one), sample(subject, two), atol=1e-5)
    effjax.save(tmp_path / "pair", *one)
    assert effjax.load(tmp_path / "pair")[0] == one[0]


@pytest.mark.parametrize("other", [SHARED, CACHED], ids=lambda other: other.method)
def test_it_composes_with_what_shares_attention_or_skips_blocks(other):
    """In both orders the same samples, for the attention of the calls that are left."""
    subject = testing.tiny_dit()
    own = transform(plan_of(0.5))
    one, two = (
        effjax.chain(*pair)(subject.forward, subject.params)
        for pair in itertools.permutations((own, other))
    )
    chex.assert_trees_all_close(sample(subject, one), sample(subject, two), atol=1e-5)
    alone = own(subject.forward, subject.params)
    counted = [
        sampler_cost(subject.sampler, forward, params, subject.cond).scope("attention").flops
        for forward, params in (alone, one)
    ]
    assert counted[1] * 2 == counted[0]


def test_diagonal_plans_of_a_model():
    subject = testing.tiny_flux()
    plan = Diagonal(0.6, 4, order=1, block=8, text=5).plan(subject.forward, subject.params)
    assert plan.mean_density <= 0.6
    assert plan.orders == ((1, 1),) * 4
    keep = transform(plan)(subject.forward, subject.params)[1]["methods"]["paro_attention"]
    bits = np.unpackbits(keep["single_blocks"]["0"]["attn"]["keep"], axis=-1, count=9)
    assert (bits.sum((-1, -2)) == plan.kept[0][2][0]).all()
    assert (bits[0].sum(-1) == np.array([9, *[4] * 7, 9])).all()  # two of each row beside the ends
    for row in range(1, 8):
        assert bits[0, 0, row, max(row - 1, 1) : row + 1].all()


# ---- (d) errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"orders": ((0, 6), (0, 0))}, r"orders\[0\]\[1\] must be .* got 6"),
        ({"steps": 1, "kept": plan_of().kept * 2}, "masks for 2 slots and 1 network calls"),
        ({"kept": ()}, "at least one layer, one head and one slot"),
        ({"kept": (((32,), (32, 32)),)}, "a number for every slot, layer and head"),
        ({"kept": (((65, 32), (32, 32)),)}, "kept is 32 ... 65"),
        ({"width": 3}, "32 ... 32"),
        ({"values": 8}, "values in 8 bits need queries and keys in 8 or 4 bits"),
        ({"bits": 6}, "bits must be one of 16, 8, 4, got 6"),
        ({"joint": (False,)}, "joint must say of each of 2 layers"),
        ({"taus": (0.1, 0.2)}, "taus are one for each of 1 slots"),
        ({"text": 3, "joint": (True, True), "width": 0}, "width must be"),
    ],
)
def test_bad_plans(untyped, change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan_of(), **change)


def test_masks_of_something_else_are_refused():
    subject = testing.tiny_dit()
    plan = dataclasses.replace(plan_of(0.5, block=7), masks="calibrated")
    good = {
        f"blocks.{i}.attn.keep": np.asarray(bits)
        for i, bits in enumerate(
            transform(plan_of(0.5, block=7))(subject.forward, subject.params)[1]["methods"][
                "paro_attention"
            ]["blocks"][str(i)]["attn"]["keep"]
            for i in range(2)
        )
    }

    def refused(message, **changes):
        with pytest.raises(ValueError, match=message):
            transform(plan, {**good, **changes})(subject.forward, subject.params)

    transform(plan, good)(subject.forward, subject.params)
    name = "blocks.1.attn.keep"
    pad, row, text, other = (good[name].copy() for _ in range(4))
    pad[0, 0, 0, 1] |= 1
    row[0, 0, 0] = 255, 0b11000000
    text[0, 0, 0, 1] &= 0b10111111
    other[0, 0, 0, 0] ^= 1
    refused("has bits set behind its 10 blocks", **{name: pad})
    refused("keeps 10 blocks in a row, the plan's width is", **{name: row})
    refused("leaves out blocks of text or of the incomplete end", **{name: text})
    refused("other numbers of blocks than the plan says", **{name: other})
    refused(r"is uint8\[1, 2, 10, 1\], must be uint8\[1, 2, 10, 2\]", **{name: pad[..., :1]})
    refused("x is no mask of this model", x=pad)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.keep is missing"):
        transform(plan, {"blocks.0.attn.keep": good["blocks.0.attn.keep"]})(
            subject.forward, subject.params
        )
    with pytest.raises(ValueError, match="needs its masks"):
        transform(plan)(subject.forward, subject.params)
    with pytest.raises(ValueError, match="makes its own"):
        transform(plan_of(0.5, block=7), good)(subject.forward, subject.params)


def test_a_plan_for_something_else_is_refused():
    subject = testing.tiny_dit()
    pair = transform(plan_of())(subject.forward, subject.params)
    with pytest.raises(ValueError, match="planned for 4 network calls, but the sampler makes 3"):
        Sampler(DDIM(steps=3))(*pair, subject.cond, jax.random.key(0))
    inputs = (jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond)
    with pytest.raises(ValueError, match="step 4 lies outside the plan"):
        pair[0](pair[1], {}, *inputs, step=4)
    small = diagonal(0.5, ((0,),), (False,), Layout(grid=(1, 8, 8)), steps=4, block=8)
    with pytest.raises(ValueError, match="2 self-attention layers with"):
        transform(small)(subject.forward, subject.params)
    wide = dataclasses.replace(plan_of(), grid=(1, 4, 16))
    pair = transform(wide)(subject.forward, subject.params)
    with pytest.raises(ValueError, match=r"made for the grid \(1, 4, 16\) and 64 tokens"):
        pair[0](pair[1], {}, *inputs, step=0)
    flux = testing.tiny_flux()
    plan = Diagonal(0.6, 4, block=8, text=7).plan(flux.forward, flux.params)
    pair = transform(plan)(flux.forward, flux.params)
    with pytest.raises(ValueError, match=r"71 tokens with the text, this call has .* 69 tokens"):
        sample(flux, pair)
    llama = testing.tiny_llama()
    with pytest.raises(ValueError, match="Llama has no self-attention layers"):
        Diagonal(0.5, 4).plan(llama.forward, llama.params)
    with pytest.raises(ValueError, match="this model has 0 self-attention layers"):
        transform(plan_of())(llama.forward, llama.params)


@pytest.mark.parametrize(
    ("goals", "message"),
    [
        ({"density": 0.05}, "a density of 0.05 is below 0.125"),
        ({"density": 0.05, "rule": "row"}, "leaves no block for rows of 8 blocks"),
        ({"slots": 5}, "4 network calls for 5 slots"),
        ({"block": 128}, "Take smaller blocks"),
        ({"values": 8}, "need queries and keys in 8 or 4 bits"),
    ],
)
def test_bad_goals(goals, message):
    with pytest.raises(ValueError, match=message):
        found_for(testing.tiny_dit(), **goals)


def test_bad_orders():
    x, *_ = heads(TOKENS)
    with pytest.raises(ValueError, match=r"orders are numbered 0 \.\.\. 5, got"):
        permute(x, (0, 0, 0, 0, 0, 6), GRID)
    with pytest.raises(ValueError, match="30 tokens of the grid"):
        permute(x[:, 1:], (0,) * 6, GRID)
