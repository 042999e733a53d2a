"""Quantized products: every program against the specification, costs, errors, compilation."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.compat import inner_jaxprs
from effjax.cost import cost
from experiments.kernels.cases import PRODUCTS
from pallas_kernels.packing import pack
from pallas_kernels.quantized_matmul import (
    dynamic_int8_matmul,
    gpu,
    int8_matmul,
    packed_matmul,
    quantize_per_token,
    tpu,
)

PROGRAMS = {
    "xla": {"implementation": "xla"},
    "pallas_tpu": {"implementation": "pallas_tpu", "interpret": True},
    "pallas_gpu": {"implementation": "pallas_gpu", "interpret": True},
}
KERNELS = ("pallas_tpu", "pallas_gpu")
# Quantized values are exact in every program; float32 sums of up to 1024 terms differ by their
# order alone.
CLOSE = 3e-6


struct = jax.ShapeDtypeStruct


def relative(out, expected):
    return float(jnp.abs(out - expected).max() / jnp.abs(expected).max())


@pytest.fixture
def small_tiles(monkeypatch):
    """Several tiles along each axis, and uneven edges, without large arrays."""
    for name, size in (("_ROWS", 128), ("_COLUMNS", 128), ("_INNER", 256)):
        monkeypatch.setattr(tpu, name, size)


def int8_operands(m, k, n, zero=True, seed=0):
    rng = np.random.default_rng(seed)
    operands = {
        "x_qvalues": jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8),
        "w_qvalues": jnp.asarray(rng.integers(-128, 128, (k, n)), jnp.int8),
        "x_scale": jnp.asarray(rng.uniform(0.01, 0.02, (m, 1)), jnp.float32),
        "w_scale": jnp.asarray(rng.uniform(0.01, 0.02, (n,)), jnp.float32),
    }
    if zero:
        operands["w_zero"] = jnp.asarray(rng.integers(-128, 128, (n,)), jnp.int32)
    return operands


def packed_operands(m, k, n, bits, group_size, dtype=jnp.float32, zero=True, seed=0):
    rng = np.random.default_rng(seed)
    half, groups = 2 ** (bits - 1), k // (group_size or k)
    qvalues = jnp.asarray(rng.integers(-half, half, (k, n)), jnp.int8)
    if dtype == jnp.int8:
        x = jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    else:
        x = jnp.asarray(rng.normal(size=(m, k)), jnp.float32).astype(dtype)
    operands = {
        "x": x,
        "planes": pack(qvalues, bits),
        "scale": jnp.asarray(rng.uniform(0.01, 0.02, (groups, n)), jnp.bfloat16),
    }
    if zero:
        operands["zero"] = jnp.asarray(rng.integers(-half, half, (groups, n)), jnp.int8)
    if dtype == jnp.int8:
        operands["x_scale"] = jnp.asarray(rng.uniform(0.01, 0.02, (m, 1)), jnp.float32)
    return operands


def shapes_of(operands):
    return jax.tree.map(lambda a: struct(a.shape, a.dtype), operands)


def run(function, operands, **options):
    return jax.jit(lambda operands: function(**operands, **options))(operands)


def run_all(function, operands, programs=tuple(PROGRAMS), **options):
    """Results of several programs, and the reference's, by one compilation."""

    @jax.jit
    def every(operands):
        outs = {name: function(**operands, **options, **PROGRAMS[name]) for name in programs}
        return outs, function(**operands, **options, implementation="reference")

    return every(operands)


@pytest.mark.parametrize(
    ("shape", "zero"), [((1, 256, 64), False), ((3, 100, 70), True), ((33, 384, 130), True)]
)
def test_int8_equals_reference_exactly(shape, zero):
    outs, expected = run_all(int8_matmul, int8_operands(*shape, zero))
    for out in outs.values():
        chex.assert_trees_all_equal(out, expected)


def test_int8_over_several_tiles(small_tiles):
    operands = int8_operands(130, 512, 130)
    outs, expected = run_all(int8_matmul, operands, KERNELS, out_dtype=jnp.bfloat16)
    for out in outs.values():
        assert out.dtype == jnp.bfloat16
        chex.assert_trees_all_equal(out, expected)


