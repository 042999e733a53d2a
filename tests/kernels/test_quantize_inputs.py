"""Values of inputs: every program against the specification, costs, errors, compilation."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.cost import cost
from effjax.quant import hadamard
from experiments.kernels.cases import CODES
from pallas_kernels.quantize_inputs import quantize_inputs, xla
from pallas_kernels.quantize_inputs.factors import join, joined_orders
from pallas_kernels.quantize_inputs.tpu import split

PROGRAMS = {
    "xla": {"implementation": "xla"},
    "pallas_tpu": {"implementation": "pallas_tpu", "interpret": True},
    "pallas_gpu": {"implementation": "pallas_gpu", "interpret": True},
}
struct = jax.ShapeDtypeStruct


def matrices(orders):
    return tuple(jnp.asarray(hadamard(n) * np.float32(n**-0.5)) for n in orders)


def operands_of(shape, dtype=jnp.float32, orders=(), modulated=False, smoothed=False, seed=0):
    rng = np.random.default_rng(seed)
    width = shape[-1]
    operands = {"x": jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype)}
    if modulated:
        pair = rng.normal(size=(2, shape[0], width))
        operands["modulation"] = tuple(
            jnp.asarray(each, jnp.float32).astype(dtype) for each in pair
        )
    if smoothed:
        operands["smoothing_scale"] = jnp.asarray(rng.uniform(0.5, 2, width), jnp.float32)
    if orders:
        operands["signs"] = jnp.asarray(rng.choice([-1, 1], width), jnp.float32)
        operands["factors"] = matrices(orders)
    return operands


def apart(found, expected):
    """How many quantized values lie between, at most, and the share that differs."""
    distance = np.abs(np.asarray(found, int) - np.asarray(expected, int))
    return distance.max(), (distance > 0).mean()


def run_all(operands, programs=tuple(PROGRAMS), **options):
    """Results of several programs, and the reference's, by one compilation."""

    @jax.jit
    def every(operands):
        outs = {name: quantize_inputs(**operands, **options, **PROGRAMS[name]) for name in programs}
        return outs, quantize_inputs(**operands, **options, implementation="reference")

    return every(operands)


@pytest.mark.parametrize("implementation", ["reference", *PROGRAMS])
def test_formulas(implementation):
    x = jnp.array([[7.0, 0.5, 1.5, -2.5], [0, 0, 0, 0], [1e-9, -2e-9, 0, 1e-9]])
    options = PROGRAMS.get(implementation, {"implementation": implementation})
    qvalues, scale, sums = quantize_inputs(x, bits=4, **options)
    # Halves go to even; a row of zeros has scale 1, one of tiny numbers its own.
    np.testing.assert_array_equal(qvalues, [[7, 0, 2, -2], [0] * 4, [4, -7, 0, 4]])
    np.testing.assert_allclose(scale[:, 0], [1, 1, 2e-9 / 7], rtol=1e-6)
    np.testing.assert_array_equal(sums[:, 0], [7, 0, 1])
    assert (qvalues.dtype, scale.dtype, sums.dtype) == (jnp.int8, jnp.float32, jnp.int32)


def test_what_is_coded_is_the_modulated_masked_rotated_row():
    operands = operands_of((2, 3, 144), orders=(12, 12), modulated=True, smoothed=True)
    qvalues, scale, _ = quantize_inputs(**operands, implementation="reference")
    shift, gain = operands["modulation"]
    y = operands["x"] * (1 + gain[:, None]) + shift[:, None]
    y = y * operands["smoothing_scale"] * operands["signs"]
    y = np.asarray(y, np.float64) @ np.kron(*operands["factors"])
    assert np.abs(np.asarray(qvalues, int) * np.asarray(scale) - y).max() <= 0.5001 * scale.max()
    np.testing.assert_allclose(scale[..., 0], np.abs(y).max(-1) / 127, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "bits", "modulated", "smoothed"),
    [
        ((2, 5, 100), jnp.float32, 8, False, True),
        ((3, 33, 64), jnp.bfloat16, 4, False, False),
        ((2, 150, 128), jnp.bfloat16, 8, True, False),  # two tiles of tokens, the last uneven
        ((2, 2, 3, 40), jnp.float32, 2, True, True),
        ((7,), jnp.float32, 6, False, False),
    ],
)
def test_unrotated_rows(shape, dtype, bits, modulated, smoothed):
    operands = operands_of(shape, dtype, modulated=modulated, smoothed=smoothed)
    outs, expected = run_all(operands, bits=bits)
    for name, out in outs.items():
        assert out.qvalues.shape == shape
        assert out.scale.shape == out.sums.shape == (*shape[:-1], 1)
        most, share = apart(out.qvalues, expected.qvalues)
        np.testing.assert_allclose(out.scale, expected.scale, rtol=1e-6)
        # x (1 + scale) + shift may be one rounding or two, and so may x / (max / n) be.
        allowed = (1, 1e-3) if modulated or name == "pallas_gpu" else (0, 0)
        assert most <= allowed[0], name
        assert share <= allowed[1], name
        assert np.array_equal(out.sums, np.asarray(out.qvalues, int).sum(-1, keepdims=True))


