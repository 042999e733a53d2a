"""Heads with windows of their own: against the definition, static and at run time."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from experiments.kernels.cases import HEAD_WISE
from pallas_kernels.arrow_attention import arrow_attention
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Arrow, visible_pairs

KERNELS = ("pallas_tpu", "pallas_gpu")
WINDOW = (20, 0, -1, 3)


def operands(tokens, *, heads=4, width=16, dtype=jnp.float32, batch=2):
    noise = jax.random.split(jax.random.key(tokens), 4)
    shape = (batch, tokens, heads, width)
    return [jax.random.normal(key, shape).astype(dtype) for key in noise]


def visible(window, tokens, text, text_first, tile):
    """bool[S, T] of one head, element by element."""
    if window == 0:
        return np.zeros((tokens, tokens), bool)
    place = np.arange(tokens)
    is_text = place < text if text_first else place >= tokens - text
    if tile is None:
        near = np.abs(place[:, None] - place) <= window
        seen = is_text[:, None] | is_text[None] | near
    else:
        seen = np.zeros((tokens, tokens), bool)
        bm, bn = tile
        image = tokens - text
        for m in range(-(-tokens // bm)):
            rows = slice(m * bm, min((m + 1) * bm, tokens))
            if is_text[rows].any():
                seen[rows] = True
                continue
            first = max((m * bm - window) // bn, 0)
            last = -(-((m + 1) * bm + window) // bn) - 1
            for n in range(-(-tokens // bn)):
                always = n < -(-text // bn) if text_first else n >= image // bn
                if always or first <= n <= last:
                    seen[rows, n * bn : (n + 1) * bn] = True
    return seen | (window < 0)


def by_formula(q, k, v, kept, window, *, text, text_first, tile):
    logits = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
    seen = np.stack([visible(w, q.shape[1], text, text_first, tile) for w in window])
    weights = jax.nn.softmax(jnp.where(seen, logits, -1e30), axis=-1)
    out = jnp.einsum("bhst,bthd->bshd", weights, v)
    return jnp.where((np.asarray(window) == 0)[:, None], kept, out)


LAYOUTS = {
    "image first": {"text": 37, "text_first": False, "tile": None},
    "text first": {"text": 37, "text_first": True, "tile": None},
    "no text": {"text": 0, "text_first": False, "tile": None},
    "tiles": {"text": 37, "text_first": False, "tile": (32, 16)},
    "tiles, text first": {"text": 37, "text_first": True, "tile": (32, 16)},
    "tiles, no text": {"text": 0, "text_first": False, "tile": (32, 16)},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_every_head_has_its_window(layout, implementation):
    layout = LAYOUTS[layout]
    *qkv, kept = operands(200)
    expected = by_formula(*qkv, kept, WINDOW, **layout)
    run = partial(arrow_attention, kept=kept, implementation=implementation, **layout)
    chex.assert_trees_all_close(jax.jit(partial(run, window=WINDOW))(*qkv), expected, atol=1e-5)
    widths = (-1, 0, 3, 7, 20)  # one that no head has

    @jax.jit
    def traced(window, *qkv):
        return run(*qkv, window, widths=widths)

    chex.assert_trees_all_close(traced(jnp.asarray(WINDOW), *qkv), expected, atol=1e-5)
    other = (-1, -1, 7, 0)
    expected = by_formula(*qkv, kept, other, **layout)
    chex.assert_trees_all_close(traced(jnp.asarray(other), *qkv), expected, atol=1e-5)
    assert traced._cache_size() == 1


@pytest.mark.parametrize("layout", ["image first", "text first", "tiles, text first"])
@pytest.mark.parametrize("implementation", KERNELS)
def test_kernels(layout, implementation):
    layout = LAYOUTS[layout]
    *qkv, kept = operands(300, batch=1)
    expected = by_formula(*qkv, kept, WINDOW, **layout)
    options = {"implementation": implementation, "interpret": True, "kept": kept, **layout}
    run = jax.jit(partial(arrow_attention, widths=(-1, 0, 3, 20), **options))
    chex.assert_trees_all_close(run(*qkv, jnp.asarray(WINDOW)), expected, atol=1e-5)


def test_windows_over_everything_are_dense_to_the_bit():
    q, k, v, _ = operands(60)
    dense = jax.jit(dense_attention)(q, k, v)
    run = partial(arrow_attention, text=10)
    assert np.array_equal(jax.jit(partial(run, window=(-1,) * 4))(q, k, v), dense)
    assert np.array_equal(jax.jit(partial(run, widths=(-1,)))(q, k, v, jnp.full(4, -1)), dense)
    wide = jax.jit(partial(run, window=(49,) * 4))(q, k, v)
    chex.assert_trees_all_close(wide, dense, atol=1e-6)
    all_text = jax.jit(partial(arrow_attention, window=(1,) * 4, text=60))(q, k, v)
    chex.assert_trees_all_close(all_text, dense, atol=1e-6)


def test_either_side_of_the_text_gives_the_same():
    *qkv, kept = operands(100)
    turned = [jnp.concatenate([x[:, 70:], x[:, :70]], axis=1) for x in (*qkv, kept)]
    one = arrow_attention(*qkv, WINDOW, text=30, kept=kept)
    two = arrow_attention(*turned[:3], WINDOW, text=30, text_first=True, kept=turned[3])
    chex.assert_trees_all_close(jnp.concatenate([two[:, 30:], two[:, :30]], axis=1), one, atol=1e-5)


def test_heads_that_are_not_computed_are_kept_to_the_bit():
    *qkv, kept = operands(100)
    run = jax.jit(partial(arrow_attention, text=30, widths=(0, 20), kept=kept))
    out = run(*qkv, jnp.array([0, 20, 0, 0]))
    assert np.array_equal(out[:, :, [0, 2, 3]], kept[:, :, [0, 2, 3]])
    zeros = arrow_attention(*qkv, (0,) * 4, text=30)
    assert not zeros.any()


def test_bfloat16():
    *qkv, kept = operands(200, dtype=jnp.bfloat16)
    out = jax.jit(partial(arrow_attention, window=WINDOW, text=37, kept=kept))(*qkv)
    assert out.dtype == jnp.bfloat16
    wide = [x.astype(jnp.float32) for x in (*qkv, kept)]
    expected = by_formula(*wide, WINDOW, **LAYOUTS["image first"])
    chex.assert_trees_all_close(out.astype(jnp.float32), expected, atol=3e-2, rtol=2e-2)


@pytest.mark.parametrize("static", [True, False])
def test_gradients(static):
    *qkv, kept = operands(90)

    def loss(attend):
        return lambda q, k, v: jnp.sum(jnp.sin(attend(q, k, v)))

    def own(q, k, v):
        options = {} if static else {"widths": sorted(WINDOW)}
        window = WINDOW if static else jnp.asarray(WINDOW)
        return arrow_attention(q, k, v, window, text=37, kept=kept, **options)

    formula = partial(by_formula, kept=kept, window=WINDOW, **LAYOUTS["image first"])
    found, expected = (jax.jit(jax.grad(loss(f), (0, 1, 2)))(*qkv) for f in (own, formula))
    chex.assert_trees_all_close(found, expected, atol=1e-4)


def test_visible_pairs_in_closed_form():
    for image, text, window in ((4096, 333, 256), (100, 20, 7), (64, 0, 5)):
        seen = visible_pairs(Arrow(window, text=text), image + text)
        assert seen == (image + text) ** 2 - (image - window - 1) * (image - window)
        first = visible_pairs(Arrow(window, text=text, text_first=True), image + text)
        assert first == seen
    rule = Arrow(9, text=37, tile=(32, 16))
    assert visible_pairs(rule, 200) == visible(9, 200, 37, False, (32, 16)).sum()


def test_what_is_left_out_costs_nothing():
    x = jax.ShapeDtypeStruct((1, 1109, 4, 16), jnp.float32)
    attend = partial(arrow_attention, text=85)
    dense = cost(dense_attention, x, x, x)
    assert cost(partial(attend, window=(0,) * 4), x, x, x).flops == 0
    half = cost(partial(attend, window=(-1, 0, 0, -1)), x, x, x)
    assert half.flops == dense.flops // 2
    windows = cost(partial(attend, window=(64,) * 4), x, x, x)
    seen = 4 * visible_pairs(Arrow(64, text=85), 1109)
    assert windows.useful_flops <= windows.flops < 0.35 * dense.flops
    # The text's rows are dense attention, in blocks of queries that may be padded.
    assert windows.useful_flops >= 2 * seen * 32


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", HEAD_WISE)
def test_compiles_for_tpus(compile_for_tpu, case):
    function, operands = HEAD_WISE[case]
    assert "tpu_custom_call" in compile_for_tpu(jax.jit(function), *operands).as_text()


@pytest.mark.parametrize("case", list(HEAD_WISE)[:2])
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = HEAD_WISE[case]
    assert "triton" in lower_for_gpu(jax.jit(function), *operands)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": (1, 2)}, "one number for each of 4 heads"),
        ({"window": (1, 2, 3, -2)}, "window must be at least -1"),
        ({"window": jnp.ones(4, jnp.int32)}, "need widths="),
        ({"text": 61}, "61 text tokens do not fit in a sequence of 60"),
        ({"tile": (0, 8)}, "tile must be at least 1"),
        ({"kept": jnp.ones((2, 60, 4, 8))}, r"kept of heads must be float32\[2, 60, 4, 16\]"),
    ],
)
def test_errors(change, message):
    q, k, v, _ = operands(60)
    options = {"window": WINDOW, "text": 10} | change
    with pytest.raises(ValueError, match=message):
        arrow_attention(q, k, v, **options)


def test_keys_of_other_tokens_are_refused():
    q, k, v, _ = operands(60)
    with pytest.raises(ValueError, match="of the same tokens and heads"):
        arrow_attention(q, k[:, :50], v[:, :50], WINDOW)
