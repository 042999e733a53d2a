"""A new family of pipelines is its model files, their converters and one entry: nothing else."""

import dataclasses
import functools
import importlib
import json
import re
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import converters
import effjax
import effjax.models
from converters import family as converter_families
from effjax import registry, testing
from effjax.cli import main
from effjax.forward import abstract
from effjax.methods import round_to_nearest
from effjax.methods.quantization.round_to_nearest import RoundToNearestPlan
from effjax.models.clip import CLIPText, CLIPTextConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import TextToVideoPipeline, diffusion, families
from effjax.pipelines.card import model_card
from effjax.pipelines.description import describe, lines
from effjax.pipelines.family import decode_frames, zeros_like
from effjax.samplers import FlowMatchEuler
from experiments import train_pixart

ROOT = Path(__file__).parent
PAGE = ROOT.parent / "docs" / "pipelines.md"
QUIET = {"progress": False}
ASKED = {"key": jax.random.key(0), "num_inference_steps": 2, **QUIET}


def entry_of_the_page():
    """The entry that docs/pipelines.md shows."""
    marked = r'```python title="effjax/pipelines/families/tiny_video.py"\n(.*?)```'
    (code,) = re.findall(marked, PAGE.read_text(), flags=re.DOTALL)
    return code


def forget_families():
    for table in (registry.models, converter_families.families, families.table):
        table.cache_clear()


@pytest.fixture(scope="module")
def modules(tmp_path_factory):
    """The family's files beside effjax's own: its models, as modules."""
    entries = tmp_path_factory.mktemp("families")
    (entries / "tiny_video.py").write_text(entry_of_the_page())
    beside = {
        effjax.models: ROOT / "tiny_video" / "models",
        converters: ROOT / "tiny_video" / "converters",
        families: entries,
    }
    for package, folder in beside.items():
        package.__path__.append(str(folder))
    forget_families()
    yield [importlib.import_module(f"effjax.models.tiny_video{end}") for end in ("", "_vae")]
    for package, folder in beside.items():
        package.__path__.remove(str(folder))
    for name in [name for name in sys.modules if ".tiny_video" in name]:
        if not name.startswith("tests."):
            del sys.modules[name]
    forget_families()


def random(model, config, seed):
    forward, shapes = abstract(model, config)
    return forward, testing.random_params(shapes, seed=seed)


@pytest.fixture(scope="module")
def parts(modules):
    """Models of random weights, by the names of the components."""
    denoiser, vae = (module.MODEL for module in modules)
    clip = CLIPTextConfig(
        vocab_size=64,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=2,
        max_positions=8,
        end_token=1,
        projection=5,
    )
    t5 = T5Config(
        vocab_size=64, hidden_size=12, intermediate_size=24, num_layers=1, num_heads=3, head_dim=4
    )
    return {
        "transformer": random(denoiser, denoiser.Config(), 0),
        "text_encoder": random(CLIPText, clip, 1),
        "text_encoder_2": random(T5Encoder, t5, 2),
        "vae": random(vae, vae.Config(), 3),
    }


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    """A directory as diffusers writes it."""
    from transformers import CLIPImageProcessor

    path = tmp_path_factory.mktemp("video") / "source"
    index = {"_class_name": "TinyVideoPipeline", "scheduler": ["diffusers", "FlowMatchEuler"]}
    for name, pair in parts.items():
        converters.save_pretrained(*pair, path / name)
        index[name] = ["diffusers", pair[0].model.__name__]
    for name in ("tokenizer", "tokenizer_2"):
        train_pixart.tokenizer().save_pretrained(path / name)
        index[name] = ["transformers", "PreTrainedTokenizerFast"]
    CLIPImageProcessor(crop_size=8).save_pretrained(path / "feature_extractor")
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler").mkdir()
    (path / diffusion.SCHEDULER).write_text(json.dumps(FlowMatchEuler(4, shift=3.0).to_config()))
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return effjax.pipeline(folder, **QUIET)


@functools.cache
def tokens(prompt, length):
    read = train_pixart.tokenizer()(prompt, padding="max_length", max_length=length)
    return jnp.array([read["input_ids"]], jnp.int32), jnp.array([read["attention_mask"]], bool)


def condition_by_hand(parts, prompt):
    ids, _ = tokens(prompt, 8)
    pooled = parts["text_encoder"][0](parts["text_encoder"][1], {}, ids)[0].pooled
    ids, mask = tokens(prompt, 10)  # the tokenizer's own limit is below the entry's 12
    states = parts["text_encoder_2"][0](parts["text_encoder_2"][1], {}, ids, mask)[0]
    return {"pooled": pooled, "states": states * mask[..., None].astype(jnp.float32)}


