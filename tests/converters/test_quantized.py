"""Quantized layers that are read, against writers that follow the formats."""

import json
import re
import tracemalloc
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import converters
import effjax
from converters import quantized
from effjax import testing
from effjax.forward import abstract, flatten_params
from effjax.methods import cskv, kivi
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan, transform
from effjax.models.dit import DiT, DiTConfig
from effjax.models.pixart import PixArt, PixArtConfig
from effjax.quant import Activations, QTensor, Quantizer, qdot, restore
from effjax.storage import Tensor
from tests.converters.conftest import assert_equal_params
from tests.converters.formats import (
    AWQ,
    CASES,
    KERNELS,
    LAYERS,
    TOKENS,
    WI,
    WO,
    Matrix,
    compressed,
    gptq,
    matrices,
    words,
    write,
)


@pytest.mark.parametrize("case", CASES)
def test_leaves_stand_for_what_the_format_says(t5, tmp_path, case):
    config, writer, settings = CASES[case]
    held = matrices(settings)
    directory = write(t5, tmp_path / "q", config, {k: writer(m) for k, m in held.items()})
    forward, params = converters.from_pretrained(directory)
    assert forward == t5[0]
    found, dense = flatten_params(params), flatten_params(t5[1])
    assert {name for name, leaf in found.items() if isinstance(leaf, QTensor)} == set(KERNELS)
    x = np.random.default_rng(3).standard_normal((5, 96)).astype(np.float32)
    for kernel, matrix in zip(KERNELS, held.values(), strict=True):
        leaf = found[kernel]
        assert (leaf.bits, leaf.shape) == (matrix.bits, dense[kernel].shape)
        assert (leaf.zero_point is None) == matrix.symmetric
        assert leaf.group_size == matrix.group
        np.testing.assert_array_equal(leaf.restore(), matrix.value().T)
        # Libraries multiply in float16, which rounds the same product once.
        half = matrix.value(np.float16).T
        np.testing.assert_array_equal(leaf.restore().astype(np.float16), half)
        inputs = jnp.asarray(x[:, : leaf.shape[0]])
        if leaf.activations is None:
            reference = qdot(inputs, leaf, path="reference")
            np.testing.assert_allclose(reference, inputs @ matrix.value().T, atol=1e-5)
        dense[kernel] = jnp.asarray(matrix.value().T)
    rest = {name: leaf for name, leaf in found.items() if name not in KERNELS}
    assert_equal_params(rest, {name: dense[name] for name in rest})


@pytest.mark.parametrize("case", ["gptq 4", "awq", "packed 8", "int8 tokens"])
def test_models_compute_what_the_dense_ones_do(t5, tmp_path, case):
    config, writer, settings = CASES[case]
    layers = {k: writer(m) for k, m in matrices(settings).items()}
    forward, params = converters.from_pretrained(write(t5, tmp_path / "q", config, layers))
    ids, mask = jnp.arange(9, dtype=jnp.int32)[None], jnp.ones((1, 9), bool)
    run = jax.jit(forward)
    found, _ = run(params, {}, ids, mask)
    expected, _ = run(restore(params, "float32"), {}, ids, mask)
    quantized = case == "int8 tokens"  # inputs are rounded too
    error = np.abs(found - expected)
    assert error.max() < 1e-4 or quantized
    assert quantized == (error.max() > 1e-4)
    assert np.linalg.norm(error) < 0.05 * np.linalg.norm(expected)


def test_inputs_by_token(t5, tmp_path):
    config, writer, settings = CASES["int8 tokens"]
    held = matrices(settings)
    directory = write(t5, tmp_path / "q", config, {k: writer(m) for k, m in held.items()})
    leaf = flatten_params(converters.from_pretrained(directory)[1])[KERNELS[0]]
    assert leaf.activations == Activations(Quantizer(8, levels="n+1/2"))
    assert not leaf.packed
    x = np.random.default_rng(3).standard_normal((5, 64)).astype(np.float32)
    x[:, 7] = 4  # above zero, for at -127.5 the last bit of a quotient decides
    step = np.abs(x).max(1, keepdims=True) / 127.5
    expected = np.clip(np.round(x / step), -128, 127) * step @ held[WI].value().T
    np.testing.assert_allclose(qdot(jnp.asarray(x), leaf), expected, atol=1e-5)


