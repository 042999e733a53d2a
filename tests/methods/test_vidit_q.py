"""ViDiT-Q: identities, the ordering of its ingredients, segments, search, errors."""

import dataclasses
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.capture import tap
from effjax.forward import METHODS, abstract, flatten_params, nest_params
from effjax.layers.folding import fold, folds
from effjax.layers.linear import Linear
from effjax.methods import dit_fast_attn, round_to_nearest, vidit_q
from effjax.models.pixart import PixArt, PixArtConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.quant import Activations, QTensor, Quantizer, qdot, quantize_matrix
from effjax.quant.hadamard import Rotation
from effjax.samplers import DDIM, Sampler
from effjax.search.sensitivity import (
    Preparation,
    Rounding,
    fidelity,
    rounded_samples,
    sensitivity,
    sqnr,
)
from effjax.targets import BLOCK_LAYERS
from tests.subjects.joint import tiny_joint


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_dit()


@pytest.fixture(scope="module")
def calibration(subject):
    return calibrated(subject, vidit_q.uniform(8))


def calibrated(subject, plan, **options):
    return vidit_q.calibrate(
        plan,
        subject.forward,
        subject.params,
        subject.sampler,
        subject.cond,
        uncond=subject.uncond,
        key=jax.random.key(7),
        progress=False,
        **options,
    )


def sample(subject, forward, params):
    return jax.jit(subject.sampler)(
        forward, params, subject.cond, jax.random.key(0), uncond=subject.uncond
    )


def test_masks_and_rotations_alone_change_nothing(subject, calibration):
    """Quantizers off: equal to the model within float32's rounding."""
    preparations = {
        path: Preparation(
            vidit_q.balance(kernel_of(subject, path), absmax[0], 0.99),
            Rotation(absmax.shape[1], 3),
        )
        for path, absmax in calibration.items()
    }
    floats = jnp.full((len(preparations), 2), 16, jnp.int32)
    same = subject.forward.patch(Rounding(floats, preparations))
    dense = sample(subject, subject.forward, subject.params)
    run = jax.jit(lambda params: subject.sampler(same, params, subject.cond, jax.random.key(0)))
    chex.assert_trees_all_close(run(subject.params), dense, rtol=1e-4, atol=1e-4)


def layers_of(subject):
    found = subject.forward.target_modules(subject.params, Linear)
    return {target.path: target for target in found}


def kernel_of(subject, path):
    return flatten_params(subject.params)[f"{path}.kernel"]


def test_the_calibration_is_the_largest_magnitude_on_the_trajectory(subject, calibration):
    """By hand: the first layer of the first block over all calls."""
    sampler, path = subject.sampler, "blocks.0.attn.to_q"
    uncond = sampler.unconditional(subject.forward, subject.cond)
    carry = sampler.init(subject.forward, subject.params, subject.cond, jax.random.key(7))
    seen = []
    for step in range(sampler.calls):
        inputs = sampler.inputs(carry.x, subject.cond, uncond, step)
        values = tap(
            subject.forward, subject.params, inputs, pattern=path.replace(".", r"\."), what="input"
        )
        seen.append(np.abs(np.asarray(values[path])))
        carry = sampler.step(subject.forward, subject.params, carry, subject.cond, uncond, step)
    expected = np.max([x.max((0, 1)) for x in seen], 0)
    chex.assert_trees_all_close(calibration[path][0], expected, rtol=1e-4)
    averaged = calibrated(subject, vidit_q.uniform(8), decay=0.9)[path][0]
    by_hand = seen[0].max(1).mean(0)
    for x in seen[1:]:
        by_hand = 0.9 * by_hand + 0.1 * x.max(1).mean(0)
    chex.assert_trees_all_close(averaged, by_hand, rtol=1e-4)