def decoded_by_hand(params, latents):
    z = np.asarray(latents) * np.array([2.0, 0.5]) + np.array([0.5, -0.25])
    frames = z[:, [0, 1, 1, 2, 2]].repeat(2, axis=2).repeat(2, axis=3)
    kernel, bias = (np.asarray(params["out"][name], np.float64) for name in ("kernel", "bias"))
    return np.tanh(frames @ kernel + bias)


def test_a_video_is_what_the_formulas_say(parts, pipe):
    assert isinstance(pipe, TextToVideoPipeline)
    assert repr(pipe).startswith("TextToVideoPipeline(TinyVideo, ")
    video = pipe("a red A", negative_prompt="a blue 7", output_type="np", **ASKED)
    assert (video.shape, video.dtype) == ((1, 5, 8, 8, 3), np.float32)
    noise = jax.random.normal(jax.random.key(1), (1, 3, 4, 4, 2))
    latents = pipe("a red A", negative_prompt="a blue 7", latents=noise, **ASKED | LATENT)
    # Trailing steps, shifted by 3: sigma = 1, 3/4, 0; guided by the entry's 3.
    forward, params = parts["transformer"]
    cond, uncond = (condition_by_hand(parts, each) for each in ("a red a", "a blue 7"))
    x = noise
    for sigma, following in ((1.0, 0.75), (0.75, 0.0)):
        time = jnp.full(1, 1000 * sigma)
        towards, away = (forward(params, {}, x, time, each)[0] for each in (cond, uncond))
        x = x + (following - sigma) * (away + 3.0 * (towards - away))
    chex.assert_trees_all_close(latents, x, atol=1e-4)
    expected = decoded_by_hand(parts["vae"][1], latents)
    chex.assert_trees_all_close(np.asarray(pipe.decode(latents)), expected, atol=1e-5)


LATENT = {"output_type": "latent"}


def test_it_is_saved_whole_and_goes_back(pipe, folder, tmp_path):
    eight = round_to_nearest.transform(RoundToNearestPlan(((".*", 8, 16),)))
    for name, own in {"plain": pipe, "small": pipe.transform(eight)}.items():
        own.save(tmp_path / name)
        again = effjax.pipeline(tmp_path / name, **QUIET)
        assert (type(again), again.family, again.forward) == (
            TextToVideoPipeline,
            pipe.family,
            own.forward,
        )
        images, same = own("a red A", **ASKED), again("a red A", **ASKED)
        assert (len(same), len(same[0]), same[0][0].size) == (1, 5, (8, 8))
        chex.assert_trees_all_equal(np.stack(images[0]), np.stack(same[0]))
        assert again.processors["feature_extractor"].crop_size == {"height": 8, "width": 8}
    converters.convert(tmp_path / "plain", tmp_path / "back", **QUIET)
    again = effjax.pipeline(tmp_path / "back", **QUIET)
    chex.assert_trees_all_equal(again.params, pipe.params)
    index, first = (
        json.loads((path / "model_index.json").read_text()) for path in (tmp_path / "back", folder)
    )
    assert (index.keys(), index["_class_name"]) == (first.keys(), first["_class_name"])


def test_sizes_and_prompts_of_its_own(pipe):
    videos = pipe(["a A", "a 7 " * 4], height=4, width=12, num_frames=3, **ASKED | LATENT)
    assert videos.shape == (2, 2, 2, 6, 2)
    drawn = pipe("a A", num_frames=1, num_videos_per_prompt=2, **ASKED)
    assert [len(each) for each in drawn] == [1, 1]
    with pytest.raises(ValueError, match=r"latents of 2 frames.*: 1, 3, 5, \.\.\.; got 4"):
        pipe("a A", num_frames=4, **ASKED)
    with pytest.raises(ValueError, match=r"multiples of 4 pixels.*got 6 x 8"):
        pipe("a A", height=6, **ASKED)
    # CLIP's eight tokens are cut, T5's ten are all read, and more of them are an error.
    short, long = pipe.encode(["a " * 8]), pipe.encode(["a " * 9])
    chex.assert_trees_all_equal(short["pooled"], long["pooled"])
    assert np.abs(short["states"] - long["states"]).max() > 0
    with pytest.raises(ValueError, match="a prompt has 11 tokens, this model reads 10"):
        pipe("a " * 10, **ASKED)


