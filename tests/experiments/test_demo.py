"""The demo and the training of its model, at the smallest scale."""

import dataclasses
import json
import math

import chex
import jax
import numpy as np
import pytest
from PIL import Image

import effjax
from effjax import testing
from effjax.bundled import demo, judge
from effjax.forward import abstract
from effjax.methods.attention import dit_fast_attn
from effjax.models.dit import DiT
from experiments import pictures, train_dit, train_pixart, train_sd3

FIGURES = {
    "steps",
    "total_flops",
    "seconds_per_image",
    "compile_seconds",
    "state_bytes",
    "weight_bytes",
    "judge_accuracy",
    "frechet",
}


@pytest.mark.slow
def test_the_demo_writes_its_report(tmp_path):
    """On a model of two layers and 64 tokens, whose images say nothing."""
    config = dataclasses.replace(train_dit.TINY, num_layers=2, num_heads=2, patch_size=4)
    forward, shapes = abstract(DiT, config)
    train_dit.export(tmp_path / "model", forward, testing.random_params(shapes))
    report = demo.run(tmp_path, model=tmp_path / "model", steps=4, images=4)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert "Infinity" not in (tmp_path / "report.json").read_text()
    for program in demo.ROWS:
        own = FIGURES if program == "dense" else FIGURES | {"psnr"}
        assert set(report[program]) == own
        equal = report[program]["steps"] == 4 and program == "fewer_steps"  # no step was saved
        assert (report[program].get("psnr", 0.0) is None) == equal
        assert all(math.isfinite(value) for value in report[program].values() if value is not None)
    dense, fast, fewer = (report[name] for name in demo.ROWS)
    assert dense["state_bytes"] == 0 < fast["state_bytes"]
    assert fast["total_flops"] < dense["total_flops"]
    assert fewer["total_flops"] * 4 == dense["total_flops"] * fewer["steps"]
    assert 0 < sum(report["computed"]["blocks"]) < 4
    for name in ("samples.png", "steps.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 30
    assert "times the dense images per second" in demo.table(report)


def test_fewer_steps_where_nothing_is_saved(tmp_path, monkeypatch):
    """Where the accelerated program is slower, the dense model keeps its steps and its images."""

    def sample(programs, labels, key):
        images = dict.fromkeys(programs, np.zeros((len(labels), 32, 32, 1)))
        images["accelerated"] = images["dense"] + 0.5
        spent = {name: 1.5 if name == "accelerated" else 1.0 for name in programs}
        return images, {
            name: {"compile_seconds": 0.0, "seconds_per_image": seconds}
            for name, seconds in spent.items()
        }

    monkeypatch.setattr(demo, "sample", sample)
    config = dataclasses.replace(train_dit.TINY, num_layers=2, num_heads=2, patch_size=4)
    forward, shapes = abstract(DiT, config)
    train_dit.export(tmp_path / "model", forward, testing.random_params(shapes))
    report = demo.run(tmp_path, model=tmp_path / "model", steps=4, images=2)
    assert report["fewer_steps"]["steps"] == 4
    assert report["fewer_steps"]["psnr"] is None
    assert math.isclose(report["accelerated"]["psnr"], 20 * math.log10(4), rel_tol=1e-5)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert demo.table(report).splitlines()[-2].split()[-2:] == ["equal", "-"]


def test_the_pictures_have_titles_and_a_legend(tmp_path):
    rng = np.random.default_rng(0)
    programs = {title: rng.uniform(-1, 1, (5, 8, 8, 1)) for title in ("dense", "small")}
    demo.draw_samples(programs, list("ABCDE"), tmp_path / "samples.png", columns=2)
    with Image.open(tmp_path / "samples.png") as picture:
        drawn = np.asarray(picture)
    side, ink = 16, drawn < 128
    left = drawn.shape[1] - 2 * (side + 2) - 8
    for row, line in enumerate((24, 24 + 24 + 2 * (side + 2) + 8)):  # two bands of two columns
        assert ink[line : line + 24, left:].any()  # the classes
        for number, images in enumerate(programs.values()):
            top = line + 24 + number * (side + 2)
            assert ink[top : top + side, :left].any()  # the program's title
            pixels = np.rint(127.5 * (images[2 * row, ..., 0] + 1)).astype(np.uint8)
            cell = drawn[top : top + side, left : left + side]
            np.testing.assert_array_equal(cell, pixels.repeat(2, axis=0).repeat(2, axis=1))
    assert set(pictures.STRATEGIES) == set(dit_fast_attn.Strategy)
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=2, tokens=64)
    pictures.draw_plan(plan, tmp_path / "plan.png")
    with Image.open(tmp_path / "plan.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 16)}
    for color, _ in pictures.STRATEGIES.values():  # those that the plan does not use: in the legend
        assert tuple(bytes.fromhex(color[1:])) in colors


def test_samples_in_chunks_are_the_samples(monkeypatch):
    subject = testing.tiny_dit(batch=5)
    whole = jax.jit(subject.sampler)(
        subject.forward, subject.params, subject.cond, jax.random.key(1)
    )
    monkeypatch.setattr(demo, "CHUNK", 2)
    programs = {"one": (subject.sampler, subject.forward, subject.params)}
    parts, timings = demo.sample(programs, np.asarray(subject.cond), jax.random.key(1))
    chex.assert_trees_all_close(parts["one"], np.asarray(whole), atol=1e-5)
    assert timings["one"]["seconds_per_image"] > 0


def test_the_bundled_model_passed_its_gate():
    log = json.loads((train_dit.WEIGHTS / "log.json").read_text())
    assert train_dit.passes(log["judged"])
    assert log["judged"]["images"] >= 1024
    weights = train_dit.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6


TEXT_MODELS = {"pixart": train_pixart, "sd3": train_sd3}


@pytest.mark.parametrize("script", TEXT_MODELS.values(), ids=TEXT_MODELS)
def test_the_text_models_passed_their_gates(script):
    log = json.loads((script.WEIGHTS / "log.json").read_text())
    assert script.passes(log["judged"])
    assert log["judged"]["images"] >= 1024
    files = script.WEIGHTS.rglob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 6e6


@pytest.mark.parametrize("script", TEXT_MODELS.values(), ids=TEXT_MODELS)
def test_the_text_models_draw_what_they_are_asked_for(script):
    """Through the real conversion: unseen captions, few steps."""
    pipe = effjax.pipeline(script.WEIGHTS, dtype="float32", progress=False)
    _, things = train_pixart.unseen(16, 5)
    images = train_pixart.sample(pipe, things, steps=6, guidance=3.0, seed=0, chunk=16)
    right = judge.alignment(judge.load(), images, things)
    assert right["color"] == right["place"] == 1.0
    assert right["class"] >= 0.75


@pytest.mark.slow
def test_training_resumes_where_it_stopped(tmp_path):
    config = dataclasses.replace(train_dit.TINY, num_layers=1, num_heads=2, head_dim=8)
    options = {"batch": 2, "seed": 0, "learning_rate": 1e-3, "checkpoints": tmp_path / "c"}
    train_dit.train(config, steps=2, **options)
    forward, params, log = train_dit.train(config, steps=3, **options)
    assert [run["first_step"] for run in log["runs"]] == [0, 2]
    assert list(log["loss"]) == ["2", "3"]
    chex.assert_tree_all_finite(params)
    train_dit.export(tmp_path / "model", forward, params)
    train_dit.export(tmp_path / "model", forward, params)  # replaces the older one
    pipe = effjax.pipeline(tmp_path / "model", progress=False)
    assert pipe.index("A") == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "model"]


