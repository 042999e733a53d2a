"""Decode attention over plain, flat, quantized and low-rank caches, and the merge of its parts."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.cost import cost
from experiments.kernels.cases import DECODE
from pallas_kernels.decode_attention import (
    decode_attention,
    flat_decode_attention,
    latent_decode_attention,
    low_rank_decode_attention,
    pack_int4,
    quantized_decode_attention,
)
from pallas_kernels.decode_attention.reference import dequantize, rebuild_keys
from pallas_kernels.decode_attention.tiles import segments
from pallas_kernels.merge import merge, merge_rows

B, T = 2, 300  # two whole tiles of 128 and a piece of a third

# float32 sums in another order; bfloat16 keeps 8 bits: the weights, the rebuilt keys and the
# output are each rounded to one part in 256.
TOLERANCE = {"float32": {"atol": 2e-5, "rtol": 2e-5}, "bfloat16": {"atol": 3e-2, "rtol": 2e-2}}

# The smallest tiles that the kernels take.
PROGRAMS = {
    "xla": {"implementation": "xla", "tile": 64, "splits": 3},
    "tpu": {"implementation": "pallas_tpu", "interpret": True, "tile": 128},
    "gpu": {"implementation": "pallas_gpu", "interpret": True, "tile": 64, "splits": 3},
}
KERNELS = ["tpu", "gpu"]


def normal(seed, *shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def qvalues(seed, *shape, bits):
    x = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    return jnp.asarray(x, jnp.int8) if bits == 8 else pack_int4(jnp.asarray(x, jnp.int32))


def plain(queries=1, heads=4, key_heads=2, width=16, value_width=24, dtype="float32", tokens=T):
    return (
        normal(0, B, queries, heads, width, dtype=dtype),
        normal(1, B, tokens, key_heads, width, dtype=dtype),
        normal(2, B, tokens, key_heads, value_width, dtype=dtype),
    )


def poison(x, lengths):
    """NaN in all that lies beyond the lengths, [B, T, K, W] and [B, K]."""
    valid = np.arange(x.shape[1])[None, :, None] < np.asarray(lengths)[:, None, :]
    return jnp.where(valid[..., None], x, jnp.nan)


def specified(function, *operands, **options):
    """The reference's result, compiled as one program."""
    return jax.jit(partial(function, implementation="reference", **options))(*operands)


def assert_agrees(function, *operands, program, dtype="float32"):
    """A program gives the reference's outputs and log-sum-exps."""
    expected = specified(function, *operands, return_lse=True)
    out = jax.jit(partial(function, return_lse=True, **PROGRAMS[program]))(*operands)
    assert out[0].dtype == operands[0].dtype
    assert np.isfinite(np.asarray(out[0], np.float32)).all()
    chex.assert_trees_all_equal_shapes_and_dtypes(out, expected)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float32), (out, expected))
    chex.assert_trees_all_close(*wide, **TOLERANCE[dtype])


# --- the specification ---