def test_components_that_may_be_missing_and_those_that_may_not(pipe, parts, folder, tmp_path):
    bare = dataclasses.replace(pipe, text_encoder_2=None, tokenizer_2=None)
    assert not bare.encode(["a A"])["states"].any()
    bare.save(tmp_path / "bare")
    again = effjax.pipeline(tmp_path / "bare", **QUIET)
    assert again.text_encoder_2 is None
    chex.assert_trees_all_equal(again("a A", **ASKED | LATENT), bare("a A", **ASKED | LATENT))
    other = parts["text_encoder_2"]
    with pytest.raises(ValueError, match="has no tokenizer 2: give one"):
        effjax.pipeline(tmp_path / "bare", text_encoder_2=other, **QUIET)
    tokenizer = train_pixart.tokenizer()
    given = {"text_encoder_2": other, "tokenizer_2": tokenizer, **QUIET}
    whole = effjax.pipeline(tmp_path / "bare", **given)
    chex.assert_trees_all_close(whole.encode(["a A"]), pipe.encode(["a A"]), atol=1e-6)
    with pytest.raises(ValueError, match="a TinyVideoPipeline needs its text_encoder"):
        dataclasses.replace(pipe, text_encoder=None)
    with pytest.raises(ValueError, match="a TinyVideoPipeline has no text_encoder_3"):
        dataclasses.replace(pipe, text_encoder_3=other)
    with pytest.raises(TypeError, match=r"unknown arguments text_encoder_4; components that can"):
        effjax.pipeline(folder, text_encoder_4=other)


def test_it_is_described(pipe, folder):
    figures = describe(folder)
    assert (figures["pipeline"], figures["becomes"]) == ("TinyVideoPipeline", "TextToVideoPipeline")
    assert list(figures["components"]) == ["transformer", "text_encoder", "text_encoder_2", "vae"]
    assert figures["beside"] == dict.fromkeys(
        ["tokenizer", "tokenizer_2", "feature_extractor"], True
    )
    assert any("feature_extractor: there" in line for line in lines(figures))
    card = model_card(pipe, "tiny")
    assert "of effjax (`TinyVideoPipeline`)" in card
    assert "| text_encoder_2 | `T5Encoder` | " in card
    assert "Beside them: tokenizer, tokenizer_2, feature_extractor, scheduler." in card


def test_the_command_line_makes_videos(folder, tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--prompt", "a A", "--steps", "2", "-o", str(out)]
    assert main(["sample", str(folder), *asked]) == 0
    with Image.open(out / "000_a_A.gif") as video:
        assert (video.n_frames, video.size) == (3, (8, 8))  # PIL lets equal frames last longer
    assert "000_a_A.gif" in capsys.readouterr().out


def changed(pipe, **fields):
    return dataclasses.replace(pipe, family=dataclasses.replace(pipe.family, **fields))


def with_guidance(condition, scale, config):
    return {**condition, "guidance": jnp.full(len(condition["pooled"]), scale, config.dtype)}


def test_conditions_and_outputs_as_other_families_have_them(pipe, parts):
    """A guidance scale that the model reads, negative conditions of zeros, frames one by one."""
    noise = jax.random.normal(jax.random.key(1), (1, 3, 4, 4, 2))
    options = {**ASKED, **LATENT, "latents": noise}
    distilled = changed(pipe, embed_guidance=with_guidance)
    sampler = distilled.sampler(num_inference_steps=2, guidance_scale=2.0)
    assert not sampler.guided
    cond = with_guidance(condition_by_hand(parts, "a a"), 2.0, pipe.forward.config)
    expected = sampler(pipe.forward, pipe.params, cond, jax.random.key(0), noise=noise)
    chex.assert_trees_all_close(
        distilled("a A", guidance_scale=2.0, **options), expected, atol=1e-4
    )

    zeros = changed(pipe, negative=zeros_like)
    cond, uncond = zeros.conditions(["a A", "a 7"], negative_prompt=[None, "a 7"])
    assert not uncond["pooled"][0].any()
    chex.assert_trees_all_equal(uncond["pooled"][1], cond["pooled"][1])

    def double(params, state, latents):  # in the place of a VAE of images
        assert latents.shape == (6, 4, 4, 2)
        return latents.repeat(2, axis=1).repeat(2, axis=2), state

    frames = decode_frames(double, {}, jnp.concatenate([noise, -noise]))
    chex.assert_trees_all_equal(frames[1, 2], -noise[0, 2].repeat(2, axis=0).repeat(2, axis=1))


def test_two_entries_of_one_name(modules, tmp_path, monkeypatch):
    (tmp_path / "again.py").write_text(entry_of_the_page())
    monkeypatch.setattr(families, "__path__", [*families.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match="two entries are named 'TinyVideoPipeline'"):
        families.table.__wrapped__()
    sys.modules.pop("effjax.pipelines.families.again", None)