def test_many_rows_of_int8_on_a_gpu():
    outs, expected = run_all(int8_matmul, int8_operands(130, 200, 256), ("pallas_gpu",))
    chex.assert_trees_all_equal(outs["pallas_gpu"], expected)


# Weights are rounded to the dtype of floats; products of quantized values stay exact.
@pytest.mark.parametrize(
    ("dtype", "close"), [(jnp.float32, 1e-6), (jnp.bfloat16, 8e-3), (jnp.int8, CLOSE)]
)
def test_many_rows_of_packed_weights_on_a_gpu(dtype, close, monkeypatch):
    monkeypatch.setattr(gpu, "_MANY_FLOATS", 20)
    for bits, k, group_size in ((4, 256, 64), (3, 200, 200)):
        operands = packed_operands(20, k, 40, bits, group_size, dtype)
        options = {"bits": bits, "group_size": group_size}
        outs, expected = run_all(packed_matmul, operands, ("pallas_gpu",), **options)
        assert relative(outs["pallas_gpu"], expected) < close


def test_zero_points_are_added_to_quantized_values():
    operands = int8_operands(4, 64, 8)
    x = operands["x_qvalues"].astype(jnp.float32) * operands["x_scale"]
    weights = operands["w_qvalues"].astype(jnp.float32) + operands["w_zero"].astype(jnp.float32)
    expected = np.asarray(x) @ np.asarray(weights * operands["w_scale"])
    np.testing.assert_allclose(run(int8_matmul, operands), expected, rtol=1e-4, atol=1e-4)


def test_given_sums_are_used():
    operands = int8_operands(5, 64, 16)
    sums = jnp.sum(operands["x_qvalues"], axis=1, keepdims=True, dtype=jnp.int32)
    expected = int8_matmul(**operands, implementation="xla")
    given = int8_matmul(**operands, x_sums=sums, implementation="xla")
    chex.assert_trees_all_equal(given, expected)
    others, _ = run_all(int8_matmul, operands | {"x_sums": sums + 1}, ("xla", "pallas_tpu"))
    step = operands["x_scale"] * operands["w_scale"] * operands["w_zero"].astype(jnp.float32)
    for out in others.values():
        chex.assert_trees_all_close(out - expected, step, atol=0.01)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "dtype", "zero"),
    [
        ((1, 256, 64), 4, 128, jnp.bfloat16, True),
        ((5, 256, 130), 3, 128, jnp.bfloat16, True),
        ((3, 192, 70), 4, 64, jnp.int8, True),  # K fills no whole block
        ((2, 256, 40), 3, 256, jnp.float32, True),
        ((2, 160, 40), 2, 32, jnp.float32, False),
        ((9, 200, 64), 4, None, jnp.int8, False),  # as MBQ's W4A8
        ((3, 100, 64), 6, None, jnp.int8, True),
        ((3, 256, 64), 8, 128, jnp.bfloat16, True),
    ],
)
def test_packed_equals_reference(shape, bits, group_size, dtype, zero):
    operands = packed_operands(*shape, bits, group_size, dtype, zero)
    options = {"bits": bits, "group_size": group_size, "out_dtype": jnp.float32}
    outs, expected = run_all(packed_matmul, operands, **options)
    for name, out in outs.items():
        assert relative(out, expected) < CLOSE, name


@pytest.mark.parametrize("group_size", [None, 128])
def test_no_sum_is_fused_with_a_product_of_the_same_inputs(group_size):
    """XLA's CPU of jax 0.10 makes one library call of both, which may corrupt memory."""
    operands = packed_operands(6, 256, 48, 8, group_size)
    options = {"bits": 8, "group_size": group_size, "out_dtype": jnp.float32}
    run = partial(packed_matmul, **options, implementation="xla")
    lines = str(jax.make_jaxpr(run)(**operands)).splitlines()
    sums = [number for number, line in enumerate(lines) if "reduce_sum" in line]
    assert sums
    assert all("optimization_barrier" in lines[number - 1] for number in sums)