def test_reference_is_softmax_over_each_rows_keys():
    q, k, v = plain(queries=3, tokens=9)
    lengths = np.array([[9, 4], [0, 2]])
    options = {"scale": 0.3, "return_lse": True}
    out, log_sum_exp = specified(decode_attention, q, k, v, jnp.asarray(lengths), **options)
    expected, sums = np.zeros(out.shape), np.full(log_sum_exp.shape, -np.inf)
    for b, s, h in np.ndindex(*out.shape[:3]):
        seen = max(0, lengths[b, h // 2] - (2 - s))
        if seen:
            weights = np.exp(0.3 * np.asarray(k)[b, :seen, h // 2] @ np.asarray(q)[b, s, h])
            expected[b, s, h] = weights @ np.asarray(v)[b, :seen, h // 2] / weights.sum()
            sums[b, s, h] = np.log(weights.sum())
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_allclose(log_sum_exp, sums, atol=1e-5)


# --- every program against the specification ---


@pytest.mark.parametrize("program", PROGRAMS)
def test_plain_cache(program):
    q, k, v = plain(queries=2)
    lengths = jnp.array([[300, 1], [0, 137]])
    assert_agrees(
        decode_attention, q, poison(k, lengths), poison(v, lengths), lengths, program=program
    )


@pytest.mark.parametrize("program", PROGRAMS)
def test_bfloat16(program):
    # On a TPU, tiles of 8 heads by 128 channels are taken apart by strided loads.
    heads, width = (8, 128) if program == "tpu" else (2, 32)
    operands = plain(1, heads, heads, width, width, "bfloat16", tokens=200)
    assert_agrees(
        decode_attention, *operands, jnp.array([200, 77]), program=program, dtype="bfloat16"
    )


@pytest.mark.parametrize(
    ("queries", "width", "program"),
    [(8, 64, "xla"), (8, 80, "gpu"), (1, 96, "tpu"), (8, 256, "tpu")],
)
def test_head_dims_and_many_queries(queries, width, program):
    operands = plain(queries, 3, 1, width, width, tokens=140)
    assert_agrees(decode_attention, *operands, jnp.array([5, 140]), program=program)


@pytest.mark.parametrize("program", ["xla", "tpu"])
def test_values_are_the_first_channels_of_latents(program):
    """One key head for all queries, of which tokens beyond the lengths are NaN."""
    q, k, _ = plain(queries=2, key_heads=1, width=40)
    lengths = jnp.array([300, 131])
    k = poison(k, lengths[:, None])
    got = latent_decode_attention(q, k, lengths, values=24, scale=0.3, **PROGRAMS[program])
    options = {"scale": 0.3, "implementation": "reference"}
    want = decode_attention(q, k, k[..., :24], lengths, **options)
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32"])
    with pytest.raises(NotImplementedError, match="latents have no GPU kernel"):
        latent_decode_attention(q, k, lengths, values=24, **PROGRAMS["gpu"])
    for values in (0, 41):
        with pytest.raises(ValueError, match=f"first 1 ... 40 channels of the keys.*={values}"):
            latent_decode_attention(q, k, lengths, values=values)


@pytest.mark.parametrize("program", PROGRAMS)
def test_flat_cache(program):
    # Heads in no order, with a gap (slots 300 ... 309) and starts within tiles.
    places = {"head_start": (364, 0, 64, 310), "head_capacity": (64, 64, 236, 40)}
    q, k, v = normal(0, B, 1, 8, 16), normal(1, B, 428, 16), normal(2, B, 428, 16)
    lengths = jnp.array([[64, 63, 0, 40], [1, 900, 236, 39]])
    k, v = (x.at[:, 300:310].set(jnp.nan).at[0, 64:300].set(jnp.nan) for x in (k, v))
    assert_agrees(partial(flat_decode_attention, **places), q, k, v, lengths, program=program)


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "groups", "offset", "program"),
    [
        (8, 4, 10, True, "xla"),
        (8, 4, 10, True, "tpu"),
        (8, 4, 10, True, "gpu"),
        (4, 8, 1, False, "tpu"),
        (4, 4, 2, True, "xla"),
        (4, 4, 2, True, "tpu"),
        (4, 8, 2, False, "gpu"),
        (8, 8, "tokens", True, "xla"),
        (4, 4, "tokens", True, "tpu"),
        (4, 4, "tokens", False, "gpu"),
    ],
)
def test_quantized_cache(k_bits, v_bits, groups, offset, program):
    # The one scale's case has 8 heads of 128 channels, which a TPU takes apart by strided loads.
    heads, width = (8, 128) if groups == 1 else (2, 32)
    tokens, lengths = 320, jnp.array([[320, 0], [131, 1]])[:, np.arange(heads) % 2]
    k = qvalues(1, B, tokens, heads, width, bits=k_bits)
    v = qvalues(2, B, tokens, heads, width, bits=v_bits)
    of_keys = (B, tokens, heads, 1) if groups == "tokens" else (B, groups, heads, width)
    scales = {
        "k_scale": 0.05 * normal(3, *of_keys),
        "v_scale": poison(0.1 * normal(4, B, tokens, heads, 1), lengths),
    }
    if offset:
        scales["k_offset"] = normal(5, *of_keys)
        scales["v_offset"] = poison(normal(6, B, tokens, heads, 1), lengths)

    def attend(q, k, v, lengths, scales, **options):
        if groups == 2:  # 160 tokens a scale: the program finds a tile
            options["tile"] = None
        return quantized_decode_attention(q, k, v, lengths, **scales, **options)

    assert_agrees(attend, normal(0, B, 1, 2 * heads, width), k, v, lengths, scales, program=program)


@pytest.mark.parametrize(
    ("bits", "offset", "program"), [(8, True, "xla"), (4, True, "tpu"), (4, False, "gpu")]
)
def test_flat_cache_of_quantized_values(bits, offset, program):
    places = {"head_start": (64, 0), "head_capacity": (236, 64)}
    names = ("k_scale", "v_scale", *(("k_offset", "v_offset") if offset else ()))
    scales = {name: 0.1 * normal(i, B, 300, 1) for i, name in enumerate(names)}
    k, v = (qvalues(i, B, 300, 32, bits=bits) for i in (11, 12))
    lengths = jnp.array([[236, 63], [1, 900]])

    def attend(q, k, v, lengths, scales, **options):
        return flat_decode_attention(q, k, v, lengths, **scales, **places, **options)

    assert_agrees(attend, normal(0, B, 1, 4, 32), k, v, lengths, scales, program=program)


@pytest.mark.parametrize("program", ["xla", "tpu"])
@pytest.mark.parametrize("shared_values", [False, True])
def test_low_rank_keys(program, shared_values):
    q, _, v = plain(queries=2, width=16)
    features, basis = normal(3, B, T, 40), 0.2 * normal(4, 40, 2 * 16)
    frequencies = jnp.asarray(100.0 ** (-np.arange(8) / 8), jnp.float32)
    positions = jnp.asarray(np.random.default_rng(5).permutation(B * T).reshape(B, T), jnp.int32)
    lengths = jnp.array([[300, 299], [0, 3]])
    features = features.at[1, 3:].set(jnp.nan)
    v = normal(6, B, T, 24).at[1, 3:].set(jnp.nan) if shared_values else v

    def attend(q, features, basis, v, lengths, frequencies, positions, **options):
        rotary = {"frequencies": frequencies, "positions": positions}
        return low_rank_decode_attention(q, features, basis, v, lengths, **rotary, **options)

    assert_agrees(attend, q, features, basis, v, lengths, frequencies, positions, program=program)


# --- what must hold whatever the program ---


@pytest.mark.parametrize("program", ["xla", "gpu"])
def test_any_division_gives_the_same(program):
    q, k, v = plain()
    lengths = jnp.array([300, 20])
    expected = specified(decode_attention, q, k, v, lengths)
    for splits in (1, 100) if program == "xla" else (1,):
        options = PROGRAMS[program] | {"splits": splits}
        out = jax.jit(partial(decode_attention, **options))(q, k, v, lengths)
        chex.assert_trees_all_close(out, expected, **TOLERANCE["float32"])


def test_the_default_is_the_platforms_program():
    q, k, v = plain(tokens=20)
    lengths = jnp.array([20, 7])
    chex.assert_trees_all_close(
        jax.jit(decode_attention)(q, k, v, lengths),
        specified(decode_attention, q, k, v, lengths),
        **TOLERANCE["float32"],
    )


def test_slots_have_no_order_and_equal_capacities_are_a_plain_cache():
    q, k, v = plain(heads=4, key_heads=2, value_width=16, tokens=12)
    flat = [x.transpose(0, 2, 1, 3).reshape(B, 24, 16) for x in (k, v)]
    places = {"head_start": (0, 12), "head_capacity": (12, 12)}
    lengths = jnp.array([12, 5])
    expected = specified(decode_attention, q, k, v, lengths)
    attend = jax.jit(partial(flat_decode_attention, **places, implementation="xla"))
    chex.assert_trees_all_close(attend(q, *flat, lengths), expected, **TOLERANCE["float32"])
    turned = [jnp.concatenate([x[:, 3:12], x[:, :3], x[:, 12:]], axis=1) for x in flat]
    full = jnp.array([12, 12])
    chex.assert_trees_all_close(
        attend(q, *turned, full), attend(q, *flat, full), **TOLERANCE["float32"]
    )


def test_a_row_does_not_depend_on_its_neighbors():
    q, k, v = plain(tokens=40)
    attend = jax.jit(partial(decode_attention, implementation="xla", tile=16))
    both = attend(q, k, v, jnp.array([33, 40]))
    other = attend(*(x.at[1].set(7.0) for x in (q, k, v)), jnp.array([33, 1]))
    chex.assert_trees_all_close(both[0], other[0], **TOLERANCE["float32"])


def test_low_rank_of_full_rank_is_exact_and_values_can_be_absorbed():
    q, k, _ = plain(heads=2, tokens=10)
    frequencies = jnp.asarray(100.0 ** (-np.arange(8) / 8), jnp.float32)
    features, basis = k.reshape(B, 10, 32), jnp.eye(32)
    zeros = jnp.zeros((B, 10), jnp.int32)
    lengths, value_features = jnp.array([10, 4]), normal(7, B, 10, 6)
    value_basis = normal(8, 6, 2, 24)
    v = jnp.einsum("btr,rkw->btkw", value_features, value_basis)
    expected = specified(decode_attention, q, k, v, lengths)
    attend = jax.jit(
        partial(low_rank_decode_attention, frequencies=frequencies, implementation="xla")
    )
    explicit = attend(q, features, basis, v, lengths, positions=zeros)
    chex.assert_trees_all_close(explicit, expected, **TOLERANCE["float32"])
    absorbed = attend(q, features, basis, value_features, lengths, positions=zeros)
    absorbed = jnp.einsum("bshr,rhw->bshw", absorbed, value_basis)
    chex.assert_trees_all_close(absorbed, expected, atol=1e-4)


def test_rotation_turns_halves_and_keeps_relative_positions():
    frequencies = jnp.array([1.0, 0.1])
    k = rebuild_keys(
        jnp.ones((1, 3, 1)), jnp.array([[1.0, 2, 3, 4]]), jnp.arange(3)[None], frequencies
    )
    at_two = [np.cos(2) - 3 * np.sin(2), 2 * np.cos(0.2) - 4 * np.sin(0.2)]
    np.testing.assert_allclose(k[0, 2, 0, :2], at_two, rtol=1e-5)
    np.testing.assert_allclose(k[0, 2, 0, 2], 3 * np.cos(2) + np.sin(2), rtol=1e-5)
    np.testing.assert_allclose(k[0, 0] @ k[0, 1].T, k[0, 1] @ k[0, 2].T, rtol=1e-4)


def test_packed_quantized_values_come_back():
    x = jnp.asarray(np.random.default_rng(0).integers(-8, 8, (1, 4, 2, 6)), jnp.int32)
    packed = pack_int4(x)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (1, 4, 2, 3)
    np.testing.assert_array_equal(dequantize(packed, jnp.ones((1, 1, 2, 6))), x)
    with pytest.raises(ValueError, match="even last axis"):
        pack_int4(jnp.ones((2, 3), jnp.int32))


# --- merge and division ---


def test_merged_parts_are_the_whole():
    q, k, v = plain(tokens=30)
    attend = partial(specified, decode_attention, return_lse=True)
    whole = attend(q, k, v, jnp.array([30, 12]))
    cuts = [(0, 5, [5, 5]), (5, 12, [7, 7]), (12, 30, [18, 0])]
    parts = [attend(q, k[:, a:b], v[:, a:b], jnp.array(lengths)) for a, b, lengths in cuts]
    chex.assert_trees_all_close(merge(*zip(*parts)), whole, **TOLERANCE["float32"])
    in_steps = merge(*zip(merge(*zip(*parts[1:])), parts[0]))
    chex.assert_trees_all_close(in_steps, whole, **TOLERANCE["float32"])


def test_empty_parts_change_nothing():
    output, log_sum_exp = normal(0, 3, 4), jnp.array([1e4, -1e4, 0.0])
    nothing = jnp.zeros((3, 4)), jnp.full((3,), -jnp.inf)
    merged = merge([output, nothing[0]], [log_sum_exp, nothing[1]])
    chex.assert_trees_all_close(merged, (output, log_sum_exp))
    chex.assert_trees_all_equal(merge(*zip(nothing, nothing)), nothing)
    rows = merge_rows(output[:, None], log_sum_exp[:, None], jnp.array([2, 2, 0]), count=4)
    chex.assert_trees_all_close(rows[0][2, 0], output[0], atol=1e-6)
    np.testing.assert_array_equal(rows[1][:, 0], [0.0, -np.inf, 1e4, -np.inf])
    assert not rows[0][1].any()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([], []), "at least one part"),
        (([jnp.ones((2, 3))], [jnp.ones(2), jnp.ones(2)]), "1 outputs and 2"),
        (([jnp.ones((2, 3))], [jnp.ones(3)]), "without its last axis"),
    ],
)
def test_merge_names_its_errors(parts, message):
    with pytest.raises(ValueError, match=message):
        merge(*parts)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=4), st.sampled_from([1, 3, 7]))
