"""Lists of blocks against the rules they come from."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_mask import (
    Arrow,
    Band,
    Causal,
    Full,
    Grouped,
    Levels,
    SinkLocal,
    block_mask,
    dense_mask,
    from_map,
    tile_map,
    top_blocks,
    visible_pairs,
)

LENGTH = 41
INDEX = np.arange(LENGTH)
ROW, COLUMN = INDEX[:, None], INDEX[None]
NEAR = np.abs(ROW - COLUMN)


def arrow(window, first, last):
    """The arrow of a sequence whose image is first ... last - 1."""
    if window == 0:
        return np.zeros((LENGTH, LENGTH), bool)
    text = (first > INDEX) | (last <= INDEX)
    everything = np.ones((LENGTH, LENGTH), bool)
    return everything if window < 0 else text[:, None] | text[None] | (window >= NEAR)


# Each rule beside its definition, element by element: [heads, S, T].
RULES = [
    (Full(), [np.ones((LENGTH, LENGTH), bool)]),
    (Band(3), [NEAR <= 3]),
    (Band(0), [NEAR == 0]),
    (Band((2, 100)), [NEAR <= 2, NEAR <= 100]),
    (Causal(), [COLUMN <= ROW]),
    (Causal(5), [COLUMN <= ROW + 5]),
    (SinkLocal((2, 0), 6), [(COLUMN <= ROW) & ((s > COLUMN) | (ROW - COLUMN < 6)) for s in (2, 0)]),
    (
        SinkLocal(4, 8, granularity=4),
        [(COLUMN <= ROW) & ((COLUMN < 4) | (COLUMN >= (ROW // 4 + 1) * 4 - 8))],
    ),
    (Arrow((3, 0, -1), text=7), [arrow(w, 0, LENGTH - 7) for w in (3, 0, -1)]),
    (Arrow((3, 0, -1), text=7, text_first=True), [arrow(w, 7, LENGTH) for w in (3, 0, -1)]),
    (
        Levels((1, 4, 9, 16, 11)),
        [np.repeat(np.cumsum((1, 4, 9, 16, 11)), (1, 4, 9, 16, 11))[:, None] > COLUMN],
    ),
    (
        Levels((1, 4, 9, 16, 11), whole=False),
        [(np.repeat((0, 1, 5, 14, 30), (1, 4, 9, 16, 11))[:, None] > COLUMN) | (NEAR == 0)],
    ),
    (
        Grouped(5, (4, 9, 16, 7)),
        [np.repeat((1, 2, 3, 4, 5, 9, 18, 34, 41), (*[1] * 5, 4, 9, 16, 7))[:, None] > COLUMN],
    ),
    (  # the last group lacks keys
        Grouped(2, (10,) * 4),
        [np.array([1, 2, *np.repeat((12, 22, 32), 10), *range(33, LENGTH + 1)])[:, None] > COLUMN],
    ),
]


@pytest.mark.parametrize(("rule", "expected"), RULES, ids=lambda x: str(x)[:40])
@pytest.mark.parametrize("block", [(8, 16), 1, 64])
def test_lists_show_what_the_rule_says(rule, expected, block):
    expected = np.stack(expected)
    mask = block_mask(rule, LENGTH, block=block)
    assert np.array_equal(dense_mask(mask)[0], np.broadcast_to(expected, dense_mask(mask)[0].shape))
    assert visible_pairs(rule, LENGTH) == mask.seen == expected.sum()
    # The lists hold exactly the blocks in which something is seen, uncut ones first.
    block_q, block_k = (block, block) if isinstance(block, int) else block
    padded = np.pad(expected, [(0, 0), (0, -LENGTH % block_q), (0, -LENGTH % block_k)])
    tiles = padded.reshape(len(expected), -1, block_q, padded.shape[2] // block_k, block_k)
    assert mask.visited == tiles.any((2, 4)).sum()
    for head, row in np.ndindex(*mask.count.shape[1:]):
        own = mask.index[0, head, row, : mask.count[0, head, row]]
        assert len(set(own)) == len(own)
        rows = min(block_q, LENGTH - row * block_q)
        whole = [tiles[head, row, :rows, each].all() for each in own]
        assert whole == sorted(whole, reverse=True)
        assert sum(whole) == mask.full[0, head, row]
    share = mask.visited / (len(expected) * mask.index.shape[2] * tiles.shape[3])
    assert mask.density == pytest.approx(share)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 70), st.integers(0, 80), st.integers(1, 40), st.integers(1, 40), st.booleans()
)
def test_a_band_of_any_size(tokens, window, block_q, block_k, causal):
    rule = SinkLocal(0, window + 1) if causal else Band(window)
    distance = np.arange(tokens)[:, None] - np.arange(tokens)
    expected = (np.abs(distance) <= window) & ((distance >= 0) | (not causal))
    mask = block_mask(rule, tokens, block=(block_q, block_k))
    assert np.array_equal(dense_mask(mask)[0, 0], expected)
    assert mask.seen == expected.sum()


def test_closed_forms():
    assert visible_pairs(Band(128), 1024) / 1024**2 == pytest.approx(0.2352, abs=5e-5)
    assert visible_pairs(Arrow(256, text=333), 4096 + 333) == 4_874_281
    # MoA's prefill: blocks of 64, one of sinks, n of the latest.
    for n in (1, 3):
        mask = block_mask(SinkLocal(64, 64 * n, granularity=64), 64 * 10, block=64)
        assert mask.visited == sum(min(i + 1, n + 1) for i in range(10))


def test_more_keys_than_queries():
    mask = block_mask(Causal(20), 10, 30, block=(4, 8))
    expected = np.arange(30) <= np.arange(10)[:, None] + 20
    assert np.array_equal(dense_mask(mask)[0, 0], expected)


@pytest.mark.parametrize("lead", [(), (2,), (3, 2)])
def test_maps_static_and_at_run_time(lead):
    keep = np.random.default_rng(0).random((*lead, 6, 3)) < 0.5
    static = from_map(keep, LENGTH, block=(8, 16), rule=Causal())
    expected = np.repeat(np.repeat(keep, 8, -2), 16, -1)[..., :LENGTH, :LENGTH] & (COLUMN <= ROW)
    expected = expected.reshape((1,) * (2 - len(lead)) + expected.shape)
    assert np.array_equal(dense_mask(static), expected)
    assert static.static
    assert static.seen == expected.sum()
    make = jax.jit(lambda keep: from_map(keep, LENGTH, block=(8, 16), rule=Causal(), width=3))
    dynamic = make(jnp.asarray(keep))
    assert np.array_equal(dense_mask(dynamic), expected)
    assert not dynamic.static
    assert dynamic.seen is None
    assert dynamic.visited == 3 * dynamic.count.size  # the most there can be


def test_a_short_width_drops_the_last_blocks():
    keep = jnp.ones((3, 3), bool)
    mask = from_map(keep, 12, block=4, width=2)
    assert mask.index.tolist() == [[[[0, 1]] * 3]]
    with pytest.raises(ValueError, match="a row keeps 3 blocks, more than the width 2"):
        from_map(np.ones((3, 3), bool), 12, block=4, width=2)


def test_top_blocks_are_the_best_visible_ones():
    scores = jax.random.normal(jax.random.key(0), (2, 3, 6, 6))
    mask = jax.jit(lambda s: top_blocks(s, 2, 48, block=8, rule=Causal()))(scores)
    lower = np.tril(np.ones((6, 6), bool))
    ranked = np.where(lower, scores, -np.inf)
    for place in np.ndindex(2, 3, 6):
        best = set(np.argsort(-ranked[place])[: min(2, place[2] + 1)])
        count = int(mask.count[place])
        assert set(np.asarray(mask.index[place])[:count]) == best
        # Blocks on the diagonal are cut, and come last.
        assert int(mask.full[place]) == count - (place[2] in best)


def test_tiles_see_equally_many_neighbors():
    keep = tile_map((6, 8), (2, 2), (1, 0))
    assert keep.shape == (12, 12)
    assert np.array_equal(keep.sum(1), np.full(12, 3))
    assert np.array_equal(
        tile_map((4,), (1,), (1,)).astype(int), [[1, 1, 1, 0]] * 2 + [[0, 1, 1, 1]] * 2
    )
    assert tile_map((4, 4), (2, 2), (5, 5)).all()
    with pytest.raises(ValueError, match="must divide the"):
        tile_map((5,), (2,), (1,))


def test_a_mask_is_a_pytree():
    mask = block_mask(Band(3), LENGTH, block=8)
    chex.assert_trees_all_equal(jax.jit(lambda m: m)(mask), jax.tree.map(jnp.asarray, mask))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Band(-1), "window must be at least 0, got -1"),
        (lambda: Arrow(-2, 3), "window must be at least -1"),
        (lambda: SinkLocal(1, (3, 0)), "local must be at least 1"),
        (lambda: Grouped(-1, (2,)), "before must be at least 0"),
        (lambda: Levels(()), "sizes must be at least 1"),
        (lambda: Levels((1, 2), first=2), "first must be a level"),
        (lambda: SinkLocal((1, 2), (3, 4, 5)).parameters, "one value, or one for each head"),
        (lambda: block_mask(Full(), 0), "queries must be at least 1"),
        (
            lambda: from_map(np.ones((2, 2), bool), 12, block=4),
            r"ends with the dimensions \[3, 3\]",
        ),
        (lambda: from_map(jnp.ones((3, 3), bool), 12, block=4), "need a static width"),
        (lambda: top_blocks(jnp.ones((3, 3)), 4, 12, block=4), "count must be 1 ... 3"),
        (
            lambda: top_blocks(jnp.ones((2, 3)), 1, 12, block=4),
            r"ends with the dimensions \[3, 3\]",
        ),
        (lambda: tile_map((4,), (2,), (-1,)), "reach must be at least 0"),
        (lambda: tile_map((4,), (0,), (1,)), "tile must be at least 1"),
        (lambda: block_mask(Arrow(3, text=9), 8), "9 text tokens do not fit in a sequence of 8"),
        (lambda: block_mask(Full(), 8).check(1, 9, 1, 8), "made for 8 queries and 8 keys"),
        (
            lambda: block_mask(Band((1, 2)), 8).check(1, 8, 3, 8),
            "a rule for 2 heads, the arrays have 3",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