def test_leaves_are_what_the_paper_says(subject, calibration):
    plan = vidit_q.uniform(4, alpha=0.7, seed=5)
    _, params = vidit_q.transform(plan, calibration)(subject.forward, subject.params)
    flat = flatten_params(params)
    leaf = flat["blocks.1.mlp.fc2.kernel"]
    assert isinstance(leaf, QTensor)
    kernel = kernel_of(subject, "blocks.1.mlp.fc2")
    absmax = calibration["blocks.1.mlp.fc2"][0]
    smoothing_scale = np.abs(kernel).max(1) ** 0.7 / np.asarray(absmax) ** 0.3
    chex.assert_trees_all_close(leaf.smoothing_scale, smoothing_scale, rtol=1e-5)
    matrix = Rotation(64, 5).matrix()
    rotated = matrix.T @ (np.asarray(kernel) / smoothing_scale[:, None])
    low, high = np.minimum(rotated.min(0), 0), np.maximum(rotated.max(0), 0)
    scale = (high - low) / 15
    chex.assert_trees_all_close(leaf.scale[0], scale, rtol=1e-4)
    assert np.abs(leaf.dequantize() - rotated).max() <= 0.501 * scale.max()
    assert leaf.activations.dynamic
    assert leaf.activations.quantizer == Quantizer(8)
    assert not isinstance(flat["blocks.1.modulation.kernel"], QTensor)
    assert not isinstance(flat["final.proj.kernel"], QTensor)
    # SmoothQuant's strength is the exponent of the inputs.
    smooth = vidit_q.smooth_quant(strength=0.3)
    assert smooth.segments[0][1][0][3:] == (0.7, False)


def drift(seed):
    """Section 7(c)'s data: four static outlier channels, and channels that drift from step to
    step: inputs [steps, tokens, C] and a matrix [C, O]."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((256, 256)) / 16
    x = rng.standard_normal((10, 64, 256)) * rng.lognormal(0, 0.7, (10, 1, 256))
    x[..., rng.choice(256, 4, replace=False)] *= 30
    return jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)


@pytest.mark.parametrize("bits", [8, 4])
def test_both_balances_beat_either_alone(bits):
    """The sheet's ordering: static tensor > token > rotation, scaling > both."""
    errors = {name: [] for name in ("static", "token", "scale", "rotate", "both")}
    for seed in range(3):
        x, w = drift(seed)
        exact = x @ w
        absmax = jnp.abs(x).max((0, 1))
        smoothing_scale = vidit_q.balance(w, absmax, 0.5)
        options = {
            "token": {},
            "scale": {"smoothing_scale": smoothing_scale},
            "rotate": {"rotation": Rotation(256)},
            "both": {"smoothing_scale": smoothing_scale, "rotation": Rotation(256)},
        }
        activations = Activations(Quantizer(8))
        for name, option in options.items():
            leaf = quantize_matrix(
                w, Quantizer(bits, symmetric=False), activations=activations, **option
            )
            errors[name].append(relative(qdot(x, leaf), exact))
        leaf = quantize_matrix(
            w,
            Quantizer(bits, symmetric=False),
            activations=Activations(Quantizer(8, symmetric=False), dynamic=False),
            input_range=(x.min(), x.max()),
        )
        errors["static"].append(relative(qdot(x, leaf), exact))
    mean = {name: float(np.mean(values)) for name, values in errors.items()}
    assert mean["static"] > mean["token"] > max(mean["rotate"], mean["scale"])
    assert mean["both"] < 0.8 * min(mean["rotate"], mean["scale"])


def relative(out, exact):
    return float(jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact))


def test_more_bits_are_nearer_to_the_model(subject, calibration):
    dense = sample(subject, subject.forward, subject.params)
    errors = []
    for bits in (8, 6, 4):
        plan = vidit_q.uniform(bits)
        pair = vidit_q.transform(plan, calibration)(subject.forward, subject.params)
        errors.append(relative(sample(subject, *pair), dense))
    assert errors[0] < errors[1] < errors[2]
    assert errors[0] < 0.05


