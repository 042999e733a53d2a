"""Layers of float8 values, read and written, against arithmetic of numpy and ml_dtypes."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import converters
import effjax
from converters import quantized
from effjax import cost, parallel, testing
from effjax.forward import abstract, flatten_params
from effjax.models.dit import DiT, DiTConfig
from effjax.quant import Activations, Quantizer, qdot, quantize_matrix, restore
from tests.converters.formats import KERNELS, LAYERS, WI, compressed, shapes_of, write

E4M3 = ml_dtypes.float8_e4m3fn
FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [40, 48]}
GPTQMODEL = {
    "quant_method": "fp8",
    "format": "float8_e4m3fn",
    "weight_scale_method": "row",
    "weight_block_size": None,
    "weight_scale_semantics": "inverse",
}


class Matrix:
    """Random float8 values [O, I] and a scale for each block of outputs and inputs."""

    def __init__(self, shape, block, seed=0):
        rng = np.random.default_rng(seed)
        outputs, inputs = shape
        high, wide = block[0] or outputs, block[1] or inputs
        self.qvalues = rng.standard_normal(shape).astype(E4M3)
        self.scales = rng.uniform(0.01, 0.1, (-(-outputs // high), -(-inputs // wide)))
        self.scales = self.scales.astype(np.float32)
        self.every = np.zeros(shape, np.float32)
        for row in range(outputs):
            for column in range(inputs):
                self.every[row, column] = self.scales[row // high, column // wide]

    def value(self):
        return self.qvalues.astype(np.float32) * self.every


def matrices(block):
    shapes = shapes_of(LAYERS).values()
    return {k: Matrix(shape, block, n) for n, (k, shape) in enumerate(zip(LAYERS, shapes))}


def fp8(held):
    return {k: {"weight": m.qvalues, "weight_scale_inv": m.scales} for k, m in held.items()}


@pytest.fixture(scope="module")
def blocks(t5, tmp_path_factory):
    """A model of ragged blocks, as transformers has them, and its matrices."""
    held = matrices((40, 48))
    directory = write(t5, tmp_path_factory.mktemp("fp8") / "q", FP8, fp8(held))
    return directory, held


def test_blocks_with_inputs_in_float8(blocks):
    directory, held = blocks
    params = flatten_params(converters.from_pretrained(directory)[1])
    x = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    for kernel, matrix in zip(KERNELS, held.values(), strict=True):
        leaf, value = params[kernel], matrix.value().T
        assert leaf.block == (48, min(40, value.shape[1]))
        assert leaf.activations == Activations(Quantizer(8, levels="e4m3"), group_size=48)
        np.testing.assert_array_equal(leaf.restore(), value)
        inputs = x[:, : value.shape[0]]
        quantized = np.concatenate(
            [
                (part / scale).astype(E4M3).astype(np.float32) * scale
                for part in np.split(inputs, [48], axis=1)
                for scale in [np.abs(part).max(1, keepdims=True) / np.float32(448)]
            ],
            axis=1,
        )
        for path in ("integer", "reference"):
            found = qdot(jnp.asarray(inputs), leaf, path=path)
            np.testing.assert_allclose(found, quantized @ value, atol=1e-4)


@pytest.mark.parametrize("kind", ["row", "tensor", "block"])
def test_scales_that_divide(t5, tmp_path, kind):
    """GPTQModel's `weight_scale_inv`; its inputs are floats."""
    block = {"row": (1, None), "tensor": (None, None), "block": (32, 16)}[kind]
    held = matrices(block)
    layers = fp8(held)
    for layer in layers.values():
        shape = {"row": (-1,), "tensor": ()}.get(kind, layer["weight_scale_inv"].shape)
        layer["weight_scale_inv"] = (1 / layer["weight_scale_inv"]).reshape(shape)
    config = GPTQMODEL | {"weight_scale_method": kind}
    config["weight_block_size"] = list(block) if kind == "block" else None
    params = flatten_params(
        converters.from_pretrained(write(t5, tmp_path / "q", config, layers))[1]
    )
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    for kernel, matrix in zip(KERNELS, held.values(), strict=True):
        np.testing.assert_allclose(params[kernel].restore(), matrix.value().T, rtol=3e-7)
        assert params[kernel].activations is None
    leaf, value = params[KERNELS[0]], held[WI].value().T
    np.testing.assert_allclose(qdot(jnp.asarray(x), leaf), x @ value, atol=1e-4)
    half = qdot(jnp.asarray(x, jnp.bfloat16), leaf)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half.astype(np.float32), x @ value, atol=0.1)


