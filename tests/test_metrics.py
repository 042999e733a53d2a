"""Metrics against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.metrics import psnr, relative_difference, structural_dissimilarity


def images(seed):
    return jax.random.normal(jax.random.key(seed), (2, 9, 10, 3))


def test_relative_difference_takes_the_larger_signed_value_and_clips():
    a, b = images(0), images(1)
    x, y = np.asarray(a), np.asarray(b)
    expected = np.clip(np.abs((x - y) / (np.maximum(x, y) + 1e-6)), 0, 10).mean()
    assert float(relative_difference(a, b)) == pytest.approx(expected, rel=1e-5)
    assert float(relative_difference(a, a)) == 0
    # -1 against -3: the difference 2 over the larger value -1, not over a magnitude of 3
    assert float(relative_difference(jnp.array([-1.0]), jnp.array([-3.0]))) == pytest.approx(
        2.0, abs=1e-4
    )
    assert float(relative_difference(jnp.array([0.0]), jnp.array([-1.0]))) == 10


def test_psnr_in_decibels():
    a = jnp.zeros((4, 4))
    assert float(psnr(a, a + 0.2)) == pytest.approx(20.0, abs=1e-4)  # range 2, error 0.2
    assert float(psnr(a, a + 0.1, data_range=1.0)) == pytest.approx(20.0, abs=1e-4)
    assert float(psnr(a, a)) == float("inf")


def test_dissimilarity_by_its_formula():
    a, b = np.asarray(images(0), np.float64), np.asarray(images(1), np.float64)
    spread = a.max() - a.min()
    c1, c2 = (0.01 * spread) ** 2, (0.03 * spread) ** 2
    values = []
    for n in range(2):
        for i in range(3):
            for j in range(4):
                for c in range(3):
                    x, y = (z[n, i : i + 7, j : j + 7, c] for z in (a, b))
                    covariance = (x * y).mean() - x.mean() * y.mean()
                    luminance = (2 * x.mean() * y.mean() + c1) / (
                        x.mean() ** 2 + y.mean() ** 2 + c1
                    )
                    values.append(luminance * (2 * covariance + c2) / (x.var() + y.var() + c2))
    expected = 1 - np.mean(values)
    found = float(
        structural_dissimilarity(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32))
    )
    assert found == pytest.approx(expected, abs=1e-4)
    assert float(structural_dissimilarity(images(0), images(0))) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="at least 7 x 7, got 4 x 9"):
        structural_dissimilarity(jnp.ones((1, 4, 9, 1)), jnp.ones((1, 4, 9, 1)))