@pytest.mark.parametrize("method", ["gptq", "ordered", "awq"])
def test_a_layer_is_read_in_blocks(method):
    """Loading may take a tenth more than the arrays, and twice the largest tensor."""
    rng = np.random.default_rng(0)
    shapes = {"qweight": (4096, 64) if method == "awq" else (512, 512), "qzeros": (32, 64)}
    held = {k: rng.integers(-(2**31), 2**31, v).astype(np.int32) for k, v in shapes.items()}
    held["scales"] = np.ones((32, 512), np.float16)
    if method == "ordered":
        method, held["g_idx"] = "gptq", rng.permutation(np.arange(4096) // 128)
    tensors = {k: Tensor(v.shape, v.dtype, lambda v=v: v) for k, v in held.items()}
    layer = quantized.Layer("a", quantized.Scheme(method, 4, 128, False), tensors)
    layer.leaf((4096, 512))
    tracemalloc.start()
    leaf = layer.read((4096, 512))
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    arrays = sum(array.nbytes for array in jax.tree.leaves(leaf))
    assert most < 1.1 * arrays + 2 * held["qweight"].nbytes


def test_rules_for_single_layers(t5, tmp_path):
    """GPTQModel's `dynamic`: names begin with an expression, the first rule holds, "-:" first."""
    first, second, third = LAYERS
    held = {first: Matrix((96, 64), 8, 32, False, seed=1), second: Matrix((64, 96), 3, -1, True)}
    rules = {
        "+:encoder.block.0": {"bits": 8, "sym": False, "desc_act": True},
        r".*\.wo$": {"bits": 3, "group_size": -1},
        "encoder": {"bits": 2},
        rf"-:{third}$": {},
    }
    layers = {layer: matrix.gptq() for layer, matrix in held.items()}
    groups = layers[first]["g_idx"] = np.random.default_rng(5).permutation(np.arange(64) // 32)
    directory = write(t5, tmp_path / "q", gptq(4, dynamic=rules), layers)
    found = flatten_params(converters.from_pretrained(directory)[1])
    gate, down, query = (found[kernel] for kernel in KERNELS)
    scale, zero = (x[:, groups] for x in (held[first].scales, held[first].zeros))
    expected = scale.astype(np.float32) * (held[first].qvalues - zero)
    np.testing.assert_array_equal(gate.restore(), expected.T)
    assert (gate.bits, down.bits, down.group_size) == (8, 3, 96)
    np.testing.assert_array_equal(down.restore(), held[second].value().T)
    np.testing.assert_array_equal(query, flatten_params(t5[1])[KERNELS[2]])
    layers = {third: Matrix((64, 64), 4, 32, True).gptq()}
    with pytest.raises(
        ValueError, match=rf"quantized values of \['{third}'\], which no group or rule"
    ):
        converters.from_pretrained(write(t5, directory, gptq(4, dynamic=rules), layers))


def test_biases_of_layers_that_have_none(t5, tmp_path):
    """Some writers of GPTQ give every layer one: zeros change nothing."""
    held = matrices((4, 32, True))
    layers = {k: m.gptq() | {"bias": np.zeros(m.outputs, np.float16)} for k, m in held.items()}
    directory = write(t5, tmp_path / "q", gptq(4), layers)
    kernel = flatten_params(converters.from_pretrained(directory)[1])[KERNELS[0]]
    np.testing.assert_array_equal(kernel.restore(), held[WI].value().T)
    layers[WO]["bias"][3] = 1
    with pytest.raises(ValueError, match=rf"1 problems.*\n.*{WO}\.bias: unexpected, and not all"):
        converters.from_pretrained(write(t5, directory, gptq(4), layers))


def test_planes_are_of_whole_blocks():
    scheme = quantized.Scheme("gptq_p", 5, None, True)
    faults = quantized.Layer("a", scheme, {}).problems((96, 40))
    assert faults == [("a", "planes of 32 quantized values do not divide a layer [96, 40]")]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_zero_points_of_zero_in_the_first_version(t5, tmp_path, bits):
    """GPTQModel subtracts one from whole words of values that fit them, and from 3-bit values."""
    held = matrices((bits, 32, False), low=0)
    layers = {}
    for layer, matrix in held.items():
        matrix.zeros[:, 0] %= 2
        layers[layer] = matrix.gptq(version=2)
        if bits == 3:
            zeros = words((matrix.zeros.T - 1) % 8, 3)
        else:
            ones = sum(1 << low for low in range(0, 32, bits))
            zeros = (layers[layer]["qzeros"].view(np.uint32) - np.uint32(ones)).view(np.int32)
        layers[layer]["qzeros"] = zeros
    directory = write(t5, tmp_path / "q", gptq(bits, sym=False), layers)
    params = flatten_params(converters.from_pretrained(directory)[1])
    for kernel, matrix in zip(KERNELS, held.values(), strict=True):
        np.testing.assert_array_equal(params[kernel].restore(), matrix.value().T)


def test_three_bit_quantized_values_cross_words():
    """Three words hold 32 values as AutoGPTQ builds them: 10, 2 + 1 bits, 10, 1 + 2, 10."""
    qvalues = np.random.default_rng(0).integers(0, 8, 32)
    built = np.zeros(3, np.int64)
    for n in range(10):
        built[0] |= qvalues[n] << 3 * n
        built[1] |= qvalues[11 + n] << 3 * n + 1
        built[2] |= qvalues[22 + n] << 3 * n + 2
    built[0] |= (qvalues[10] & 3) << 30
    built[1] |= qvalues[10] >> 2 | (qvalues[21] & 1) << 31
    built[2] |= qvalues[21] >> 1
    held = {"qweight": built.astype(np.uint32).view(np.int32)[:, None]}
    scheme = quantized.Scheme("gptq", 3, None, False)
    places = np.random.default_rng(1).permutation(32)
    np.testing.assert_array_equal(scheme.qvalues(held, 1, places)[:, 0], qvalues[places] - 4)


@pytest.mark.parametrize(("bits", "kind"), [(3, "gptq"), (4, "gptq"), (4, "packed")])
def test_groups_of_inputs_that_stand_apart(t5, tmp_path, bits, kind):
    """GPTQ's desc_act, compressed-tensors' actorder: leaves take their inputs in another order."""
    held, layers = matrices((bits, 32, False)), {}
    rng = np.random.default_rng(5)
    groups = {k: rng.permutation(np.arange(m.inputs) // 32) for k, m in held.items()}
    for layer, matrix in held.items():
        name = "g_idx" if kind == "gptq" else "weight_g_idx"
        layers[layer] = getattr(matrix, kind)() | {name: groups[layer].astype(np.int32)}
    packed = compressed("pack-quantized", 4, 32, sym=False)
    packed["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    config = gptq(bits, sym=False, desc_act=True) if kind == "gptq" else packed
    forward, params = converters.from_pretrained(write(t5, tmp_path / "q", config, layers))
    found = flatten_params(params)
    assert all(found[kernel].perm is not None for kernel in KERNELS)
    for kernel, (layer, matrix) in zip(KERNELS, held.items(), strict=True):
        scale, zero = (
            x[:, groups[layer]] for x in (matrix.scales.astype(np.float32), matrix.zeros)
        )
        dense = (scale * (matrix.qvalues - zero)).T
        np.testing.assert_array_equal(found[kernel].restore(), dense)
        x = rng.standard_normal((5, matrix.inputs)).astype(np.float32)
        for path in ("integer", "reference"):
            np.testing.assert_allclose(
                qdot(jnp.asarray(x), found[kernel], path=path), x @ dense, atol=2e-5
            )
    # compressed-tensors has dropped such orders: what is written are the values.
    with pytest.warns(UserWarning, match=r"3 layers are written as float32.*effjax\.save keeps"):
        converters.save_pretrained(forward, params, tmp_path / "out", layout="transformers")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["config_groups"] == {}
    assert set(LAYERS) <= set(said["ignore"])
    again = flatten_params(converters.from_pretrained(tmp_path / "out")[1])
    for kernel in KERNELS:
        np.testing.assert_array_equal(again[kernel], found[kernel].restore())


@pytest.mark.parametrize("case", ["gptq 4", "packed 8", "int8 tokens", "ordered"])
def test_imported_leaves_are_saved_beside_a_recipe(t5, tmp_path, case):
    config, writer, settings = CASES["gptq 4" if case == "ordered" else case]
    layers = {k: writer(m) for k, m in matrices(settings).items()}
    if case == "ordered":
        layers[WI]["g_idx"] = layers[WI]["g_idx"][::-1]
    pair = converters.from_pretrained(write(t5, tmp_path / "q", config, layers))
    plan = RoundToNearestPlan(((r".*to_v", 8, 8),))
    forward, params = transform(plan)(*pair)
    effjax.save(tmp_path / "saved", forward, params)
    again = effjax.load(tmp_path / "saved")
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)
    held = json.loads((tmp_path / "saved" / "recipe.json").read_text())
    assert sorted(held["leaves"]) == sorted(KERNELS)
    held["leaves"]["blocks.0.mlp.door.kernel"] = held["leaves"].pop(KERNELS[0])
    (tmp_path / "saved" / "recipe.json").write_text(json.dumps(held))
    with pytest.raises(ValueError, match=r"leaves that T5Encoder lacks: \['blocks.0.mlp.door"):
        effjax.load(tmp_path / "saved")


def test_groups_that_were_never_set(t5, tmp_path):
    """compressed-tensors fills them with -1, for consecutive inputs."""
    held = matrices((4, 32, True))
    layers = {k: m.packed() | {"weight_g_idx": np.full(m.inputs, -1)} for k, m in held.items()}
    said = compressed("pack-quantized", 4, 32)
    _, params = converters.from_pretrained(write(t5, tmp_path / "q", said, layers))
    leaf = flatten_params(params)[KERNELS[0]]
    assert leaf.perm is None
    np.testing.assert_array_equal(leaf.restore(), held[WI].value().T)


def test_a_language_model_is_saved_with_its_quantized_values_and_its_cache(tmp_path):
    """Methods that patch, and that keep parameters of their own, on imported leaves."""
    subject = testing.tiny_llama(
        hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=32
    )
    matrix = Matrix((128, 64), 4, 32, False)
    held = matrix.gptq() | {"g_idx": np.arange(64, dtype=np.int32) % 2}
    layers = {"model.layers.0.mlp.up_proj": held}
    model = subject.forward, subject.params
    directory = write(model, tmp_path / "q", gptq(4, sym=False), layers, layout="transformers")
    pair = converters.from_pretrained(directory)
    transforms = (
        kivi.transform(kivi.KIVIPlan(group=8)),
        cskv.transform(cskv.CSKVPlan(k_density=0.5, window=4)),
    )
    tokens = jnp.arange(10)[None] % 7
    for number, compress in enumerate(transforms):
        forward, params = compress(*pair)
        effjax.save(tmp_path / str(number), forward, params)
        again = effjax.load(tmp_path / str(number))
        assert again[0] == forward
        chex.assert_trees_all_equal(again[1], params)
        texts = [
            effjax.generate.generate(*each, tokens, max_new_tokens=4)
            for each in (again, (forward, params))
        ]
        np.testing.assert_array_equal(texts[0].tokens, texts[1].tokens)


def test_groups_that_must_be_there(t5, tmp_path):
    held = {k: m.packed() for k, m in matrices((4, 32, True)).items()}
    said = compressed("pack-quantized", 4, 32)
    said["config_groups"]["group_0"]["weights"]["actorder"] = "group"
    with pytest.raises(
        ValueError, match=r"3 problems.*\n.*wi_0\.weight_g_idx: missing, must be in"
    ):
        converters.from_pretrained(write(t5, tmp_path / "q", said, held))


def test_quantized_values_beyond_their_bits(t5, tmp_path):
    held = {k: m.int8() for k, m in matrices((4, -1, True)).items()}
    held[WO]["weight"] = held[WO]["weight"] + np.int8(1)
    directory = write(t5, tmp_path / "q", compressed("int-quantized", 4), held)
    with pytest.raises(
        ValueError, match=rf"{WO}\.weight holds -7 \.\.\. 8, .* 4-bit values are -8 \.\.\."
    ):
        converters.from_pretrained(directory)


def test_groups_of_other_sizes_are_refused(t5, tmp_path):
    held = {k: m.gptq() for k, m in matrices((4, 32, True)).items()}
    held[WI]["g_idx"] = held[WI]["g_idx"].copy()
    held[WI]["g_idx"][0] = 1
    del held[WO]["g_idx"]  # as the oldest files
    directory = write(t5, tmp_path / "q", gptq(4, desc_act=True), held)
    with pytest.raises(
        ValueError, match=r"1 problems.*\n.*g_idx: must name each of 2 groups 32 tim"
    ):
        converters.from_pretrained(directory)


def test_everything_wrong_is_named_before_anything_is_read(t5, tmp_path):
    held = {k: m.gptq() for k, m in matrices((4, 32, True)).items()}
    del held[WI]["scales"]
    held[WI]["qzeros"] = held[WI]["qzeros"].astype(np.int64)
    held[WO]["qweight"] = held[WO]["qweight"][:, :-1]
    held["encoder.block.0.layer.0.SelfAttention.q"] = {"qscale": np.zeros(3, np.float32)}
    held["shared"] = {"qweight": np.zeros((4, 4), np.int32)}
    held["lm_head"] = {"scales": np.zeros((4, 4), np.float16)}
    with pytest.raises(ValueError, match=r"\(7 problems\)") as error:
        converters.from_pretrained(write(t5, tmp_path / "q", gptq(4), held))
    for fault in (
        f"{WI}.scales: missing, must be float32[2, 96] or bfloat16[2, 96] or float16[2, 96]",
        f"{WI}.qzeros: misshapen, is int64[2, 12], must be int32[2, 12]",
        f"{WO}.qweight: misshapen, is int32[12, 63], must be int32[12, 64]",
        "SelfAttention.q.weight: missing, must be [64, 64]",
        "SelfAttention.q.qscale: unexpected",
        "shared.weight: quantized, which only linear layers can be",
        "lm_head.scales: unexpected",
    ):
        assert fault in str(error.value)


def test_values_that_contradict_the_configuration(t5, tmp_path):
    held = {k: m.gptq() for k, m in matrices((4, 32, False)).items()}
    with pytest.raises(ValueError, match=r"3 problems.*\n.*wi_0\.qzeros: holds zero points.*sym"):
        converters.from_pretrained(write(t5, tmp_path / "a", gptq(4), held))
    with pytest.raises(ValueError, match="groups of 40 do not divide 64 inputs"):
        converters.from_pretrained(write(t5, tmp_path / "a", gptq(4, 40, sym=False), held))
    held = {k: m.packed() for k, m in matrices((4, 32, True)).items()}
    held[WO]["weight_shape"] = np.array([96, 64])
    with pytest.raises(ValueError, match=r"wo\.weight_shape: says \[96, 64\], must be \[64, 96\]"):
        converters.from_pretrained(
            write(t5, tmp_path / "b", compressed("pack-quantized", 4, 32), held)
        )
    held[WO]["weight_shape"] = np.array([64, 96])
    held[WI]["weight_scale"][3, 0] = np.inf
    directory = write(t5, tmp_path / "b", compressed("pack-quantized", 4, 32), held)
    with pytest.raises(ValueError, match=r"wi_0\.weight_scale: 1 of 192 values are NaN"):
        converters.from_pretrained(directory, check_finite=True)
    only = compressed("pack-quantized", 4, 32, targets=["re:.*wi_0"])
    with pytest.raises(
        ValueError, match=r"quantized values of \['enc.*'\], which no group .* quantizes"
    ):
        converters.from_pretrained(write(t5, directory, only, held))


@pytest.mark.parametrize(
    "name", ["int8", "int8_inputs", "int4", "int4_asymmetric", "int3", "int4_inputs"]
)
def test_what_torchao_saved(name):
    """QValues and answers of its own files, see tests/golden/make_torchao.py."""
    folder = Path(__file__).parents[1] / "golden" / "torchao" / name
    expected = np.load(folder / "expected.npz")
    forward, params = converters.from_pretrained(folder)
    leaf = params["blocks"]["0"]["mlp"]["down"]["kernel"]
    assert isinstance(leaf, QTensor)
    assert leaf.bits == int(name[3])
    assert (leaf.activations is not None) == name.endswith("inputs")
    np.testing.assert_array_equal(leaf.restore(), expected["kernel"].T)
    tokens = jnp.arange(12).reshape(2, 6) % 16
    logits, _ = jax.jit(forward)(params, {}, tokens)
    # A rounded input may fall on the other side by what float32 sums in another order differ.
    atol = 2e-3 if name.endswith("inputs") else 2e-6
    np.testing.assert_allclose(logits, expected["logits"], atol=atol)


@pytest.mark.parametrize("name", ["int8", "int4", "float8", "float8_tensor", "float8_blocks"])
def test_what_compressed_tensors_saved(name):
    """QValues and answers of its own files, see tests/golden/make_compressed_tensors.py."""
    folder = Path(__file__).parents[1] / "golden" / "compressed_tensors" / name
    expected = np.load(folder / "expected.npz")
    forward, params = converters.from_pretrained(folder)
    leaf = params["blocks"]["0"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(leaf.restore(), expected["kernel"].T)
    logits, _ = jax.jit(forward)(params, {}, jnp.arange(12).reshape(2, 6) % 16)
    np.testing.assert_allclose(logits, expected["logits"], atol=2e-3)


def test_layers_of_several_schemes(t5, tmp_path):
    """A name decides before a class does, and each group has its format."""
    four = Matrix((96, 64), 4, 32, True)
    eight = Matrix((64, 96), 8, -1, True)
    config = compressed("mixed-precision", 8, inputs=TOKENS)
    config["config_groups"]["group_0"]["format"] = "int-quantized"
    named = compressed("", 4, 32, targets=[r"re:.*wi_\d$"])["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = named | {"format": "pack-quantized"}
    layers = {WI: four.packed(), WO: eight.int8()}
    _, params = converters.from_pretrained(write(t5, tmp_path / "q", config, layers))
    gate, down = (flatten_params(params)[kernel] for kernel in KERNELS[:2])
    assert (gate.bits, gate.activations) == (4, None)
    assert (down.bits, down.activations) == (8, Activations(Quantizer(8, levels="n+1/2")))
    np.testing.assert_array_equal(gate.restore(), four.value().T)
    np.testing.assert_array_equal(down.restore(), eight.value().T)


def test_dtypes_and_shardings(t5, tmp_path):
    config, writer, settings = CASES["gptq 4"]
    held = matrices(settings)
    layers = {k: writer(m) for k, m in held.items()}
    layers[WI]["scales"] = layers[WI]["scales"].astype(ml_dtypes.bfloat16)
    directory = write(t5, tmp_path / "q", config, layers | {})
    mesh = Mesh(np.array(jax.devices()), ("d",))
    split = NamedSharding(mesh, PartitionSpec(None, "d"))
    whole = NamedSharding(mesh, PartitionSpec())

    def choose(path, shape):
        return split if path in KERNELS else whole

    forward, params = converters.from_pretrained(directory, dtype="bfloat16", sharding=choose)
    assert forward.config.param_dtype == "bfloat16"
    flat = flatten_params(params)
    leaf = flat[KERNELS[1]]
    assert {array.sharding for array in jax.tree.leaves(leaf)} == {split}
    np.testing.assert_array_equal(leaf.restore(), held[WO].value().T)
    assert {x.dtype for x in jax.tree.leaves(flat[KERNELS[0]])} == {
        np.dtype(name) for name in ("uint32", "float32", "int32")
    }
    assert all(leaf.dtype == jnp.bfloat16 for name, leaf in flat.items() if name not in KERNELS)
    rows = NamedSharding(mesh, PartitionSpec("d"))
    _, params = converters.from_pretrained(
        directory, sharding=lambda path, shape: rows if path in KERNELS else whole
    )
    leaf = flatten_params(params)[KERNELS[0]]
    assert {array.sharding.spec for array in jax.tree.leaves(leaf.qvalue)} == {
        PartitionSpec("d", None)
    }
    assert leaf.scale.shape[0] % mesh.size != 0  # too few groups to cut
    assert leaf.scale.sharding.is_fully_replicated


def test_fused_and_copied_layers(tmp_path):
    """Thirds of one matrix become three leaves; copies must be quantized alike."""
    config = DiTConfig(
        sample_size=8, patch_size=2, num_layers=2, num_heads=2, head_dim=32, num_classes=5
    )
    forward, shapes = abstract(DiT, config)
    model = forward, testing.random_params(shapes)
    said = compressed("pack-quantized", 4, 32, sym=False)
    matrix = Matrix((192, 64), 4, 32, False)
    layers = {"blocks.1.attn.qkv": matrix.packed()}
    _, params = converters.from_pretrained(
        write(model, tmp_path / "fused", said, layers, layout="original")
    )
    for k, name in enumerate(("to_q", "to_k", "to_v")):
        leaf = params["blocks"]["1"]["attn"][name]["kernel"]
        np.testing.assert_array_equal(leaf.restore(), matrix.value()[64 * k : 64 * (k + 1)].T)
    layers["blocks.1.attn.qkv"]["weight_g_idx"] = np.arange(64, dtype=np.int32) % 2
    permuted = converters.from_pretrained(write(model, tmp_path / "fused", said, layers))
    with pytest.warns(UserWarning, match="3 layers are written as float32"):
        converters.save_pretrained(*permuted, tmp_path / "again", layout="original")
    again = converters.from_pretrained(tmp_path / "again")[1]
    chex.assert_trees_all_equal(again, restore(permuted[1], "float32"))
    copies = [f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_2" for i in range(2)]
    one = Matrix((64, 64), 4, 32, False).packed()
    directory = write(model, tmp_path / "copied", said, {copies[0]: one}, layout="diffusers")
    with pytest.raises(ValueError, match=rf"{re.escape(copies[1])}\.weight: differs from its copy"):
        converters.from_pretrained(directory)
    _, params = converters.from_pretrained(write(model, directory, said, {copies[1]: one}))
    assert params["time"]["fc2"]["kernel"].bits == 4


def test_a_quantized_pixart(tmp_path):
    config = PixArtConfig(
        sample_size=8,
        num_layers=1,
        num_heads=2,
        head_dim=32,
        caption_channels=12,
        interpolation=2.0,
    )
    forward, shapes = abstract(PixArt, config)
    held = {
        f"transformer_blocks.0.{name}": Matrix(shape, 4, 32, False)
        for name, shape in {"attn2.to_k": (64, 64), "ff.net.2": (64, 256)}.items()
    }
    directory = write(
        (forward, testing.random_params(shapes)),
        *(tmp_path / "q", AWQ, {layer: matrix.awq() for layer, matrix in held.items()}),
        layout="diffusers",
    )
    block = converters.from_pretrained(directory)[1]["blocks"]["0"]
    found = (block["cross"]["to_k"]["kernel"], block["mlp"]["fc2"]["kernel"])
    for leaf, matrix in zip(found, held.values(), strict=True):
        np.testing.assert_array_equal(leaf.restore(), matrix.value().T)
    assert converters.describe(directory)["parameters"] == sum(
        leaf.size for leaf in jax.tree.leaves(shapes)
    )
