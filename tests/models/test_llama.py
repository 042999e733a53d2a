"""The Llama family: parity with stored outputs of transformers, positions, configurations."""

import dataclasses
import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
from converters import llama
from effjax import testing
from effjax.forward import abstract, flatten_params, nest_params, parameter_count
from effjax.generate import generate
from effjax.layers.rotary import frequencies
from effjax.models.llama import Llama, LlamaConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "llama.npz"  # made by make_llama.py beside it
ARRAYS = dict(np.load(GOLDEN))
CONFIGS = json.loads(str(ARRAYS["configs"]))
MASK = ARRAYS["mask"]
POSITIONS = np.where(MASK, MASK.cumsum(1) - 1, -1).astype(np.int32)


def weights(name):
    prefix = f"{name}/weights/"
    return {key.removeprefix(prefix): ARRAYS[key] for key in ARRAYS if key.startswith(prefix)}


def load(name, **changes):
    config = dataclasses.replace(llama.read_config(CONFIGS[name]), **changes)
    forward, shapes = abstract(Llama, config)
    tensors, binding = weights(name), llama.TRANSFORMERS.bind(flatten_params(shapes))
    return forward, nest_params(
        {
            path: jnp.asarray(pieces[0].read(tensors[pieces[0].source]))
            for path, pieces in binding.targets.items()
        }
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers(name):
    """Of texts of 20, 13 and 1 tokens, padded at the left."""
    forward, params = load(name)
    out, state = jax.jit(forward)(params, {}, ARRAYS["tokens"], POSITIONS)
    assert state == {}
    chex.assert_trees_all_close(out[MASK], ARRAYS[f"{name}/logits"][MASK], atol=1e-4)


def test_bfloat16_is_near():
    forward, params = load("llama3", dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    out, _ = jax.jit(forward)(params, {}, ARRAYS["tokens"], POSITIONS)
    assert out.dtype == jnp.bfloat16
    want = ARRAYS["llama3/logits"][MASK]
    chex.assert_trees_all_close(np.float32(out[MASK]), want, atol=0.06 * np.abs(want).max())


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_padding_may_stand_anywhere(name):
    forward, params = load(name)
    run = jax.jit(forward)
    left, _ = run(params, {}, ARRAYS["tokens"], POSITIONS)
    shift = np.argmax(MASK, axis=1)
    columns = (np.arange(20) + shift[:, None]) % 20
    turned = [np.take_along_axis(x, columns, axis=1) for x in (ARRAYS["tokens"], POSITIONS)]
    right, _ = run(params, {}, *turned)
    for row, start in enumerate(shift):
        chex.assert_trees_all_close(right[row, : 20 - start], left[row, start:], atol=1e-5)
    # Positions that count up need not be given.
    bare, _ = run(params, {}, ARRAYS["tokens"][:1])
    chex.assert_trees_all_close(bare, left[:1], atol=1e-5)


def test_only_wanted_logits_are_made():
    forward, params = load("qwen2")
    logits_to_keep = jnp.array([[19, 3], [19, 18], [19, 19]])
    every, _ = jax.jit(forward)(params, {}, ARRAYS["tokens"], POSITIONS)
    few, _ = jax.jit(forward)(params, {}, ARRAYS["tokens"], POSITIONS, logits_to_keep)
    want = jnp.take_along_axis(every, logits_to_keep[:, :, None], axis=1)
    assert few.shape == (3, 2, 40)
    chex.assert_trees_all_close(few, want, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_directory_of_transformers_loads_and_is_written_back(name, tmp_path):
    tensors = {key: np.ascontiguousarray(value) for key, value in weights(name).items()}
    config = CONFIGS[name]
    if config["tie_word_embeddings"]:  # as transformers writes it
        del tensors["lm_head.weight"]
    (tmp_path / "src").mkdir()
    save_file(tensors, tmp_path / "src" / "model.safetensors")
    (tmp_path / "src" / "config.json").write_text(json.dumps(config))
    forward, params = converters.from_pretrained(tmp_path / "src")
    assert forward == load(name)[0]
    chex.assert_trees_all_equal(params, load(name)[1])
    converters.save_pretrained(forward, params, tmp_path / "copy", progress=False)
    written = json.loads((tmp_path / "copy" / "config.json").read_text())
    assert written["model_type"] == config["model_type"]
    again, copied = converters.from_pretrained(tmp_path / "copy")
    assert again == forward
    chex.assert_trees_all_equal(copied, params)


@pytest.mark.torch
@pytest.mark.parametrize("name", ["llama3", "mistral", "qwen2 window", "qwen3"])
def test_transformers_reads_what_is_written(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    forward, params = load(name)
    converters.save_pretrained(forward, params, tmp_path / "copy", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "copy", trust_remote_code=False
    ).eval()
    with torch.no_grad():
        logits = model(
            input_ids=torch.tensor(ARRAYS["tokens"]).long(),
            attention_mask=torch.tensor(MASK).long(),
            position_ids=torch.tensor(np.maximum(POSITIONS, 0)),
        ).logits
    chex.assert_trees_all_close(logits.numpy()[MASK], ARRAYS[f"{name}/logits"][MASK], atol=1e-4)


@pytest.mark.torch
def test_bfloat16_is_as_near_as_in_transformers(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    forward, params = load("qwen2")
    converters.save_pretrained(forward, params, tmp_path)
    tokens = ARRAYS["tokens"][:1]  # without padding

    def theirs(dtype):
        model = transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        with torch.inference_mode():
            return model(torch.tensor(tokens).long()).logits.float().numpy()

    exact = theirs(torch.float32)
    forward, params = converters.from_pretrained(tmp_path, dtype="bfloat16", progress=False)
    ours = np.float32(jax.jit(forward)(params, {}, tokens)[0])
    own, other = (np.linalg.norm(x - exact) for x in (ours, theirs(torch.bfloat16)))
    assert 0 < own < 1.5 * other


def test_tied_checkpoints_may_hold_the_embedding_twice(tmp_path):
    tensors = {key: np.ascontiguousarray(value) for key, value in weights("qwen2").items()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)  # old files
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"]))
    chex.assert_trees_all_equal(converters.from_pretrained(tmp_path)[1], load("qwen2")[1])
    save_file(
        {**tensors, "lm_head.weight": tensors["lm_head.weight"] + 1}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"lm_head\.weight: differs from its copy"):
        converters.from_pretrained(tmp_path)


def test_megrez_has_its_published_size():
    """2.29 billion in the blocks, 2.92 in all; names, shapes and bytes without memory."""
    config = {
        "model_type": "llama",
        "vocab_size": 122880,
        "hidden_size": 2560,
        "intermediate_size": 7168,
        "num_hidden_layers": 32,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "rope_theta": 5e6,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    }
    _, shapes = abstract(Llama, llama.read_config(config))
    assert parameter_count(shapes) == 2_915_207_680
    backbone = parameter_count({"blocks": shapes["blocks"], "norm": shapes["norm"]})
    assert backbone == 2_286_062_080


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": (("factor", 2.0), ("rope_type", "dynamic"))}, "no rotary scaling"),
        ({"rope_scaling": (("rope_type", "llama3"),)}, "lacks 'low_freq_factor'"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"head_dim": 7}, "even head_dim"),
        ({"head_dim": 10**6}, "head_dim must be at most 65536"),
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"window": 4, "window_layers": (True,)}, "all 32 layers"),
        ({"hidden_size": 0}, "hidden_size must be a whole number of at least 1"),
    ],
)
def test_configurations_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**changes)