def test_masks_are_folded_where_they_can_be(subject):
    """Without rounding the folded model is the model; with it, shared scales cost little."""
    flat = flatten_params(subject.params)
    found = folds(subject.forward.target_modules(subject.params))
    assert [len(where.readers) for where in found] == [3, 1, 1] * 2
    for i, where in enumerate(found):
        width = flat[f"{where.readers[0]}.kernel"].shape[0]
        smoothing_scale = jnp.asarray(np.random.default_rng(i).uniform(0.5, 2, width), jnp.float32)
        flat = fold(flat, where, smoothing_scale)
        for reader in where.readers:
            flat[f"{reader}.kernel"] = flat[f"{reader}.kernel"] / smoothing_scale[:, None]
    dense = sample(subject, subject.forward, subject.params)
    same = sample(subject, subject.forward, nest_params(flat))
    chex.assert_trees_all_close(same, dense, rtol=1e-3, atol=1e-4)

    plan = vidit_q.uniform(8, alpha=0.5, fold=True)
    absmax = calibrated(subject, plan)
    forward, params = vidit_q.transform(plan, absmax)(subject.forward, subject.params)
    leaves = flatten_params(params)
    assert leaves["blocks.0.attn.to_q.kernel"].smoothing_scale is None
    assert leaves["blocks.0.mlp.fc2.kernel"].smoothing_scale is not None  # a GELU stands before it
    assert relative(sample(subject, forward, params), dense) < 0.05
    with pytest.raises(ValueError, match="cannot be folded"):
        dataclasses.replace(ranged(subject, 8, 8), fold=True)


def test_factors_are_folded_into_the_norms_of_a_text_encoder():
    config = T5Config(
        vocab_size=20, hidden_size=8, intermediate_size=16, num_layers=1, num_heads=2, head_dim=4
    )
    forward, shapes = abstract(T5Encoder, config)
    params = testing.random_params(shapes)
    flat = flatten_params(params)
    for i, where in enumerate(folds(forward.target_modules(shapes))):
        width = flat[f"{where.readers[0]}.kernel"].shape[0]
        smoothing_scale = jnp.asarray(np.random.default_rng(i).uniform(0.5, 2, width), jnp.float32)
        flat = fold(flat, where, smoothing_scale)
        for reader in where.readers:
            flat[f"{reader}.kernel"] = flat[f"{reader}.kernel"] / smoothing_scale[:, None]
    inputs = (jnp.arange(10).reshape(2, 5), jnp.ones((2, 5), bool))
    chex.assert_trees_all_close(
        forward(nest_params(flat), {}, *inputs)[0], forward(params, {}, *inputs)[0], atol=1e-5
    )


# Segments ---------------------------------------------------------------------------------------


def ranged(subject, first, second, boundary=2):
    rules = tuple(((BLOCK_LAYERS, bits, 8, 0.9, True),) for bits in (first, second))
    return vidit_q.ViDiTQPlan(((0, rules[0]), (boundary, rules[1])), calls=subject.sampler.calls)


def test_segments_have_their_own_leaves(subject, tmp_path):
    """Equal to running each segment with its own one-segment model, fused, stepwise and loaded."""
    plan = ranged(subject, 8, 4)
    calibration = calibrated(subject, plan)
    forward, params = vidit_q.transform(plan, calibration)(subject.forward, subject.params)
    assert forward.boundaries == (2,)
    assert set(params[METHODS]["vidit_q"]["1"]) == set(calibration)
    fused = sample(subject, forward, params)

    sampler, cond, key = subject.sampler, subject.cond, jax.random.key(0)
    parts = []
    for segment, bits in enumerate((8, 4)):
        own = vidit_q.uniform(bits, alpha=0.9)
        part = {path: absmax[segment][None] for path, absmax in calibration.items()}
        parts.append(vidit_q.transform(own, part)(subject.forward, subject.params))
    run = jax.jit(sampler.run, static_argnames=("start", "stop"))
    uncond = sampler.unconditional(subject.forward, cond)
    carry = sampler.init(subject.forward, subject.params, cond, key)
    carry = run(*parts[0], carry, cond, uncond, start=0, stop=2)
    carry = run(*parts[1], carry, cond, uncond, start=2, stop=4)
    # Values are to 65, sums of other orders differ in their last bits.
    chex.assert_trees_all_close(fused, carry.x, atol=1e-4, rtol=1e-5)

    stepwise = sampler.stepwise(forward, params, cond, key, progress=False)
    chex.assert_trees_all_close(stepwise, fused, atol=1e-4, rtol=1e-5)
    effjax.save(tmp_path / "m", forward, params)
    again = effjax.load(tmp_path / "m")
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)
    assert effjax.cost.weight_bytes(params) > effjax.cost.weight_bytes(parts[0][1])


