"""Products of floats: sums in float32, the forms of a CPU, gradients, costs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from pallas_kernels.float_matmul import matmul, matmul_transposed

PRODUCTS = {"matmul": (matmul, (40, 72)), "matmul_transposed": (matmul_transposed, (72, 40))}


def operands(rows, shape, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=rows), dtype)
    return x, jnp.asarray(rng.normal(size=shape) / 40**0.5, dtype)


def exact(name, x, w):
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    return x @ (w if name == "matmul" else w.T)


@pytest.mark.parametrize("rows", [(40,), (1, 40), (3, 40), (2, 4, 40), (33, 40), (0, 40)], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_are_rounded_once(name, dtype, rows):
    product, shape = PRODUCTS[name]
    x, w = operands(rows, shape, dtype)
    out = jax.jit(product)(x, w)
    assert out.dtype == dtype
    expected = exact(name, x, w)
    assert out.shape == expected.shape
    # Half a unit of the last place of the result, and float32's sums.
    allowed = np.abs(expected) * float(jnp.finfo(dtype).eps) / 2 + 1e-5
    assert np.all(np.abs(np.asarray(out, np.float64) - expected) <= allowed)


@pytest.mark.parametrize("rows", [1, 4, 16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_gradients_are_those_of_the_product(name, dtype, rows):
    product, shape = PRODUCTS[name]
    x, w = operands((rows, 40), shape, dtype)
    out, pull = jax.vjp(product, x, w)
    gradients = pull(jnp.ones_like(out))
    ones = np.ones(out.shape)
    wide = np.asarray(x, np.float64), np.asarray(w, np.float64)
    matrix = wide[1] if name == "matmul" else wide[1].T
    expected = ones @ matrix.T, wide[0].T @ ones
    expected = expected[0], (expected[1] if name == "matmul" else expected[1].T)
    for each, right in zip(gradients, expected, strict=True):
        assert each.dtype == dtype
        close = 1e-5 if dtype == jnp.float32 else 0.03
        np.testing.assert_allclose(np.asarray(each, np.float64), right, atol=close * 10, rtol=close)


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_batch_of_products_is_each_of_them(name):
    product, shape = PRODUCTS[name]
    x, w = operands((3, 2, 40), shape, jnp.bfloat16)
    out = jax.jit(jax.vmap(product, (0, None)))(x, w)
    single = jnp.stack([product(each, w) for each in x])
    np.testing.assert_array_equal(np.asarray(out, np.float32), np.asarray(single, np.float32))


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", PRODUCTS)
def test_padding_is_not_counted(name, dtype, platform):
    product, shape = PRODUCTS[name]
    x, w = operands((3, 40), shape, dtype)
    counted = cost(product, x, w, platform=platform)
    assert counted.flops == counted.useful_flops == 2 * 3 * 40 * 72
    assert counted.bytes_ >= (3 * 40 + 40 * 72 + 3 * 72) * jnp.dtype(dtype).itemsize


COPY = 256 * 1024 * 4  # bytes of the matrix in float32


def rounded_once(x, w):
    return jnp.dot(x, w, preferred_element_type=jnp.float32).astype(x.dtype)


def extra_bytes(product, rows, shape):
    x = jax.ShapeDtypeStruct((rows, 256), jnp.bfloat16)
    w = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return jax.jit(product).lower(x, w).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("name", PRODUCTS)
def test_no_matrix_is_copied_on_a_cpu(name, rows):
    product, _ = PRODUCTS[name]
    shape = (256, 1024) if name == "matmul" else (1024, 256)
    if extra_bytes(rounded_once, 64, (256, 1024)) > COPY / 2:
        pytest.skip("this CPU has no products of bfloat16")
    assert extra_bytes(product, rows, shape) < COPY / 2


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_can_be_transposed(name):
    product, shape = PRODUCTS[name]
    x, w = operands((8, 40), shape, jnp.bfloat16)
    out = jax.jit(lambda x, w: product(x, w).T)(x, w)
    np.testing.assert_array_equal(
        np.asarray(out.T, np.float32), np.asarray(product(x, w), np.float32)
    )
