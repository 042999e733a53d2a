"""Grouped products: every program against a loop over the groups."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from pallas_kernels.grouped_matmul import by_groups, grouped_matmul
from pallas_kernels.grouped_matmul.xla import Blocks, block_rows

SIZES = {
    "even": (4, 4, 4, 4),
    "uneven": (1, 0, 9, 3),
    "one group": (0, 0, 0, 16),
    "rows of no group": (2, 3, 0, 4),
    "none": (0, 0, 0, 0),
}


def operands(rows=16, dtype=jnp.float32):
    x, w = (jax.random.normal(jax.random.key(i), s) for i, s in enumerate([(rows, 6), (4, 6, 5)]))
    return x.astype(dtype), w.astype(dtype)


def one_by_one(x, w, sizes):
    """The rows of each group times its matrix."""
    out, first = np.zeros((x.shape[0], w.shape[2]), np.float32), 0
    for matrix, size in zip(np.float32(w), sizes):
        out[first : first + size] = np.float32(x[first : first + size]) @ matrix
        first += size
    return out


@pytest.mark.parametrize("implementation", ["reference", "xla", None])
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_rows_meet_the_matrix_of_their_group(implementation, sizes):
    x, w = operands()
    run = jax.jit(lambda x, w, s: grouped_matmul(x, w, s, implementation=implementation))
    got = run(x, w, jnp.array(sizes, jnp.int32))
    chex.assert_trees_all_close(got, one_by_one(x, w, sizes), atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 8, 300])
def test_blocks_of_every_size(rows):
    """Fewer rows than groups, and more than a block holds."""
    x, w = operands(rows)
    ids = np.sort(np.random.default_rng(rows).integers(0, 4, rows))
    sizes = np.bincount(ids, minlength=4)
    got = jax.jit(grouped_matmul)(x, w, jnp.asarray(sizes))
    chex.assert_trees_all_close(got, one_by_one(x, w, sizes), atol=1e-4)


def test_blocks_cover_every_row_once():
    """In the order of the rows; no more run than there are."""
    for rows, groups in ((16, 4), (5, 64), (700, 8), (1, 1)):
        rng = np.random.default_rng(rows)
        sizes = np.bincount(rng.integers(0, groups, rows), minlength=groups)
        blocks = Blocks.of(jnp.asarray(sizes), rows)
        used = int(blocks.used)
        assert used == sum(-(-size // blocks.rows) for size in sizes) <= len(blocks.start)
        start, group = (np.asarray(each)[:used] for each in (blocks.start, blocks.group))
        assert (np.diff(start) > 0).all()
        covered = np.repeat(np.arange(groups), sizes)[start]
        np.testing.assert_array_equal(covered, group)
    assert [block_rows(rows, 64) for rows in (8, 128, 8192, 10**6)] == [1, 2, 128, 128]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_rounded_once(dtype):
    x, w = operands(dtype=dtype)
    sizes = SIZES["uneven"]
    got = grouped_matmul(x, w, jnp.array(sizes))
    assert got.dtype == dtype
    want = one_by_one(x, w, sizes)
    chex.assert_trees_all_close(np.float32(got), want, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_gradients():
    """Those of the reference; rows of no group have none."""
    x, w = operands()
    for sizes in (SIZES["uneven"], SIZES["rows of no group"]):

        def loss(x, w, sizes=sizes, implementation=None):
            y = grouped_matmul(x, w, jnp.array(sizes), implementation=implementation)
            return jnp.sum(jnp.sin(y))

        def plain(x, w, sizes=sizes):
            first, total = 0, 0.0
            for number, size in enumerate(sizes):
                total += jnp.sum(jnp.sin(x[first : first + size] @ w[number]))
                first += size
            return total

        got = jax.jit(jax.grad(loss, (0, 1)))(x, w)
        chex.assert_trees_all_close(got, jax.grad(plain, (0, 1))(x, w), atol=1e-5)


def test_any_product_by_groups():
    """A tree of arrays by group, such as quantized values and scales."""
    x, _ = operands()
    rng = np.random.default_rng(0)
    leaf = {"q": jnp.asarray(rng.integers(-8, 8, (4, 6, 5)), jnp.int8), "s": jnp.arange(1.0, 5.0)}
    sizes = SIZES["uneven"]

    def product(rows, own):
        return rows @ own["q"].astype(rows.dtype) * own["s"]

    got = by_groups(product, x, leaf, jnp.array(sizes), 5)
    want = one_by_one(x, np.float32(leaf["q"]) * np.float32(leaf["s"])[:, None, None], sizes)
    chex.assert_trees_all_close(got, want, atol=1e-4)


def test_cost_is_that_of_the_rows():
    x, w = operands()
    sizes = jnp.array(SIZES["even"])
    assert cost(grouped_matmul, x, w, sizes).flops == 2 * 16 * 6 * 5


def test_what_does_not_fit():
    x, w = operands()
    for given, message in (
        ((x[0], w, jnp.zeros(4, int)), r"x is \[M, K\] and w \[G, K, N\]"),
        ((x, w[:, :5], jnp.zeros(4, int)), r"of the same dtype, got float32\[16, 6\]"),
        ((x.astype(jnp.bfloat16), w, jnp.zeros(4, int)), "of the same dtype, got bfloat16"),
        ((x, w, jnp.zeros(3, int)), "integers, one for each of 4 groups"),
        ((x, w, jnp.zeros(4)), "integers, one for each of 4 groups"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*given)
