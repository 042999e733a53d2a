"""GPTQ and AWQ: against plain loops, against rounding to nearest, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.calibration import Trajectory
from effjax.capture import tap
from effjax.forward import flatten_params
from effjax.methods import awq, gptq, round_to_nearest
from effjax.methods.quantization import blocks
from effjax.quant import Quantizer, dequantize, quantize_matrix
from tests.subjects.joint import tiny_joint


@pytest.fixture(scope="module")
def subject():
    """Inputs of very different sizes, heads that are not grouped."""
    made = testing.tiny_llama(
        hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, num_kv_heads=4
    )
    for name in ("norm1", "norm2"):
        norm = made.params["blocks"]["0"][name]
        norm["scale"] = norm["scale"] * jnp.geomspace(0.1, 10, 32)
    return made


def token_ids(seed, rows=8):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 50, (rows, 20)), jnp.int32)


BATCHES = [(token_ids(seed),) for seed in range(3)]


def error(subject, params):
    """Of the logits on texts that nothing was fitted to."""
    tokens = token_ids(9)
    exact, found = (subject.forward(p, {}, tokens)[0] for p in (subject.params, params))
    return float(jnp.mean(jnp.square(exact - found)))


# GPTQ ------------------------------------------------------------------------------------------


def correlated(inputs=64, outputs=12):
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((8, inputs))
    x = rng.standard_normal((400, 8)) @ mix + 0.3 * rng.standard_normal((400, inputs))
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    return jnp.asarray(w), jnp.asarray((x.T @ x / 400).astype(np.float32))


def spread(w, moment, *, group=None, bits=4, symmetric=False, act_order=False):
    quantizer = Quantizer(bits, symmetric)
    leaf = quantize_matrix(w, quantizer, group_size=group)
    plan = gptq.uniform(bits, group_size=group, act_order=act_order)
    qvalues, scale, zero = gptq._spread(plan, quantizer, w, moment, leaf)
    every = w.shape[0] // scale.shape[0]
    scale, zero = jax.tree.map(lambda part: jnp.repeat(part, every, axis=0), (scale, zero))
    return np.asarray(qvalues), np.asarray(dequantize(qvalues, scale, zero)), leaf


@pytest.mark.parametrize("group", [None, 32])
def test_gptq_is_its_plain_loop(group):
    """One input after the other over the whole matrix, in float64."""
    w, moment = correlated()
    qvalues, _, leaf = spread(w, moment, group=group)
    quantizer = Quantizer(4, symmetric=False)
    held, h = np.asarray(w, np.float64), np.asarray(moment, np.float64)
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    want = np.zeros(held.shape, np.int8)
    at = leaf.scale[0], leaf.zero_point[0]
    for i in range(len(held)):
        if group and i % group == 0:
            at = quantizer.fit_axes(jnp.asarray(held[i : i + group], jnp.float32), 0)
            at = at[0][0], at[1][0]
        qvalue = quantizer.quantize(jnp.asarray(held[i], jnp.float32), *at)
        want[i] = qvalue
        held[i + 1 :] -= np.outer(
            upper[i, i + 1 :], (held[i] - np.asarray(dequantize(qvalue, *at))) / upper[i, i]
        )
    assert np.mean(qvalues == want) > 0.99  # ties and float32
    assert np.abs(qvalues.astype(int) - want).max() <= 1


@pytest.mark.parametrize("group", [None, 32])
def test_the_order_of_activations(group):
    """As the plain order on permuted inputs, with the scales of the unpermuted groups."""
    w, moment = correlated()
    qvalues, _, leaf = spread(w, moment, group=group, act_order=True)
    order = np.argsort(-np.diag(moment), kind="stable")
    held, h = np.asarray(w, np.float64)[order], np.asarray(moment, np.float64)[order][:, order]
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    want = np.zeros(held.shape, np.int8)
    for i, place in enumerate(order):
        at = (part[place // leaf.group_size] for part in (leaf.scale, leaf.zero_point))
        scale, zero = (np.asarray(part) for part in at)
        qvalue = np.clip(np.round(held[i] / scale + zero), -8, 7)
        want[place] = qvalue
        held[i + 1 :] -= np.outer(
            upper[i, i + 1 :], (held[i] - (qvalue - zero) * scale) / upper[i, i]
        )
    assert np.mean(qvalues == want) > 0.99  # ties and float32


def test_gptq_without_correlations_rounds_to_nearest():
    w, _ = correlated()
    qvalues, _, leaf = spread(w, jnp.eye(64))
    chex.assert_trees_all_equal(qvalues, leaf.qvalues())


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("bits", [3, 4])
def test_gptq_errs_less_in_what_a_layer_computes(bits, group, symmetric, act_order):
    w, moment = correlated()
    how = {"group": group, "bits": bits, "symmetric": symmetric, "act_order": act_order}
    _, found, leaf = spread(w, moment, **how)

    def squared(rounded):
        difference = np.asarray(w) - np.asarray(rounded)
        return np.trace(difference.T @ np.asarray(moment) @ difference)

    assert squared(found) < 0.6 * squared(leaf.restore())


def test_inputs_that_never_occur_are_harmless():
    w, moment = correlated()
    moment = moment.at[5].set(0).at[:, 5].set(0)
    qvalues, _, leaf = spread(w, moment)
    chex.assert_trees_all_equal(qvalues[5], leaf.qvalues()[5])


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding(subject, act_order):
    pair = subject.forward, subject.params
    plan = gptq.uniform(3, act_order=act_order)
    assert gptq.GPTQPlan.from_json(plan.to_json()) == plan
    found = gptq.fit(plan, *pair, BATCHES, progress=False)
    _, params = gptq.transform(plan, found)(*pair)
    _, nearest = gptq.transform(plan)(*pair)
    _, baseline = round_to_nearest.transform(round_to_nearest.uniform(3))(*pair)
    chex.assert_trees_all_equal(nearest, baseline)
    assert error(subject, params) < 0.95 * error(subject, nearest)


@pytest.mark.parametrize("batches", [[[0, 1], [2]], [[0, 2, 1]], [[2], [1], [0]]], ids=str)
def test_every_token_counts_once_in_the_moments(subject, batches, monkeypatch):
    """H of all tokens' inputs, of texts of 20, 20 and 7, however they are divided and padded."""
    texts = [token_ids(seed, 1)[0, :length] for seed, length in enumerate((20, 20, 7))]
    path = "blocks.0.attn.to_q"
    inputs = [
        tap(subject.forward, subject.params, (text[None],), pattern=path, what="input")[path][0]
        for text in texts
    ]
    rows = np.concatenate(inputs).astype(np.float64)
    moments, spread = [], gptq._spread

    def seen(plan, quantizer, kernel, moment, leaf):
        moments.append(moment)
        return spread(plan, quantizer, kernel, moment, leaf)

    monkeypatch.setattr(gptq, "_spread", seen)
    plan = gptq.GPTQPlan(((path.replace(".", "[.]"), 4, 16),))
    given = [blocks.texts([np.asarray(texts[row]) for row in batch]) for batch in batches]
    gptq.fit(plan, subject.forward, subject.params, given, progress=False)
    (moment,) = moments
    chex.assert_trees_all_close(np.asarray(moment), rows.T @ rows / 47, rtol=1e-4, atol=1e-5)


