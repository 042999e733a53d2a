"""Ranges against their definitions."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.quant import Quantizer, fake_quantize
from effjax.quant.ranges import (
    Range,
    least_squares,
    minmax,
    moving_average,
    percentile,
    union,
)

X = jax.random.normal(jax.random.key(0), (8, 500)).at[:, 0].set(40.0)


def test_all_that_is_seen():
    low, high = minmax(X, 1)
    assert low.shape == high.shape == (8, 1)
    assert np.array_equal(low, X.min(1, keepdims=True))
    assert (high == 40).all()
    assert minmax(X).low.shape == (1, 1)


def test_percentiles_leave_out_outliers():
    low, high = percentile(X, 1, percent=99.0)
    np.testing.assert_allclose(high, np.percentile(X, 99, axis=1, keepdims=True), rtol=1e-5)
    np.testing.assert_allclose(low, np.percentile(X, 1, axis=1, keepdims=True), rtol=1e-5)
    assert (high < 5).all()
    np.testing.assert_allclose(percentile(X, 1, percent=100.0), minmax(X, 1), rtol=1e-4)
    with pytest.raises(ValueError, match=r"percent must lie in 50 \.\.\. 100"):
        percentile(X, percent=20.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_least_squares_is_the_best_of_its_grid(symmetric):
    x, quantizer = X.at[:, 0].set(9.0), Quantizer(3, symmetric)

    def error(found):
        quantized = fake_quantize(x, quantizer, low=found.low, high=found.high)
        return np.asarray(jnp.mean(jnp.square(quantized - x), 1))

    full = minmax(x, 1)
    best = error(least_squares(x, quantizer, 1, steps=20))
    grid = [error(Range(*(s / 20 * end for end in full))) for s in range(1, 21)]
    np.testing.assert_allclose(best, np.min(grid, axis=0), rtol=1e-5)
    assert (best < error(full)).all()
    # With many bits, nothing is worth leaving out.
    assert np.array_equal(least_squares(x, Quantizer(8, symmetric), 1).high, full.high)


def test_batches_are_joined():
    ranges = [Range(jnp.float32(-i), jnp.float32(10 * i)) for i in (1, 3, 2)]
    assert reduce(union, ranges, None) == (-3, 30)
    low, high = reduce(moving_average, ranges, None)
    assert low == pytest.approx(0.95 * (0.95 * -1 + 0.05 * -3) + 0.05 * -2)
    assert high == pytest.approx(0.95 * (0.95 * 10 + 0.05 * 30) + 0.05 * 20)