def test_division_is_balanced_and_complete(tiles, workers):
    cut = jax.jit(segments, static_argnums=1)
    row, first, stop = map(np.asarray, cut(jnp.asarray(tiles, jnp.int32), workers))
    visited = [
        (int(r), tile) for r, a, b in zip(row, first, stop) for tile in range(int(a), int(b))
    ]
    assert visited == [(r, tile) for r in range(4) for tile in range(tiles[r])]
    assert max(stop - first) <= -(-sum(tiles) // workers)


# --- declared cost ---


def shapes(*pairs):
    return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in pairs]


@pytest.mark.parametrize("program", KERNELS)
def test_declared_cost_is_the_grids(program):
    options = {"implementation": f"pallas_{program}", "interpret": True, "tile": 128}
    bf16, rows = jnp.bfloat16, 16 if program == "gpu" else 4  # padded to a tensor core's side
    q, lengths = ((B, 1, 32, 128), bf16), ((B,), jnp.int32)
    cache, packed = ((B, 1000, 8, 128), bf16), ((B, 1000, 8, 64), jnp.uint8)
    tiles = B * 8 * 8  # of 128 tokens, the last one not full

    declared = cost(partial(decode_attention, **options), *shapes(q, cache, cache, lengths))
    assert declared.flops == tiles * 128 * rows * 4 * 128
    # Both caches once (a TPU reads whole tiles), queries, outputs, log-sum-exps and lengths; on a
    # GPU, queries and float32 partial results of each segment.
    if program == "tpu":
        small = B * 32 * (128 * 2 * 2 + 4) + B * 8 * 4
        assert declared.bytes_ == 2 * B * 1024 * 8 * 128 * 2 + small
    else:
        count = tiles + B * 8 - 1  # as many workers as there are tiles
        assert declared.bytes_ == 2 * B * 1000 * 8 * 128 * 2 + count * 16 * (128 * (2 + 4) + 4)

    def quantized(q, k, v, lengths, k_scale, v_scale):
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return quantized_decode_attention(q, k, v, lengths, **scales, **options)

    scales = ((B, 1, 8, 128), bf16), ((B, 1000, 8, 1), bf16)
    less = cost(quantized, *shapes(q, packed, packed, lengths, *scales))
    assert less.flops == declared.flops
    assert less.bytes_ < 0.5 * declared.bytes_

    places = {"head_start": (0, 512), "head_capacity": (512, 128)}
    flat = ((B, 640, 128), bf16)
    attend = partial(flat_decode_attention, **places, **options)
    part = cost(attend, *shapes(((B, 1, 8, 128), bf16), flat, flat, lengths))
    assert part.flops == B * 5 * 128 * rows * 4 * 128