@pytest.mark.parametrize(
    ("shape", "orders", "dtype", "bits", "modulated", "smoothed", "programs"),
    [
        ((2, 5, 128), (128,), jnp.float32, 8, True, True, tuple(PROGRAMS)),
        ((1, 130, 384), (128,), jnp.bfloat16, 4, False, True, tuple(PROGRAMS)),  # three blocks
        ((3, 1024), (8, 128), jnp.float32, 8, False, False, tuple(PROGRAMS)),
        ((2, 3, 1152), (12, 12, 8), jnp.bfloat16, 8, True, True, tuple(PROGRAMS)),
        ((2, 3, 1152), (8, 144), jnp.float32, 8, False, True, ("xla", "pallas_tpu")),
        ((5, 4608), (32, 144), jnp.bfloat16, 6, False, True, ("xla", "pallas_tpu")),
        ((3, 48), (12,), jnp.float32, 8, False, False, ("xla", "pallas_gpu")),
    ],
)
def test_rotated_rows_are_near(shape, orders, dtype, bits, modulated, smoothed, programs):
    operands = operands_of(shape, dtype, orders, modulated, smoothed)
    outs, expected = run_all(operands, programs, bits=bits)
    for name, (qvalues, scale, sums) in outs.items():
        most, share = apart(qvalues, expected.qvalues)
        assert most <= 1, name
        assert share < 1e-3, name
        np.testing.assert_allclose(scale, expected.scale, rtol=1e-5)
        assert np.array_equal(sums, np.asarray(qvalues, int).sum(-1, keepdims=True))


