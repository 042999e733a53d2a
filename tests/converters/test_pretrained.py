"""Loading, placing, saving, and what is refused; none of it needs torch."""

import dataclasses
import json
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

import converters
import effjax
from converters.__main__ import main
from effjax import testing
from effjax.forward import abstract, flatten_params, nest_params
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.models.t5 import T5Encoder
from tests.converters.conftest import CONFIG, assert_equal_params, random_params
from tests.converters.formats import T5

VAE = AutoencoderKLConfig(block_out_channels=(8, 8), layers_per_block=1, norm_groups=2)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def change(directory, function):
    """Rewrite the weights of a saved directory."""
    tensors = load_file(directory / WEIGHTS)
    function(tensors)
    save_file(tensors, directory / WEIGHTS)


def change_config(directory, **values):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


# Loading -------------------------------------------------------------------------------------


def test_pipeline_directory_subfolder_and_file(dit, saved, tmp_path):
    pipeline = tmp_path / "pipeline"
    shutil.copytree(saved, pipeline / "transformer")
    parts = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "X"], "vae": ["a", "b"]}
    (pipeline / "model_index.json").write_text(json.dumps(parts))
    for source, options in (
        (pipeline, {}),
        (str(pipeline), {"subfolder": "transformer"}),
        (pipeline / "transformer", {}),
        (pipeline / "transformer" / WEIGHTS, {}),
    ):
        forward, params = converters.from_pretrained(source, **options)
        assert forward == dit[0]
        assert_equal_params(params, dit[1])
    shutil.rmtree(pipeline / "transformer")
    with pytest.raises(ValueError, match=r"subfolder=, one of \['transformer', 'vae'\]"):
        converters.from_pretrained(pipeline)