def test_what_transformers_has_no_class_for_is_named():
    config = LlamaConfig(qk_norm=True, mlp_bias=True)
    with pytest.raises(ValueError, match="no class of transformers has this combination"):
        llama.write_config(config)


def test_unknown_activations_are_named():
    with pytest.raises(ValueError, match="hidden_act='gelu'"):
        llama.read_config({**CONFIGS["llama2"], "hidden_act": "gelu"})


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 32),
        ({"rope_type": "default"}, 32),
        ({"type": "linear", "factor": 4.0}, 128),
        ({"type": "yarn", "factor": 4.0}, 128),
        ({"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}, 32),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8}, 32),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            32,
        ),
    ],
)
def test_the_longest_text_of_a_stretched_rotation(scaling, length):
    described = {**CONFIGS["llama2"], "max_position_embeddings": 32, "rope_scaling": scaling}
    described.pop("rope_parameters", None)
    config = llama.read_config(described)
    assert (config.max_positions, config.max_length) == (32, length)
    assert llama.read_config(llama.write_config(config)) == config


def test_texts_of_the_stretched_length_are_written():
    """Greedily, as the whole forward says; one more token is refused."""
    scaling = (("factor", 2.0), ("rope_type", "linear"))
    subject = testing.tiny_llama(batch=1, max_positions=16, rope_scaling=scaling)
    forward, params, text = subject.forward, subject.params, subject.cond
    run = jax.jit(forward)
    for length in range(20, 24):
        logits = run(params, {}, jnp.pad(text, ((0, 0), (0, 24 - length))))[0]
        text = jnp.append(text, jnp.argmax(logits[:, length - 1], -1)[:, None], axis=1)
    out = generate(forward, params, subject.cond.tolist(), max_new_tokens=4)
    assert out.rows() == text[:, 20:].tolist()
    with pytest.raises(ValueError, match="32"):
        generate(forward, params, subject.cond.tolist(), max_new_tokens=13)


def test_tied_models_may_hold_the_head_alone(tmp_path):
    """As save_model of safetensors leaves them, which keeps the first name; in shards too."""
    want = load("qwen2")[1]
    tensors = {key: np.ascontiguousarray(value) for key, value in weights("qwen2").items()}
    del tensors["model.embed_tokens.weight"]
    files = {"a.safetensors": {}, "b.safetensors": {}}
    for number, name in enumerate(tensors):
        files["ab"[number % 2] + ".safetensors"][name] = tensors[name]
    for name, held in files.items():
        save_file(held, tmp_path / name)
    listed = {name: file for file, held in files.items() for name in held}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["qwen2"]))
    chex.assert_trees_all_equal(converters.from_pretrained(tmp_path)[1], want)
    converters.convert(tmp_path, tmp_path / "copy")
    written = load_file(tmp_path / "copy" / "model.safetensors")
    assert written.keys() == {*tensors, "model.embed_tokens.weight"} - {"lm_head.weight"}
    np.testing.assert_array_equal(written["model.embed_tokens.weight"], tensors["lm_head.weight"])
    untied = {**CONFIGS["qwen2"], "tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(untied))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight: missing"):
        converters.from_pretrained(tmp_path)


def test_linear_scaling_divides_positions():
    plain, one = frequencies(8, 100.0)
    stretched, factor = frequencies(8, 100.0, (("factor", 4.0), ("rope_type", "linear")))
    chex.assert_trees_all_close(stretched * 4, plain)
    assert one == factor == 1.0