def test_vmap_over_layers():
    layers = [operands_of((4, 256), orders=(2, 128), smoothed=True, seed=seed) for seed in range(2)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    for options in PROGRAMS.values():
        every = jax.jit(jax.vmap(lambda o, options=options: quantize_inputs(**o, **options)))(
            stacked
        )
        for index, each in enumerate(layers):
            most, share = apart(every.qvalues[index], quantize_inputs(**each).qvalues)
            assert most <= 1
            assert share < 1e-3


def test_the_tpu_kernel_joins_factors():
    for orders, sizes in {
        (8, 144): (8, 144),
        (12, 12, 8): (12, 96),
        (32, 144): (32, 144),
        (148, 128): (148, 128),
        (12, 8, 128): (96, 128),
        (128,): (None, 128),
    }.items():
        outer, inner = split(matrices(orders))
        assert tuple(None if m is None else m.shape[0] for m in (outer, inner)) == sizes
        whole = inner if outer is None else jnp.kron(outer, inner)
        if whole.shape[0] <= 1152:
            np.testing.assert_allclose(whole, reduce(jnp.kron, matrices(orders)), atol=1e-6)


def test_neighbors_are_joined_where_that_costs_least():
    orders = (4, 4, 32)
    factors = matrices(orders)
    for cost_of, sizes in {
        xla.factor_cost: (16, 32),
        (lambda orders: len(orders)): (512,),
        (lambda orders: sum(orders)): (4, 4, 32),
        (lambda orders: abs(orders[-1] - 128)): (4, 128),
    }.items():
        joined = join(factors, cost_of)
        assert tuple(factor.shape[0] for factor in joined) == sizes
        assert joined_orders(orders, cost_of) == sizes
        np.testing.assert_allclose(reduce(jnp.kron, joined), reduce(jnp.kron, factors), atol=1e-6)
    assert join((), xla.factor_cost) == ()


def test_declared_cost():
    operands = operands_of((2, 150, 1152), jnp.bfloat16, (12, 12, 8), True, True)
    shapes = jax.tree.map(lambda a: struct(a.shape, a.dtype), operands)
    width = 1152

    def counted(program):
        return cost(lambda o: quantize_inputs(**o, **PROGRAMS[program]), shapes)

    beside = 2 * 2 * 2 * width + 4 * width  # modulation, smoothing scale with signs

    def moved(rows, matrices):
        return 3 * rows * width + 8 * rows + beside + 4 * matrices

    assert counted("xla").flops == 2 * 300 * width * (12 + 12 + 8)
    # Tiles of 128 tokens; the factors are joined into matrices of 12 and 96.
    assert counted("pallas_tpu").flops == 2 * 2 * 256 * width * (12 + 96)
    assert counted("pallas_tpu").bytes_ == moved(300, 12**2 + 96**2)
    # Every axis of a row is padded to 16.
    assert counted("pallas_gpu").flops == 2 * 300 * 16**3 * 3 * 16
    assert counted("pallas_gpu").bytes_ == moved(300, 3 * 16**2)


X = jnp.ones((2, 3, 128))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 9}, "quantized values have 2 ... 8 bits, got bits=9"),
        ({"x": X.astype(jnp.float16)}, "x must be float32 or bfloat16"),
        (
            {"smoothing_scale": jnp.ones(64)},
            r"smoothing_scale must be float32\[128\], got float32\[64\]",
        ),
        ({"signs": jnp.ones(128, jnp.int8)}, r"signs must be float32\[128\], got int8"),
        ({"modulation": (jnp.ones((2, 128)), jnp.ones((1, 128)))}, r"scale must be .* \[2, 128\]"),
        ({"factors": (jnp.ones((4, 2)),)}, "factors must be square and float32"),
        ({"factors": (jnp.ones((12, 12)),)}, r"orders \(12,\) must have a product that divides"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        quantize_inputs(**{"x": X} | options)


@pytest.mark.parametrize(
    ("shape", "orders", "kernel", "message"),
    [
        ((3, 144), (12, 12), "pallas_tpu", "multiple of 128 channels, got 144"),
        ((3, 384), (12,), "pallas_tpu", r"multiple of 8, got orders \(12,\)"),
        ((1, 32768), (), "pallas_tpu", "fit VMEM up to 21845 channels"),
        ((3, 1152), (8, 144), "pallas_gpu", r"orders up to 128 fit shared memory, got \(8, 144\)"),
        ((1, 32768), (), "pallas_gpu", "registers hold 16384"),
        ((0, 128), (), "pallas_tpu", "there are no rows"),
    ],
)
def test_kernels_refuse_by_name(shape, orders, kernel, message):
    operands = operands_of(shape, orders=orders)
    with pytest.raises(NotImplementedError, match=f"{kernel}': .*{message}"):
        quantize_inputs(**operands, implementation=kernel, interpret=True)
    # Without a name the other program runs.
    assert quantize_inputs(**operands).qvalues.shape == shape


def test_kernels_of_other_platforms():
    with pytest.raises(NotImplementedError, match="pallas_tpu' runs on tpu alone"):
        quantize_inputs(X, implementation="pallas_tpu")


@pytest.mark.aot_tpu
@pytest.mark.parametrize("case", CODES)
def test_compiles_for_tpus(case, compile_for_tpu):
    function, operands = CODES[case]
    assert "tpu_custom_call" in compile_for_tpu(jax.jit(function), *operands).as_text()


@pytest.mark.aot_tpu
@pytest.mark.parametrize("tokens", [4096, 300])
@pytest.mark.parametrize("orders", [(8, 144), (32, 144)])
def test_large_factors_compile_for_tpus(orders, tokens, compile_for_tpu):
    width = int(np.prod(orders))
    operands = jax.eval_shape(partial(operands_of, (1, tokens, width), jnp.bfloat16, (), True))
    operands |= {"factors": tuple(struct((n, n), jnp.float32) for n in orders)}
    named = jax.jit(lambda o: quantize_inputs(**o, implementation="pallas_tpu"))
    assert "tpu_custom_call" in compile_for_tpu(named, operands).as_text()


@pytest.mark.parametrize("case", CODES)
def test_lowers_for_gpus(lower_for_gpu, case):
    function, operands = CODES[case]
    assert "triton" in lower_for_gpu(jax.jit(function), *operands)
