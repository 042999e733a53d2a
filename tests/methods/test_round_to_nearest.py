"""Round to nearest: which layers, which bits, how near, what it takes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from effjax import testing
from effjax.capture import tap
from effjax.cost import cost, weight_bytes
from effjax.forward import abstract, flatten_params
from effjax.layers.linear import Linear
from effjax.methods.quantization.round_to_nearest import (
    RoundToNearestPlan,
    calibrate,
    transform,
    uniform,
)
from effjax.models.dit import DiT, DiTConfig
from effjax.quant import QTensor, qdot
from effjax.quant.ranges import moving_average
from effjax.transform import chain
from tests.subjects.joint import tiny_joint


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_dit(num_heads=2, head_dim=64)


def relative(found, expected):
    return float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected))


def test_rules_decide_by_the_first_match(subject):
    plan = RoundToNearestPlan(
        ((r".*\.to_q", 16, 16), (r".*\.attn\..*", 8, 8), (r"blocks.*\.fc2", 4, 16))
    )
    _, params = transform(plan)(subject.forward, subject.params)
    leaves = {k: v for k, v in flatten_params(params).items() if isinstance(v, QTensor)}
    assert set(leaves) == {
        f"blocks.{i}.{name}.kernel"
        for i in range(2)
        for name in ("attn.to_k", "attn.to_v", "attn.to_out", "mlp.fc2")
    }
    assert leaves["blocks.0.attn.to_k.kernel"].activations.quantizer.bits == 8
    assert leaves["blocks.1.mlp.fc2.kernel"].bits == 4
    assert leaves["blocks.1.mlp.fc2.kernel"].activations is None
    # Layers that are quantized hold the nearest quantized values of their own matrix.
    w = subject.params["blocks"]["0"]["attn"]["to_k"]["kernel"]
    leaf = leaves["blocks.0.attn.to_k.kernel"]
    assert jnp.abs(leaf.dequantize() - w).max() <= leaf.scale.max() * 0.501


def test_roles_find_the_layers_of_every_stream():
    """What layers are called does not matter; a model without a role says which it has."""
    subject = tiny_joint()
    pair = subject.forward, subject.params
    _, params = transform(uniform(8, 8))(*pair)
    found = {k for k, leaf in flatten_params(params).items() if isinstance(leaf, QTensor)}
    assert found == {
        f"blocks.{i}.{name}.kernel"
        for i in range(2)
        for stream in ("image", "text")
        for name in (
            *(f"attn.{stream}.to_{part}" for part in ("q", "k", "v", "out")),
            *(f"mlp_{stream}.fc{part}" for part in (1, 2)),
        )
    }
    plan = RoundToNearestPlan((("role:head|embedding", 8, 16), ("role:up", 4, 16)))
    bits = plan.decided(*pair)
    assert bits["proj"] == bits["caption_projection"] == (8, 16)
    assert bits["blocks.1.mlp_text.fc1"] == (4, 16)
    assert plan.describe().startswith("all head, embedding: W8A16; all up: W4A16; group size")
    for selector, message in {
        "role:cross_qkv": r"'role:cross_qkv' matches no layer; there are layers with the roles "
        r"down, embedding, head, modulation, out, qkv, up: ",
        "role:up|cross_out": r"no layers with the role cross_out; give role:up for those",
    }.items():
        with pytest.raises(ValueError, match=message):
            transform(RoundToNearestPlan(((selector, 8, 8),)))(*pair)


def test_error_falls_with_bits(subject):
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 4))
    inputs = (x, jnp.array([10.0, 500.0]), jnp.array([1, 2]))
    run = jax.jit(lambda forward, params: forward(params, {}, *inputs)[0])
    dense = run(subject.forward, subject.params)
    errors = {
        bits: relative(run(*transform(uniform(*bits))(subject.forward, subject.params)), dense)
        for bits in ((8, 16), (8, 8), (6, 8), (4, 8), (3, 16))
    }
    assert list(errors.values()) == sorted(errors.values()), errors
    assert errors[8, 8] < 0.02


def test_bytes_in_closed_form():
    config = DiTConfig.preset("DiT-XL/2")
    forward, params = abstract(DiT, config)
    weights = 28 * (4 * 1152**2 + 2 * 1152 * 4608)
    rows = 28 * (4 * 1152 + 4608 + 1152)
    for bits in (8, 4):
        _, quantized = jax.eval_shape(
            lambda p, bits=bits: (0, transform(uniform(bits))(forward, p)[1]), params
        )
        saved = weight_bytes(params) - weight_bytes(quantized)
        assert saved == 4 * weights - (bits * weights // 8 + 8 * rows)  # scales and zero points


def test_products_are_of_integers(subject):
    forward, params = transform(uniform(8, 8))(subject.forward, subject.params)
    x = jnp.zeros((2, 16, 16, 4))
    text = jax.jit(forward).lower(params, {}, x, jnp.zeros(2), jnp.zeros(2, jnp.int32)).as_text()
    assert text.count("xi8>, tensor<") >= 12
    counted, dense = (
        cost(f, p, {}, x, jnp.zeros(2), jnp.zeros(2, jnp.int32))
        for f, p in ((forward, params), (subject.forward, subject.params))
    )
    assert counted.flops == dense.flops


def test_gradients_are_straight_through(subject):
    _, params = transform(uniform(8, 8))(subject.forward, subject.params)
    leaf = params["blocks"]["0"]["attn"]["to_q"]["kernel"]
    x = jax.random.normal(jax.random.key(2), (3, 128))
    found = jax.grad(lambda x: jnp.sum(jnp.sin(qdot(x, leaf))))(x)
    expected = jnp.cos(qdot(x, leaf)) @ leaf.dequantize().T
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def batches(count):
    for i in range(count):
        x = (1 + i) * jax.random.normal(jax.random.key(i), (2, 16, 16, 4))
        yield x, jnp.array([10.0, 500.0]), jnp.array([1, 2])


def test_calibrated_inputs(subject):
    plan = calibrate(uniform(8, 8), subject.forward, subject.params, batches(2))
    assert len(plan.input_ranges) == 12
    inputs = [
        tap(subject.forward, subject.params, batch, kind=Linear, what="input")
        for batch in batches(2)
    ]
    for path, low, high in plan.input_ranges:
        assert low == pytest.approx(min(float(seen[path].min()) for seen in inputs))
        assert high == pytest.approx(max(float(seen[path].max()) for seen in inputs))
    again = RoundToNearestPlan.from_json(plan.to_json())
    assert again == plan
    forward, params = transform(plan)(subject.forward, subject.params)
    leaf = params["blocks"]["0"]["attn"]["to_q"]["kernel"]
    assert not leaf.activations.dynamic
    [batch] = list(batches(1))
    run = jax.jit(lambda forward, params: forward(params, {}, *batch)[0])
    dense = run(subject.forward, subject.params)
    static = relative(run(forward, params), dense)
    dynamic = relative(run(*transform(uniform(8, 8))(subject.forward, subject.params)), dense)
    assert dynamic < static < 0.1
    averaged = calibrate(
        uniform(8, 8), subject.forward, subject.params, batches(2), join=moving_average
    )
    assert averaged.input_ranges[0][2] < plan.input_ranges[0][2]


def test_calibrations_that_say_nothing(subject):
    with pytest.raises(ValueError, match="no batches to calibrate with"):
        calibrate(uniform(8, 8), subject.forward, subject.params, [])
    with pytest.raises(ValueError, match="quantizes no layer's inputs"):
        calibrate(uniform(8), subject.forward, subject.params, batches(1))
    foreign = dataclasses.replace(uniform(8, 8), input_ranges=(("blocks.9.attn.to_q", -1.0, 1.0),))
    with pytest.raises(ValueError, match=r"input ranges of \['blocks.9.attn.to_q'\]"):
        transform(foreign)(subject.forward, subject.params)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((".*", 9, 8),), r"rules\[0\]\[1\] must be one of 2, .*, 8, 16, got 9"),
        ((("(", 8, 8),), "is no regular expression"),
        ((("role:up|updown", 8, 8),), r"names roles \['updown'\] that there are not"),
        (((".*", 16, 8),), "quantizes the inputs of float weights"),
    ],
)
def test_rules_that_say_nothing(untyped, rules, message):
    with pytest.raises(ValueError, match=message):
        RoundToNearestPlan(rules)


def test_plans_that_do_not_fit(subject):
    short = {"rules": [[".*", 8]], "group_size": None, "symmetric": False}
    with pytest.raises((ValueError, TypeError), match="rule"):
        RoundToNearestPlan.from_dict(short)
    with pytest.raises(ValueError, match="'nowhere' matches no layer; there are"):
        transform(RoundToNearestPlan((("nowhere", 8, 8),)))(subject.forward, subject.params)
    twice = chain(transform(uniform(8)), transform(uniform(4)))
    with pytest.raises(ValueError, match="is quantized already"):
        twice(subject.forward, subject.params)
    with pytest.raises(ValueError, match="group_size 100 does not divide"):
        transform(uniform(4, group_size=100))(subject.forward, subject.params)