# AWQ -------------------------------------------------------------------------------------------


def test_losses_of_unequal_batches_are_those_of_all_tokens(subject, monkeypatch):
    found, losses = [], awq._losses
    monkeypatch.setattr(awq, "_losses", lambda *given: found.append(losses(*given)) or found[-1])
    tokens, plan = token_ids(0), awq.uniform(3)

    def total(*batches):
        found.clear()
        scales = awq.fit(plan, subject.forward, subject.params, batches, points=4, progress=False)
        return scales, np.sum(found, axis=0)

    (one, whole), (two, parts) = total((tokens,)), total((tokens[:1],), (tokens[1:],))
    chex.assert_trees_all_close(two, one, rtol=1e-5)
    chex.assert_trees_all_close(parts, whole, rtol=1e-4)


def test_padding_does_not_count_in_the_losses(subject, monkeypatch):
    found, losses = [], awq._losses
    monkeypatch.setattr(awq, "_losses", lambda *given: found.append(losses(*given)) or found[-1])
    rows = [np.asarray(token_ids(seed, 1)[0, :length]) for seed, length in enumerate((20, 7))]

    def total(*batches):
        found.clear()
        options = {"points": 4, "progress": False}
        scales = awq.fit(awq.uniform(3, 8), subject.forward, subject.params, batches, **options)
        return scales, np.asarray(found).reshape(len(batches), -1, 4).sum(0)

    (one, whole), (two, parts) = total(blocks.texts(rows)), total(*((row[None],) for row in rows))
    chex.assert_trees_all_close(two, one, rtol=1e-5)
    chex.assert_trees_all_close(parts, whole, rtol=1e-4)