def test_segments_are_never_guessed(subject):
    plan = ranged(subject, 8, 8)
    forward, params = vidit_q.transform(plan, calibrated(subject, plan))(
        subject.forward, subject.params
    )
    inputs = (jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), subject.cond)
    with pytest.raises(ValueError, match=r"parameters change at the network calls \(2,\)"):
        jax.jit(lambda step: forward(params, {}, *inputs, step=step))(1)
    forward(params, {}, *inputs, step=1)
    other = Sampler(DDIM(steps=5))
    with pytest.raises(ValueError, match="planned for 4 network calls"):
        other(forward, params, subject.cond, jax.random.key(0))


def test_time_ranges_become_segments(subject):
    rules = {bits: ((BLOCK_LAYERS, bits, 8, None, True),) for bits in (4, 8)}
    sampler = Sampler(DDIM(steps=10))
    times = np.asarray(sampler.schedule.times)
    plan = vidit_q.by_time([(0, 500, rules[4]), (501, 1000, rules[8])], sampler)
    first_low = int(np.argmax(times < 501))
    assert plan.segments == ((0, rules[8]), (first_low, rules[4]))
    assert plan.calls == 10
    assert vidit_q.by_time([(0, 1000, rules[8])], sampler).calls is None
    for wrong in (
        [(0, 500, rules[4])],
        [(0, 500, rules[4]), (502, 1000, rules[8])],
        [(0, 500, rules[4]), (500, 1000, rules[8])],
    ):
        with pytest.raises(ValueError, match="without gap or overlap"):
            vidit_q.by_time(wrong, sampler)


# Search -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_layer", [False, True])
def test_the_search_spends_bits_where_they_matter(subject, by_layer):
    """One block's feed-forward layers hardly matter: their share of bits goes elsewhere."""
    params = jax.tree.map(jnp.copy, subject.params)
    params["blocks"]["0"]["mlp"]["fc2"]["kernel"] *= 1e-3
    plan = vidit_q.search(
        subject.forward,
        params,
        subject.sampler,
        subject.cond,
        key=jax.random.key(0),
        average_bits=6.0,
        candidates=(4, 8),
        groups={"role:up|down": fidelity},
        by_layer=by_layer,
        progress=False,
    )
    assert len(plan.segments[0][1]) == (4 if by_layer else 2)
    layers = layers_of(subject)
    assert plan.rule(layers["blocks.0.mlp.fc1"])[1] == 4
    assert plan.rule(layers["blocks.1.mlp.fc2"])[1] == 8
    assert plan.rule(layers["blocks.1.attn.to_q"]) is None
    selectors = [rule[0] for rule in plan.segments[0][1]]
    assert by_layer or selectors == [r"blocks\.0\.mlp\..*", r"blocks\.1\.mlp\..*"]
    assert vidit_q.ViDiTQPlan.from_json(plan.to_json()) == plan


def test_one_measurement_serves_many_budgets(subject):
    options = {"key": jax.random.key(0), "candidates": (4, 8), "alpha": None, "progress": False}
    pair = (subject.forward, subject.params)
    measured = vidit_q.sensitivities(*pair, subject.sampler, subject.cond, **options)
    plans = [measured.plan(bits) for bits in (4.0, 6.0, 8.0)]
    spent = [np.mean([bits for _, bits, *_ in plan.segments[0][1]]) for plan in plans]
    assert spent[0] == 4 < spent[1] < spent[2] == 8
    searched = vidit_q.search(*pair, subject.sampler, subject.cond, average_bits=6.0, **options)
    assert searched == plans[1]


