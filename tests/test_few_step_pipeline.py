"""Pipelines of students: made of a pipeline of VAR, saved and loaded, in a few calls, commands."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.cli import main
from effjax.methods import distilled_decoding, round_to_nearest
from effjax.methods.distillation.distilled_decoding import DistilledPlan
from effjax.pipelines import FewStepPipeline, NextScalePipeline, NextTokenPipeline
from effjax.pipelines.reference import reference

PLAN = DistilledPlan((0, 2), split=3)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A pipeline of VAR, from its folder."""
    subject = testing.tiny_var()
    path = tmp_path_factory.mktemp("pipelines") / "teacher"
    pair = subject.forward, subject.params
    NextScalePipeline(*pair, subject.sampler.vae, names={1: "fox", 4: "dog"}).save(path)
    return effjax.pipeline(path, progress=False)


@pytest.fixture(scope="module")
def pipe(teacher):
    return teacher.transform(distilled_decoding.transform(PLAN))


def test_a_transform_makes_the_pipeline_of_the_student(teacher, pipe, tmp_path):
    assert type(pipe) is FewStepPipeline
    assert (pipe.names, pipe.origin, pipe.patch_nums) == (teacher.names, teacher.origin, (1, 2, 3))
    chex.assert_trees_all_equal(pipe.vae[1], teacher.vae[1])
    small = pipe.transform(round_to_nearest.transform(round_to_nearest.uniform(8, 16)))
    small.save(tmp_path / "small")
    index = json.loads((tmp_path / "small" / "model_index.json").read_text())
    assert (index["_class_name"], index["transformer"][1]) == (
        "DistilledVARPipeline",
        "DistilledVAR",
    )
    again = effjax.pipeline(tmp_path / "small", progress=False)
    assert (type(again), again.forward, again.names) == (FewStepPipeline, small.forward, pipe.names)
    chex.assert_trees_all_equal(again.params, small.params)
    assert [name for name, _ in again.forward.recipe] == ["distilled_decoding", "round_to_nearest"]
    # It is compared with the model that it was made of, which has another loop.
    found = reference(again)
    assert (found.kind, found.pair[0].model.__name__) == ("dense", "VAR")
    chex.assert_trees_all_equal(found.pair[1], teacher.params)
    with pytest.raises(
        ValueError, match="is compared with the model that it was made of, and what"
    ):
        reference(effjax.pipelines.FewStepPipeline(pipe.forward, pipe.params, pipe.vae))


def test_images_of_a_few_calls(teacher, pipe):
    options = {"key": jax.random.key(0), "progress": False}
    images = pipe(["fox", 4], **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (6, 6))] * 2
    x, watched = pipe(["fox", 4], output_type="latent", **options), []
    cond, loop = pipe.conditions(["fox", 4])[0], pipe.sampler()
    again, near = loop.stepwise(
        pipe.forward,
        pipe.params,
        cond,
        options["key"],
        watch=lambda call, states: watched.append((call, len(states))),
    )
    chex.assert_trees_all_close(again, x, atol=1e-6)
    assert watched == [(0, 1), (1, 1)]
    tokens = pipe(["fox", 4], output_type="tokens", **options)
    chex.assert_trees_all_equal(near, tokens)
    chex.assert_trees_all_close(pipe.latents(tokens), x, atol=1e-5)  # all of them are codes
    one = pipe(["fox", 4], output_type="tokens", num_inference_steps=1, **options)
    chex.assert_trees_all_equal(one[:, :5], tokens[:, :5])
    assert (one[:, 5:] != tokens[:, 5:]).any()
    between = {"teacher": teacher, "output_type": "tokens", **options}
    mixed = pipe(["fox", 4], teacher_start=1, **between)
    chex.assert_trees_all_equal(mixed[:, :1], tokens[:, :1])
    drawn = teacher(["fox", 4], output_type="tokens", **options)
    last = pipe(["fox", 4], teacher_start=0, **between)
    chex.assert_trees_all_equal(last[:, :5], drawn[:, :5])


def _teacher(**options):
    subject = testing.tiny_var(**options)
    return NextScalePipeline(subject.forward, subject.params, subject.sampler.vae)


def test_bad_input(untyped, teacher, pipe):
    key, raster = jax.random.key(0), testing.tiny_llamagen()
    tokens = NextTokenPipeline(raster.forward, raster.params, raster.sampler.vae)
    for wrong, message in (
        ({"num_inference_steps": 3}, r"calls that start at \(0, 2\): .* 1 ... 2, got 3"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"teacher_start": 1}, "give teacher= too"),
        ({"teacher": teacher, "teacher_start": 2}, r"start is 0 ... t - 1; got 2"),
        ({"teacher": teacher, "num_inference_steps": 1}, "between two calls"),
        ({"teacher": teacher, "teacher_start": 1.0}, "teacher_start must be a whole number"),
        ({"teacher": teacher, "teacher_start": True}, "teacher_start must be a whole number"),
        ({"teacher": "var-d16"}, "teacher is the pipeline of the model .*, got a str"),
        ({"teacher": pipe}, "teacher is the pipeline of the model .*, got a FewStepPipeline"),
        ({"teacher": tokens}, "sampled by a NextScale, got a NextToken"),
        ({"teacher": _teacher(num_classes=9)}, "'classes': 5, .* the teacher {'classes': 9"),
        ({"teacher": _teacher(patch_nums=(1, 1, 2))}, r"'maps': \(1, 2, 3\).*\(1, 1, 2\)"),
        ({"teacher": teacher.with_refiner(teacher)}, "without a refiner"),
        ({"output_type": "gif"}, "output_type must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe("fox", key=key, **wrong)
    with pytest.raises(
        ValueError, match="made of a VAR or a LlamaGen without other methods, got a Dist"
    ):
        pipe.transform(distilled_decoding.transform(PLAN))


def test_commands(teacher, tmp_path, capsys):
    source, small = teacher.origin.model, str(tmp_path / "small")
    asked = ["--starts", "0,2", "--split", "2", "--steps", "2", "--pairs", "64", "--batch", "4"]
    drawn = ["--guidance", "2", "--top-k", "8", "--solver-steps", "5"]
    folder = ["--checkpoints", str(tmp_path / "training")]
    with pytest.raises(SystemExit):
        main(["apply", source, small, "distilled_decoding", *asked[:4]])
    assert "is nothing before it is trained; use `effjax fit`" in capsys.readouterr().err
    assert main(["fit", source, small, "distilled_decoding", *asked, *drawn, *folder]) == 0
    assert "2 calls (from 0, from 2)" in capsys.readouterr().out
    folder = str(tmp_path / "images")
    assert main(["sample", small, "--labels", "fox", "--steps", "1", "-o", folder]) == 0
    capsys.readouterr()
    assert main(["sample", small, "--labels", "fox", "--guidance", "2", "-o", folder]) == 1
    assert "a FewStepPipeline takes no --guidance: leave it out" in capsys.readouterr().err
    # A method that decides by call is watched, call by call.
    quick = str(tmp_path / "quick")
    assert main(["apply", small, quick, "even_steps", "--last", "0"]) == 0
    capsys.readouterr()
    assert main(["bench", quick, "--json", "--labels", "fox", "--batch", "2"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["skipped"] == {"blocks": 0.5}
    assert figures["reference"]["kind"] == "dense"
    assert np.isfinite(figures["ratio"]["flops"])
    learned = effjax.pipeline(small, progress=False)
    assert float(jnp.abs(learned.params["marks"]).max()) > 0