@pytest.mark.parametrize(
    ("bits", "group_size", "dtype"),
    [
        *itertools.product(range(2, 9), (32, 128, None), [jnp.float32]),
        *itertools.product((3, 4), (64, 256), [jnp.bfloat16, jnp.int8]),
    ],
)
def test_one_row_on_a_cpu(bits, group_size, dtype):
    rows = 768 if group_size else 700  # the last is padded to whole blocks
    operands = packed_operands(1, rows, 24, bits, group_size, dtype)
    options = {"bits": bits, "group_size": group_size, "out_dtype": jnp.float32}
    run = partial(packed_matmul, **options)
    out = jax.jit(partial(run, implementation="xla"))(**operands)
    assert relative(out, run(**operands, implementation="reference")) < CLOSE


def test_one_row_on_a_cpu_has_the_gradients_and_the_cost_of_the_product():
    x, *rest = packed_operands(1, 256, 24, 4, 64).values()
    names = ("planes", "scale", "zero")

    def run(x, implementation):
        operands = dict(zip(names, rest, strict=True))
        return jnp.sum(
            packed_matmul(x, bits=4, group_size=64, implementation=implementation, **operands)
        )

    gradients = [jax.grad(run)(x, each) for each in ("xla", "reference")]
    assert relative(*gradients) < CLOSE
    assert cost(partial(run, implementation="xla"), x, platform="cpu").flops == 2 * 256 * 24


@pytest.mark.parametrize(("bits", "group_size"), [(3, 128), (4, None)])
def test_packed_over_several_tiles(bits, group_size, small_tiles):
    operands = packed_operands(130, 512, 130, bits, group_size)
    outs, expected = run_all(packed_matmul, operands, KERNELS, bits=bits, group_size=group_size)
    for name, out in outs.items():
        assert relative(out, expected) < CLOSE, name


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "dtype", "zero"),
    [
        ((1, 256, 64), 2, 32, jnp.float32, True),
        ((1, 512, 130), 3, 64, jnp.float32, True),  # groups within a block, N in no whole tile
        ((4, 256, 64), 3, None, jnp.int8, True),
        ((1, 1152, 64), 4, 128, jnp.float32, True),  # two programs, of five and four steps
        ((3, 200, 300), 4, None, jnp.bfloat16, True),
        ((1, 512, 64), 5, 256, jnp.float32, False),
        ((1, 512, 64), 7, 128, jnp.float32, True),
        ((2, 256, 300), 8, 64, jnp.float32, True),
        ((1, 256, 512), 8, None, jnp.int8, False),
    ],
)
def test_few_rows_on_a_gpu(shape, bits, group_size, dtype, zero):
    operands = packed_operands(*shape, bits, group_size, dtype, zero)
    options = {"bits": bits, "group_size": group_size, "out_dtype": jnp.float32}
    jaxpr = str(
        jax.make_jaxpr(partial(packed_matmul, **options, **PROGRAMS["pallas_gpu"]))(**operands)
    )
    assert f"packed_matmul_{bits}bit_few_rows" in jaxpr
    outs, expected = run_all(packed_matmul, operands, ("pallas_gpu",), **options)
    assert relative(outs["pallas_gpu"], expected) < CLOSE


def test_gpu_splits_the_inner_axis():
    operands = packed_operands(5, 1024, 64, 4, 128, jnp.int8)
    options = {"bits": 4, "group_size": 128}
    by_gpu = partial(packed_matmul, **options, **PROGRAMS["pallas_gpu"])
    jaxpr = jax.make_jaxpr(lambda operands: by_gpu(**operands))(shapes_of(operands))
    assert "f32[2,16,64]" in str(jaxpr)
    outs, expected = run_all(packed_matmul, operands, ("pallas_gpu",), **options)
    assert relative(outs["pallas_gpu"], expected) < CLOSE


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.int8])
def test_result_dtype(dtype):
    operands = packed_operands(2, 128, 8, 4, 64, dtype)
    expected = jnp.float32 if dtype == jnp.int8 else dtype
    out = run(packed_matmul, operands, bits=4, group_size=64)
    assert out.dtype == expected
    exact = run(packed_matmul, operands, bits=4, group_size=64, out_dtype=jnp.float32)
    chex.assert_trees_all_equal(out, exact.astype(expected))  # rounded once, at the end


