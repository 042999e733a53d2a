"""The quantized leaf: both paths of its product, what it costs, what it refuses."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compat import relaxed_promotion
from effjax.quant import Activations, QTensor, Quantizer, Rotation, qdot, quantize_matrix, restore

W = jax.random.normal(jax.random.key(0), (256, 48)) + 0.2
X = jax.random.normal(jax.random.key(1), (2, 5, 256)) + 0.5
TOKENS = Activations()
UNEVEN = Activations(Quantizer(8, symmetric=False))
GROUPS = Activations(group_size=64)
STATIC = Activations(Quantizer(8, symmetric=False), dynamic=False)
RANGE = (jnp.float32(-3.0), jnp.float32(4.0))

PERM = jnp.asarray(np.random.default_rng(3).permutation(256))
CASES = {
    "W8A16": {},
    "W4A16 groups": {"quantizer": Quantizer(4, symmetric=False), "group_size": 64},
    "W3A16 groups": {"quantizer": Quantizer(3, symmetric=False), "group_size": 128},
    "W8A8": {"activations": TOKENS},
    "W8A8 asymmetric": {"quantizer": Quantizer(8, symmetric=False), "activations": TOKENS},
    "W8A8 packed": {"activations": TOKENS, "packed": True},
    "W4A8": {"quantizer": Quantizer(4), "activations": TOKENS},
    "W4A8 groups": {
        "quantizer": Quantizer(4, symmetric=False),
        "group_size": 64,
        "activations": TOKENS,
    },
    "W6A6": {"quantizer": Quantizer(6), "activations": Activations(Quantizer(6))},
    "W8A8 half levels": {
        "quantizer": Quantizer(8, levels="n+1/2"),
        "activations": Activations(Quantizer(8, levels="n+1/2")),
    },
    "W8A8 static": {"activations": STATIC, "input_range": RANGE},
    "W4A8 static": {
        "quantizer": Quantizer(4, symmetric=False),
        "activations": STATIC,
        "input_range": RANGE,
    },
    "W8A8 asymmetric tokens": {"quantizer": Quantizer(8, symmetric=False), "activations": UNEVEN},
    "W4A8 asymmetric tokens": {
        "quantizer": Quantizer(4, symmetric=False),
        "group_size": 64,
        "activations": UNEVEN,
    },
    "W8A8 groups of inputs": {
        "quantizer": Quantizer(8, symmetric=False),
        "activations": GROUPS,
        "packed": False,
    },
    "W8A8 groups": {"group_size": 64, "activations": GROUPS, "packed": False},
    "smoothing scale and rotation": {
        "activations": TOKENS,
        "smoothing_scale": jnp.linspace(0.5, 2.0, 256),
        "rotation": Rotation(256),
    },
    "W4A16 ordered": {"quantizer": Quantizer(4), "group_size": 64, "perm": PERM},
    "W8A8 ordered": {
        "activations": TOKENS,
        "perm": PERM,
        "smoothing_scale": jnp.linspace(0.5, 2.0, 256),
    },
    "W4A8 ordered": {"quantizer": Quantizer(4), "activations": UNEVEN, "perm": PERM},
}


@pytest.mark.parametrize("case", CASES)
def test_the_integer_path_computes_what_the_quantized_values_stand_for(case):
    leaf = quantize_matrix(W, **CASES[case])
    expected = jax.jit(lambda x, w: qdot(x, w, path="reference"))(X, leaf)
    found = jax.jit(qdot)(X, leaf)
    assert found.dtype == X.dtype
    chex.assert_trees_all_close(found, expected, atol=2e-3, rtol=1e-4)
    # And that is near the product itself: bits say how near.
    bits = min(leaf.bits, leaf.activations.quantizer.bits if leaf.activations else 16)
    error = jnp.linalg.norm(found - X @ W) / jnp.linalg.norm(X @ W)
    assert error < {8: 0.02, 6: 0.06, 4: 0.16, 3: 0.3}[bits]


@pytest.mark.parametrize("case", ["W8A8", "W8A8 asymmetric", "W4A8"])
def test_the_integer_path_multiplies_integers(case):
    leaf = quantize_matrix(W, **CASES[case])
    text = jax.jit(qdot).lower(X, leaf).as_text()
    assert "xi8>" in text
    assert "xi32>" in text
    assert f"{X.shape[0] * X.shape[1]}x256xf32" not in text.split("dot_general")[1][:200]


@pytest.mark.parametrize("kernel", ["pallas_tpu", "pallas_gpu"])
def test_one_kernel_prepares_and_quantized_values_inputs(kernel):
    leaf = quantize_matrix(
        W, Quantizer(8, symmetric=False), **CASES["smoothing scale and rotation"]
    )

    def product(x):
        return qdot(x, leaf, implementation=kernel, interpret=True)

    chex.assert_trees_all_close(product(X), qdot(X, leaf, path="reference"), atol=2e-2)
    jaxpr = jax.make_jaxpr(product)(X)
    text = str(jaxpr)
    assert text.count("pallas_call[") == 2  # quantized values with their sums, and the product
    assert "reduce_sum" not in text.split("pallas_call[")[0]


def test_bfloat16_and_float16_inputs():
    for dtype in (jnp.bfloat16, jnp.float16):
        for case in ("W8A8", "W4A16 groups"):
            leaf = quantize_matrix(W, **CASES[case])
            found = qdot(X.astype(dtype), leaf)
            assert found.dtype == dtype
            expected = qdot(X, leaf, path="reference")
            assert jnp.linalg.norm(found.astype(jnp.float32) - expected) < 0.02 * jnp.linalg.norm(
                expected
            )


def test_scaling_and_rotation_without_rounding_change_nothing():
    smoothing_scale = jnp.exp(jax.random.normal(jax.random.key(5), (256,)))
    leaf = quantize_matrix(W, smoothing_scale=smoothing_scale, rotation=Rotation(256))
    exact = dataclasses.replace(leaf, activations=None)
    prepared = leaf.prepare(X)
    matrix = Rotation(256).apply((W / smoothing_scale[:, None]).T).T
    chex.assert_trees_all_close(prepared @ matrix, X @ W, atol=2e-3)
    assert jnp.abs(exact.dequantize() - matrix).max() < exact.scale.max()


@pytest.mark.parametrize("case", ["W4A16 groups", "smoothing scale and rotation", "W8A8 ordered"])
def test_what_was_quantized_comes_back_rounded(case):
    leaf = quantize_matrix(W, **CASES[case])
    error = jnp.linalg.norm(leaf.restore() - W) / jnp.linalg.norm(W)
    assert 0 < error < (0.02 if leaf.bits == 8 else 0.12)
    restored = restore({"a": leaf, "b": X}, "bfloat16")
    chex.assert_trees_all_equal(restored["a"], leaf.restore().astype(jnp.bfloat16))
    assert restored["b"] is X


def test_an_outlier_channel_spoils_its_own_group_alone():
    x = X.at[..., 7].multiply(100)

    def error(how):
        leaf = quantize_matrix(W, activations=how, packed=False)
        rest = W.at[:64].set(0)  # what the other groups add
        quantized = qdot(x, leaf) - qdot(x.at[..., 64:].set(0), leaf)
        return float(jnp.linalg.norm(quantized - x @ rest) / jnp.linalg.norm(x @ rest))

    assert 5 * error(GROUPS) < error(TOKENS)


def test_an_outlier_channel_wants_a_mask_and_a_rotation():
    x = X.at[..., 7].multiply(100)
    balanced, shifted = (jnp.ones(256).at[7].set(factor) for factor in (0.1, 0.01))

    def error(**options):
        leaf = quantize_matrix(W, activations=TOKENS, **options)
        return float(jnp.linalg.norm(qdot(x, leaf) - x @ W) / jnp.linalg.norm(x @ W))

    plain = error()
    assert error(smoothing_scale=balanced) < plain / 2
    assert error(rotation=Rotation(256)) < plain / 2
    # All of it moved to the weights is no better than none of it.
    assert error(smoothing_scale=shifted) > plain / 2


def test_bytes_are_logical():
    leaf = quantize_matrix(W, Quantizer(3, symmetric=False), group_size=128)
    qvalues, scales, zeros = 256 * 48 * 3 // 8, 2 * 48 * 4, 2 * 48 * 4
    assert leaf.logical_bytes == qvalues + scales + zeros
    assert quantize_matrix(W, activations=TOKENS).logical_bytes == 256 * 48 + 48 * 4


def test_a_leaf_is_a_pytree_with_the_shape_of_its_matrix():
    leaf = quantize_matrix(W, Quantizer(4), activations=TOKENS, rotation=Rotation(256))
    again = jax.jit(lambda x: x)(leaf)
    assert isinstance(again, QTensor)
    assert (again.shape, again.bits, again.rotation) == ((256, 48), 4, Rotation(256))
    chex.assert_trees_all_equal(again, leaf)
    shapes = jax.eval_shape(lambda w: quantize_matrix(w, Quantizer(4), activations=TOKENS), W)
    assert shapes.shape == (256, 48)
    gradient = jax.grad(lambda x: qdot(x, quantize_matrix(W)).sum())(X)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("case", CASES)
def test_a_leaf_is_described_as_json(case):
    leaf = quantize_matrix(W, **CASES[case])
    again = QTensor.from_dict(json.loads(json.dumps(leaf.to_dict())))
    shapes = jax.eval_shape(lambda leaf: leaf, leaf)
    assert jax.tree.structure(again) == jax.tree.structure(shapes)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(again)] == [
        (x.shape, x.dtype) for x in jax.tree.leaves(shapes)
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"parts": ["smoothing scales"]},
        {"group_size": 0},
        {"group_size": 60},
        {"rotation": {"size": 4}},
        {"shape": None},
        {"shape": []},
        {"bits": 9},
        {"bits": 4.0},
        {"activations": {"quantizer": {"bits": 1}}},
    ],
)
def test_what_describes_no_leaf(change):
    described = quantize_matrix(W, smoothing_scale=jnp.ones(256)).to_dict()
    with pytest.raises(ValueError, match="describes no quantized leaf"):
        QTensor.from_dict(described | change)


def test_qwix_reads_a_leaf():
    qwix = pytest.importorskip("qwix", reason="qwix is not installed")
    leaf = quantize_matrix(W, Quantizer(4, symmetric=False), group_size=64)
    with relaxed_promotion():
        theirs = qwix.dequantize(leaf.to_qwix())
    chex.assert_trees_all_close(theirs, leaf.dequantize(), atol=1e-6)
    with pytest.raises(ValueError, match="knows nothing of orders, smoothing scales"):
        quantize_matrix(W, activations=TOKENS).to_qwix()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 60}, "group_size 60 does not divide the 256 inputs"),
        ({"smoothing_scale": jnp.ones(255)}, "one factor for each of 256 inputs"),
        ({"perm": jnp.arange(255)}, "perm must have one place for each of 256"),
        ({"rotation": Rotation(128)}, "rotation of width 128 does not fit 256"),
        ({"activations": STATIC}, "need an input_range"),
        ({"activations": TOKENS, "input_range": RANGE}, "need an input_range"),
        (
            {"activations": Activations(group_size=60)},
            "groups of 60 inputs .* do not divide the 256",
        ),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_matrix(W, **options)


def test_products_that_there_are_not():
    leaf = quantize_matrix(W)
    with pytest.raises(ValueError, match=r"do not fit a matrix \[256, 48\]"):
        qdot(X[..., :100], leaf)
    with pytest.raises(NotImplementedError, match="multiplied with packed values"):
        qdot(X, quantize_matrix(W, packed=False))
    grouped = quantize_matrix(W, group_size=64, activations=TOKENS, packed=False)
    with pytest.raises(NotImplementedError, match="multiplied when packed"):
        qdot(X, grouped)
    with pytest.raises(NotImplementedError, match="multiplied with int8 values"):
        qdot(X, quantize_matrix(W, Quantizer(4), activations=GROUPS))
    other = quantize_matrix(W, group_size=128, activations=GROUPS, packed=False)
    with pytest.raises(NotImplementedError, match="a scale for every 128 inputs"):
        qdot(X, other)
    for options in ({"dynamic": False}, {"quantizer": Quantizer(8, symmetric=False)}):
        with pytest.raises(ValueError, match=r"those of single tokens .* symmetric"):
            Activations(**options, group_size=64)
    with pytest.raises(ValueError, match="ranges of single images are symmetric"):
        quantize_matrix(jnp.ones((3, 3, 4, 4)), activations=UNEVEN)
    with pytest.raises(ValueError, match="a quantized weight is a matrix"):
        quantize_matrix(jnp.ones(3))
