"""Dense and window attention against the reference."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.attention import dense_attention, reference_attention
from pallas_kernels.window_attention import (
    default_block,
    visited_area,
    window_area,
    window_attention,
    window_mask,
)


def heads(tokens, dtype=jnp.float32, keys=None):
    shapes = [(2, tokens, 3, 8)] + [(2, keys or tokens, 3, 8)] * 2
    keys = jax.random.split(jax.random.key(tokens), 3)
    return [2 * jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


# bfloat16 keeps 8 bits: the rounding of q, the weights and the output each cost one part in 256.
TOLERANCE = {
    jnp.float32: {"atol": 1e-5, "rtol": 1e-5},
    jnp.bfloat16: {"atol": 3e-2, "rtol": 2e-2},
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("keys", [None, 5])
def test_dense_equals_reference(dtype, keys):
    q, k, v = heads(7, dtype, keys)
    out = jax.jit(dense_attention)(q, k, v)
    assert out.dtype == dtype
    chex.assert_trees_all_close(out, reference_attention(q, k, v), **TOLERANCE[dtype])


def test_dense_survives_large_logits():
    q, k, v = heads(7)
    out = dense_attention(100 * q, 100 * k, v)
    chex.assert_trees_all_close(out, reference_attention(100 * q, 100 * k, v), atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "window", "block"),
    [(1, 0, None), (5, 0, 2), (16, 3, 4), (17, 3, 4), (64, 8, None), (50, 20, 16), (33, 40, 8)],
)
def test_window_equals_masked_reference(tokens, window, block, dtype):
    q, k, v = heads(tokens, dtype)
    expected = reference_attention(q, k, v, jnp.asarray(window_mask(tokens, window)))
    out = jax.jit(lambda *x: window_attention(*x, window=window, block=block))(q, k, v)
    assert out.dtype == dtype
    chex.assert_trees_all_close(out, expected, **TOLERANCE[dtype])


@settings(deadline=None, max_examples=8, derandomize=True)
@given(st.integers(1, 40), st.integers(0, 45), st.integers(1, 50))
def test_window_for_any_shape(tokens, window, block):
    q, k, v = heads(tokens)
    expected = reference_attention(q, k, v, jnp.asarray(window_mask(tokens, window)))
    out = window_attention(q, k, v, window=window, block=block)
    chex.assert_trees_all_close(out, expected, atol=1e-5)
    area = window_mask(tokens, window).sum()
    assert window_area(tokens, window) == area
    assert area <= visited_area(tokens, window, block) <= tokens**2


def test_a_window_over_everything_is_dense_to_the_bit():
    q, k, v = heads(9)
    wide = jax.jit(lambda *x: window_attention(*x, window=8))(q, k, v)
    chex.assert_trees_all_equal(wide, jax.jit(dense_attention)(q, k, v))


def test_area_of_the_paper_and_linear_work():
    assert window_area(1024, 128) / 1024**2 == pytest.approx(0.2352, abs=5e-5)
    # An eighth of the tokens to each side: executed work stays near the useful part ...
    for tokens in (256, 1024, 4096, 16384):
        ratio = visited_area(tokens, tokens // 8) / window_area(tokens, tokens // 8)
        assert 1 <= ratio < 1.25
    # ... and for a fixed window it grows linearly with the sequence.
    assert visited_area(8192, 64, 32) < 2.05 * visited_area(4096, 64, 32)
    assert default_block(16384, 50) == 128


def test_gradients_equal_the_reference():
    q, k, v = heads(20)
    mask = jnp.asarray(window_mask(20, 3))

    def through(attend):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(q, k, v)

    chex.assert_trees_all_close(
        through(lambda *x: window_attention(*x, window=3, block=4)),
        through(lambda *x: reference_attention(*x, mask)),
        atol=1e-4,
    )
    chex.assert_trees_all_close(through(dense_attention), through(reference_attention), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"), [({"window": -1}, "at least 0"), ({"window": 1, "block": 0}, "block")]
)
def test_bad_windows(options, message):
    with pytest.raises(ValueError, match=message):
        window_attention(*heads(8), **options)


def test_dtype_is_kept_under_vmap():
    q, k, v = (jnp.stack([x, x]) for x in heads(12, jnp.bfloat16))
    out = jax.vmap(lambda *x: window_attention(*x, window=2))(q, k, v)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out[0], out[1])
