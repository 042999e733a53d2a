"""Pipelines of NAR and NBP: files, images and tokens, commands, errors."""

import json
import re
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.autoregression import NextBlock, NextDiagonal
from effjax.cli import main
from effjax.generate import JacobiDecoding
from effjax.methods import kivi
from effjax.pipelines import NextTokenPipeline
from pallas_kernels import use_implementation


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


def pipeline_of(make):
    subject = make(num_layers=1)
    names = {1: "fox", 4: "dog"}
    return NextTokenPipeline(subject.forward, subject.params, subject.sampler.vae, names=names)


@pytest.fixture(scope="module")
def pipe():
    return pipeline_of(testing.tiny_nar)


def test_released_files_and_an_index_are_a_pipeline(tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference, nar_reference

    torch.save({"model": llamagen_reference.random_codes()}, tmp_path / "vq.pt")
    torch.save({"model": nar_reference.random_model(width=768)}, tmp_path / "c2i.pt")
    index = {"_class_name": "NARPipeline", "transformer": "c2i.pt", "vae": "vq.pt"}
    (tmp_path / "model_index.json").write_text(json.dumps({**index, "image_size": 8}))
    pipe = effjax.pipeline(tmp_path, progress=False)
    assert (type(pipe), pipe.size, pipe.grid) == (NextTokenPipeline, (8, 8, 3), (4, 4))
    assert type(pipe.sampler()) is NextDiagonal
    assert pipe.sampler().calls == 7


@pytest.mark.parametrize(
    ("make", "loop"), [(testing.tiny_nar, NextDiagonal), (testing.tiny_nbp, NextBlock)]
)
def test_images_and_commands(make, loop, tmp_path):
    pipe = pipeline_of(make)
    assert type(pipe.sampler()) is loop
    options = {"key": jax.random.key(0), "progress": False, "guidance_scale": 1.0}
    tokens = pipe([1, "dog"], output_type="tokens", **options)
    assert tokens.shape == (2, 16)
    wanted = loop.logits(pipe.forward, pipe.params, tokens, pipe.conditions([1, 4])[0])
    chex.assert_trees_all_close(pipe.logits(tokens, ["fox", 4]), wanted, atol=1e-5)
    pipe.save(tmp_path / "copy")
    again = effjax.pipeline(tmp_path / "copy", progress=False)
    assert (again.forward, again.family.name) == (
        pipe.forward,
        f"{pipe.forward.model.__name__}Pipeline",
    )
    source, folder, small = (str(tmp_path / name) for name in ("copy", "images", "small"))
    assert main(["sample", source, "--labels", "fox,dog", "--top-k", "3", "-o", folder]) == 0
    assert main(["apply", source, small, "round_to_nearest", "--bits", "w8a8"]) == 0
    assert main(["bench", small, "--labels", "1", "--repeats", "1"]) == 0


def test_bad_input(pipe, tmp_path):
    with pytest.raises(ValueError, match="a NextDiagonal takes no decoder"):
        pipe.sampler(decoder=JacobiDecoding())
    with pytest.raises(ValueError, match="whole images of 16 tokens, got 5"):
        pipe.logits(np.zeros((1, 5), int), 1)
    with pytest.raises(ValueError, match="kivi takes new tokens one by one"):
        pipe.transform(kivi.transform(kivi.KIVIPlan(group=4)))
    pipe.save(tmp_path / "copy")
    index = json.loads((tmp_path / "copy" / "model_index.json").read_text())
    video = testing.tiny_nbp(num_layers=1, frames=2)
    with pytest.raises(ValueError, match="has 8 rows and 4 columns of tokens"):
        NextTokenPipeline(video.forward, video.params, video.sampler.vae)
    index["_class_name"] = "NARTextPipeline"
    (tmp_path / "copy" / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="text_encoder"):
        effjax.pipeline(tmp_path / "copy", progress=False)


@pytest.mark.slow
def test_the_code_of_the_page_runs():
    page = (Path(__file__).parent.parent / "docs" / "raster.md").read_text()
    page = page[page.index("## A diagonal") : page.index("## Several tokens in a call")]
    made = {"jax": jax}
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)), made)
    assert made["logits"].shape == (2, 16, 40)
    assert made["loop"].calls == 3
    chex.assert_trees_all_equal(made["more"][:, :4], made["tokens"][:, :4])
