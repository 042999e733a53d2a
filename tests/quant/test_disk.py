"""Values on disk: the bits that the format promises, and the planes that come from them."""

import json
import tracemalloc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import effjax
from effjax import testing
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan, transform
from effjax.quant import QTensor, Quantizer, quantize_matrix, restore
from effjax.quant.disk import QValues, pack_bits, planes_of, rows_of, signed, unpack_bits
from pallas_kernels.packing import pack

BITS = (2, 3, 4, 5, 6, 7, 8)


def qvalues(shape, bits, seed=0):
    half = 2 ** (bits - 1)
    return np.random.default_rng(seed).integers(-half, half, shape).astype(np.int8)


def read_by_the_book(stored, bits, shape):
    """The format's definition, bit by bit: bit k of a row is bit k % 8 of its byte k // 8."""
    found = np.zeros(shape, np.int64)
    for i in range(shape[0]):
        stream = int.from_bytes(stored[i].tobytes(), "little")
        for n in range(shape[1]):
            qvalue = stream >> (bits * n) & (2**bits - 1)
            found[i, n] = qvalue - 2**bits if qvalue >= 2 ** (bits - 1) else qvalue
    return found


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 8, 21])
def test_a_row_is_a_little_endian_stream_of_bits(bits, width):
    held = qvalues((3, width), bits)
    stream = pack_bits(held, bits)
    assert stream.shape == (3, -(-width * bits // 8))
    np.testing.assert_array_equal(read_by_the_book(stream, bits, held.shape), held)
    np.testing.assert_array_equal(signed(unpack_bits(stream, bits, width), bits), held)


def test_bits_by_hand():
    assert pack_bits(np.array([1, -1, 2], np.int8), 4).tolist() == [0xF1, 0x02]
    assert pack_bits(np.array([1, 2, 3, -4], np.int8), 3).tolist() == [0b11010001, 0b1000]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("inputs", [40, 300])
def test_planes_are_those_of_the_kernels(bits, inputs):
    held = qvalues((inputs, 12), bits)
    planes = planes_of(lambda begin, end: held[begin:end], held.shape, bits)
    chex.assert_trees_all_equal(planes, pack(jnp.asarray(held), bits))
    chex.assert_trees_all_equal_dtypes(planes, pack(jnp.asarray(held), bits))
    np.testing.assert_array_equal(rows_of(planes, bits)(0, inputs), held)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("packed", [False, True])
def test_the_disk_does_not_depend_on_the_memory(bits, packed):
    held = qvalues((300, 12), bits)
    leaf = quantize_matrix(jnp.asarray(held, jnp.float32), Quantizer(bits), packed=packed)
    value = jax.tree.map(np.asarray, leaf.qvalue)
    stored = QValues(value, leaf.shape, bits).to_disk()
    assert stored.dtype == (np.int8 if bits == 8 else np.uint8)
    np.testing.assert_array_equal(read_by_the_book(stored, bits, leaf.shape), leaf.qvalues())
    chex.assert_trees_all_equal(QValues(value, leaf.shape, bits).from_disk(stored), value)


@pytest.fixture(scope="module")
def quantized():
    """A tiny DiT with 3-, 4-, 5- and 8-bit layers, some with quantized inputs."""
    subject = testing.tiny_dit(num_heads=2, head_dim=32)
    rules = (
        (r".*\.to_q", 3, 16),
        (r".*\.to_k", 5, 16),
        (r".*\.attn\..*", 8, 8),
        (r".*\.mlp\..*", 4, 8),
    )
    return transform(RoundToNearestPlan(rules, 32))(subject.forward, subject.params)


def test_another_program_reads_a_saved_model(quantized, tmp_path):
    forward, params = quantized
    effjax.save(tmp_path / "m", forward, params)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="np") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    seen = set()
    for layer in ("attn.to_q", "attn.to_k", "attn.to_v", "mlp.fc1"):
        name = f"blocks.1.{layer}.kernel"
        leaf = params["blocks"]["1"][layer.split(".")[0]][layer.split(".")[1]]["kernel"]
        said = json.loads(metadata[f"{name}.qvalue"])
        found = read_by_the_book(tensors[f"{name}.qvalue"], said["bits"], said["shape"])
        scale, zero = (tensors[f"{name}.{part}"] for part in ("scale", "zero_point"))
        every = said["shape"][0] // scale.shape[0]
        restored = (found - zero.repeat(every, 0)).astype(np.float32) * scale.repeat(every, 0)
        np.testing.assert_array_equal(restored, leaf.dequantize())
        seen.add(said["bits"])
    assert seen == {3, 4, 5, 8}
    held = sum(tensors[name].nbytes for name in tensors if name.endswith(".qvalue"))
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, QTensor))
    assert held == sum(
        -(-leaf.shape[1] * leaf.bits // 8) * leaf.shape[0]
        for leaf in leaves
        if isinstance(leaf, QTensor)
    )


@pytest.mark.parametrize("bits", [3, 4])
def test_a_tensor_is_read_in_blocks(bits):
    """Loading may take a tenth more than the arrays, and twice the largest tensor."""
    held = qvalues((4096, 512), bits)
    form = QValues(pack(jnp.asarray(held), bits), held.shape, bits)
    stored = pack_bits(held, bits)
    tracemalloc.start()
    planes = form.from_disk(stored)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert isinstance(planes, tuple)
    assert most < 1.1 * sum(plane.nbytes for plane in planes) + stored.nbytes


@pytest.mark.parametrize("max_shard_bytes", [20_000, 5_000_000])
def test_saved_quantized_values_load_as_they_were(quantized, tmp_path, max_shard_bytes):
    forward, params = quantized
    effjax.save(tmp_path / "m", forward, params, max_shard_bytes=max_shard_bytes)
    loaded, loaded_params = effjax.load(tmp_path / "m")
    assert loaded == forward
    assert jax.tree.structure(loaded_params) == jax.tree.structure(params)
    chex.assert_trees_all_equal(loaded_params, params)
    chex.assert_trees_all_equal_dtypes(loaded_params, params)


def test_damaged_quantized_values_are_explained(quantized, tmp_path):
    effjax.save(tmp_path / "m", *quantized)
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    cut, mistyped = "blocks.0.attn.to_q.kernel.qvalue", "blocks.1.attn.to_q.kernel.qvalue"
    tensors[cut] = tensors[cut][:, :-1].copy()
    tensors[mistyped] = tensors[mistyped].view(np.int8)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"\(2 problems\)") as error:
        effjax.load(tmp_path / "m")
    assert f"misshapen: {cut} is [64, 23], must be [64, 24]" in str(error.value)
    assert f"mistyped: {mistyped} is int8, must be uint8" in str(error.value)


def test_leaves_that_no_recipe_makes_are_described(quantized, tmp_path):
    _, params = quantized
    plain = testing.tiny_dit(num_heads=2, head_dim=32).forward
    effjax.save(tmp_path / "m", plain, params)
    forward, again = effjax.load(tmp_path / "m")
    assert forward == plain
    chex.assert_trees_all_equal(again, params)


def test_leaves_that_a_recipe_makes_must_be_there(quantized, tmp_path):
    forward, params = quantized
    with pytest.raises(ValueError, match=r"(?s)do not fit the recipe.*to_q\.kernel\.qvalue"):
        effjax.save(tmp_path / "m", forward, restore(params, "float32"))
    assert not (tmp_path / "m").exists()