def test_fidelity_is_of_a_typical_sample():
    """One sample that tips over weighs no more than others."""
    dense = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
    noise = jnp.array([0.01, 0.02, 0.04, 0.08])[:, None, None, None]
    np.testing.assert_allclose(fidelity(dense, dense * (1 + noise)), -(0.02 * 0.04), rtol=1e-5)
    tipped = fidelity(dense, dense * (1 + noise.at[3].mul(100)))
    np.testing.assert_allclose(tipped, -(0.02 * 0.04) * 10, rtol=1e-5)
    assert abs(fidelity(dense, dense)) < 1e-15
    same = fidelity(dense, dense * (1 + noise.at[0].set(0)))
    assert -(0.02 * 0.04) < same < -1e-8


def test_groups_may_have_different_averages(subject):
    """MixDQ's ratio: the best of several is no worse than equal averages, at as many bits."""
    options = {"average_bits": 5.0, "candidates": (3, 4, 6, 8), "alpha": None, "progress": False}
    dense = sample(subject, subject.forward, subject.params)
    found, spent = [], []
    for ratios in ((1.0,), (0.7, 1.0, 1.3, 9.0)):  # 9 is out of reach, and skipped
        plan = vidit_q.search(
            subject.forward,
            subject.params,
            subject.sampler,
            subject.cond,
            key=jax.random.key(0),
            ratios=ratios,
            **options,
        )
        pair = vidit_q.transform(plan)(subject.forward, subject.params)
        found.append(float(sqnr(dense, sample(subject, *pair))))
        leaves = [x for x in flatten_params(pair[1]).values() if isinstance(x, QTensor)]
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        spent.append(np.average([leaf.bits for leaf in leaves], weights=sizes))
    assert found[1] > found[0] - 0.5
    np.testing.assert_allclose(spent, 5.0, atol=0.03)
    for ratios, message in (((9.0, 8.0), "none of the ratios"), ((9.0,), "9")):
        with pytest.raises(ValueError, match=message):
            vidit_q.search(
                subject.forward,
                subject.params,
                subject.sampler,
                subject.cond,
                key=jax.random.key(0),
                ratios=ratios,
                **options,
            )


def test_sensitivity_compiles_once_and_rates_bits(subject, calibration):
    layers = list(calibration)
    draw = rounded_samples(
        subject.forward,
        subject.params,
        subject.sampler,
        subject.cond,
        key=jax.random.key(0),
        preparations={path: Preparation() for path in layers},
    )
    scores = sensitivity(
        draw,
        layers,
        parts=[["blocks.0.attn.to_q"], ["blocks.0.mlp.fc1", "blocks.0.mlp.fc2"]],
        candidates=[(3, 8), (6, 8), (16, 16)],
        metrics=[sqnr, sqnr],
        progress=False,
    )
    assert (np.diff(scores) > 0).all()
    assert (scores[:, 2] > 100).all()
    # What it rounds is what the leaves hold.
    plan = vidit_q.ViDiTQPlan(((0, ((r"blocks\.0\.attn\.to_q", 3, 8, None, False),)),))
    pair = vidit_q.transform(plan)(subject.forward, subject.params)
    dense = sample(subject, subject.forward, subject.params)
    assert float(sqnr(dense, sample(subject, *pair))) == pytest.approx(scores[0, 0], abs=0.5)
    with pytest.raises(ValueError, match=r"needs a metric \(given: 0\).*nowhere"):
        sensitivity(draw, layers, parts=[["nowhere"]], candidates=[(4, 8)], metrics=[])


# Composition ------------------------------------------------------------------------------------


