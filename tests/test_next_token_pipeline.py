"""Pipelines of LlamaGen: two released files, images and tokens, commands, errors."""

import dataclasses
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import effjax
from converters import convert
from effjax import testing
from effjax.autoregression import logits_of, next_token
from effjax.cli import main
from effjax.forward import abstract
from effjax.generate import JacobiDecoding
from effjax.methods import even_steps, kivi, knorm, round_to_nearest
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import NextTokenPipeline, TextNextTokenPipeline, to_pil
from effjax.pipelines.description import describe
from experiments import train_pixart
from pallas_kernels import use_implementation


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Two files in the released layout, with an index that names them."""
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference as reference

    path = tmp_path_factory.mktemp("released")
    torch.save({"model": reference.random_codes()}, path / "vq.pt")
    torch.save({"model": reference.random_model(depth=1, width=768)}, path / "c2i.pt")
    write_index(path)
    return path


def write_index(path, **changes):
    index = {"_class_name": "LlamaGenPipeline", "transformer": "c2i.pt", "vae": "vq.pt"}
    index |= {"image_size": 8, "id2label": {"1": "tench, Tinca tinca"}, **changes}
    index = {name: value for name, value in index.items() if value is not None}
    (path / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_llamagen()
    return NextTokenPipeline(
        subject.forward, subject.params, subject.sampler.vae, names={1: "fox", 4: "dog"}
    )


def test_two_files_and_an_index_are_a_pipeline(released, tmp_path):
    pipe = effjax.pipeline(released, progress=False)
    assert type(pipe) is NextTokenPipeline
    assert (pipe.size, pipe.grid, pipe.index("Tinca tinca")) == ((8, 8, 3), (4, 4), 1)
    figures = describe(released)
    assert figures["components"]["transformer"]["model"] == "LlamaGen"
    assert figures["components"]["vae"]["model"] == "VQModel"
    pipe.save(tmp_path / "again")
    again = effjax.pipeline(tmp_path / "again", progress=False)
    assert (again.forward, again.names, again.vae[0]) == (pipe.forward, pipe.names, pipe.vae[0])
    chex.assert_trees_all_equal((again.params, again.vae[1]), (pipe.params, pipe.vae[1]))
    convert(released, tmp_path / "converted", progress=False)
    again = effjax.pipeline(tmp_path / "converted", progress=False)
    assert (again.forward, again.grid) == (pipe.forward, (4, 4))
    for changes, message in (
        ({"image_size": None}, "must say image_size, in pixels"),
        ({"image_size": 9}, "image_size must be a multiple of 2 pixels"),
        ({"image_size": "8"}, "image_size must be a whole number"),
        ({"vae": "none.pt"}, "has no none.pt, which model_index.json names as its vae: give"),
        ({"vae": "c2i.pt"}, "must be a VQModel, got a LlamaGen"),
    ):
        for file in released.glob("*.pt"):
            (tmp_path / file.name).unlink(missing_ok=True)
            (tmp_path / file.name).symlink_to(file)
        write_index(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            effjax.pipeline(tmp_path, progress=False)


def test_images_tokens_and_back(pipe, tmp_path):
    options = {"key": jax.random.key(0), "progress": False}
    tokens = pipe([1, "dog"], output_type="tokens", **options)
    x = pipe([1, "dog"], output_type="latent", **options)
    chex.assert_trees_all_close(pipe.latents(tokens), x, atol=1e-5)
    images = pipe(["fox", 4], **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 8))] * 2
    drawn = to_pil(pipe.decode(x))
    np.testing.assert_allclose(np.asarray(drawn[1], int), np.asarray(images[1], int), atol=1)
    own = pipe.encode(images)
    assert (own.shape, own.dtype) == ((2, 16), jnp.int32)
    wanted = jax.jit(logits_of)(pipe.forward, pipe.params, tokens, jnp.array([1, 4]))
    chex.assert_trees_all_close(pipe.logits(tokens, ["fox", "dog"]), wanted, atol=1e-5)
    chex.assert_trees_all_close(pipe.logits(tokens[:, :5], [1, 4]), wanted[:, :5], atol=1e-5)

    pipe.save(tmp_path / "copy")
    source, folder = str(tmp_path / "copy"), tmp_path / "images"
    asked = ["sample", source, "--labels", "fox,dog", "--guidance", "4", "--top-k", "3"]
    assert (
        main([*asked, "--guidance-interval", "5", "--temperature", "0.9", "-o", str(folder)]) == 0
    )
    assert sorted(path.name for path in folder.iterdir()) == ["000_fox.png", "001_dog.png"]
    small = str(tmp_path / "small")
    assert main(["apply", source, small, "kivi", "--group", "4"]) == 0
    assert effjax.pipeline(small, progress=False).forward.recipe[0][0] == "kivi"
    assert main(["bench", small, "--labels", "1", "--repeats", "1"]) == 0


def test_commands_take_a_decoder(tmp_path, monkeypatch):
    """The image of a call with the decoder; both models of a measurement use it."""
    subject = testing.tiny_llamagen(grid=2, num_layers=1)
    pipe = NextTokenPipeline(subject.forward, subject.params, subject.sampler.vae)
    source, small, used = str(tmp_path / "copy"), str(tmp_path / "small"), []
    pipe.save(source)
    pipe.transform(round_to_nearest.transform(round_to_nearest.uniform(8, 8))).save(small)

    def noted(loop, decoder, *given, **options):
        used.append(decoder)
        return drafted(loop, decoder, *given, **options)

    drafted = next_token.drafted
    monkeypatch.setattr(next_token, "drafted", noted)
    decoder, options = JacobiDecoding(window=2), {"key": jax.random.key(0), "progress": False}
    asked = ["sample", source, "--labels", "1", "--decoder", "jacobi,window=2"]
    assert main([*asked, "-o", str(tmp_path / "images")]) == 0
    (file,) = (tmp_path / "images").iterdir()
    (image,) = pipe([1], decoder=decoder, **options)
    np.testing.assert_allclose(np.asarray(Image.open(file), int), np.asarray(image, int), atol=1)
    sampled = len(used)
    asked = ["bench", small, "--labels", "1", "--repeats", "1", "--decoder", "jacobi,window=2"]
    assert main(asked) == 0
    assert used == [decoder] * len(used)
    assert len(used) - sampled == 2  # programs of both models


@pytest.fixture(scope="module")
def texts():
    """A model of prompts with a T5 of one layer and a tokenizer of eight tokens at most."""
    subject = testing.tiny_llamagen(caption_channels=12, caption_tokens=8)
    config = T5Config(
        vocab_size=64, hidden_size=12, intermediate_size=24, num_layers=1, num_heads=3, head_dim=4
    )
    forward, shapes = abstract(T5Encoder, config)
    tokenizer = train_pixart.tokenizer()
    tokenizer.model_max_length = 6
    return TextNextTokenPipeline(
        subject.forward,
        subject.params,
        subject.sampler.vae,
        text_encoder=(forward, testing.random_params(shapes, seed=3)),
        tokenizer=tokenizer,
    )


def test_prompts_stand_at_the_right(texts, tmp_path):
    """Conditions by hand; images of the same prompts, alone and together, after a round trip."""
    options = {"key": jax.random.split(jax.random.key(0)), "output_type": "tokens"}
    prompts = ["a red A", "a 7"]
    cond, _ = texts.conditions(prompts)
    read = texts.tokenizer([each.lower() for each in prompts], padding="max_length", max_length=6)
    ids, mask = (np.asarray(read[name]) for name in ("input_ids", "attention_mask"))
    forward, params = texts.text_encoder
    states = np.asarray(forward(params, {}, jnp.asarray(ids), jnp.asarray(mask, bool))[0])
    for row, count in enumerate(mask.sum(axis=1)):
        assert np.asarray(cond.mask[row]).tolist() == [False] * (8 - count) + [True] * count
        np.testing.assert_allclose(cond.states[row, 8 - count :], states[row, :count], atol=1e-5)
        assert not np.asarray(cond.states[row, : 8 - count]).any()
    assert not np.asarray(cond.null).any()
    tokens = texts(prompts, **options)
    texts.save(tmp_path / "copy")
    again = effjax.pipeline(tmp_path / "copy", progress=False)
    assert (type(again), again.family, again.forward) == (
        TextNextTokenPipeline,
        texts.family,
        texts.forward,
    )
    chex.assert_trees_all_equal(
        again(prompts[1:], **{**options, "key": options["key"][1:]}), tokens[1:]
    )
    logits = texts.logits(tokens, prompts)
    assert logits.shape == (2, 16, 40)
    source, folder = str(tmp_path / "copy"), tmp_path / "images"
    assert main(["sample", source, "--prompt", "a red A", "-o", str(folder)]) == 0
    assert [path.name for path in folder.iterdir()] == ["000_a_red_A.png"]
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    index["_class_name"] = "LlamaGenPipeline"
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"conditioned on prompts: .* must name a LlamaGenText"):
        effjax.pipeline(tmp_path / "copy", progress=False)


@pytest.mark.slow
def test_the_code_of_the_page_runs(pipe, tmp_path, monkeypatch):
    """On the tiny model, with the classes of the page."""
    names = {1: "golden retriever"}
    dataclasses.replace(pipe, names=names).save(tmp_path / "llamagen-b")
    page = (Path(__file__).parent.parent / "docs" / "raster.md").read_text()
    page = page[page.index("## LlamaGen") : page.index("## Chameleon")]
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    for old, new in ((', dtype="bfloat16"', ""), ("980", "4"), ("top_k=2000", "top_k=20")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    made = {"effjax": effjax, "jax": jax, "round_to_nearest": round_to_nearest}
    exec(code, made)
    assert (made["logits"].shape[:2], made["tokens"].shape) == ((2, 16), (1, 16))
    assert made["again"].shape == (2, 8, 8, 3)
    assert [name for name, _ in made["small"].forward.recipe] == ["round_to_nearest", "kivi"]


def test_methods_that_do_not_apply_are_refused(pipe, tmp_path, capsys):
    assert pipe.transform(kivi.transform(kivi.KIVIPlan())).forward.patches
    with pytest.raises(ValueError, match="even_steps keeps what a call computed"):
        pipe.transform(even_steps.transform(even_steps.EvenStepsPlan()))
    with pytest.raises(ValueError, match="knorm drops tokens of a prompt"):
        pipe.transform(knorm.transform(knorm.METHOD.plan(ratio=0.5)))
    pipe.save(tmp_path / "copy")
    source, small = str(tmp_path / "copy"), str(tmp_path / "small")
    for command, message in (
        (["apply", source, small, "gptq", "--samples", "1"], "--samples is for language models"),
        (["sample", source, "--labels", "1", "--more-smooth"], "takes no --more-smooth"),
        (["sample", source, "--prompt", "a fox"], "conditioned on classes"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


def test_bad_input(untyped, pipe):
    key = jax.random.key(0)
    for options, message in (
        ({"labels": 5}, "no class 5: a label is 0 ... 4"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"guidance_scale": 1e39}, "guidance_scale must be a finite number of at least 0"),
        ({"guidance_interval": 0}, "guidance_interval must be a whole number"),
        ({"top_k": 41}, r"top_k must be 1 \.\.\. 40"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0"),
        ({"top_k": 0.0}, "top_k must be a whole number of at least 0"),
        ({"top_k": np.False_}, "top_k must be a whole number of at least 0"),
        ({"top_k": np.zeros(2, int)}, "top_k must be a whole number of at least 0"),
        ({"decoder": "jacobi"}, r"a decoder is JacobiDecoding\(...\).* got 'jacobi'"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"output_type": "video"}, "output_type must be one of pil, np, latent, tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"labels": 1, "key": key, **options})
    with pytest.raises(ValueError, match="4 x 4 = 16 tokens, got 6"):
        pipe.latents(np.zeros((1, 6), int))
    with pytest.raises(ValueError, match="an image has 16 tokens, got 17"):
        pipe.logits(np.zeros((1, 17), int), 1)
    with pytest.raises(ValueError, match="tokens of 1 images and 2 labels"):
        pipe.logits(np.zeros((1, 14), int), [1, 2])