def test_low_rank_cost_counts_the_rebuilt_keys():
    options = {"implementation": "pallas_tpu", "interpret": True, "tile": 128}
    f32 = jnp.float32

    def attend(q, features, basis, v, lengths, frequencies):
        return low_rank_decode_attention(
            q, features, basis, v, lengths, frequencies=frequencies, **options
        )

    operands = shapes(
        ((B, 1, 8, 64), f32),
        ((B, 256, 96), f32),
        ((96, 512), f32),
        ((B, 256, 8, 64), f32),
        ((B,), jnp.int32),
        ((32,), f32),
    )
    assert cost(attend, *operands).flops == B * 256 * 8 * (2 * 96 * 64 + 4 * 64)


# --- errors ---


def call(function=decode_attention, **changes):
    q, k, v = plain(tokens=16)
    operands = {"q": q, "k": k, "v": v, "lengths": jnp.array([1, 2])} | changes
    return function(**operands)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jnp.ones((B, 9, 4, 16))}, "block_sparse_attention"),
        ({"q": jnp.ones((B, 1, 5, 16))}, "multiple of the key heads; got H = 5 and K = 2"),
        ({"q": jnp.ones((B, 1, 4, 16), jnp.int8)}, "float32, bfloat16 or float16"),
        ({"q": jnp.ones((B, 1, 4, 17))}, r"k must be \[2, any, any, 17\]"),
        ({"k": jnp.ones((B, 16, 2, 16), jnp.bfloat16)}, "k must have q's dtype float32"),
        ({"v": jnp.ones((B, 15, 2, 16))}, r"v must be \[2, 16, 2, any\]"),
        ({"lengths": jnp.ones((B, 3), jnp.int32)}, r"shape \(2,\) .* or \(2, 2\)"),
        ({"lengths": jnp.ones((B,))}, "lengths must be integers"),
        ({"tile": 0}, "tile must be at least 1"),
        ({"splits": 0}, "splits must be at least 1"),
        ({"k": jnp.ones((B, 0, 2, 16)), "v": jnp.ones((B, 0, 2, 16))}, "has no tokens"),
    ],
)
def test_named_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        call(**changes)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (((0, 8), (9, 8)), "a stretch of at least one slot of its own"),
        (((0, 8), (8,)), "a stretch of at least one slot of its own"),
        (((0, 10), (8, 8)), "within the cache's 16 slots"),
    ],
)
def test_named_errors_of_flat_caches(places, message):
    x = jnp.ones((B, 16, 16))
    flat = {"k": x, "v": x, "head_start": places[0], "head_capacity": places[1]}
    with pytest.raises(ValueError, match=message):
        call(flat_decode_attention, **flat)
    with pytest.raises(ValueError, match="need both k_scale and v_scale"):
        call(flat_decode_attention, **flat | {"k_scale": jnp.ones((B, 16, 1))})
    with pytest.raises(ValueError, match="one query token"):
        call(flat_decode_attention, **flat | {"q": jnp.ones((B, 2, 4, 16))})


