"""Quantizers against their formulas, and fake quantization against real quantized values."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.quant import Quantizer, dequantize, fake_quantize

X = jax.random.normal(jax.random.key(0), (6, 40)) * 3 + 1


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_formulas(bits):
    x = np.asarray(X, np.float64)
    n = 2 ** (bits - 1) - 1
    largest = np.abs(x).max(1, keepdims=True)
    for levels, divisor in (("n", n), ("n+1/2", n + 0.5)):
        quantizer = Quantizer(bits, levels=levels)
        scale, zero = quantizer.fit_axes(X, 1)
        np.testing.assert_allclose(scale, largest / divisor, rtol=1e-6)
        assert zero is None
        expected = np.clip(np.round(x / np.asarray(scale)), -n - 1, n)
        assert np.abs(np.asarray(quantizer.quantize(X, scale), int) - expected).max() <= (bits == 8)
    quantizer = Quantizer(bits, symmetric=False)
    scale, zero = quantizer.fit_axes(X, 1)
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = (high - low) / (2**bits - 1)
    np.testing.assert_allclose(scale, step, rtol=1e-6)
    unsigned = np.clip(np.round(x / step) + np.round(-low / step), 0, 2**bits - 1)
    half = 2 ** (bits - 1)
    qvalues = quantizer.quantize(X, scale, zero)
    assert np.abs(np.asarray(qvalues, int) - (unsigned - half)).max() <= (bits == 8)
    # No value is further from its code than half a step.
    assert np.abs(dequantize(qvalues, scale, zero) - x).max() <= step.max() * 0.5001
    assert np.array_equal(np.asarray(zero) + half, np.round(-low / step))


def test_ranges_away_from_zero():
    x = jnp.array([[10.0, 11.0, 12.0]])
    with_zero = Quantizer(4, symmetric=False)
    without = Quantizer(4, symmetric=False, keeps_zero=False)
    for quantizer, span in ((with_zero, 12.0), (without, 2.0)):
        scale, zero = quantizer.fit_axes(x, 1)
        assert scale.item() == pytest.approx(span / 15)
        error = jnp.abs(dequantize(quantizer.quantize(x, scale, zero), scale, zero) - x)
        assert error.max() <= span / 30 * 1.001


def test_zeros_have_a_scale():
    for quantizer in (Quantizer(8), Quantizer(8, symmetric=False)):
        scale, zero = quantizer.fit_axes(jnp.zeros((2, 3)), 1)
        assert (scale == 1).all()
        qvalues = quantizer.quantize(jnp.zeros((2, 3)), scale, zero)
        assert not np.asarray(dequantize(qvalues, scale, zero)).any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_fake_quantization_is_quantized_values_and_back_with_bits_as_data(symmetric):
    @jax.jit
    def fake(x, bits):
        return fake_quantize(x, Quantizer(8, symmetric), bits=bits, axes=1)

    for bits in (2, 3, 4, 6, 8):
        quantizer = Quantizer(bits, symmetric)
        scale, zero = quantizer.fit_axes(X, 1)
        expected = dequantize(quantizer.quantize(X, scale, zero), scale, zero)
        chex.assert_trees_all_close(fake(X, bits), expected, atol=1e-5)
    assert fake._cache_size() == 1
    chex.assert_trees_all_equal(fake(X, 16), X)
    # Bits of each row.
    each = fake(X, jnp.array([2, 4, 8, 16, 3, 6])[:, None])
    chex.assert_trees_all_close(each[2:3], fake(X[2:3], 8))
    chex.assert_trees_all_equal(each[3], X[3])


def test_the_gradient_is_straight_through_within_the_range():
    x = jnp.array([-3.0, -0.9, 0.2, 0.7, 5.0])
    gradient = jax.grad(
        lambda x: fake_quantize(x, Quantizer(4), low=jnp.float32(-1), high=jnp.float32(1)).sum()
    )(x)
    assert gradient.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Quantizer(9), "bits must be one of 2, .*, 8, got 9"),
        (lambda: fake_quantize(X, Quantizer(8)), "give either axes"),
        (lambda: fake_quantize(X, Quantizer(8), axes=1, low=X, high=X), "give either axes"),
        (lambda: fake_quantize(X, Quantizer(8), low=X), "give either axes"),
    ],
)
def test_bad_input(untyped, make, message):
    with pytest.raises(ValueError, match=message):
        make()
