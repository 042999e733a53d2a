"""Convolutions of values: what they stand for, at borders too, what they cost and refuse."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.cost import cost, weight_bytes
from effjax.forward import abstract, flatten_params
from effjax.layers.convolution import Conv2d, convolve
from effjax.methods.quantization import round_to_nearest
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.quant import Activations, QTensor, Quantizer, Rotation, qconv, qdot, quantize_matrix

KERNEL = jax.random.normal(jax.random.key(0), (3, 3, 5, 7)) + 0.1
IMAGES = (
    jax.random.normal(jax.random.key(1), (2, 8, 9, 5)) * jnp.array([1.0, 4.0])[:, None, None, None]
)
IMAGE = Activations()
STATIC = Activations(Quantizer(8, symmetric=False), dynamic=False)
RANGE = (jnp.float32(-14.0), jnp.float32(20.0))
WINDOWS = {
    "same": (1, ((1, 1), (1, 1))),
    "halves": (2, ((0, 1), (0, 1))),
    "none": (1, ((0, 0), (0, 0))),
    "uneven": (2, ((2, 0), (1, 3))),
}
CASES = {
    "W8A8 by image": {"activations": IMAGE},
    "W8A8 asymmetric by image": {
        "quantizer": Quantizer(8, symmetric=False),
        "activations": IMAGE,
    },
    "W8A8 static": {"activations": STATIC, "input_range": RANGE},
    "W4A8 static, asymmetric": {
        "quantizer": Quantizer(4, symmetric=False),
        "activations": STATIC,
        "input_range": RANGE,
    },
    "W8A16": {},
    "W4A16 asymmetric": {"quantizer": Quantizer(4, symmetric=False)},
}


def correlate(x, kernel, stride, padding):
    """The definition, in float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    x = np.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = kernel.shape[:2]
    windows = np.lib.stride_tricks.sliding_window_view(x, (rows, columns), axis=(1, 2))
    return np.einsum("byxirs,rsio->byxo", windows[:, ::stride, ::stride], kernel)


def stands_for(x, leaf):
    """Images as their quantized values say them, by the formulas of the quantizers."""
    how = leaf.activations
    if how is None:
        return np.asarray(x, np.float64)
    if how.dynamic:
        scale = np.abs(x).max((1, 2, 3), keepdims=True) / 127
        return np.clip(np.round(x / scale), -128, 127) * np.asarray(scale, np.float64)
    scale, zero = np.float32(leaf.input_scale), int(leaf.input_zero_point)
    qvalues = np.clip(np.round(x / scale) + zero, -128, 127)
    return (qvalues - zero) * np.float64(scale)


@pytest.mark.parametrize("case", CASES)
def test_quantized_values_are_convolved_as_what_they_stand_for(case):
    leaf = quantize_matrix(KERNEL, **CASES[case])
    values, kernel = stands_for(np.asarray(IMAGES), leaf), leaf.restore()

    @jax.jit
    def every(x, w):
        return {
            (name, path): qconv(x, w, stride=stride, padding=padding, path=path)
            for name, (stride, padding) in WINDOWS.items()
            for path in ("integer", "reference")
        }

    for (name, path), found in every(IMAGES, leaf).items():
        assert found.dtype == IMAGES.dtype
        expected = correlate(values, kernel, *WINDOWS[name])
        atol = 1e-4 * np.abs(expected).max()
        np.testing.assert_allclose(found, expected, atol=atol, err_msg=f"{name} {path}")
        exact = correlate(IMAGES, KERNEL, *WINDOWS[name])
        error = np.linalg.norm(found - exact) / np.linalg.norm(exact)
        assert error < (0.2 if leaf.bits == 4 else 0.04 if "static" in case else 0.02)


