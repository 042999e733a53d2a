"""CLIP's text encoder: parity with transformers in both of its layouts, pooling, configurations."""

import dataclasses
import json
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import converters
import effjax
from converters import clip
from effjax import testing
from effjax.forward import abstract
from effjax.layers.mlp import ACTIVATIONS
from effjax.models.clip import CLIPText, CLIPTextConfig

CONFIG = CLIPTextConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_layers=3,
    num_heads=4,
    max_positions=12,
    end_token=47,
    projection=20,
)
# The end stands at 7, at 3 and twice, from 1 on; the largest token at 2, at 5 and at 0.
IDS = np.array(
    [
        [1, 5, 49, 8, 9, 3, 2, 47, 0, 0],
        [1, 5, 6, 47, 4, 48, 4, 4, 4, 4],
        [49, 47, 3, 2, 47, 5, 5, 5, 49, 5],
    ],
    np.int32,
)
ENDS = {47: [7, 3, 1], 2: [2, 5, 0]}
MASK = np.arange(10) < np.array([8, 4, 10])[:, None]


def model(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    forward, shapes = abstract(CLIPText, config)
    return forward, testing.random_params(shapes)


def run(forward, params, ids, *mask):
    return jax.jit(forward)(params, {}, ids, *mask)[0]


@pytest.mark.torch
@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize(
    ("changes", "masked"),
    [
        ({}, False),
        ({"activation": "gelu", "end_token": 2}, True),
        ({"projection": None}, True),
        ({"projection": None, "end_token": 2}, False),
    ],
)
def test_equals_transformers(changes, masked, prefixed, tmp_path):
    """From the files that it writes, and from those of versions 4 and 5."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    forward, params = model(**changes)
    converters.save_pretrained(forward, params, tmp_path / "clip")
    kind = clip.write_config(forward.config)["architectures"][0]
    theirs = getattr(transformers, kind).from_pretrained(tmp_path / "clip").eval()
    tensors = load_file(tmp_path / "clip" / "model.safetensors")
    if not prefixed:
        tensors = {name.removeprefix("text_model."): value for name, value in tensors.items()}
    prefix = "text_model." if prefixed else ""
    tensors[f"{prefix}embeddings.position_ids"] = np.arange(12)[None]  # as old versions write it
    save_file(tensors, tmp_path / "clip" / "model.safetensors")
    loaded, params = converters.from_pretrained(tmp_path / "clip")
    assert loaded == forward
    own = run(loaded, params, IDS, *([MASK] if masked else []))
    mask = {"attention_mask": torch.tensor(MASK).long()} if masked else {}
    with torch.no_grad():
        out = theirs(torch.tensor(IDS).long(), **mask, output_hidden_states=True)
    pooled = out.text_embeds if forward.config.projection else out.pooler_output
    seen = MASK if masked else np.ones_like(MASK)
    chex.assert_trees_all_close(own.pooled, pooled.numpy(), atol=2e-4)
    chex.assert_trees_all_close(own.last[seen], out.last_hidden_state.numpy()[seen], atol=2e-4)
    assert len(own.states) == len(out.hidden_states) == 4
    for state, want in zip(own.states, out.hidden_states):
        chex.assert_trees_all_close(state[seen], want.numpy()[seen], atol=2e-4)


@pytest.mark.torch
def test_reads_what_transformers_writes(tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(**clip.write_config(CONFIG), bos_token_id=1)
    for kind in (transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection):
        theirs = kind(config).eval()
        theirs.save_pretrained(tmp_path / kind.__name__)
        forward, params = converters.from_pretrained(tmp_path / kind.__name__)
        assert (forward.config.projection is None) == (kind is transformers.CLIPTextModel)
        with torch.no_grad():
            want = theirs(torch.tensor(IDS).long()).last_hidden_state.numpy()
        chex.assert_trees_all_close(run(forward, params, IDS).last, want, atol=2e-4)


@pytest.mark.parametrize("end", ENDS)
def test_the_text_is_pooled_where_it_ends(end):
    forward, params = model(end_token=end, projection=None)
    out = run(forward, params, IDS)
    chex.assert_trees_all_equal(out.pooled, out.last[jnp.arange(3), jnp.array(ENDS[end])])


def test_later_tokens_and_padding_change_nothing():
    forward, params = model()
    out = run(forward, params, IDS)
    cut = run(forward, params, IDS[:, :4])
    chex.assert_trees_all_close(cut.last, out.last[:, :4], atol=1e-5)
    padded = np.concatenate([IDS[:, :2], IDS[:, :1] * 0, IDS[:, 2:]], axis=1)
    changed = padded.copy()
    changed[:, 2] = 7
    mask = np.arange(11)[None] != np.array([[2], [2], [2]])
    one, two = (run(forward, params, ids, mask).last for ids in (padded, changed))
    chex.assert_trees_all_equal(one[:, 3:], two[:, 3:])


def test_half_precision_is_near():
    forward, params = model(dtype="bfloat16")
    exact = run(model()[0], params, IDS)
    out = run(forward, params, IDS)
    assert out.last.dtype == out.pooled.dtype == out.states[0].dtype == jnp.bfloat16
    chex.assert_trees_all_close(np.float32(out.last), exact.last, atol=0.05 * np.ptp(exact.last))


def test_saved_models_come_back(tmp_path):
    forward, params = model()
    effjax.save(tmp_path / "saved", forward, params)
    again, loaded = effjax.load(tmp_path / "saved", progress=False)
    assert again == forward
    chex.assert_trees_all_equal(loaded, params)


def test_activations_are_those_of_their_names():
    x = np.linspace(-4, 4, 33)
    gelu = [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]
    quick = x / (1 + np.exp(-1.702 * x))
    for name, want in (("gelu", gelu), ("quick_gelu", quick)):
        got = ACTIVATIONS[name](jnp.asarray(x, jnp.float32))
        chex.assert_trees_all_close(got, np.asarray(want, np.float32), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"projection": 0}, "projection must be a whole number of at least 1"),
        ({"activation": "relu"}, "quick_gelu.*gelu.*got 'relu'"),
    ],
)
def test_configurations_that_cannot_be(untyped, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_texts_that_are_too_long_are_named():
    forward, params = model()
    with pytest.raises(ValueError, match="texts of 13 tokens are longer than the 12"):
        run(forward, params, np.zeros((1, 13), np.int32))


def test_files_of_the_other_class_are_named(tmp_path):
    converters.save_pretrained(*model(), tmp_path / "clip")
    file = tmp_path / "clip" / "config.json"
    config = json.loads(file.read_text())
    assert clip.read_config(config) == CONFIG
    file.write_text(json.dumps({**config, "architectures": ["CLIPTextModel"]}))
    with pytest.raises(ValueError, match=r"text_projection\.weight: unexpected"):
        converters.from_pretrained(tmp_path / "clip")