def test_it_composes_with_dit_fast_attn_in_both_orders(tmp_path):
    subject = testing.tiny_pixart()
    attention = dit_fast_attn.transform(dit_fast_attn.uniform((3, 1), layers=2, calls=4, tokens=64))
    plan = ranged(subject, 8, 6)
    quantize = vidit_q.transform(plan, calibrated(subject, plan))
    one = effjax.chain(attention, quantize)(subject.forward, subject.params)
    two = effjax.chain(quantize, attention)(subject.forward, subject.params)
    chex.assert_trees_all_equal(one[1], two[1])
    images = sample(subject, *one)
    chex.assert_trees_all_close(images, sample(subject, *two), atol=1e-5)
    effjax.save(tmp_path / "both", *one)
    again = effjax.load(tmp_path / "both")
    assert again[0] == one[0]
    chex.assert_trees_all_equal(sample(subject, *again), images)
    assert [name for name, _ in again[0].recipe] == ["dit_fast_attn", "vidit_q"]


def test_both_streams_of_a_joint_transformer_are_quantized():
    subject = tiny_joint()
    layers = layers_of(subject)
    wanted = {path for path, each in layers.items() if each.role in ("qkv", "out", "up", "down")}
    assert {f"blocks.1.{name}.fc2" for name in ("mlp_text", "mlp_image")} < wanted
    plan = vidit_q.uniform(8, 8, fold=True)
    largest = calibrated(subject, plan)
    assert set(largest) == wanted
    forward, params = vidit_q.transform(plan, largest)(subject.forward, subject.params)
    held = {k for k, leaf in flatten_params(params).items() if isinstance(leaf, QTensor)}
    assert held == {f"{path}.kernel" for path in wanted}
    dense = sample(subject, subject.forward, subject.params)
    assert 0 < relative(sample(subject, forward, params), dense) < 0.1


def test_parts_of_a_search_hold_both_streams():
    """A part is what a block's layers of some roles are, whatever they are called."""
    subject = tiny_joint(steps=1)
    measured = vidit_q.sensitivities(
        *(subject.forward, subject.params, subject.sampler, subject.cond),
        uncond=subject.uncond,
        key=jax.random.key(0),
        candidates=(4, 8),
        alpha=None,
        progress=False,
    )
    assert list(measured.parts) == [
        rf"blocks\.{i}\.{own}\..*" for i in range(2) for own in ("attn", "(mlp_image|mlp_text)")
    ]
    decided = measured.plan(8.0).decided(subject.forward, subject.params)
    assert decided.keys() == vidit_q.uniform(8).decided(subject.forward, subject.params).keys()
    with pytest.raises(ValueError, match=r"no layers with the role cross_qkv; give role:qkv"):
        vidit_q.sensitivities(
            *(subject.forward, subject.params, subject.sampler, subject.cond),
            key=jax.random.key(0),
            groups={"role:qkv|cross_qkv": fidelity},
        )


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (("(", 8, 8, None, True), "no regular expression"),
        ((".*", 9, 8, None, True), r"segments\[0\]\[1\]\[0\]\[1\] must be one of 2"),
        ((".*", 16, 8, None, True), "quantizes the inputs of float weights"),
        ((".*", 8, 8, 1.5, True), "of at least 0 and at most 1 or none, got 1.5"),
    ],
)
def test_bad_rules(rule, message):
    with pytest.raises(ValueError, match=message):
        vidit_q.ViDiTQPlan(((0, (rule,)),))