def test_integers_are_exact_at_borders():
    """Scales are powers of two and zero is not the code 0: not one bit may differ."""
    rng = np.random.default_rng(0)
    kernel = jnp.asarray(rng.integers(-100, 101, (3, 3, 4, 6)), jnp.float32)
    kernel = kernel.at[0, 0, 0].set(-55.0).at[0, 0, 1].set(200.0)  # -55 ... 200: scale 1
    kernel = jnp.clip(kernel, -55, 200)
    images = jnp.asarray(rng.integers(-10, 246, (2, 6, 5, 4)), jnp.float32)
    span = (jnp.float32(-10.0), jnp.float32(245.0))
    leaf = quantize_matrix(
        kernel, Quantizer(8, symmetric=False), activations=STATIC, input_range=span
    )
    assert (leaf.scale == 1).all()
    assert (leaf.input_scale, leaf.input_zero_point) == (1, 10 - 128)
    chex.assert_trees_all_equal(leaf.restore(), kernel)
    for stride, padding in WINDOWS.values():
        found = convolve(images, leaf, stride=stride, padding=padding)
        np.testing.assert_array_equal(found, correlate(images, kernel, stride, padding))


def test_each_image_has_its_own_range():
    leaf = quantize_matrix(KERNEL, activations=IMAGE)
    options = {"stride": 1, "padding": WINDOWS["same"][1]}
    both = qconv(IMAGES, leaf, **options)
    chex.assert_trees_all_equal(both[:1], qconv(IMAGES[:1], leaf, **options))
    factors = jnp.array([1.0, 2.0])[:, None, None, None]
    chex.assert_trees_all_equal(both * factors, qconv(IMAGES * factors, leaf, **options))


def test_products_are_of_integers():
    leaf = quantize_matrix(KERNEL, Quantizer(8, symmetric=False), activations=IMAGE)
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (IMAGES, leaf))

    def run(x, w):
        return convolve(x, w, stride=1, padding=((1, 1), (1, 1)))

    text = jax.jit(run).lower(*shapes).as_text()
    [line] = [line for line in text.splitlines() if "stablehlo.convolution" in line]
    assert line.count("xi8>") == 2
    assert line.endswith("xi32>")
    assert cost(run, *shapes).flops == 2 * 2 * 8 * 9 * 9 * 5 * 7


def test_bfloat16_and_float16_images():
    for dtype in (jnp.bfloat16, jnp.float16):
        for case in ("W8A8 by image", "W4A16 asymmetric", "W8A8 static"):
            leaf = quantize_matrix(KERNEL, **CASES[case])
            x = IMAGES.astype(dtype)
            found = convolve(x, leaf, stride=1, padding=((1, 1), (1, 1)))
            assert found.dtype == dtype
            expected = qconv(
                x.astype(jnp.float32), leaf, stride=1, padding=((1, 1), (1, 1)), path="reference"
            )
            error = jnp.linalg.norm(found.astype(jnp.float32) - expected)
            assert error < 0.005 * jnp.linalg.norm(expected)


def test_gradients_are_straight_through():
    leaf = quantize_matrix(KERNEL, Quantizer(8, symmetric=False), activations=IMAGE)

    def loss(x, kernel):
        return jnp.sum(
            jnp.sin(jnp.arange(7.0)) * convolve(x, kernel, stride=2, padding=((0, 1),) * 2)
        )

    found = jax.grad(loss)(IMAGES, leaf)
    chex.assert_trees_all_close(found, jax.grad(loss)(IMAGES, leaf.restore()), atol=1e-5)


def test_bytes_are_logical():
    leaf = quantize_matrix(KERNEL, Quantizer(4, symmetric=False))
    assert leaf.shape == KERNEL.shape
    assert leaf.logical_bytes == 3 * 3 * 5 * 7 // 2 + 1 + 2 * 4 * 7
    eight = quantize_matrix(KERNEL, **CASES["W8A8 static"])
    assert eight.logical_bytes == 3 * 3 * 5 * 7 + 4 * 7 + 2 * 4 + 4 * 7  # scales, range, sums
    assert not eight.packed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 9}, r"\[3, 3, 5, 7\], has one scale for each output"),
        ({"smoothing_scale": jnp.ones(5)}, "leave out group_size, order, smoothing scale"),
        ({"rotation": Rotation(4)}, "leave out group_size, order, smoothing scale"),
        (
            {
                "activations": Activations(
                    Quantizer(8, symmetric=False, keeps_zero=False), dynamic=False
                ),
                "input_range": RANGE,
            },
            "padded with zeros: keep keeps_zero=True",
        ),
    ],
)
def test_options_that_do_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        quantize_matrix(KERNEL, **change)


