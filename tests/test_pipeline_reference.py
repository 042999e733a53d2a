"""What compressed pipelines are compared with, and what is said of them."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.cli import main
from effjax.methods import dit_fast_attn, kivi, lora, round_to_nearest
from effjax.pipelines.reference import reference
from tests.test_pipelines import write_pipeline
from tests.test_text_pipeline import write_language_model

QUIET = {"progress": False}
CODES = round_to_nearest.transform(round_to_nearest.uniform(4, 16))


@pytest.fixture
def source(tmp_path):
    write_pipeline(tmp_path / "source")
    return tmp_path / "source"


def bench(capsys, *arguments):
    options = ("--batch", "2", "--repeats", "1", "--json")
    status = main(["bench", *map(str, arguments), *options])
    captured = capsys.readouterr()
    return json.loads(captured.out) if status == 0 else captured.err


def test_the_distance_is_that_to_the_true_source(capsys, source, tmp_path):
    pipe = effjax.pipeline(source, **QUIET)
    small = pipe.transform(CODES)
    small.save(tmp_path / "small")
    sampler, labels = pipe.sampler(num_inference_steps=2), jnp.zeros(2, jnp.int32)
    run = jax.jit(sampler)
    dense, quantized = (
        np.asarray(run(each.forward, each.params, labels, jax.random.key(0)), np.float64)
        for each in (pipe, small)
    )
    truth = 10 * np.log10(4 / np.mean((dense - quantized) ** 2))  # of images in -1 ... 1
    asked = (tmp_path / "small", "--steps", 2, "--labels", "0")
    figures = bench(capsys, *asked)
    assert figures["reference"] == {"kind": "dense", "model": str(source)}
    assert figures["psnr_to_dense"] == pytest.approx(truth, abs=0.1)
    assert figures["dense"]["weight_bytes"] == sum(x.nbytes for x in jax.tree.leaves(pipe.params))

    source.rename(tmp_path / "moved")
    figures = bench(capsys, *asked)  # its own quantized values, as floats
    assert figures["reference"]["kind"] == "dequantized"
    assert f"{source} cannot be loaded" in figures["reference"]["reason"]
    assert figures["psnr_to_dequantized"] > truth + 20
    assert not {"dense", "psnr_to_dense"} & set(figures)
    options = ("--batch", "1", "--repeats", "1")
    assert main(["bench", *map(str, asked), *options]) == 0
    told = capsys.readouterr().out
    assert told.startswith("against dequantized weights")
    assert "dense" not in told

    figures = bench(capsys, *asked, "--reference", tmp_path / "moved")
    assert figures["psnr_to_dense"] == pytest.approx(truth, abs=0.1)
    error = bench(capsys, *asked, "--reference", tmp_path / "small")
    assert "is compressed itself" in error
    write_pipeline(tmp_path / "other", channels=3)
    error = bench(capsys, *asked, "--reference", tmp_path / "other")
    assert "is another model: it differs in in_channels, out_channels" in error


def test_edits_leave_the_weights_as_they_are(source):
    pipe = effjax.pipeline(source, **QUIET)
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=2, tokens=64)
    fast = pipe.transform(dit_fast_attn.transform(plan))
    shutil.rmtree(source)
    found = reference(fast)
    assert (found.kind, found.model) == ("dense", None)
    assert found.pair[0] == pipe.forward
    chex.assert_trees_all_equal(found.pair[1], pipe.params)
    unknown = reference(dataclasses.replace(pipe.transform(CODES), origin=None))
    assert unknown.kind == "dequantized"
    assert "give the model as reference" in unknown.reason


def test_adapters_belong_to_what_was_made_smaller(source):
    """And alone they are compared with the model without them."""
    pipe = effjax.pipeline(source, **QUIET)
    factors = np.ones((16, 2), np.float32), np.ones((2, 16), np.float32)
    styled = pipe.transform(lora.add({"style": {"blocks.0.attn.to_q": factors}}, {"style": 0.5}))
    found = reference(styled.transform(CODES))
    assert found.kind == "dense"
    assert found.pair[0] == styled.forward
    chex.assert_trees_all_equal(found.pair[1], styled.params)
    assert reference(styled).pair[0] == pipe.forward


def test_dtypes_of_a_reference_are_those_of_the_pipeline(source):
    pipe = effjax.pipeline(source, dtype="bfloat16", compute_dtype="float32", **QUIET)
    found = reference(pipe.transform(CODES))
    assert found.pair[0] == pipe.forward
    chex.assert_trees_all_equal(found.pair[1], pipe.params)


def test_language_models_are_compared_with_their_source(tmp_path):
    write_language_model(tmp_path / "source")
    pipe = effjax.pipeline(tmp_path / "source", **QUIET)
    small = pipe.transform(CODES, kivi.transform(kivi.KIVIPlan(group=8)))
    small.save(tmp_path / "small")
    again = effjax.pipeline(tmp_path / "small", **QUIET)
    found = reference(again)
    assert (found.kind, found.model) == ("dense", str(tmp_path / "source"))
    chex.assert_trees_all_equal(found.pair[1], pipe.params)
    shutil.rmtree(tmp_path / "source")
    lost = reference(again)
    assert lost.kind == "dequantized"
    assert lost.pair[0] == pipe.forward


def test_what_is_said_of_saved_language_models(capsys, tmp_path):
    write_language_model(tmp_path / "source")
    pipe = effjax.pipeline(tmp_path / "source", **QUIET)
    pipe.transform(kivi.transform(kivi.KIVIPlan(group=8))).save(tmp_path / "small")
    assert main(["info", str(tmp_path / "small"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["pipeline"] == "TextPipeline"
    assert figures["methods"] == figures["components"]["model"]["methods"] == ["kivi"]
    assert figures["origin"] == {"model": str(tmp_path / "source")}
    assert figures["parameters"] == sum(x.size for x in jax.tree.leaves(pipe.params))
    assert main(["info", str(tmp_path / "small")]) == 0
    assert "methods: kivi" in capsys.readouterr().out
