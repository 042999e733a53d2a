"""Hadamard matrices and the rotations made of them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from effjax.quant import Rotation, hadamard
from effjax.quant.hadamard import _orders


@pytest.mark.parametrize("order", [1, 2, 4, 64, 40, 144, *_orders()])
def test_rows_are_orthogonal_signs(order):
    matrix = hadamard(order)
    assert matrix.shape == (order, order)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    assert np.array_equal(matrix @ matrix.T, order * np.eye(order))


@pytest.mark.parametrize("order", [12, 20, 28, 36, 40, 60, 108, 140, 144, 156, 172])
def test_orders_of_the_field_are_there(order):
    assert Rotation(order).width == order  # strict: an error otherwise


def test_williamsons_matrices_are_symmetric_and_circulant():
    for order in (156, 172):
        n = order // 4
        matrix = hadamard(order)
        squares = 0
        for k in range(4):
            block = matrix[:n, k * n : (k + 1) * n]
            assert np.array_equal(block, block.T)
            assert np.array_equal(block, np.roll(block, (1, 1), (0, 1)))
            squares += block @ block
        assert np.array_equal(squares, order * np.eye(n))


@pytest.mark.parametrize("width", [8, 12, 36, 144, 1152, 4608, 3584, 18944, 9984, 11008])
def test_widths_of_models_rotate(width):
    rotation = Rotation(width, seed=3)
    assert np.prod(rotation.factors) == width
    assert max(rotation.factors) <= 256
    x = jax.random.normal(jax.random.key(0), (3, width))
    y = rotation.apply(x)
    np.testing.assert_allclose(jnp.linalg.norm(y, axis=1), jnp.linalg.norm(x, axis=1), rtol=1e-5)
    # One outlier is spread over all channels.
    spread = rotation.apply(jnp.zeros((1, width)).at[0, 5].set(100.0))
    np.testing.assert_allclose(jnp.abs(spread), 100 * width**-0.5, rtol=1e-4)


def test_the_fast_product_is_the_matrix():
    rotation = Rotation(144, seed=1)
    matrix = rotation.matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(144), atol=1e-5)
    factors = [hadamard(n) for n in rotation.factors]
    expected = np.eye(1)
    for factor in factors:
        expected = np.kron(expected, factor)
    np.testing.assert_allclose(matrix, rotation.signs()[:, None] * expected / 12, atol=1e-5)
    assert set(np.unique(rotation.signs())) == {-1.0, 1.0}
    x = jax.random.normal(jax.random.key(0), (5, 144))
    chex.assert_trees_all_close(rotation.apply(x), x @ matrix, atol=1e-5)
    chex.assert_trees_all_close(rotation.undo(rotation.apply(x)), x, atol=1e-5)


def test_it_costs_the_factors_alone():
    rotation = Rotation(1152)
    x = jax.ShapeDtypeStruct((10, 1152), jnp.float32)
    assert cost(rotation.apply, x).flops == 10 * 2 * 1152 * sum(rotation.factors)
    assert sum(rotation.factors) < 200


def test_widths_without_a_matrix():
    with pytest.raises(ValueError, match=r"no known Hadamard matrix of order 100 .* blocks of 20"):
        Rotation(100)
    loose = Rotation(100, strict=False)
    matrix = loose.matrix()
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(100), atol=1e-5)
    assert np.count_nonzero(matrix) == 100 * 20
    with pytest.raises(ValueError, match="no Hadamard matrix of order 6"):
        hadamard(6)