def test_convolutions_that_there_are_not():
    leaf = quantize_matrix(KERNEL)
    options = {"stride": 1, "padding": ((0, 0), (0, 0))}
    with pytest.raises(ValueError, match=r"\[2, 8, 9, 4\] do not fit a kernel \[3, 3, 5, 7\]"):
        qconv(IMAGES[..., :4], leaf, **options)
    with pytest.raises(ValueError, match=r"do not fit a kernel \[5, 7\]"):
        qconv(IMAGES, quantize_matrix(KERNEL[0, 0]), **options)
    with pytest.raises(ValueError, match=r"do not fit a matrix \[3, 3, 5, 7\]"):
        qdot(jnp.ones((2, 3)), leaf)
    with pytest.raises(ValueError, match="made of a matrix, not of a kernel"):
        leaf.to_qwix()
    wide = jax.eval_shape(quantize_matrix, jax.ShapeDtypeStruct((3, 3, 8192, 1), jnp.float32))
    with pytest.raises(ValueError, match=r"sums of 73728 products .* can exceed int32"):
        jax.eval_shape(
            lambda x, w: qconv(x, w, **options),
            jax.ShapeDtypeStruct((1, 3, 3, 8192), jnp.float32),
            wide,
        )


@pytest.fixture(scope="module")
def autoencoder():
    config = AutoencoderKLConfig(
        block_out_channels=(8, 16), layers_per_block=1, norm_groups=4, latent_channels=4
    )
    forward, shapes = abstract(AutoencoderKL, config)
    return forward, testing.random_params(shapes)


def test_round_to_nearest_quantized_values_convolutions(autoencoder, tmp_path):
    forward, params = autoencoder
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    run = jax.jit(lambda forward, params: forward(params, {}, latents)[0])
    dense = run(forward, params)
    rule = (r"decoder\..*conv.*", 8, 8)
    plan = round_to_nearest.RoundToNearestPlan((rule,))
    static = round_to_nearest.calibrate(plan, forward, params, [(latents,)])
    errors = {}
    for name, each in {"image": plan, "static": static}.items():
        quantized = round_to_nearest.transform(each)(forward, params)
        errors[name] = float(jnp.linalg.norm(run(*quantized) - dense) / jnp.linalg.norm(dense))
    assert 0 < errors["image"] < 0.05, errors
    assert 0 < errors["static"] < 0.1, errors

    leaves = {
        path: leaf
        for path, leaf in flatten_params(quantized[1]).items()
        if isinstance(leaf, QTensor)
    }
    kernels = [target.path for target in forward.target_modules(params, Conv2d)]
    assert leaves
    assert {path.removesuffix(".kernel") for path in leaves} <= set(kernels)
    saved = sum(3 * math.prod(leaf.shape) - 12 * leaf.shape[-1] - 8 for leaf in leaves.values())
    # Scales, zero points and sums of each output, and the range of the images.
    assert weight_bytes(params) - weight_bytes(quantized[1]) == saved

    effjax.save(tmp_path / "small", *quantized)
    again = effjax.load(tmp_path / "small", progress=False)
    assert again[0] == quantized[0]
    chex.assert_trees_all_equal(again[1], quantized[1])
    chex.assert_trees_all_equal(run(*again), run(*quantized))


@pytest.mark.aot_tpu
def test_integer_convolutions_compile_for_tpus(compile_for_tpu):
    shape = jax.ShapeDtypeStruct
    leaf = jax.eval_shape(
        lambda w: quantize_matrix(w, Quantizer(8, symmetric=False), activations=IMAGE),
        shape((3, 3, 320, 320), jnp.float32),
    )
    run = jax.jit(lambda x, w: convolve(x, w, stride=1, padding=((1, 1), (1, 1))))
    text = compile_for_tpu(run, shape((2, 64, 64, 320), jnp.bfloat16), leaf).as_text()
    assert " s32[" in next(line for line in text.splitlines() if " convolution(" in line)