def test_named_errors_of_quantized_and_low_rank_caches():
    x = jnp.ones((B, 16, 2, 16), jnp.int8)
    good = {"k": x, "v": x, "k_scale": jnp.ones((B, 4, 2, 16)), "v_scale": jnp.ones((B, 16, 2, 1))}
    bad = {
        "int8 values, or uint8": {"k": x.astype(jnp.int32)},
        "do not divide": {"k_scale": jnp.ones((B, 3, 2, 16))},
        "v_scale must be": {"v_scale": jnp.ones((B, 16, 2))},
        r"k_offset must be float\[2, 16, 2, 1\]": {
            "k_scale": jnp.ones((B, 16, 2, 1)),
            "k_offset": jnp.ones((B, 16, 2, 16)),
        },
        "multiple or a divisor of the 4": {"tile": 6},
    }
    for message, changes in bad.items():
        with pytest.raises(ValueError, match=message):
            call(quantized_decode_attention, **good | changes)
    q, _, v = plain(tokens=16)
    attend = partial(low_rank_decode_attention, q, jnp.ones((B, 16, 5)))
    lengths, frequencies = jnp.array([1, 2]), jnp.ones(8)
    with pytest.raises(ValueError, match="a multiple of the head dim 16"):
        attend(jnp.ones((5, 40)), v, lengths, frequencies=frequencies)
    with pytest.raises(ValueError, match=r"frequencies must be float\[8\]"):
        attend(jnp.ones((5, 32)), v, lengths, frequencies=jnp.ones(16))
    with pytest.raises(NotImplementedError, match="low-rank keys have no GPU kernel"):
        attend(
            jnp.ones((5, 32)),
            v,
            lengths,
            frequencies=frequencies,
            implementation="pallas_gpu",
        )