def test_scaling_alone_changes_nothing(subject):
    plan, pair = awq.uniform(8), (subject.forward, subject.params)
    places = {each.source: each for each in awq._places(plan, *pair)}
    assert sorted(places) == [
        "blocks.0.attn.to_v",
        "blocks.0.mlp.up",
        "blocks.0.norm1",
        "blocks.0.norm2",
    ]
    rng = np.random.default_rng(0)
    flat = flatten_params(subject.params)
    scales = {
        source: jnp.asarray(
            np.exp(rng.standard_normal(flat[f"{each.readers[0]}.kernel"].shape[0])), jnp.float32
        )
        for source, each in places.items()
    }
    assert error(subject, awq._scaled(plan, scales, *pair)) < 1e-9


def test_awq_beats_rounding(subject):
    plan, pair = awq.uniform(3), (subject.forward, subject.params)
    found = awq.fit(plan, *pair, BATCHES, progress=False)
    assert all(float(jnp.std(scale)) > 0 for scale in found.values())
    _, params = awq.transform(plan, found)(*pair)
    _, nearest = awq.transform(plan)(*pair)
    assert error(subject, params) < 0.95 * error(subject, nearest)


def test_the_first_exponent_is_no_scaling(subject):
    mean = jnp.abs(jax.random.normal(jax.random.key(0), (32,)))
    chex.assert_trees_all_close(awq._scales(mean, jnp.float32(0.0)), jnp.ones(32), rtol=1e-6)
    one = awq._scales(mean, jnp.float32(0.5))
    assert float(one.max() * one.min()) == pytest.approx(1, rel=1e-5)
    plan, pair = awq.uniform(4), (subject.forward, subject.params)
    found = awq.fit(plan, *pair, BATCHES[:1], points=1, progress=False)
    chex.assert_trees_all_close(found, jax.tree.map(jnp.ones_like, found), rtol=1e-6)


def test_grouped_values_have_no_place_for_scales():
    grouped = testing.tiny_llama()
    places = awq._places(awq.uniform(4), grouped.forward, grouped.params)
    assert not any("to_v" in each.source for each in places)
    assert len(places) == 6


# Other architectures ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def joint():
    """Two streams, with what a sampler gives the model, and modulations that spread channels."""
    made = tiny_joint(steps=2)
    for block in made.params["blocks"].values():
        for name in ("modulation_image", "modulation_text"):
            spread = jnp.concatenate([jnp.zeros(16), jnp.geomspace(0.1, 8, 16) - 1, jnp.zeros(16)])
            block[name]["bias"] = block[name]["bias"] + jnp.tile(spread, 2)
    pair = made.forward, made.params
    data = Trajectory(made.sampler, made.cond, jax.random.key(0), made.uncond)
    return pair, blocks.along(*pair, data)


