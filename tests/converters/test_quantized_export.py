"""Quantized leaves that are written as compressed-tensors, and what cannot be."""

import dataclasses
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
from converters.names import Binding
from converters.quantized_export import schemes
from effjax import testing
from effjax.forward import flatten_params, nest_params
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan, transform
from effjax.quant import Activations, QTensor, Quantizer, quantize_matrix, quantize_stack, restore
from tests.converters.formats import CASES, LAYERS, matrices, write


@pytest.fixture(scope="module")
def quantized():
    """A tiny DiT with layers of every kind that compressed-tensors has."""
    subject = testing.tiny_dit(num_heads=2, head_dim=32)
    rules = ((r".*\.to_[qkv]", 8, 8), (r".*\.to_out", 8, 16), (r".*0\.mlp\..*", 4, 8))
    pair = transform(RoundToNearestPlan(rules, symmetric=True))(subject.forward, subject.params)
    forward, params = pair
    rest = RoundToNearestPlan(((r".*1\.mlp\..*", 4, 16), (r"final\.proj", 8, 16)), group_size=32)
    _, params = transform(rest)(dataclasses.replace(forward, recipe=()), params)
    return subject.forward, params


def by_the_book(tensors, group, layer):
    """The matrix float32[O, I] of a layer, from the tensors and the configuration alone."""
    said = group["weights"]
    bits = said["num_bits"]

    def qvalues(packed, count):  # [rows, words] to [rows, count]
        rows = [int.from_bytes(row.tobytes(), "little") for row in np.ascontiguousarray(packed)]
        fields = [[row >> (bits * n) & (2**bits - 1) for n in range(count)] for row in rows]
        return np.array(fields) - 2 ** (bits - 1)

    scale = tensors[f"{layer}.weight_scale"]
    if group["format"] == "pack-quantized":
        outputs, inputs = tensors[f"{layer}.weight_shape"]
        q = qvalues(tensors[f"{layer}.weight_packed"], inputs)
        zero = 0
        if not said["symmetric"]:
            zero = qvalues(tensors[f"{layer}.weight_zero_point"].T, outputs).T
    else:
        q = tensors[f"{layer}.weight"].astype(np.int64)
        zero = 0 if said["symmetric"] else tensors[f"{layer}.weight_zero_point"].astype(np.int64)
    every = said["group_size"] or q.shape[1]
    assert scale.shape == (q.shape[0], q.shape[1] // every)
    zero = np.broadcast_to(zero, scale.shape).repeat(every, 1)
    return (q - zero).astype(np.float32) * scale.repeat(every, 1)


def test_what_is_written_is_what_the_format_says(quantized, tmp_path):
    report = converters.save_pretrained(*quantized, tmp_path / "q")
    [file] = report["files"]
    tensors = load_file(tmp_path / "q" / file)
    said = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    kinds = {}
    for group in said["config_groups"].values():
        weights, inputs = group["weights"], group["input_activations"]
        settings = weights["num_bits"], weights["strategy"], weights["symmetric"], inputs is None
        kinds[settings] = group["format"]
        for layer in group["targets"]:
            flat = flatten_params(quantized[1])
            names = {"attn1": "attn", "ff": "mlp", "to_out.0": "to_out", "net.0.proj": "fc1"}
            names |= {"net.2": "fc2", "transformer_blocks": "blocks", "proj_out_2": "final.proj"}
            path = layer
            for theirs, ours in names.items():
                path = path.replace(theirs, ours)
            expected = flat.pop(f"{path}.kernel").restore().T
            np.testing.assert_array_equal(by_the_book(tensors, group, layer), expected)
    assert kinds == {
        (8, "channel", True, False): "int-quantized",
        (8, "channel", True, True): "pack-quantized",
        (4, "channel", True, False): "pack-quantized",
        (4, "group", False, True): "pack-quantized",
        (8, "group", False, True): "pack-quantized",
    }
    assert "proj_out_1" in said["ignore"]
    assert "pos_embed.proj" not in said["ignore"]  # is no linear layer
    assert report["parameters"] == sum(
        converters.save_pretrained(*dense, tmp_path / "dense")["parameters"]
        for dense in [(quantized[0], restore(quantized[1], "float32"))]
    )


@pytest.mark.parametrize("layout", ["diffusers", "original"])
def test_leaves_come_back_bit_for_bit(quantized, tmp_path, layout):
    converters.save_pretrained(*quantized, tmp_path / "one", layout=layout, max_shard_bytes=100_000)
    forward, params = converters.from_pretrained(tmp_path / "one")
    assert forward == quantized[0]
    # The format has no word for what divides the ranges of tokens: they come back as its own.
    wide = Activations(Quantizer(8, levels="n+1/2"))
    expected = jax.tree.map(
        lambda leaf: (
            dataclasses.replace(leaf, activations=wide)
            if isinstance(leaf, QTensor) and leaf.activations
            else leaf
        ),
        quantized[1],
        is_leaf=lambda leaf: isinstance(leaf, QTensor),
    )
    chex.assert_trees_all_equal(params, expected)
    chex.assert_trees_all_equal_dtypes(params, expected)
    converters.save_pretrained(forward, params, tmp_path / "two", layout=layout)
    converters.convert(tmp_path / "one", tmp_path / "three", layout=layout)
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "three").iterdir())
    for file in files:
        written = (tmp_path / "two" / file).read_bytes()
        assert written == (tmp_path / "three" / file).read_bytes()


