"""Dense attention against the reference."""

import chex
import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import dense_attention


def heads(tokens, dtype=jnp.float32, keys=None):
    shapes = [(2, tokens, 3, 8)] + [(2, keys or tokens, 3, 8)] * 2
    keys = jax.random.split(jax.random.key(tokens), 3)
    return [2 * jax.random.normal(k, s).astype(dtype) for k, s in zip(keys, shapes)]


def softmax_attention(q, k, v):
    in_float32 = (x.astype(jnp.float32) for x in (q, k, v))
    return jax.nn.dot_product_attention(*in_float32).astype(v.dtype)


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
    chex.assert_trees_all_close(out, softmax_attention(q, k, v), **TOLERANCE[dtype])


def test_dense_survives_large_logits():
    q, k, v = heads(7)
    out = dense_attention(100 * q, 100 * k, v)
    chex.assert_trees_all_close(out, softmax_attention(100 * q, 100 * k, v), atol=1e-5)


def test_long_sequences_go_by_blocks_of_queries(monkeypatch):
    monkeypatch.setattr("pallas_kernels.attention.WHOLE", 32)
    # 150 queries, two query heads a key head: 300 rows in blocks of 64.
    q, _, _ = heads(150)
    _, k, v = heads(7)
    q = jnp.concatenate([q, q[..., ::-1]], axis=2)
    q = q[:, :, jnp.array([0, 3, 1, 4, 2, 5])]
    out = jax.jit(dense_attention)(q, k, v)
    chex.assert_trees_all_close(out, softmax_attention(q, k, v), atol=1e-5)
    through = [
        jax.jit(jax.grad(lambda *x, f=f: jnp.sum(jnp.sin(f(*x))), argnums=(0, 1, 2)))(q, k, v)
        for f in (dense_attention, softmax_attention)
    ]
    chex.assert_trees_all_close(*through, atol=1e-4)


def test_gradients_equal_the_reference():
    q, k, v = heads(20)

    def through(attend):
        return jax.grad(lambda *x: jnp.sum(jnp.sin(attend(*x))), argnums=(0, 1, 2))(q, k, v)

    chex.assert_trees_all_close(through(dense_attention), through(softmax_attention), atol=1e-4)


def test_gradients_of_a_named_kernel():
    q, k, v = heads(20)

    def loss(q):
        return jnp.sum(dense_attention(q, k, v, implementation="pallas_tpu"))

    with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on tpu alone"):
        jax.jit(jax.grad(loss))(q)
    lowered = jax.jit(jax.grad(loss)).trace(q).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