def test_leaves_are_saved_placed_and_counted(blocks, tmp_path):
    directory, held = blocks
    forward, params = converters.from_pretrained(directory)
    effjax.save(tmp_path / "saved", forward, params)
    again = effjax.load(tmp_path / "saved")
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)
    leaf = flatten_params(params)[KERNELS[0]]
    assert leaf.qvalue.dtype == E4M3
    grid = held[WI].scales.size
    assert leaf.logical_bytes == 64 * 96 + 4 * grid
    dense = cost.weight_bytes(restore(params, "float32"))
    quantized = sum(m.qvalues.size - 4 * m.qvalues.size + 4 * m.scales.size for m in held.values())
    assert cost.weight_bytes(params) == dense + quantized
    assert converters.describe(directory)["weight_bytes"] == dense + quantized
    mesh = Mesh(np.array(jax.devices()[:2]), ("d",))
    placed = jax.device_put(leaf, parallel.leaf_sharding(leaf, mesh, (None, "d")))
    assert placed.qvalue.sharding.spec == PartitionSpec(None, "d")
    assert placed.scale.sharding.is_fully_replicated  # three columns of scales
    x = jnp.ones((3, 64))
    np.testing.assert_allclose(qdot(x, placed), qdot(x, leaf), atol=1e-5)
    exported = jax.export.export(jax.jit(qdot))(x, leaf).serialize()
    np.testing.assert_array_equal(jax.export.deserialize(exported).call(x, leaf), qdot(x, leaf))
    with pytest.raises(ValueError, match="made of integer values"):
        leaf.to_qwix()


def test_gradients_pass_through_the_quantized_values():
    rng = np.random.default_rng(0)
    w, x = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((32, 8), (3, 32)))
    float8 = Quantizer(8, levels="e4m3")
    leaf = quantize_matrix(w, float8, group_size=16, activations=Activations(float8))
    scale = np.abs(np.asarray(w).reshape(2, 16, 8)).max(1) / np.float32(448)
    np.testing.assert_allclose(leaf.scale, scale, rtol=2e-7)
    qvalues = np.asarray(w) / np.asarray(leaf.scale).repeat(16, 0)
    qvalues = np.clip(qvalues, -448, 448).astype(E4M3)
    np.testing.assert_array_equal(leaf.qvalue.astype(np.float32), qvalues.astype(np.float32))
    gradient = jax.grad(lambda x: qdot(x, leaf).sum())(x)
    np.testing.assert_allclose(gradient, np.tile(leaf.restore().sum(1), (3, 1)), atol=1e-5)
    with pytest.raises(ValueError, match="both float8"):
        quantize_matrix(w, float8, activations=Activations())
    with pytest.raises(ValueError, match="symmetric and of 8 bits, got bits=4"):
        Quantizer(4, levels="e4m3")
    with pytest.raises(ValueError, match="not packed"):
        quantize_matrix(w, float8, packed=True)


@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 32), (40, 48)])
def test_leaves_are_written_as_compressed_tensors(t5, tmp_path, block):
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "tensor" if block[0] is None else "channel"}
    if block[1]:
        grouped = {"strategy": "group", "group_size": block[1]}
        square = {"strategy": "block", "block_structure": list(block)}
        weights |= grouped if block[0] == 1 else square
    inputs = {"num_bits": 8, "type": "float", "dynamic": True, "strategy": "token"}
    config = compressed("float-quantized", 8, inputs=inputs)
    config["config_groups"]["group_0"]["weights"] = weights
    held = matrices(block)
    layers = {k: {"weight": m.qvalues, "weight_scale": m.scales} for k, m in held.items()}
    if block == (None, None):
        layers = {k: v | {"weight_scale": v["weight_scale"].reshape(1)} for k, v in layers.items()}
    pair = converters.from_pretrained(write(t5, tmp_path / "q", config, layers))
    for kernel, matrix in zip(KERNELS, held.values(), strict=True):
        np.testing.assert_array_equal(flatten_params(pair[1])[kernel].restore(), matrix.value().T)
    converters.save_pretrained(*pair, tmp_path / "out", layout="transformers")
    chex.assert_trees_all_equal(converters.from_pretrained(tmp_path / "out")[1], pair[1])
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    group = said["config_groups"]["group_0"]
    assert group["weights"].items() >= weights.items()
    assert group["input_activations"].items() >= inputs.items()


