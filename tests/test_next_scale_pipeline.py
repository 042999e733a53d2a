"""Pipelines of VAR: two released files, images and tokens, commands, errors."""

import dataclasses
import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from converters import convert
from effjax import testing
from effjax.autoregression import teacher_forced
from effjax.cli import main
from effjax.pipelines import NextScalePipeline, to_pil
from effjax.pipelines.description import describe


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Two files in the released layout, with an index that names them."""
    torch = pytest.importorskip("torch")
    from tests.models import var_reference as reference

    path = tmp_path_factory.mktemp("released")
    torch.save(reference.random_vae(widths=(32, 32, 32, 32, 32)), path / "vae.pth")
    torch.save(reference.random_var(width=16, heads=2), path / "var.pth")
    torch.save(reference.random_var(width=16, heads=2, vocabulary=41), path / "other.pth")
    write_index(path)
    return path


def write_index(path, **changes):
    index = {"_class_name": "VARPipeline", "transformer": "var.pth", "vae": "vae.pth"}
    index |= {"id2label": {"1": "tench, Tinca tinca"}, **changes}
    (path / "model_index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_var()
    return NextScalePipeline(
        subject.forward, subject.params, subject.sampler.vae, names={1: "fox", 4: "dog"}
    )


def test_two_files_and_an_index_are_a_pipeline(released, tmp_path):
    pipe = effjax.pipeline(released, progress=False)
    assert type(pipe) is NextScalePipeline
    assert (pipe.size, pipe.index("Tinca tinca")) == ((256, 256, 3), 1)
    figures = describe(released)
    assert figures["components"]["transformer"]["model"] == "VAR"
    assert figures["components"]["vae"]["parameters"] == 456_885
    convert(released, tmp_path / "again", progress=False)
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["vae"] == ["effjax", "VQVAE"]
    again = effjax.pipeline(tmp_path / "again", progress=False)
    assert (again.forward, again.names, again.vae[0]) == (pipe.forward, pipe.names, pipe.vae[0])
    chex.assert_trees_all_equal((again.params, again.vae[1]), (pipe.params, pipe.vae[1]))


def test_other_files_are_refused(released, tmp_path):
    for changes, message in (
        ({"vae": "none.pth"}, "has no none.pth, which model_index.json names as its vae: give"),
        ({"refiner": "none.pth"}, "has no none.pth, which .* names as its refiner: give one"),
        ({"transformer": "none.pth"}, "names as its transformer: put it there"),
        ({"vae": "../vae.pth"}, "vae must be .* the name of a weight file beside it"),
        ({"vae": 3}, r"model_index\.json: vae must be"),
        (
            {"transformer": "other.pth"},
            "has 40 codes of 6 channels, and the model predicts 41 of 6",
        ),
    ):
        for file in released.glob("*.pth"):
            (tmp_path / file.name).unlink(missing_ok=True)
            (tmp_path / file.name).symlink_to(file)
        write_index(tmp_path, **changes)
        with pytest.raises(ValueError, match=message):
            effjax.pipeline(tmp_path, progress=False)
    with pytest.raises(ValueError, match="one file of a pipeline: give its directory"):
        effjax.pipeline(released / "var.pth")


def test_images_tokens_and_back(pipe, tmp_path):
    options = {"key": jax.random.key(0), "progress": False}
    images = pipe(["fox", 4], **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (6, 6))] * 2
    tokens = pipe([1, "dog"], output_type="tokens", **options)
    x = pipe([1, "dog"], output_type="latent", **options)
    chex.assert_trees_all_close(pipe.latents(tokens), x, atol=1e-5)
    drawn = to_pil(pipe.decode(x))
    np.testing.assert_allclose(np.asarray(drawn[1], int), np.asarray(images[1], int), atol=1)
    # Encoded again, images are other tokens of the same number.
    own = pipe.encode(images)
    assert (own.shape, own.dtype) == ((2, 14), jnp.int32)
    chex.assert_trees_all_equal(own[1:], pipe.encode(np.asarray(images[1])))
    wanted = jax.jit(teacher_forced)(pipe.forward, pipe.params, pipe.vae, tokens, jnp.array([1, 4]))
    chex.assert_trees_all_close(pipe.logits(tokens, ["fox", "dog"]), wanted, atol=1e-5)

    pipe.save(tmp_path / "copy")
    again = effjax.pipeline(tmp_path / "copy", progress=False)
    assert (again.forward, again.names) == (pipe.forward, pipe.names)
    assert len(again("fox", num_images_per_prompt=2, **options)) == 2
    # Commands: the same program with other numbers.
    source, folder = str(tmp_path / "copy"), str(tmp_path / "images")
    asked = ["sample", source, "--labels", "fox,dog", "--guidance", "4", "--top-p", "0.5"]
    assert main([*asked, "-o", folder]) == 0
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "000_fox.png",
        "001_dog.png",
    ]
    small = str(tmp_path / "small")
    assert main(["apply", source, small, "round_to_nearest", "--bits", "w8a16"]) == 0
    assert effjax.pipeline(small, progress=False).forward.recipe[0][0] == "round_to_nearest"


@pytest.mark.slow
def test_the_code_of_the_page_runs(pipe, tmp_path, monkeypatch):
    """On the tiny model, with the classes of the page."""
    names = {1: "golden retriever"}
    dataclasses.replace(pipe, names=names).save(tmp_path / "var-d16")
    page = (Path(__file__).parent.parent / "docs" / "visual-ar.md").read_text()
    page, _, _ = page.partition("## All tokens")  # the tests of other loops run the rest
    code = "\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL))
    for old, new in ((', dtype="bfloat16"', ""), ("980", "4")):
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    made = {}
    exec(code, made)
    assert len(made["clear"]) == 2
    assert (made["tokens"].shape, made["coarse"].shape) == ((2, 14), (2, 6, 6, 3))
    assert (tmp_path / "var-d16-w8a8" / "model_index.json").is_file()


def test_options_that_are_not_there(pipe, tmp_path, capsys):
    pipe.save(tmp_path / "copy")
    source = str(tmp_path / "copy")
    for wrong, message in (
        (["--steps", "4"], "takes no --steps: leave it out. It takes --guidance, --top-k"),
        (["--top-k", "9999"], "top_k must be 1 ... 40"),
        (["--strength", "0.5"], "changes no images: leave out --image and --strength"),
        (["--negative-prompt", "x"], "conditioned on classes: leave out --negative-prompt"),
    ):
        assert main(["sample", source, "--labels", "1", *wrong, "-o", f"{tmp_path}/new"]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    assert main(["generate", source, "--prompt", "fox"]) == 1
    assert "use `effjax sample`" in capsys.readouterr().err


def test_numbers_may_be_arrays(untyped, pipe):
    for read, given, expected in (
        (jnp.asarray, [1.0, 0.5, 2.0], (1.0, 0.5, 2.0)),
        (np.asarray, [1.0, 0.5, 2.0], (1.0, 0.5, 2.0)),
        (jnp.asarray, 0.5, 0.5),
        (np.asarray, 0.5, 0.5),
    ):
        assert pipe.sampler(temperature=read(given)).temperature == expected
    loop = pipe.sampler(guidance_scale=np.asarray(2.0), top_k=jnp.asarray(3), top_p=np.float64(1))
    assert (loop.guidance, loop.top_k, loop.top_p) == (2.0, 3, None)


def test_bad_input(untyped, pipe):
    key = jax.random.key(0)
    for options, message in (
        ({"labels": 5}, "no class 5: a label is 0 ... 4"),
        ({"labels": []}, "labels is empty"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"top_k": 41}, r"top_k must be 1 \.\.\. 40"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": [1.0, 1.0]}, "temperature is one number, or one for each of 3 scales"),
        ({"temperature": "111"}, "temperature must be a finite number of at least 0, got '111'"),
        ({"temperature": np.ones((3, 1))}, "temperature must be a finite number of at least 0"),
        ({"top_k": -1}, "top_k must be a whole number of at least 0, got -1"),
        ({"top_k": 0.0}, "top_k must be a whole number of at least 0, got 0.0"),
        ({"more_smooth": "no"}, "more_smooth must be True or False, got 'no'"),
        ({"output_type": "video"}, "output_type must be one of pil, np, latent, tokens"),
        ({"output_type": "tokens", "more_smooth": True}, "no tokens stand for the images"),
        ({"callback_on_step_end": 3}, "must be a function of a step and latents"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"labels": 1, "key": key, **options})
    with pytest.raises(TypeError, match="key must come from"):
        pipe(1, key=0)
    for tokens, message in (
        (np.zeros((1, 6), int), "whole scales are 1, 5, 14; got 6"),
        (np.full((1, 14), 40), r"codes 0 \.\.\. 39, got 40"),
        (np.zeros(14, int), r"whole numbers \[images, L\]"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.latents(tokens)
    with pytest.raises(ValueError, match="tokens of 1 images and 2 labels"):
        pipe.logits(np.zeros((1, 14), int), [1, 2])
    with pytest.raises(ValueError, match="images must be a PIL image or an array"):
        pipe.encode(np.zeros((8, 8, 3), np.uint8))
