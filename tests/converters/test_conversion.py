"""Whole pipelines in the layouts of diffusers and transformers."""

import json
import shutil

import chex
import jax
import pytest

import converters
import effjax
from effjax.methods import dit_fast_attn, kivi, round_to_nearest
from effjax.pipelines import TextPipeline
from tests.test_pipelines import write_pipeline, write_text_pipeline
from tests.test_text_pipeline import write_language_model

QUIET = {"progress": False}


@pytest.fixture(params=["images", "latents", "prompts"])
def pipeline(request, tmp_path):
    path = tmp_path / "source"
    if request.param == "prompts":
        write_text_pipeline(path)
    else:
        latents = request.param == "latents"
        write_pipeline(path, vae=latents, channels=4 if latents else 1)
    return path


def components(pipe):
    return [pipe.params, pipe.vae and pipe.vae[1], getattr(pipe, "text_encoder", (0, None))[1]]


def test_every_component_is_converted_or_copied(pipeline, tmp_path):
    report = converters.convert(pipeline, tmp_path / "half", dtype="bfloat16", **QUIET)
    wide, half = (effjax.pipeline(path, **QUIET) for path in (pipeline, tmp_path / "half"))
    expected = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), components(wide))
    chex.assert_trees_all_equal(components(half), expected)
    assert half.scheduler == wide.scheduler
    assert getattr(half, "names", None) == getattr(wide, "names", None)
    index = json.loads((tmp_path / "half" / "model_index.json").read_text())
    assert index["_class_name"] == report["pipeline"]
    for name, written in report["components"].items():
        assert index[name][1] == written["model"]
        assert written["destination"] == str(tmp_path / "half" / name)
    assert report["bytes"] == 2 * report["parameters"]


def test_what_was_saved_without_methods_goes_back(pipeline, tmp_path):
    pipe = effjax.pipeline(pipeline, **QUIET)
    pipe.save(tmp_path / "saved")
    converters.convert(tmp_path / "saved", tmp_path / "back", **QUIET)
    again = effjax.pipeline(tmp_path / "back", **QUIET)
    chex.assert_trees_all_equal(components(again), components(pipe))
    assert not list((tmp_path / "back").rglob("recipe.json"))
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert (
        index["_class_name"]
        == json.loads((pipeline / "model_index.json").read_text())["_class_name"]
    )


def test_methods_that_other_layouts_do_not_have(tmp_path):
    write_pipeline(tmp_path / "source")
    pipe = effjax.pipeline(tmp_path / "source", **QUIET)
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=2, tokens=64)
    pipe.transform(dit_fast_attn.transform(plan)).save(tmp_path / "fast")
    with pytest.raises(ValueError, match="compressed by dit_fast_attn, which other layouts do not"):
        converters.convert(tmp_path / "fast", tmp_path / "new", **QUIET)
    (tmp_path / "source" / "transformer" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="no converter for"):
        converters.convert(tmp_path / "source", tmp_path / "new", **QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast", "source"]


def test_a_language_model_takes_its_tokenizer_along(tmp_path):
    write_language_model(tmp_path / "source")
    pipe = effjax.pipeline(tmp_path / "source", **QUIET)
    qvalues = round_to_nearest.transform(round_to_nearest.uniform(8, 16))
    pipe.transform(qvalues).save(tmp_path / "saved")
    for source in ("source", "saved"):
        converters.convert(tmp_path / source, tmp_path / f"{source}-new", **QUIET)
        again = effjax.pipeline(tmp_path / f"{source}-new", **QUIET)
        assert isinstance(again, TextPipeline)
        assert again.settings == pipe.settings
        assert again.encode("a b c") == pipe.encode("a b c")
    held = (tmp_path / "saved-new" / "config.json").read_text()
    assert "compressed-tensors" in held  # quantized values are exported as quantized values
    pipe.transform(kivi.transform(kivi.KIVIPlan(group=8))).save(tmp_path / "small")
    with pytest.raises(ValueError, match="compressed by kivi"):
        converters.convert(tmp_path / "small", tmp_path / "new", **QUIET)


def test_ends_in_config_json_are_kept(tmp_path):
    write_language_model(tmp_path / "source")
    settings = tmp_path / "source" / "generation_config.json"
    settings.write_text('{"max_new_tokens": 3}')
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps(config | {"eos_token_id": [3, 4]}))
    converters.convert(tmp_path / "source", tmp_path / "new", **QUIET)
    pipe = effjax.pipeline(tmp_path / "new", **QUIET)
    assert (list(pipe.ends), pipe.settings["max_new_tokens"]) == ([3, 4], 3)
    settings.unlink()
    converters.convert(tmp_path / "source", tmp_path / "again", **QUIET)
    assert list(effjax.pipeline(tmp_path / "again", **QUIET).ends) == [3, 4]


def test_variants_of_components(tmp_path):
    write_text_pipeline(tmp_path / "source")
    folder = tmp_path / "source" / "transformer"
    stem = "diffusion_pytorch_model"
    shutil.copy(folder / f"{stem}.safetensors", folder / f"{stem}.fp16.safetensors")
    converters.convert(tmp_path / "source", tmp_path / "new", variant="fp16", **QUIET)
    assert effjax.pipeline(tmp_path / "new", **QUIET).forward.config.param_dtype == "float32"
    with pytest.raises(ValueError, match="has a variant 'int8'"):
        converters.convert(tmp_path / "source", tmp_path / "other", variant="int8", **QUIET)
    with pytest.raises(ValueError, match="give subfolder="):
        converters.convert(tmp_path / "source", tmp_path / "other", layout="diffusers", **QUIET)
    assert not (tmp_path / "other").exists()