@pytest.mark.slow
def test_training_of_the_text_model_resumes(tmp_path):
    """From the class-conditional model's blocks: its first loss is that of no new beginning."""
    config = dataclasses.replace(train_pixart.TINY, num_layers=1)
    text = dataclasses.replace(train_pixart.TINY_T5, num_layers=1)
    options = {"batch": 2, "seed": 0, "learning_rate": 1e-3, "checkpoints": tmp_path / "c"}
    train_pixart.train(config, text, steps=2, **options)
    *models, log = train_pixart.train(config, text, steps=3, **options)
    assert [run["first_step"] for run in log["runs"]] == [0, 2]
    chex.assert_tree_all_finite([params for _, params in models])
    train_pixart.export(tmp_path / "model", *models)
    figures = train_pixart.evaluate(tmp_path / "model", images=4, steps=2, guidance=2.0, seed=0)
    assert figures["alignment_of_real_images"]["all"] == 1.0
    assert not train_pixart.passes(figures)
    pipe = effjax.pipeline(tmp_path / "model", progress=False)
    assert pipe.max_tokens == train_pixart.LENGTH
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "model"]


def test_every_caption_is_read_whole():
    """No word is unknown, no caption is cut, and lower case loses nothing that cannot be read."""
    reader = train_pixart.tokenizer()
    _, things = train_pixart.unseen(512, 3)
    assert things.held_out.all()
    for caption in things.captions():
        ids = reader(caption)["input_ids"]
        assert reader.unk_token_id not in ids
        assert len(ids) <= train_pixart.LENGTH
        assert ids[-1] == reader.eos_token_id
    assert len(reader) <= train_pixart.TINY_T5.vocab_size
