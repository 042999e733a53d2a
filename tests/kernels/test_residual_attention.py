"""Dense and sparse attention in one pass against the two alone."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from experiments.kernels.cases import RESIDUAL
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Arrow, Band, Levels, block_mask, with_rest
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.residual_attention import dense_and_sparse_attention

KERNELS = ("pallas_tpu", "pallas_gpu")


def heads(tokens, *, key_heads=2, width=16, dtype=jnp.float32):
    noise = jax.random.split(jax.random.key(tokens), 3)
    shapes = [(2, tokens, heads, width) for heads in (4, key_heads, key_heads)]
    return [2 * jax.random.normal(key, s).astype(dtype) for key, s in zip(noise, shapes)]


def apart(rule, *operands):
    dense = dense_attention(*operands, implementation="reference")
    return dense, block_sparse_attention(*operands, rule, implementation="reference")


@pytest.mark.parametrize("implementation", [None, *KERNELS])
@pytest.mark.parametrize(
    "rule",
    # A narrow band; one that some heads do not have, or have everywhere; levels.
    [Band(20), Arrow((30, 0, -1, 3), text=40), Levels((1, 59, 300))],
    ids=lambda rule: type(rule).__name__,
)
def test_both_results(implementation, rule):
    operands = heads(360)  # neither a multiple of 128 nor of 64
    found = jax.jit(
        partial(
            dense_and_sparse_attention,
            rule=rule,
            implementation=implementation,
            interpret=implementation in KERNELS,
        )
    )(*operands)
    chex.assert_trees_all_close(found, apart(rule, *operands), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", *KERNELS])
def test_bfloat16(implementation):
    operands = heads(256, dtype=jnp.bfloat16)
    interpret = implementation in KERNELS
    found = dense_and_sparse_attention(
        *operands, Band(64), implementation=implementation, interpret=interpret
    )
    assert {x.dtype for x in found} == {jnp.dtype(jnp.bfloat16)}
    found, expected = jax.tree.map(
        lambda x: x.astype(jnp.float32), (found, apart(Band(64), *operands))
    )
    chex.assert_trees_all_close(found, expected, atol=3e-2, rtol=2e-2)


def test_gradients():
    operands = heads(40, key_heads=4)

    def loss(attend):
        return lambda *x: sum(jnp.sum(jnp.sin(c * y)) for c, y in zip((1, 3), attend(*x)))

    attends = partial(dense_and_sparse_attention, rule=Band(5)), partial(apart, Band(5))
    found, expected = jax.jit(
        lambda *x: [jax.grad(loss(attend), (0, 1, 2))(*x) for attend in attends]
    )(*operands)
    chex.assert_trees_all_close(found, expected, atol=2e-4)


@pytest.mark.parametrize(("platform", "block"), [("tpu", 128), ("cuda", 64)])
def test_kernels_cost_little_more_than_dense_attention(platform, block):
    x = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    attend = partial(dense_and_sparse_attention, rule=Band(128))
    counted = cost(attend, x, x, x, platform=platform)
    mask = block_mask(Band(128), 1024, block=block)
    cut = int((mask.count - mask.full).sum()) * block**2
    assert counted.flops == 2 * 4 * 2 * 64 * (2 * 1024**2 + cut)
    assert counted.useful_flops == 2 * 4 * 4 * 64 * 1024**2
    two = sum(
        cost(f, x, x, x, platform=platform).flops
        for f in (dense_attention, partial(block_sparse_attention, mask=Band(128)))
    )
    assert counted.flops < 0.95 * two


def costs(tokens):
    x = jax.ShapeDtypeStruct((2, tokens, 4, 32), jnp.float32)
    rule = Band(tokens // 8)
    attends = (
        dense_attention,
        partial(block_sparse_attention, mask=rule),
        partial(dense_and_sparse_attention, rule=rule),
    )
    return [cost(attend, x, x, x) for attend in attends]


def test_short_sequences_make_their_logits_once():
    dense, _, both = costs(512)
    mask = block_mask(Band(64), 512, block=(64, 32))
    assert both.flops == dense.flops + 2 * 8 * 32 * mask.visited * 64 * 32
    assert both.useful_flops == dense.flops + 2 * 8 * 32 * mask.seen


def test_long_sequences_make_them_twice():
    dense, sparse, both = costs(600)
    assert both.flops == dense.flops + sparse.flops


def test_the_dense_part_is_dense_attention_to_the_bit():
    operands = heads(256, key_heads=4)
    dense, _ = jax.jit(partial(dense_and_sparse_attention, rule=Band(32)))(*operands)
    assert np.array_equal(dense, jax.jit(dense_attention)(*operands))


def test_lists_with_the_rest_hold_every_block_once():
    mask = with_rest(Band((3, 40)), 100, 100, block=16)
    assert np.array_equal(np.sort(mask.index), np.broadcast_to(np.arange(7), mask.index.shape))
    own = block_mask(Band((3, 40)), 100, block=16)
    for head, row in np.ndindex(*mask.count.shape[1:]):
        count = mask.count[0, head, row]
        assert count == own.count[0, head, row]
        assert np.array_equal(mask.index[0, head, row, :count], own.index[0, head, row, :count])


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", RESIDUAL)
def test_compiles_for_tpus(compile_for_tpu, case):
    function, operands = RESIDUAL[case]
    assert "tpu_custom_call" in compile_for_tpu(jax.jit(function), *operands).as_text()


@pytest.mark.parametrize("case", RESIDUAL)
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = RESIDUAL[case]
    assert "triton" in lower_for_gpu(jax.jit(function), *operands)


def test_errors():
    q, k, v = heads(8)
    with pytest.raises(ValueError, match="must agree in batch"):
        dense_and_sparse_attention(q, k[:1], v[:1], Band(2))
    half = [x.astype(jnp.float16) for x in (q, k, v)]
    with pytest.raises(NotImplementedError, match="the kernel has no float16"):
        dense_and_sparse_attention(*half, Band(2), implementation="pallas_tpu")
