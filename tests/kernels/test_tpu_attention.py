"""The TPU's kernel: where a bound replaces the running peak, and several heads in one tile."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_mask import EVERYTHING, Band, SinkLocal, block_mask, from_map
from pallas_kernels.block_sparse_attention import block_sparse_attention, tpu
from pallas_kernels.block_sparse_attention.heads import Arithmetic, Heads
from pallas_kernels.block_sparse_attention.operation import heads_first
from pallas_kernels.residual_attention import dense_and_sparse_attention

# Rounding of the logits and of exp2 in float32; bfloat16 rounds weights and output.
TOLERANCE = {jnp.float32: 6e-6, jnp.bfloat16: 1e-2}


def heads(query_heads=4, key_heads=2, tokens=256):
    noise = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, tokens, count, 8) for count in (query_heads, key_heads, key_heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(noise, shapes)]


def at_an_angle(norm, cosine):
    """Queries and keys of nearly one norm and one angle: logits of norm^2 cosine 8^-0.5."""
    q, k, v = heads()
    first, second = jnp.eye(8)[:2]
    across = cosine * first + (1 - cosine**2) ** 0.5 * second
    return [norm * first + 1e-3 * q, norm * across + 1e-3 * k, v]


def one_large_query():
    q, k, v = heads()
    return [q.at[:, 130].multiply(1e3), k, v]


def scaled_values(factor):
    q, k, v = heads()
    return [q, k, factor * v]


OPERANDS = {
    "small": (heads(), [True, True]),
    "large weights": (at_an_angle(8.0, 1.0), [True, True]),  # 2^33
    "tiny weights": (at_an_angle(8.0, -1.0), [True, True]),  # 2^-33
    "large values": (scaled_values(1e15), [True, True]),
    "tiny values": (scaled_values(1e-15), [True, True]),
    "orthogonal": (at_an_angle(1e3, 0.0), [False, False]),  # bound 510,000, logits of about 1
    # 2^-73; less the bound it would be 2^-146, which is nothing.
    "very negative": (at_an_angle(12.0, -1.0), [False, False]),
    "one large query": (one_large_query(), [True, False]),
    "not finite": ([heads()[0].at[:, 130].set(jnp.inf), *heads()[1:]], [True, False]),
}


def largest_difference(found, expected):
    found, expected = (jnp.nan_to_num(x.astype(jnp.float32)) for x in (found, expected))
    return float(jnp.max(jnp.abs(found - expected)) / jnp.max(jnp.abs(expected)))


@pytest.fixture(scope="module")
def attend():
    """Some blocks whole, some cut, some left out; the last queries' segment has no keys."""
    mask = from_map(np.array([[True, True], [False, True]]), 256, rule=SinkLocal(140, 100))
    numbers = jnp.arange(256)[None].repeat(2, 0) // 90
    segments = numbers, jnp.minimum(numbers, 1)
    run = partial(block_sparse_attention, mask=mask, segments=segments, return_lse=True)
    kernel = partial(run, implementation="pallas_tpu", interpret=True)
    return jax.jit(kernel), jax.jit(partial(run, implementation="reference"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", OPERANDS)
def test_no_peak_where_norms_bound_the_logits(name, dtype, attend):
    operands, small = OPERANDS[name]
    operands = [x.astype(dtype) for x in operands]
    q, k, v = operands
    arranged = Heads(*heads_first(q, k, v))
    known = tpu.small_logits(block_mask(EVERYTHING, 256, block=128), 8**-0.5, arranged, 2)
    assert known is not None
    assert known.reshape(2, 2, 2).tolist() == [[small] * 2] * 2
    (out, lse), (wanted, sums) = (run(*operands) for run in attend)
    assert np.isneginf(lse[:, 180:]).all()
    assert not np.asarray(out[:, 180:]).any()
    if name == "not finite":  # of its own query alone
        out, wanted, lse, sums = (x.at[:, 130].set(0) for x in (out, wanted, lse, sums))
    assert largest_difference(out, wanted) < TOLERANCE[dtype]
    assert largest_difference(lse[:, :180], sums[:, :180]) < 3e-6


@pytest.mark.parametrize("name", ["small", "orthogonal"])
def test_gradients_go_by_the_kernels_sums(name):
    operands, _ = OPERANDS[name]

    def loss(run, *operands):
        out, lse = run(*operands, Band(70), return_lse=True)
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

    kernel = partial(block_sparse_attention, implementation="pallas_tpu", interpret=True)
    plain = partial(block_sparse_attention, implementation="reference")
    found, expected = (
        jax.jit(jax.grad(partial(loss, run), 2))(*operands) for run in (kernel, plain)
    )
    assert largest_difference(found, expected) < 3e-6


@pytest.mark.parametrize("factor", [1.0, 1e3])
def test_both_softmaxes_of_the_residual(factor):
    q, k, v = heads()
    found = dense_and_sparse_attention(
        factor * q, k, v, Band(70), implementation="pallas_tpu", interpret=True
    )
    expected = dense_and_sparse_attention(factor * q, k, v, Band(70), implementation="reference")
    for a, b in zip(found, expected, strict=True):
        assert largest_difference(a, b) < 3e-6 * max(1.0, factor / 10)  # of rounded logits


@pytest.mark.parametrize(
    ("query_heads", "key_heads", "block", "tile"),
    [
        (6, 6, 128, 6),  # a tile holds as many key heads
        (12, 3, 128, 4),  # one key head
        (16, 4, 128, 8),  # two
        (7, 7, 512, 1),  # no two of these fit in one
        (4, 4, 512, 2),
        (9, 1, 128, 3),
    ],
)
def test_heads_of_a_tile(query_heads, key_heads, block, tile):
    q, k, v = heads(query_heads, key_heads, tokens=block)
    mask = block_mask(EVERYTHING, block, block=block)
    arithmetic = Arithmetic(8**-0.5, "float32")
    assert tpu.heads_of_a_tile(mask, arithmetic, Heads(*heads_first(q, k, v))) == tile
    by_head = block_mask(Band((0, *[200] * (query_heads - 1))), 256, block=128)  # lists of each
    assert tpu.heads_of_a_tile(by_head, arithmetic, Heads(*heads_first(q, k, v))) == 1
    if block > 128:
        return
    out = block_sparse_attention(q, k, v, mask, implementation="pallas_tpu", interpret=True)
    wanted = block_sparse_attention(q, k, v, mask, implementation="reference")
    chex.assert_trees_all_close(out, wanted, atol=3e-6, rtol=3e-6)