def noise(joint, params):
    """Squared error of the model's outputs on what it was given."""
    (forward, dense), batches = joint
    run = jax.jit(lambda params, batch: forward(params, {}, *batch)[0])
    errors = [jnp.mean(jnp.square(run(params, batch) - run(dense, batch))) for batch in batches]
    return float(np.mean(errors))


@pytest.mark.parametrize("method", [awq, gptq])
def test_a_joint_transformer_is_fitted(method, joint):
    """Both streams of a model that is no language model, from batches of its own inputs."""
    pair, batches = joint
    plan = method.uniform(3, 8)
    learned = method.fit(plan, *pair, batches, progress=False)
    layers = round_to_nearest.uniform(3).decided(*pair)
    if method is gptq:
        assert set(learned) == set(layers)
        assert all(leaf.bits == 3 for leaf in learned.values())
    else:
        assert set(learned) == {
            f"blocks.{i}.modulation_{stream}" for i in range(2) for stream in ("image", "text")
        }
    _, params = method.transform(plan, learned)(*pair)
    _, nearest = method.transform(plan)(*pair)
    assert noise(joint, params) < 0.95 * noise(joint, nearest)


def test_moments_are_those_of_every_stream(joint, monkeypatch):
    """H of a layer that reads the text alone, and of one that both streams' attention feeds."""
    (forward, params), batches = joint
    for path in ("blocks.0.mlp_text.fc1", "blocks.0.attn.image.to_out"):
        moments, spread = [], gptq._spread

        def seen(plan, quantizer, kernel, moment, leaf, moments=moments, spread=spread):
            moments.append(moment)
            return spread(plan, quantizer, kernel, moment, leaf)

        with monkeypatch.context() as patch:
            patch.setattr(gptq, "_spread", seen)
            plan = gptq.GPTQPlan(((path.replace(".", "[.]"), 4, 16),))
            gptq.fit(plan, forward, params, batches, progress=False)
        rows = np.concatenate(
            [
                np.asarray(
                    tap(forward, params, batch, pattern=path.replace(".", "[.]"), what="input")[
                        path
                    ]
                ).reshape(-1, 16)
                for batch in batches
            ]
        )
        (moment,) = moments
        chex.assert_trees_all_close(moment, rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)


# What is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [awq, gptq])
def test_what_does_not_fit(method, subject):
    pair = subject.forward, subject.params
    plan = method.uniform(4)
    with pytest.raises(ValueError, match="no batches to calibrate with"):
        method.fit(plan, *pair, [])
    with pytest.raises(ValueError, match="another model or plan"):
        method.transform(plan, {})(*pair)
    quantized = method.transform(plan)(*pair)
    with pytest.raises(ValueError, match="quantized already"):
        method.transform(plan)(*quantized)
    elsewhere = type(plan)((("nowhere", 4, 16),))
    with pytest.raises(ValueError, match="matches no layer"):
        method.transform(elsewhere)(*pair)
    with pytest.raises(ValueError, match="leave out input_ranges"):
        type(plan)(((".*", 4, 8),), input_ranges=(("lm_head", 0.0, 1.0),))
    with pytest.raises(ValueError, match=r"rules\[0\]\[1\] must be one of 2, 3.*got 9"):
        method.uniform(9)


def test_gptq_names_its_own_limits(subject):
    with pytest.raises(ValueError, match="damp must be a finite number above 0"):
        gptq.GPTQPlan((), damp=0.0)
    plan = gptq.GPTQPlan((("role:head", 4, 16),))
    with pytest.raises(ValueError, match=r"only layers of a model's blocks .*lm_head"):
        gptq.fit(plan, subject.forward, subject.params, BATCHES)