def test_bad_plans_and_calibrations(subject, calibration):
    rules = vidit_q.uniform(8).segments[0][1]
    with pytest.raises(ValueError, match="must start at call 0"):
        vidit_q.ViDiTQPlan(((1, rules),))
    with pytest.raises(ValueError, match="needs the sampler's number of calls"):
        vidit_q.ViDiTQPlan(((0, rules), (4, rules)), calls=4)
    pair = (subject.forward, subject.params)
    with pytest.raises(ValueError, match=r"'blocks\\\\.9.*' matches no layer; there are"):
        vidit_q.transform(vidit_q.uniform(8, layers=r"blocks\.9.*"), calibration)(*pair)
    with pytest.raises(ValueError, match=r"give transform\(plan, calibrate"):
        vidit_q.transform(vidit_q.uniform(8))(*pair)
    wrong = {**calibration, "blocks.0.attn.to_q": jnp.ones((1, 3))}
    with pytest.raises(
        ValueError, match=r"another model or plan:\n  blocks\.0\.attn\.to_q \[1, 3\]"
    ):
        vidit_q.transform(vidit_q.uniform(8), wrong)(*pair)
    some = {path: v for path, v in calibration.items() if not path.endswith("1.mlp.fc2")}
    with pytest.raises(ValueError, match=r"fc2 is missing, must be \[1, 64\]"):
        vidit_q.transform(vidit_q.uniform(8), some)(*pair)
    with pytest.raises(ValueError, match="made for 4 network calls, not for 5"):
        vidit_q.calibrate(
            ranged(subject, 8, 8),
            *pair,
            Sampler(DDIM(steps=5)),
            subject.cond,
            key=jax.random.key(0),
        )
    twice = vidit_q.transform(vidit_q.uniform(8), calibration)
    with pytest.raises(ValueError, match="is quantized already"):
        twice(*twice(*pair))
    with pytest.raises(ValueError, match="plans for weights of 4 and 8 bits, not 6"):
        vidit_q.pixart_sigma(6)


def test_widths_without_a_hadamard_matrix_are_refused_or_rotated_in_blocks():
    subject = testing.tiny_dit(num_heads=1, head_dim=28, num_layers=1)  # hidden width 112 = 4 x 28
    plan = vidit_q.uniform(8, alpha=None, layers=r".*\.attn\..*")
    strange = testing.tiny_dit(num_heads=1, head_dim=92, num_layers=1)
    vidit_q.transform(plan)(subject.forward, subject.params)
    with pytest.raises(ValueError, match="no known Hadamard matrix of order 92"):
        vidit_q.transform(plan)(strange.forward, strange.params)
    loose = dataclasses.replace(plan, strict=False)
    forward, params = vidit_q.transform(loose)(strange.forward, strange.params)
    dense = sample(strange, strange.forward, strange.params)
    assert relative(sample(strange, forward, params), dense) < 0.1


def test_the_released_plans_match_a_pixart():
    four, eight = vidit_q.pixart_sigma(4), vidit_q.pixart_sigma(8)
    weights = {
        "blocks.0.attn.to_q": 8,
        "blocks.27.mlp.fc1": 8,
        "blocks.27.cross.to_k": 8,
        "blocks.3.mlp.fc2": 8,
        "blocks.3.attn.to_out": 4,
        "blocks.3.cross.to_k": 4,
    }
    config = PixArtConfig(num_layers=28, num_heads=2, head_dim=8, caption_channels=12)
    forward, shapes = abstract(PixArt, config)
    layers = {target.path: target for target in forward.target_modules(shapes, Linear)}
    assert {path: four.rule(layers[path])[1] for path in weights} == weights
    assert eight.rule(layers["blocks.3.cross.to_q"])[1:3] == (8, 8)
    assert eight.rule(layers["blocks.3.cross.to_v"]) is None
    others = [each for each in layers.values() if each.role in ("head", "embedding", "modulation")]
    assert {"final.proj", "caption_projection.fc1"} < {each.path for each in others}
    assert all(four.rule(each) is eight.rule(each) is None for each in others)
    subject = testing.tiny_pixart()
    for plan in (four, eight):
        vidit_q.transform(plan, calibrated(subject, plan))(subject.forward, subject.params)
    assert "W4A8" not in eight.describe()
    assert "all qkv, out, cross_qkv, cross_out: W4A8, alpha 0.99, rotated" in four.describe()


def test_without_masks_and_rotations_it_rounds_to_nearest(subject):
    """The plain quantizer of weights and inputs, to the bit."""
    pair = (subject.forward, subject.params)
    plain = vidit_q.transform(vidit_q.uniform(4, 8, alpha=None, rotate=False))(*pair)[1]
    nearest = round_to_nearest.transform(round_to_nearest.uniform(4, 8))(*pair)[1]
    chex.assert_trees_all_equal(plain, nearest)