def test_other_formats_are_converted(t5, tmp_path):
    config, writer, settings = CASES["gptq 4"]
    held = matrices(settings)
    write(t5, tmp_path / "gptq", config, {k: writer(m) for k, m in held.items()})
    converters.convert(tmp_path / "gptq", tmp_path / "new", layout="transformers")
    said = json.loads((tmp_path / "new" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "pack-quantized"
    assert set(said["config_groups"]["group_0"]["targets"]) == set(LAYERS)
    for one, two in zip(
        jax.tree.leaves(converters.from_pretrained(tmp_path / "gptq")[1]),
        jax.tree.leaves(converters.from_pretrained(tmp_path / "new")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(one, two)


def test_stacks_are_no_layers_of_the_format():
    leaf = quantize_stack(jnp.ones((2, 3, 16, 8)), Quantizer(4))
    said = (
        "experts.up.kernel: is a stack of 6 matrices [2, 3, 16, 8], and the format knows only "
        "linear layers of one matrix: each of the 6 would need a layer with a name of its own"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        schemes(Binding({}, {}, {}), {"experts.up.kernel": leaf})


def test_leaves_that_the_format_cannot_say_are_all_named(quantized, tmp_path):
    forward, params = quantized
    flat = dict(flatten_params(params))
    w = np.asarray(flat["blocks.0.attn.to_q.kernel"].restore())
    narrow = Activations(Quantizer(6))
    zero = Quantizer(8, symmetric=False, keeps_zero=False)
    others = {
        "to_q": quantize_matrix(jnp.asarray(w), Quantizer(3)),
        "to_k": quantize_matrix(jnp.asarray(w), smoothing_scale=jnp.ones(64)),
        "to_v": quantize_matrix(jnp.asarray(w), activations=narrow),
        "to_out": quantize_matrix(jnp.asarray(w) + 9, zero),
    }
    for name, leaf in others.items():
        flat[f"blocks.0.attn.{name}.kernel"] = leaf
    with pytest.raises(ValueError, match=r"cannot hold these leaves \(4 problems\)") as error:
        converters.save_pretrained(forward, nest_params(flat), tmp_path / "q")
    for name, fault in {
        "to_q": "has 3-bit values, must be 4 or 8",
        "to_k": "has inputs that are smoothed or rotated",
        "to_v": "has inputs with Activations",
        "to_out": "has zero points beyond -128 ... 127",
    }.items():
        assert f"blocks.0.attn.{name}.kernel: {fault}" in str(error.value)
    assert not (tmp_path / "q").exists()
    flat = dict(flatten_params(params))
    flat["blocks.0.attn.to_q.kernel"] = quantize_matrix(jnp.asarray(w), Quantizer(4))
    with pytest.raises(
        ValueError, match=r"(?s)to_q.*to_v\.kernel: is a part of blocks\.0\.attn\.qkv"
    ):
        converters.save_pretrained(forward, nest_params(flat), tmp_path / "q", layout="original")