@pytest.mark.parametrize(
    ("index", "shard"),
    [
        (None, "diffusion_pytorch_model.fp16.safetensors"),
        (None, "model.fp16.safetensors"),
        ("model.safetensors.index.fp16.json", "model.fp16-0000{}-of-00002.safetensors"),
        (
            "diffusion_pytorch_model.safetensors.fp16.index.json",
            "diffusion_pytorch_model-0000{}-of-00002.fp16.safetensors",
        ),
        (
            "diffusion_pytorch_model.fp16.safetensors.index.json",
            "diffusion_pytorch_model.fp16-0000{}-of-00002.safetensors",
        ),
    ],
)
def test_variants(index, shard, dit, saved, tmp_path):
    """Named as diffusers and transformers name them, today and before."""
    tensors = {name: x.astype(np.float16) for name, x in load_file(saved / WEIGHTS).items()}
    files = {name: shard.format(1 + number % 2) for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({n: x for n, x in tensors.items() if files[n] == file}, saved / file)
    if index:
        (saved / index).write_text(json.dumps({"weight_map": files}))
    half = jax.tree.map(lambda leaf: leaf.astype("float16"), dit[1])
    assert_equal_params(converters.from_pretrained(saved, variant="fp16")[1], half)
    assert_equal_params(converters.from_pretrained(saved)[1], dit[1])
    assert converters.describe(saved, variant="fp16")["dtype"] == "float16"
    converters.convert(saved, tmp_path / "copy", variant="fp16")
    assert_equal_params(converters.from_pretrained(tmp_path / "copy")[1], half)
    (saved / WEIGHTS).rename(saved / "diffusion_pytorch_model.ema.bin")
    with pytest.raises(ValueError, match=r"There are weights for variant='ema' and variant='fp16'"):
        converters.from_pretrained(saved)


def test_variants_that_are_not_there(saved):
    with pytest.raises(
        ValueError, match=r"looked for .*model\.fp16\.safetensors.* for no variant\."
    ):
        converters.from_pretrained(saved, variant="fp16")
    with pytest.raises(ValueError, match=r"variant must be a word such as 'fp16', got '\.\./x'"):
        converters.from_pretrained(saved, variant="../x")
    for source in (saved / WEIGHTS, f"owner/name/{WEIGHTS}"):
        with pytest.raises(ValueError, match="variant='fp16' is for"):
            converters.from_pretrained(source, variant="fp16")


def test_home_is_written_as_a_tilde(dit, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    converters.save_pretrained(*dit, "~/saved")
    converters.convert("~/saved", "~/copy")
    assert_equal_params(converters.from_pretrained(f"~/copy/{WEIGHTS}")[1], dit[1])
    effjax.save("~/own", *dit)
    assert_equal_params(effjax.load("~/own")[1], dit[1])
    assert {path.name for path in tmp_path.iterdir()} == {"saved", "copy", "own"}
    with pytest.raises(ValueError, match="~nobody/saved is no file or directory here"):
        converters.from_pretrained("~nobody/saved")


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", jnp.bfloat16, np.float16])
def test_dtypes(dit, tmp_path, stored, dtype):
    forward, params = dit
    params = jax.tree.map(lambda leaf: leaf.astype(stored), params)
    converters.save_pretrained(forward, params, tmp_path / "saved")
    loaded_forward, loaded = converters.from_pretrained(tmp_path / "saved", dtype=dtype)
    expected = jax.tree.map(lambda leaf: leaf.astype(dtype or stored), params)
    assert_equal_params(loaded, expected)
    assert loaded_forward.config.param_dtype == str(jnp.dtype(dtype or stored))
    assert loaded_forward.config.dtype == loaded_forward.config.param_dtype
    forward, again = converters.from_pretrained(
        tmp_path / "saved", dtype=dtype, compute_dtype="float32"
    )
    assert forward.config.dtype == "float32"
    assert_equal_params(again, expected)
    described = converters.describe(tmp_path / "saved")
    assert (described["dtype"], described["compute_dtype"]) == (stored, stored)


def test_mixed_dtypes_are_kept(dit, tmp_path):
    forward, params = dit
    flat = {
        path: leaf.astype("float32" if path.endswith("bias") else "bfloat16")
        for path, leaf in flatten_params(params).items()
    }
    converters.save_pretrained(forward, nest_params(flat), tmp_path / "saved")
    loaded_forward, loaded = converters.from_pretrained(tmp_path / "saved")
    assert_equal_params(loaded, nest_params(flat))
    # that of most numbers, though most tensors are biases
    assert loaded_forward.config.param_dtype == loaded_forward.config.dtype == "bfloat16"


@pytest.mark.parametrize("dtype", ["int8", "float64", "flaot32"])
def test_other_dtypes_are_refused(saved, dtype):
    for name in ("dtype", "compute_dtype"):
        with pytest.raises(ValueError, match=f"must be one of .*{dtype}"):
            converters.from_pretrained(saved, **{name: dtype})


@pytest.mark.parametrize("sharding", [None, SingleDeviceSharding])
def test_arrays_do_not_depend_on_the_file(dit, saved, sharding):
    _, params = converters.from_pretrained(saved, sharding=sharding and sharding(jax.devices()[1]))
    with (saved / WEIGHTS).open("r+b") as file:  # in place: a mapping would see it
        size = (saved / WEIGHTS).stat().st_size
        file.write(b"\0" * size)
    assert_equal_params(params, dit[1])


def test_shardings_on_a_mesh(dit, saved):
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"))

    def choose(path, shape):
        split = path.endswith("kernel") and len(shape) == 2 and shape[1] % 4 == 0
        return NamedSharding(
            mesh, PartitionSpec(None, ("data", "model")) if split else PartitionSpec()
        )

    flat = flatten_params(dit[1])
    chosen = {path: choose(path, leaf.shape) for path, leaf in flat.items()}
    for sharding in (choose, nest_params(chosen), chosen):
        _, params = converters.from_pretrained(saved, sharding=sharding, dtype="bfloat16")
        assert_equal_params(params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), dit[1]))
        for path, leaf in flatten_params(params).items():
            assert leaf.sharding == chosen[path], path
    kernel = params["blocks"]["0"]["mlp"]["fc1"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(16, 16)}
    whole = NamedSharding(mesh, PartitionSpec())
    _, params = converters.from_pretrained(saved, sharding=whole)
    assert_equal_params(params, dit[1])
    assert all(leaf.sharding == whole for leaf in jax.tree.leaves(params))


def test_default_placement_is_not_committed(saved):
    _, params = converters.from_pretrained(saved)
    on_other = jax.device_put(jnp.ones(16), jax.devices()[2])
    assert (on_other + params["patch"]["bias"]).devices() == {jax.devices()[2]}