def test_named_programs_that_cannot_run():
    half = {x: jnp.ones((B, 1 if x == "q" else 16, 4, 16), jnp.float16) for x in "qkv"}
    with pytest.raises(NotImplementedError, match="no float16"):
        call(**half, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="power of two of at least 16"):
        call(tile=24, implementation="pallas_gpu")
    wide = {x: jnp.ones((B, 1 if x == "q" else 16, 4, 512)) for x in "qkv"}
    with pytest.raises(NotImplementedError, match="up to 256"):
        call(**wide, implementation="pallas_gpu")
    with pytest.raises(NotImplementedError, match="multiple of 128"):
        call(tile=8, implementation="pallas_tpu")
    large = shapes(((1, 1, 8, 128), "float32"), *[((1, 9000, 8, 128), "float32")] * 2)
    attend = partial(decode_attention, tile=9000, implementation="pallas_tpu")
    with pytest.raises(NotImplementedError, match="choose a smaller tile"):
        jax.eval_shape(attend, *large, *shapes(((1,), jnp.int32)))
    with pytest.raises(NotImplementedError, match="runs on tpu alone"):
        jax.jit(partial(call, implementation="pallas_tpu")).lower()


# --- compilers ---


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", DECODE)
def test_compiles_for_tpu_without_copying_the_cache(case, compile_for_tpu):
    function, operands = DECODE[case]
    program = compile_for_tpu(jax.jit(partial(function, implementation="pallas_tpu")), *operands)
    memory = program.memory_analysis()
    # Small arrays, and the scales of the values; odd shapes may be laid out anew.
    uneven = "uneven" in case
    limit = 1.0 if uneven else 0.06 if "int4" in case else 0.02
    assert memory.temp_size_in_bytes <= limit * memory.argument_size_in_bytes
    stored = sum(x.size * x.dtype.itemsize for x in operands)
    assert uneven or memory.argument_size_in_bytes < 1.1 * stored  # nothing padded


@pytest.mark.parametrize("case", [case for case in DECODE if "low-rank" not in case])
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = DECODE[case]
    program = jax.jit(partial(function, implementation="pallas_gpu"))
    assert "triton" in lower_for_gpu(program, *operands)
