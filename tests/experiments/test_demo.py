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
from effjax.methods.attention.dit_fast_attn import DiTFastAttnPlan
from experiments import demo, train_dit

FIGURES = {
    "attention_flops",
    "attention_flops_useful",
    "total_flops",
    "seconds_per_image",
    "compile_seconds",
    "state_bytes",
    "judge_accuracy",
    "frechet",
}


@pytest.mark.slow
def test_the_demo_writes_its_report(tmp_path):
    report = demo.run(tmp_path, steps=3, images=4, threshold=0.5)
    assert json.loads((tmp_path / "report.json").read_text()) == report
    for program in ("dense", "compressed"):
        assert set(report[program]) == FIGURES
        assert all(math.isfinite(value) for value in report[program].values())
    dense, compressed = report["dense"], report["compressed"]
    assert compressed["attention_flops"] < dense["attention_flops"]
    assert compressed["attention_flops_useful"] <= compressed["attention_flops"]
    assert dense["attention_flops_useful"] == dense["attention_flops"]
    # By hand: 3 calls x 6 layers x (QK^T and PV) x 2 halves x 2 FLOPs x N^2 x width
    assert dense["attention_flops"] == 3 * 6 * 2 * 2 * 2 * 256**2 * 128
    assert dense["state_bytes"] == 0 < compressed["state_bytes"]
    plan = DiTFastAttnPlan.from_json((tmp_path / "plan.json").read_text())
    assert (plan.layers, plan.calls) == (6, 3)
    for name in ("samples.png", "plan.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 30
    assert "executed attention FLOPs saved" in demo.table(report)


def test_samples_in_chunks_are_the_samples(monkeypatch):
    from effjax import testing

    subject = testing.tiny_dit(batch=5)
    whole = jax.jit(subject.sampler)(
        subject.forward, subject.params, subject.cond, jax.random.key(1)
    )
    monkeypatch.setattr(demo, "CHUNK", 2)
    parts, timings = demo.sample(
        subject.sampler,
        subject.forward,
        subject.params,
        np.asarray(subject.cond),
        jax.random.key(1),
    )
    chex.assert_trees_all_close(parts, np.asarray(whole), atol=1e-5)
    assert timings["seconds_per_image"] > 0


def test_the_bundled_model_passed_its_gate():
    log = json.loads((train_dit.WEIGHTS / "log.json").read_text())
    assert train_dit.passes(log["judged"])
    assert log["judged"]["images"] >= 1024
    weights = train_dit.WEIGHTS / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size < 6e6


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
    assert pipe.names["A"] == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "model"]
