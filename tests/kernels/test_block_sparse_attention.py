"""Block-sparse attention: every implementation against the reference."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from experiments.kernels.cases import ATTENTION
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import (
    EVERYTHING,
    Arrow,
    Band,
    Causal,
    Grouped,
    Levels,
    MultiDiagonal,
    Rule,
    SinkLocal,
    block_mask,
    from_map,
    top_blocks,
    with_rest,
)
from pallas_kernels.block_sparse_attention import block_sparse_attention, mosaic_gpu
from pallas_kernels.block_sparse_attention.steps import as_run, in_groups, runs

# The smallest blocks that each implementation takes.
BLOCKS = {"xla": (8, 16), "pallas_tpu": 128, "pallas_gpu": (16, 32)}
KERNELS = ("pallas_tpu", "pallas_gpu", "pallas_mosaic_gpu")

# bfloat16 keeps 8 bits: the rounding of the weights and the output each cost one part in 256.
TOLERANCE = {
    jnp.float32: {"atol": 5e-6, "rtol": 5e-6},
    jnp.float16: {"atol": 4e-3, "rtol": 3e-3},
    jnp.bfloat16: {"atol": 3e-2, "rtol": 2e-2},
}


def heads(queries, keys, *, query_heads=4, key_heads=2, width=8, value_width=8, dtype=jnp.float32):
    shapes = (
        (2, queries, query_heads, width),
        (2, keys, key_heads, width),
        (2, keys, key_heads, value_width),
    )
    noise = jax.random.split(jax.random.key(queries), 3)
    return [2 * jax.random.normal(key, shape).astype(dtype) for key, shape in zip(noise, shapes)]


def attend(implementation, mask, **options):
    interpret = implementation in KERNELS
    return jax.jit(
        partial(
            block_sparse_attention,
            mask=mask,
            implementation=implementation,
            interpret=interpret,
            return_lse=True,
            **options,
        )
    )


def assert_equals_reference(implementation, mask, operands, **options):
    expected = attend("reference", mask, **options)(*operands)
    found = attend(implementation, mask, **options)(*operands)
    assert [x.dtype for x in found] == [operands[2].dtype, jnp.float32]
    for a, b in zip(found, expected):
        chex.assert_trees_all_close(
            a.astype(jnp.float32), b.astype(jnp.float32), **TOLERANCE[operands[2].dtype.type]
        )
    return found


def test_reference_is_masked_softmax():
    q, k, v = heads(40, 50)
    rule = SinkLocal((3, 0, 7, 1), (12, 1, 60, 5))
    mask = block_mask(rule, 40, 50, block=(8, 16))
    seen = np.stack([rule.visible(*np.ogrid[:40, :50], 50, *row) for row in rule.parameters])
    assert seen.any(-1).all()
    out, lse = attend("reference", mask, scale=0.3)(q, k, v)
    expected = jax.nn.dot_product_attention(q, k, v, mask=seen[None], scale=0.3)
    chex.assert_trees_all_close(out, expected, **TOLERANCE[jnp.float32])
    logits = 0.3 * jnp.einsum("bshd,bthd->bhst", q, jnp.repeat(k, 2, 2))
    sums = jax.nn.logsumexp(jnp.where(seen, logits, -jnp.inf), -1).swapaxes(1, 2)
    chex.assert_trees_all_close(lse, sums, **TOLERANCE[jnp.float32])


@pytest.mark.parametrize("implementation", BLOCKS)
@pytest.mark.parametrize(
    "rule",
    [
        Band((3, 0, 40, 90)),
        SinkLocal((16, 0, 5, 64), (30, 1, 200, 7)),
        Arrow((20, 0, -1, 3), text=40, text_first=True),
        Levels((1, 4, 20, 75, 60)),
        MultiDiagonal((8, 60, 160), (8, (3, 0, 60, 9), (20, 160, 0, 5))),
        Levels((1, 4, 20, 75, 60), whole=False),
        Grouped(10, (1, 4, 20, 75, 60)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_rules(implementation, rule):
    # 160 tokens: neither a multiple of 128, nor one block.
    keys = sum(rule.sizes) if isinstance(rule, MultiDiagonal) else 160
    mask = block_mask(rule, 160, keys, block=BLOCKS[implementation])
    assert_equals_reference(implementation, mask, heads(160, keys))


@pytest.mark.parametrize("implementation", BLOCKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dtypes_and_lengths(implementation, dtype):
    # More keys than queries, values of another width than keys.
    mask = block_mask(Causal(33), 20, 150, block=BLOCKS[implementation])
    out, _ = assert_equals_reference(
        implementation, mask, heads(20, 150, value_width=24, dtype=dtype)
    )
    assert out.shape == (2, 20, 4, 24)


@pytest.mark.parametrize("implementation", BLOCKS)
@pytest.mark.parametrize("width", [64, 72, 80, 96, 128, 256])
def test_head_widths(implementation, width):
    mask = block_mask(Band(9), 40, block=BLOCKS[implementation])
    operands = heads(40, 40, width=width, query_heads=1, key_heads=1)
    assert_equals_reference(implementation, mask, [x.astype(jnp.bfloat16) for x in operands])


@pytest.mark.parametrize("implementation", BLOCKS)
def test_lists_at_run_time(implementation):
    size = BLOCKS[implementation]
    block_q, block_k = (size, size) if isinstance(size, int) else size
    queries, keys = 3 * block_q - 5, 4 * block_k - 3
    operands = heads(queries, keys)
    shape = (2, 4, 3, 4)
    scores = jax.random.normal(jax.random.key(1), shape)

    def run(implementation, scores, *operands):
        # The first row of blocks of the last head sees nothing at all.
        best = top_blocks(scores, 2, queries, keys, block=size)
        assert not best.static
        keep = scores > 0.3
        keep = keep.at[:, 3, 0].set(False)
        some = from_map(keep, queries, keys, block=size, width=4)
        return [attend(implementation, mask)(*operands) for mask in (best, some)]

    expected = run("reference", scores, *operands)
    found = jax.jit(partial(run, implementation))(scores, *operands)
    chex.assert_trees_all_close(found, expected, **TOLERANCE[jnp.float32])
    (out, lse) = found[1]
    rows = slice(0, block_q)
    assert not np.asarray(out[:, rows, 3]).any()
    assert np.isneginf(lse[:, rows, 3]).all()


@pytest.mark.parametrize("implementation", BLOCKS)
def test_segments(implementation):
    operands = heads(150, 150)
    # Two sequences packed in one row; the second row's last tokens are padding.
    numbers = jnp.stack([jnp.arange(150) // 70, jnp.where(jnp.arange(150) < 130, 0, -1)])
    mask = block_mask(Causal(), 150, block=BLOCKS[implementation])
    out, _ = assert_equals_reference(implementation, mask, operands, segments=(numbers, numbers))
    alone, _ = attend("reference", block_mask(Causal(), 70, block=8))(
        *(x[:1, :70] for x in operands)
    )
    chex.assert_trees_all_close(out[:1, :70], alone, **TOLERANCE[jnp.float32])


@pytest.mark.parametrize("implementation", BLOCKS)
def test_segments_cut_whole_blocks(implementation):
    # 128 tokens: whole blocks of every implementation, which no rule cuts.
    operands = heads(128, 128)
    numbers = jnp.arange(128)[None].repeat(2, 0) // 50
    for mask in (EVERYTHING, block_mask(EVERYTHING, 128, block=BLOCKS[implementation])):
        assert_equals_reference(implementation, mask, operands, segments=(numbers, numbers))


@pytest.mark.parametrize("implementation", BLOCKS)
def test_rules_that_differ_by_row(implementation):
    """Each row by numbers of its own is what it is under a rule with these numbers."""
    operands = heads(150, 150)
    widest = SinkLocal((16, 4, 16, 8), (100, 30, 150, 40), granularity=10)
    rows = [widest, SinkLocal((16, 0, 9, 8), (20, 30, 60, 10), granularity=10)]
    by_row = jnp.stack([jnp.asarray(rule.parameters) for rule in rows])
    mask = block_mask(widest, 150, block=BLOCKS[implementation])
    found = assert_equals_reference(implementation, mask, operands, by_row=by_row)
    for row, rule in enumerate(rows):
        own = [x[row : row + 1] for x in operands]
        alone = attend("reference", block_mask(rule, 150, block=8))(*own)
        for a, b in zip(found, alone, strict=True):
            chex.assert_trees_all_close(a[row], b[0], **TOLERANCE[jnp.float32])


def test_gradients_by_row():
    operands = heads(32, 32)
    rows = [SinkLocal(2, 20), SinkLocal(1, 5)]
    by_row = jnp.stack([jnp.broadcast_to(rule.parameters, (4, 2)) for rule in rows])
    seen = np.stack([rule.visible(*np.ogrid[:32, :32], 32, *rule.parameters[0]) for rule in rows])

    def loss(attend, *operands):
        return jnp.sum(jnp.sin(attend(*operands)))

    packed = partial(block_sparse_attention, mask=rows[0], by_row=by_row)
    plain = partial(jax.nn.dot_product_attention, mask=seen[:, None])
    found, expected = jax.jit(
        lambda *x: [jax.grad(partial(loss, f), (0, 1, 2))(*x) for f in (packed, plain)]
    )(*operands)
    chex.assert_trees_all_close(found, expected, atol=2e-4, rtol=2e-4)


def test_gradients_with_segments():
    operands = heads(32, 32)
    numbers = jnp.arange(32)[None].repeat(2, 0) // 10

    def loss(attend, *operands):
        return jnp.sum(jnp.sin(attend(*operands)))

    packed = partial(block_sparse_attention, mask=EVERYTHING, segments=(numbers, numbers))
    same = numbers[0][:, None] == numbers[0]
    plain = partial(jax.nn.dot_product_attention, mask=same[None, None])
    found, expected = jax.jit(
        lambda *x: [jax.grad(partial(loss, f), (0, 1, 2))(*x) for f in (packed, plain)]
    )(*operands)
    chex.assert_trees_all_close(found, expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("rule", [Band((3, 9)), Causal(4), EVERYTHING])
def test_gradients(rule):
    operands = heads(33, 37 if rule == Causal(4) else 33, query_heads=2)
    mask = block_mask(rule, 33, operands[1].shape[1], block=(8, 16))

    def loss(attend, *operands):
        out, lse = attend(*operands)
        return jnp.sum(jnp.sin(3 * out)) + jnp.sum(jnp.cos(lse))

    def plain(q, k, v):
        seen = np.broadcast_to(
            np.stack(
                [
                    rule.visible(*np.ogrid[:33, : k.shape[1]], k.shape[1], *p)
                    for p in rule.parameters
                ]
            ),
            (2, 33, k.shape[1]),
        )
        logits = jnp.einsum("bshd,btd->bhst", q, k[:, :, 0]) * 8**-0.5
        logits = jnp.where(seen, logits, -jnp.inf)
        out = jnp.einsum("bhst,btd->bshd", jax.nn.softmax(logits), v[:, :, 0])
        return out, jax.nn.logsumexp(logits, -1).swapaxes(1, 2)

    operands = [operands[0], *(x[:, :, :1] for x in operands[1:])]
    expected = jax.grad(partial(loss, plain), (0, 1, 2))(*operands)
    found = jax.jit(jax.grad(partial(loss, attend("xla", mask)), (0, 1, 2)))(*operands)
    chex.assert_trees_all_close(found, expected, atol=2e-4, rtol=2e-4)


def test_gradients_with_lists_from_scores_of_the_operands():
    def loss(q, k, v):
        pooled = q.reshape(2, 3, 8, 2, 8).mean(2), k.reshape(2, 3, 8, 2, 8).mean(2)
        scores = jnp.einsum("bmhd,bnhd->bhmn", *pooled)
        mask = top_blocks(scores, 2, 24, block=8)
        return jnp.sum(block_sparse_attention(q, k, v, mask) ** 2)

    operands = heads(24, 24, query_heads=2)
    assert all(np.isfinite(g).all() for g in jax.jit(jax.grad(loss, (0, 1, 2)))(*operands))


HOPPER = "pallas_mosaic_gpu"


@pytest.mark.parametrize(
    ("rule", "queries", "keys", "block", "options"),
    [
        (Band((3, 40)), 150, 150, 64, {}),
        (SinkLocal((16, 5), (30, 200), 8), 150, 150, 128, {"key_heads": 1}),
        # The first head is not computed, its rows see nothing.
        (Arrow((0, 20), text=40), 100, 100, 64, {}),
        (Levels((1, 4, 20, 60)), 85, 85, (128, 64), {"width": 128}),
        (MultiDiagonal((1, 20, 64), (1, (3, 20), (9, 0))), 64, 85, 64, {}),
        (Causal(70), 30, 150, (64, 128), {"width": 72, "value_width": 24, "dtype": jnp.float16}),
        (EVERYTHING, 64, 380, 64, {"query_heads": 1, "key_heads": 1}),  # buffers are filled thrice
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Rule) else None,
)
def test_hopper(rule, queries, keys, block, options, capsys):
    """Interpret mode follows warpgroups, copies and barriers, and says where they race."""
    sizes = {"query_heads": 2, "width": 64, "value_width": 64, "dtype": jnp.bfloat16} | options
    operands = [x[:1] for x in heads(queries, keys, **sizes)]
    assert_equals_reference(HOPPER, block_mask(rule, queries, keys, block=block), operands)
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_hopper_takes_any_scale():
    operands = [x[:1] for x in heads(64, 130, query_heads=2, width=64, dtype=jnp.bfloat16)]
    for scale in (-0.1, 0.0):
        found, expected = (
            attend(name, block_mask(Band(40), 64, 130, block=64), scale=scale)(*operands)[0]
            for name in (HOPPER, "reference")
        )
        found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
        chex.assert_trees_all_close(found, expected, **TOLERANCE[jnp.bfloat16])


def test_hopper_with_lists_at_run_time():
    operands = [x[:1] for x in heads(190, 250, query_heads=2, width=64, dtype=jnp.bfloat16)]
    scores = jax.random.normal(jax.random.key(1), (1, 2, 3, 4))

    @partial(jax.jit, static_argnums=0)
    def run(implementation, scores, *operands):
        mask = top_blocks(scores, 3, 190, 250, block=64)
        return attend(implementation, mask)(*operands)

    found, expected = (run(name, scores, *operands)[0] for name in (HOPPER, "reference"))
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    chex.assert_trees_all_close(found, expected, **TOLERANCE[jnp.bfloat16])


@pytest.mark.parametrize("case", sorted(set(ATTENTION) - {"segments", "sinks and local by row"}))
def test_lowers_for_hopper(lower_for_gpu, case):
    function, operands = ATTENTION[case]
    named = partial(function, implementation=HOPPER)
    assert "mosaic_gpu" in lower_for_gpu(jax.jit(named), *operands)


@pytest.mark.parametrize(
    ("rule", "block"),
    [
        (Band((100, 9)), 64),
        (Causal(), (64, 128)),
        (SinkLocal((64, 3), (100, 70), 64), (128, 64)),
        (Arrow((0, 9), text=77), 64),
        (Levels((1, 4, 20, 75, 300)), (128, 64)),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_all_rules_lower_for_hopper(lower_for_gpu, rule, block, dtype):
    x = jax.ShapeDtypeStruct((3, 1, 400, 2, 80), dtype)
    mask = block_mask(rule, 400, block=block)
    run = jax.vmap(partial(block_sparse_attention, mask=mask, implementation=HOPPER))
    assert "mosaic_gpu" in lower_for_gpu(jax.jit(run), x, x, x)


def test_hopper_declares_its_cost_also_under_vmap():
    x = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    stacked = jax.ShapeDtypeStruct((3, *x.shape), x.dtype)
    run = partial(block_sparse_attention, mask=Band(128), implementation=HOPPER)
    listed = block_mask(Band(128), 1024, block=64).flops(2, 4, head_dim=64)
    counted = cost(run, x, x, x, platform="cuda")
    triton = cost(partial(run, implementation="pallas_gpu"), x, x, x, platform="cuda")
    assert counted == triton
    assert counted.flops == listed
    batched = cost(jax.vmap(run), *[stacked] * 3, platform="cuda")
    assert batched.flops == 3 * listed


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        ({}, Band(3), "must be bfloat16 or float16, got float32"),
        ({"dtype": jnp.bfloat16}, block_mask(Band(3), 20, block=32), "64 or 128 tokens, got 32"),
        ({"dtype": jnp.bfloat16, "width": 136}, Band(3), "at most 128 wide, got 136 and 8"),
        (
            {"dtype": jnp.bfloat16},
            with_rest(Band(3), 20, 20, block=64),
            "no second result over all keys; use 'pallas_gpu' or 'xla'",
        ),
    ],
)
def test_what_hopper_refuses(options, mask, message):
    with pytest.raises(NotImplementedError, match=message):
        block_sparse_attention(*heads(20, 20, **options), mask, implementation=HOPPER)
    numbers = jnp.zeros((2, 20), jnp.int32)
    operands = heads(20, 20, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="it has no segments; use 'pallas_gpu'"):
        block_sparse_attention(
            *operands, Band(3), segments=(numbers, numbers), implementation=HOPPER
        )
    by_row = jnp.ones((2, 4, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="its rules are the same in all rows"):
        block_sparse_attention(*operands, Band(3), by_row=by_row, implementation=HOPPER)


@pytest.mark.parametrize(
    ("kind", "dtype", "kernel"),
    [
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, "mosaic_gpu"),
        ("NVIDIA GH200 480GB", jnp.bfloat16, "mosaic_gpu"),
        ("NVIDIA H100 80GB HBM3", jnp.float32, "triton"),  # what Hopper's kernel refuses
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, "triton"),
    ],
)
def test_hopper_has_its_own_kernel(lower_for_gpu, kind, dtype, kernel):
    x = jax.ShapeDtypeStruct((1, 128, 2, 64), dtype)
    run = partial(block_sparse_attention, mask=Band(20))
    assert kernel in lower_for_gpu(jax.jit(run), x, x, x, kind=kind)


def test_hopper_refuses_other_gpus(monkeypatch):
    monkeypatch.setattr(mosaic_gpu, "_capability", lambda: "8.0")
    operands = heads(20, 20, width=64, dtype=jnp.bfloat16)
    with pytest.raises(NotImplementedError, match=r"9.0 \(Hopper\), this one has 8.0; use"):
        block_sparse_attention(*operands, Band(5), implementation=HOPPER)


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_transforms(implementation):
    q, k, v = heads(20, 20)
    attend = partial(block_sparse_attention, mask=Band(4), implementation=implementation)
    stacked = jax.vmap(attend)(*(jnp.stack([x, 2 * x]) for x in (q, k, v)))
    chex.assert_trees_all_close(stacked[1], attend(2 * q, 2 * k, 2 * v), atol=1e-6)
    assert jax.jit(attend)(q, k, v).shape == q.shape


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_dense_attention_by_kernels(implementation):
    operands = heads(140, 140)
    out = dense_attention(*operands, implementation=implementation, interpret=True)
    expected = jax.nn.dot_product_attention(*operands)
    chex.assert_trees_all_close(out, expected, **TOLERANCE[jnp.float32])


@pytest.mark.parametrize(
    ("platform", "of_band", "of_dense"),
    [("cpu", (64, 32), (256, 128)), ("tpu", 128, (512, 1024)), ("cuda", 64, 64)],
)
def test_cost_is_that_of_the_visited_blocks(platform, of_band, of_dense):
    x = jax.ShapeDtypeStruct((2, 1024, 4, 64), jnp.bfloat16)
    for rule, block in ((Band(128), of_band), (EVERYTHING, of_dense)):
        counted = cost(partial(block_sparse_attention, mask=rule), *(x, x, x), platform=platform)
        pairs = 2 * 4 * block_mask(rule, 1024).seen
        assert counted.useful_flops == 4 * 64 * pairs
        listed = block_mask(rule, 1024, block=block)
        assert counted.flops == listed.flops(2, 4, head_dim=64)
        dense = cost(dense_attention, *(x, x, x), platform=platform)
        assert counted.flops / dense.flops == pytest.approx(listed.density)


def test_lists_that_heads_share_are_runs():
    mask = block_mask(Causal(), 300, block=16)
    for group in in_groups(mask, 1, 1):
        steps = as_run(group, 19).steps
        assert as_run(group, 19).run
        assert steps.blocks.max() < 19
        assert (np.diff(steps.blocks) == 1).all()
        for step in range(len(steps.block)):
            listed = steps.blocks[step, steps.skip[step] :][: steps.count[step]]
            assert np.array_equal(listed, np.arange(steps.block[step] + 1))
    assert runs(mask) == [slice(0, min(16 * m, 300)) for m in range(1, 20)]
    scattered = from_map(np.eye(4, dtype=bool) | np.eye(4, k=2, dtype=bool), 64, block=16)
    assert runs(scattered) is None
    assert not any(
        as_run(group, 4).run for group in in_groups(scattered, 1, 1) if group.steps.count[0] > 1
    )
    assert runs(block_mask(Band((3, 40)), 64, block=16)) is None


def test_declared_cost_with_padded_heads():
    x = jax.ShapeDtypeStruct((1, 300, 2, 72), jnp.float32)
    mask = block_mask(Band(10), 300, block=64)
    run = partial(block_sparse_attention, mask=mask, implementation="pallas_gpu")
    counted = cost(run, x, x, x, platform="cuda")
    assert counted.flops == 2 * mask.visited * 64 * 64 * 4 * 128
    assert counted.useful_flops == 2 * mask.seen * 4 * 72


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", ATTENTION)
def test_compiles_for_tpus(compile_for_tpu, case):
    function, operands = ATTENTION[case]
    # Without a name, the TPU's program is the kernel.
    assert "tpu_custom_call" in compile_for_tpu(jax.jit(function), *operands).as_text()


@pytest.mark.aot_tpu
def test_gradients_compile_for_tpus(compile_for_tpu):
    def loss(q, k, v):
        return jnp.sum(block_sparse_attention(q, k, v, Band(256)).astype(jnp.float32))

    x = jax.ShapeDtypeStruct((1, 4096, 8, 64), jnp.bfloat16)
    program = compile_for_tpu(jax.jit(jax.grad(loss, (0, 1, 2))), x, x, x)
    assert "tpu_custom_call" in program.as_text()


@pytest.mark.parametrize("case", ATTENTION)
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = ATTENTION[case]
    assert "triton" in lower_for_gpu(jax.jit(function), *operands)


def test_refusals_are_named():
    q, k, v = heads(20, 20)
    small = block_mask(Band(3), 20, block=8)

    def run(implementation, operands=(q, k, v), mask=small, **options):
        return block_sparse_attention(*operands, mask, implementation=implementation, **options)

    with pytest.raises(NotImplementedError, match="multiples of 128 tokens, got 8 x 8"):
        run("pallas_tpu")
    with pytest.raises(NotImplementedError, match="powers of two of at least 16, got 8"):
        run("pallas_gpu")
    with pytest.raises(NotImplementedError, match="the kernel has no float16"):
        run("pallas_tpu", [x.astype(jnp.float16) for x in (q, k, v)], Band(3))
    wide = heads(20, 20, width=300)
    with pytest.raises(NotImplementedError, match="at most 256 wide"):
        run("pallas_gpu", wide, Band(3))
    with pytest.raises(NotImplementedError, match="'pallas_tpu' runs on tpu alone"):
        jax.jit(lambda *x: run("pallas_tpu", x, Band(3)))(q, k, v)
    with pytest.raises(ValueError, match="interpret mode needs a named kernel"):
        run(None, interpret=True)
    large = block_mask(Band(3), 20, block=1024)
    with pytest.raises(NotImplementedError, match="at most 524288 to fit in fast memory"):
        run("pallas_tpu", mask=large)
    with pytest.raises(NotImplementedError, match="bytes of shared memory"):
        run("pallas_gpu", heads(20, 20, width=256), Band(3))
    lists = from_map(np.ones((512, 512), bool), 65536, block=128, rule=Band(1 << 16))
    long = jnp.zeros((1, 65536, 1, 8))
    with pytest.raises(NotImplementedError, match="do not fit in scalar memory"):
        run("pallas_tpu", (long, long, long), lists)
    # What a kernel refuses, another program does when none is named.
    assert run(None).shape == q.shape


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 8, 4), (2, 8, 2, 8), (2, 8, 2, 8)), "must be .batch, tokens, heads, width."),
        (((2, 8, 4, 8), (1, 8, 2, 8), (1, 8, 2, 8)), "must agree in batch"),
        (((2, 8, 4, 8), (2, 8, 2, 8), (2, 9, 2, 8)), "must agree in batch"),
        (((2, 8, 4, 8), (2, 8, 3, 8), (2, 8, 3, 8)), "multiple of key heads"),
        (((2, 0, 4, 8), (2, 8, 2, 8), (2, 8, 2, 8)), "at least one of everything"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*map(jnp.zeros, shapes), Band(2))


@pytest.mark.parametrize("other", range(3))
def test_dtypes_that_do_not_fit(other):
    operands = heads(8, 8)
    operands[other] = operands[other].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="must have one dtype of float32"):
        block_sparse_attention(*operands, Band(2))
    with pytest.raises(ValueError, match="must have one dtype of float32"):
        block_sparse_attention(*(jnp.ones((1, 8, 2, 4), jnp.int32) for _ in range(3)), Band(2))


def test_masks_that_do_not_fit():
    operands = heads(8, 8)
    with pytest.raises(ValueError, match="a rule for 2 heads, the arrays have 4"):
        block_sparse_attention(*operands, Band((3, 9)))
    with pytest.raises(ValueError, match="made for 9 queries"):
        block_sparse_attention(*operands, block_mask(Band(3), 9))


def test_segments_that_do_not_fit():
    q, k, v = heads(8, 8)
    wrong = jnp.zeros((2, 9), jnp.int32)
    with pytest.raises(ValueError, match="one number for every query and key"):
        block_sparse_attention(q, k, v, Band(2), segments=(wrong, wrong))
    with pytest.raises(
        ValueError, match=r"parameters of the rule\], \[2, 4, 1\]; got int32\[2, 9\]"
    ):
        block_sparse_attention(q, k, v, Band(2), by_row=wrong)