def test_one_group_of_int8_quantized_values_is_w8a8():
    operands = int8_operands(4, 256, 16)
    expected = int8_matmul(**operands)
    out = packed_matmul(
        operands["x_qvalues"],
        pack(operands["w_qvalues"], 8),
        bits=8,
        scale=operands["w_scale"][None],
        zero=operands["w_zero"][None],
        x_scale=operands["x_scale"],
    )
    assert relative(out, expected) < CLOSE


def test_group_quantizer_of_mbq():
    """Unsigned values with W = s (u - z), ranges not forced to contain zero."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0.3, 0.1, (256, 12)).astype(np.float32)
    weights[128:] += 2
    groups = weights.reshape(2, 128, 12)
    low, high = groups.min(1), groups.max(1)
    delta = np.maximum(high - low, 1e-5) / 7
    zero = np.clip(-np.round(low / delta), 0, 7)
    unsigned = np.clip(np.round(groups / delta[:, None]) + zero[:, None], 0, 7)
    dequantized = ((unsigned - zero[:, None]) * delta[:, None]).reshape(256, 12)
    x = rng.normal(size=(5, 256)).astype(np.float32)
    out = packed_matmul(
        jnp.asarray(x),
        pack(jnp.asarray(unsigned.reshape(256, 12) - 4, jnp.int8), 3),
        bits=3,
        group_size=128,
        scale=jnp.asarray(delta),
        zero=jnp.asarray(4 - zero, jnp.int8),
    )
    np.testing.assert_allclose(out, x @ dequantized, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)])
def test_leading_axes(leading):
    operands = packed_operands(int(np.prod(leading)), 128, 8, 4, 64)
    options = {"bits": 4, "group_size": 64}
    expected = run(packed_matmul, operands, **options)
    operands["x"] = operands["x"].reshape(*leading, 128)
    out = run(packed_matmul, operands, **options)
    chex.assert_trees_all_equal(out, expected.reshape(*leading, 8))
    x_scale = struct((*leading, 1), jnp.float32)
    qvalues = {"x_qvalues": struct((*leading, 64), jnp.int8), "x_scale": x_scale}
    operands = shapes_of(int8_operands(1, 64, 16)) | qvalues
    assert jax.eval_shape(lambda o: int8_matmul(**o), operands).shape == (*leading, 16)


def test_vmap_over_experts():
    operands = [packed_operands(2, 128, 64, 4, 64, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *operands)

    def experts(operands, **options):
        product = partial(packed_matmul, bits=4, group_size=64, **options)
        return jax.vmap(lambda each: product(**each))(operands)

    outs, _ = run_all(experts, {"operands": stacked})
    expected = jnp.stack([run(packed_matmul, each, bits=4, group_size=64) for each in operands])
    for name, out in outs.items():
        assert relative(out, expected) < CLOSE, name


def test_gradients_equal_those_of_the_reference():
    operands = packed_operands(3, 256, 64, 3, 128)
    weight = jax.random.normal(jax.random.key(0), (3, 64))
    floats = {"x": operands["x"], "scale": operands["scale"].astype(jnp.float32)}

    def loss(floats, **options):
        out = packed_matmul(**operands | floats, bits=3, group_size=128, **options)
        return jnp.sum(weight * out)

    def gradient(floats, **options):
        return jax.grad(partial(loss, **options))(floats)

    outs, expected = run_all(gradient, {"floats": floats})
    for name, out in outs.items():
        for leaf in floats:
            assert relative(out[leaf], expected[leaf]) < 1e-5, (name, leaf)


def test_gradients_of_scales():
    operands = int8_operands(3, 64, 8)

    def loss(x_scale, **options):
        return jnp.sum(int8_matmul(**operands | {"x_scale": x_scale}, **options) ** 2)

    gradient = jax.jit(jax.grad(partial(loss, **PROGRAMS["pallas_tpu"])))(operands["x_scale"])
    weights = operands["w_qvalues"].astype(jnp.int32) + operands["w_zero"]
    product = (operands["x_qvalues"].astype(jnp.int32) @ weights).astype(jnp.float32)
    product *= operands["w_scale"]
    expected = 2 * operands["x_scale"] * jnp.sum(product**2, axis=1, keepdims=True)
    assert relative(gradient, expected) < 1e-5


def test_quantize_per_token():
    x = jnp.asarray([[127.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1e-3, -2e-3, 0, 1e-3]])
    qvalues, scale = quantize_per_token(x)
    np.testing.assert_array_equal(qvalues, [[127, 0, 2, -2], [0] * 4, [64, -127, 0, 64]])
    np.testing.assert_allclose(scale[:, 0], np.array([127, 1e-5, 2e-3]) / 127, rtol=1e-6)
    qvalues, scale = quantize_per_token(x.astype(jnp.bfloat16), bits=4)
    assert qvalues.dtype == jnp.int8
    assert scale.dtype == jnp.float32
    assert abs(qvalues).max() == 7
    with pytest.raises(ValueError, match=r"2 ... 8 bits, got bits=9"):
        quantize_per_token(x, bits=9)


def test_dynamic_quantization_follows_the_float_product():
    x = jax.random.normal(jax.random.key(0), (4, 6, 256))
    operands = int8_operands(1, 256, 32)
    weights = {name: operands[name] for name in ("w_qvalues", "w_scale", "w_zero")}
    matrix = (weights["w_qvalues"].astype(jnp.int32) + weights["w_zero"]).astype(jnp.float32)
    expected = x @ (matrix * weights["w_scale"])
    operands = {"x": x} | weights
    errors = {
        bits: relative(run(dynamic_int8_matmul, operands, x_bits=bits), expected)
        for bits in (8, 6, 4)
    }
    assert errors[8] < 0.02
    assert 2 * errors[8] < errors[6] < errors[4] / 2  # four times the step each
    assert dynamic_int8_matmul(x.astype(jnp.bfloat16), **weights).dtype == jnp.bfloat16


def test_xla_never_holds_the_matrix():
    """Neither forward nor backward makes an array of K x N elements."""
    operands = packed_operands(2, 1024, 48, 4, 128)

    def loss(x):
        options = {"bits": 4, "group_size": 128, "implementation": "xla"}
        return jnp.sum(packed_matmul(**operands | {"x": x}, **options))

    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(variable.aval.size for variable in equation.outvars)
            for inner in inner_jaxprs(equation):
                walk(getattr(inner, "jaxpr", inner))

    walk(jax.make_jaxpr(jax.grad(loss))(operands["x"]).jaxpr)
    assert max(sizes) < 1024 * 48 / 4


def nbytes(*arrays):
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def test_declared_cost_of_packed_products():
    """Padded rows are computed, and every operand is moved once."""
    operands = packed_operands(5, 512, 192, 3, 128, jnp.bfloat16)
    weights = {name: operands[name] for name in ("planes", "scale", "zero")}
    assert nbytes(operands["planes"]) == 512 * 192 * 3 // 8

    def counted(program):
        options = {"bits": 3, "group_size": 128, **PROGRAMS[program]}
        return cost(lambda operands: packed_matmul(**operands, **options), shapes_of(operands))

    assert counted("xla").flops == 2 * 5 * 512 * 192
    assert counted("pallas_tpu").flops == 2 * 32 * 512 * 192
    assert counted("pallas_tpu").bytes_ == nbytes(weights) + 2 * 32 * (512 + 192)
    assert counted("pallas_gpu").flops == 2 * 16 * 512 * 192
    of_parts = 4 * 2 * 16 * 192  # K is split over two programs, whose sums are float32
    assert counted("pallas_gpu").bytes_ == nbytes(weights) + 2 * 16 * 512 + of_parts


def test_declared_cost_of_int8_products():
    operands = int8_operands(1000, 200, 600)

    def counted(program):
        options = {**PROGRAMS[program], "out_dtype": jnp.bfloat16}
        return cost(lambda operands: int8_matmul(**operands, **options), shapes_of(operands))

    assert counted("xla").flops == 2 * 1000 * 200 * 600
    # 2 x 2 tiles of 512 rows and 384 columns, K padded to 256; the GPU's have 128 and 64
    assert counted("pallas_tpu").flops == 2 * 1024 * 256 * 768
    columns = 4 * 600 + 4 * 600  # scales and zero points
    rows = 4 * 1000 + 4 * 1000  # scales and sums
    moved = 1000 * 256 + 256 * 600 + rows + columns + 2 * 1000 * 600
    assert counted("pallas_tpu").bytes_ == moved
    assert counted("pallas_gpu").flops == 2 * 1024 * 256 * 640


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"bits": 9}, "quantized values have .* bits, got bits=9"),
        ({}, {"bits": 3}, "3-bit values are packed as"),
        ({}, {"group_size": 48}, r"groups of 48 .* K = 192; group_size may be 32, 64, 192"),
        ({}, {"group_size": 128}, r"groups of 128 are not supported for K = 192"),
        ({}, {"group_size": 32}, r"scale must have shape \(6, 16\), got \(3, 16\)"),
        ({"x": jnp.zeros((2, 300))}, {}, "K = 300, whose 4-bit values fill 384 packed rows"),
        ({"x": jnp.zeros((2, 192), jnp.float16)}, {}, "x must be float32 or bfloat16 or int8"),
        ({"x": jnp.zeros((2, 192), jnp.int8)}, {}, "int8 activations need x_scale"),
        ({"x_scale": jnp.ones((2, 1))}, {}, "float ones take none"),
        ({"zero": jnp.zeros((3, 16))}, {}, "zero must be integers, got float32"),
        ({"zero": jnp.zeros((1, 16), jnp.int8)}, {}, r"zero must have shape \(3, 16\)"),
        ({"scale": jnp.zeros((3, 16), jnp.int8)}, {}, "scale must be float32 or bfloat16"),
        ({}, {"out_dtype": jnp.int8}, "out_dtype must be float32 or bfloat16"),
    ],
)
def test_errors_of_packed_matmul(change, options, message):
    operands = packed_operands(2, 192, 16, 4, 64) | change
    with pytest.raises(ValueError, match=message):
        packed_matmul(**operands, **{"bits": 4, "group_size": 64} | options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_qvalues": jnp.zeros((2, 64))}, "x_qvalues must be int8, got float32"),
        ({"x_qvalues": jnp.zeros((2, 63), jnp.int8)}, r"weights' K = 64 >= 1, got shape \(2, 63\)"),
        ({"w_qvalues": jnp.zeros((64,), jnp.int8)}, r"w_qvalues must be \[K, N\]"),
        ({"x_scale": jnp.ones((2,))}, r"x_scale must have shape \(2, 1\)"),
        ({"w_scale": jnp.ones((15,))}, r"w_scale must have shape \(16,\) or \(1, 16\)"),
        ({"w_scale": jnp.ones((16,), jnp.bfloat16)}, "w_scale must be float32"),
        ({"w_zero": jnp.zeros((16,))}, "w_zero must be integers"),
        ({"x_sums": jnp.zeros((2,), jnp.int32)}, r"x_sums must have shape \(2, 1\)"),
    ],
)
def test_errors_of_int8_matmul(change, message):
    with pytest.raises(ValueError, match=message):
        int8_matmul(**int8_operands(2, 64, 16) | change)


def test_sums_beyond_int32_are_refused():
    operands = jax.tree.map(lambda a: struct(a.shape, a.dtype), int8_operands(1, 2**17 + 1, 1))
    with pytest.raises(ValueError, match="can exceed int32; split K"):
        jax.eval_shape(lambda operands: int8_matmul(**operands), operands)


def test_kernels_of_other_platforms():
    operands = packed_operands(1, 128, 64, 4, 64)
    for name, platform in (("pallas_tpu", "tpu"), ("pallas_gpu", "cuda")):
        with pytest.raises(NotImplementedError, match=f"{name}' runs on {platform} alone"):
            packed_matmul(**operands, bits=4, group_size=64, implementation=name)
    empty = operands | {"x": jnp.zeros((0, 128))}
    with pytest.raises(NotImplementedError, match="without rows or columns"):
        packed_matmul(**empty, bits=4, group_size=64, **PROGRAMS["pallas_tpu"])


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", PRODUCTS)
def test_compiles_for_tpus(case, compile_for_tpu):
    function, operands = PRODUCTS[case]
    assert "tpu_custom_call" in compile_for_tpu(jax.jit(function), *operands).as_text()


@pytest.mark.parametrize("case", PRODUCTS)
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = PRODUCTS[case]
    assert "triton" in lower_for_gpu(jax.jit(function), *operands)