def test_parts_of_one_layer(tmp_path):
    config = DiTConfig(
        sample_size=8, patch_size=2, num_layers=1, num_heads=2, head_dim=32, num_classes=5
    )
    forward, shapes = abstract(DiT, config)
    model = forward, testing.random_params(shapes)
    matrix = Matrix((192, 64), (32, 64))
    layers = {"blocks.0.attn.qkv": {"weight": matrix.qvalues, "weight_scale_inv": matrix.scales}}
    said = FP8 | {"weight_block_size": [32, 64]}
    pair = converters.from_pretrained(
        write(model, tmp_path / "no", said, layers, layout="original")
    )
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        leaf = pair[1]["blocks"]["0"]["attn"][name]["kernel"]
        np.testing.assert_array_equal(leaf.restore(), matrix.value()[64 * k : 64 * (k + 1)].T)
    converters.save_pretrained(*pair, tmp_path / "out", layout="original")
    chex.assert_trees_all_equal(converters.from_pretrained(tmp_path / "out")[1], pair[1])
    whole = {
        name: {"kernel": quantize_matrix(layer["kernel"].restore(), Quantizer(levels="e4m3"))}
        for name, layer in pair[1]["blocks"]["0"]["attn"].items()
        if name in ("to_q", "to_k", "to_v")
    }
    for name, layer in whole.items():  # one scale for each
        leaf = dataclasses.replace(layer["kernel"], block=(64, 64))
        leaf = dataclasses.replace(leaf, scale=leaf.scale[:, :1])
        pair[1]["blocks"]["0"]["attn"][name]["kernel"] = leaf
    converters.save_pretrained(*pair, tmp_path / "whole", layout="original")
    chex.assert_trees_all_equal(
        restore(converters.from_pretrained(tmp_path / "whole")[1], "float32"),
        restore(pair[1], "float32"),
    )
    matrix = Matrix((192, 64), (48, 64))
    layers = {"blocks.0.attn.qkv": {"weight": matrix.qvalues, "weight_scale_inv": matrix.scales}}
    said = FP8 | {"weight_block_size": [48, 64]}
    with pytest.raises(ValueError, match=r"qkv\.weight_scale_inv is of blocks of 48 outputs, wh"):
        converters.from_pretrained(
            write(model, tmp_path / "apart", said, layers, layout="original")
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FP8 | {"activation_scheme": "static"}, r"activation_scheme='static' \(only 'dynamic'\)"),
        (FP8 | {"scale_fmt": "ue8m0"}, "scale_fmt='ue8m0'"),
        (FP8 | {"fmt": "e5m2"}, "fmt='e5m2'"),
        (FP8 | {"weight_block_size": [128]}, r"weight_block_size=\[128\] \(only outputs and in"),
        (GPTQMODEL | {"weight_scale_semantics": "factor"}, r"'factor' \(only 'inverse'\)"),
        (GPTQMODEL | {"weight_scale_method": "block"}, r"'block' \(only 'row', 'tensor'\)"),
        (compressed("float-quantized", 8), r"weights\.type='int' \(only 'float'\)"),
    ],
)
def test_what_cannot_be_read_is_named(t5, tmp_path, config, message):
    with pytest.raises(ValueError, match=f"quantization_config.*{message}"):
        converters.from_pretrained(write(t5, tmp_path / "q", config, {}))


def test_bad_tensors_are_named(t5, tmp_path):
    layers = fp8(matrices((40, 48)))
    layers[WI]["weight"] = layers[WI]["weight"].astype(ml_dtypes.float8_e5m2)
    layers[LAYERS[1]]["weight_scale_inv"] = layers[LAYERS[1]]["weight_scale_inv"][:1]
    with pytest.raises(ValueError, match=r"\(2 problems\)") as error:
        converters.from_pretrained(write(t5, tmp_path / "q", FP8, layers))
    for fault in (
        "wi_0.weight: misshapen, is float8_e5m2[96, 64], must be float8_e4m3fn[96, 64]",
        "wo.weight_scale_inv: misshapen, is float32[1, 2], must be float32[2, 2]",
    ):
        assert fault in str(error.value)
    layers = fp8(matrices((40, 48)))
    layers[WI]["weight"][3, 4] = np.nan
    with pytest.raises(ValueError, match=r"wi_0\.weight: 1 of 6144 values are NaN or infinite"):
        converters.from_pretrained(write(t5, tmp_path / "nan", FP8, layers), check_finite=True)
    scheme = quantized.Scheme("fp8", 8, None, True, block=(48, 40))
    assert scheme.grid((64, 96)) == (2, 3)