def test_shardings_that_do_not_fit_are_all_named(saved):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    uneven = NamedSharding(mesh, PartitionSpec("d"))
    with pytest.raises(ValueError, match=r"(?s)label\.embedding_table.*patch\.kernel"):
        converters.from_pretrained(saved, sharding=uneven)
    with pytest.raises(ValueError, match=r"(?s)other: no such parameter.*patch\.bias: no sharding"):
        converters.from_pretrained(saved, sharding={"other": uneven})
    with pytest.raises(
        ValueError, match=r"patch\.bias: must be a jax\.sharding\.Sharding, got 'd'"
    ):
        converters.from_pretrained(saved, sharding=lambda path, shape: "d")


# Saving --------------------------------------------------------------------------------------


def test_sharded_arrays_are_saved_whole(dit, saved, tmp_path):
    mesh = Mesh(np.array(jax.devices()), ("d",))
    flat = flatten_params(dit[1])
    spread = {
        path: jax.device_put(
            leaf,
            NamedSharding(mesh, PartitionSpec("d") if leaf.shape[0] % 4 == 0 else PartitionSpec()),
        )
        for path, leaf in flat.items()
    }
    converters.save_pretrained(dit[0], nest_params(spread), tmp_path / "spread")
    assert (tmp_path / "spread" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()
    host = jax.tree.map(np.asarray, dit[1])
    converters.save_pretrained(dit[0], host, tmp_path / "host")
    assert (tmp_path / "host" / WEIGHTS).read_bytes() == (saved / WEIGHTS).read_bytes()


def test_what_cannot_be_saved(dit, tmp_path):
    forward, params = dit
    flat = flatten_params(params)
    kernel = flat["final.proj.kernel"]
    cases = [
        (forward.patch(patch_nothing), params, "effjax.save"),
        (forward, {**params, "methods": {}}, "effjax.save"),
        (forward, nest_params({**flat, "final.proj.bias": jnp.zeros(3)}), r"final\.proj\.bias"),
        (forward, nest_params({**flat, "more": kernel}), "unexpected: more"),
        (
            forward,
            nest_params({**flat, "final.proj.kernel": kernel.astype(jnp.int8)}),
            r"final\.proj\.kernel: int8",
        ),
    ]
    for case_forward, case_params, message in cases:
        with pytest.raises(ValueError, match=message):
            converters.save_pretrained(case_forward, case_params, tmp_path / "new")
    for options in ({"layout": "torch"}, {"max_shard_bytes": 0}):
        with pytest.raises(ValueError, match=next(iter(options.values())) or "max_shard_bytes"):
            converters.save_pretrained(forward, params, tmp_path / "new", **options)
    assert not list(tmp_path.iterdir())


def patch_nothing(module, context):
    """A patch."""


def test_model_without_a_converter(dit, tmp_path):
    other = dataclasses.replace(dit[0], config=("not", "a", "DiT"))
    with pytest.raises(ValueError, match=r"no converter for models with tuple.*DiTTransformer2D"):
        converters.save_pretrained(other, dit[1], tmp_path / "new")


# Refusing ------------------------------------------------------------------------------------


def break_names(tensors):
    del tensors["proj_out_1.bias"], tensors["transformer_blocks.1.ff.net.2.bias"]
    tensors["proj_out_2.bias"] = np.zeros(3, np.float32)
    tensors["transformer_blocks.7.attn1.to_q.bias"] = np.zeros(16, np.float32)
    tensors["pos_embed.proj.bias"] = np.zeros(16, np.int32)


def break_copies(tensors):
    for part in ("class_embedder.embedding_table.weight", "timestep_embedder.linear_2.bias"):
        tensors[f"transformer_blocks.1.norm1.emb.{part}"][0] += 1e-6


def break_values(tensors):
    tensors["proj_out_1.bias"][:2] = np.nan, np.inf
    tensors["pos_embed.proj.weight"][0, 0, 0, 0] = np.nan


def break_range(tensors):
    tensors["proj_out_1.bias"][0] = 1e6


BROKEN = {
    "names": (
        break_names,
        {},
        r"(?s)5 problems.*pos_embed\.proj\.bias: of dtype int32.*"
        r"proj_out_1\.bias: missing, must be \[32\].*"
        r"proj_out_2\.bias: misshapen, is \[3\], must be \[32\].*"
        r"blocks\.1\.ff\.net\.2\.bias: missing.*blocks\.7\.attn1\.to_q\.bias: unexpected",
    ),
    "copies": (
        break_copies,
        {},
        r"(?s)2 problems.*blocks\.1\.norm1\.emb\.class_embedder\.embedding_table\.weight: "
        r"differs from its copy transformer_blocks\.0.*blocks\.1\..*\.linear_2\.bias: differs",
    ),
    "values": (
        break_values,
        {"check_finite": True},
        r"(?s)pos_embed\.proj\.weight: 1 of 256.*proj_out_1\.bias: 2 of 32 values are NaN",
    ),
    "range": (break_range, {"dtype": "float16"}, r"proj_out_1\.bias: 1 values are beyond float16"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_bad_weights_are_named_and_nothing_is_left(saved, tmp_path, fault):
    function, options, message = BROKEN[fault]
    change(saved, function)
    with pytest.raises(ValueError, match=message):
        converters.from_pretrained(saved, **options)
    with pytest.raises(ValueError, match=message):
        converters.convert(saved, tmp_path / "new", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_nan_is_kept_unless_asked_for(saved):
    change(saved, break_values)
    _, params = converters.from_pretrained(saved)
    assert np.isnan(params["final"]["modulation"]["bias"][0])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "UNet"}, r"_class_name='UNet'.*DiTTransformer2DModel"),
        ({"norm_type": "layer_norm", "attention_bias": False}, r"norm_type.*ada_norm_zero"),
        (
            {"num_layers": "2", "patch_size": 2.0},
            r"patch_size must.*got 2\.0; num_layers",
        ),
        ({"out_channels": 5}, r"config\.json: out_channels must be in_channels"),
        ({"num_layers": 3}, r"config\.json: num_layers asks for 3 .* holds tensors of 2"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1"),
        ({"attention_head_dim": 12}, r"(?s)problems.*misshapen, is .* must be"),
        (
            {"num_embeds_ada_norm": 3},
            r"embedding_table.*misshapen, is \[6, 16\], must be \[4, 16\]",
        ),
    ],
)
def test_wrong_config_values(saved, values, message):
    change_config(saved, **values)
    with pytest.raises(ValueError, match=message):
        converters.from_pretrained(saved)


@pytest.mark.parametrize(
    ("forward", "key", "found"),
    [
        (testing.tiny_llama().forward, "num_hidden_layers", 2),
        (testing.tiny_dit().forward, "num_layers", 2),
        (testing.tiny_pixart().forward, "num_layers", 2),
        (abstract(T5Encoder, T5)[0], "num_layers", 2),
        (abstract(AutoencoderKL, VAE)[0], "layers_per_block", 1),
        (abstract(AutoencoderKL, VAE)[0], "block_out_channels", 2),
    ],
)
@pytest.mark.parametrize("sharded", [False, True])
def test_counts_are_compared_with_the_tensors_before_a_model_is_built(
    forward, key, found, sharded, tmp_path, monkeypatch
):
    """Whatever a configuration says, its answer takes a moment; ten million layers take minutes."""
    params = testing.random_params(forward.abstract_params())
    options = {"max_shard_bytes": 5000} if sharded else {}
    converters.save_pretrained(forward, params, tmp_path / "model", **options)
    effjax.save(tmp_path / "saved", forward, params, **options)
    monkeypatch.setattr("converters.weights.abstract", None)
    monkeypatch.setattr("effjax.recipe.abstract", None)
    own = key.replace("hidden_layers", "layers")
    for count in (found + 1, 10**7, 10**9):
        if key == "block_out_channels":
            count = min(count, 100)
        for folder, name in (("model", key), ("saved", own)):
            asked = [32] * count if key == "block_out_channels" else count
            change_config(tmp_path / folder, **{name: asked})
        message = rf"config\.json: {{}} asks for {count} .* {found}$"
        with pytest.raises(ValueError, match=message.format(key)):
            converters.from_pretrained(tmp_path / "model")
        with pytest.raises(ValueError, match=message.format(key)):
            converters.convert(tmp_path / "model", tmp_path / "copy")
        with pytest.raises(ValueError, match=message.format(own)):
            effjax.load(tmp_path / "saved")


@pytest.mark.parametrize("value", [10**9, 2**31 - 4])
def test_absurd_sizes_are_answered_without_memory(value, saved):
    for key in ("attention_head_dim", "num_embeds_ada_norm", "num_attention_heads"):
        config = (saved / "config.json").read_text()
        change_config(saved, **{key: value})
        with pytest.raises(ValueError, match="misshapen"):
            converters.from_pretrained(saved)
        (saved / "config.json").write_text(config)


def test_a_stored_table_of_another_size_is_not_computed(saved):
    change(saved, lambda held: held.update({"pos_embed.pos_embed": np.zeros((1, 16, 16), "f4")}))
    change_config(saved, sample_size=2 * 10**9)
    with pytest.raises(ValueError, match=r"pos_embed: differs from what the model computes"):
        converters.from_pretrained(saved)


def test_config_that_is_no_json(saved):
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        converters.from_pretrained(saved)


def test_directories_that_hold_no_model(saved, tmp_path):
    (saved / "recipe.json").write_text("{}")
    with pytest.raises(ValueError, match=r"effjax\.load"):
        converters.from_pretrained(saved)
    (saved / "recipe.json").unlink()
    (saved / WEIGHTS).unlink()
    with pytest.raises(ValueError, match=r"has no weights.*looked for diffusion_pytorch_model"):
        converters.from_pretrained(saved)
    with pytest.raises(ValueError, match=r"has no config\.json"):
        converters.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no file or directory"):
        converters.from_pretrained(tmp_path / "nowhere")


def test_file_without_config(saved, tmp_path):
    (saved / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config\.json beside it"):
        converters.from_pretrained(saved / WEIGHTS)
    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="no converter knows these 1 tensors"):
        converters.from_pretrained(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="subfolder='vae' is for directories"):
        converters.from_pretrained(tmp_path / "other.safetensors", subfolder="vae")
    save_file({}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="there are no tensors in it"):
        converters.from_pretrained(tmp_path / "other.safetensors")


@pytest.mark.torch
def test_a_pickle_whose_weights_are_deeper(tmp_path):
    torch = pytest.importorskip("torch")
    torch.save({"trainer": {"net": {"x": torch.zeros(2)}}, "epoch": 3}, tmp_path / "last.pth")
    wanted = r"last\.pth holds no tensors by name, .* but \['epoch', 'trainer'\].* torch\.save"
    with pytest.raises(ValueError, match=wanted):
        converters.from_pretrained(tmp_path / "last.pth")


# Command -------------------------------------------------------------------------------------


def test_command(dit, saved, tmp_path, capsys):
    arguments = [str(saved), str(tmp_path / "half"), "--dtype", "bfloat16", "--json"]
    assert main([*arguments, "--check-finite", "--max-shard-bytes", "20000"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["bytes"] == 2 * report["parameters"]
    assert sorted(report["files"]) == sorted(
        path.name for path in (tmp_path / "half").glob("*.safetensors")
    )
    _, params = converters.from_pretrained(tmp_path / "half")
    assert_equal_params(params, jax.tree.map(lambda leaf: leaf.astype("bfloat16"), dit[1]))
    assert main(arguments) == 1  # it exists
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "exists and is not empty" in captured.err


def test_command_reports_an_error_in_one_line(saved, tmp_path, capsys):
    change(saved, break_names)
    assert main([str(saved), str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert "proj_out_1.bias: missing" in error
    assert not (tmp_path / "new").exists()


def test_import_is_light():
    qvalue = (
        "import sys, converters; dir(converters);"
        "assert not {'jax', 'torch', 'numpy', 'huggingface_hub'} & set(sys.modules), sys.modules;"
        "import converters.pretrained; from converters.family import families; families();"
        "assert not {'torch', 'diffusers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", qvalue], check=True)


def test_unknown_name():
    with pytest.raises(AttributeError, match="from_pretraind"):
        _ = converters.from_pretraind


def test_random_params_have_no_zeros(dit):
    """The round trips above would not notice swapped tensors otherwise."""
    leaves = flatten_params(random_params(dit[1])).values()
    assert all(np.all(np.asarray(leaf) != 0) for leaf in leaves)
    assert CONFIG.hidden_size == 16
