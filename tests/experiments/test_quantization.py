"""The quantization benchmarks' parts: subjects, recipes, planted outliers, sizes, speed."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax.forward import flatten_params
from effjax.quant import QTensor
from experiments import report, train_pixart
from experiments.quantization import layers, quality, sizes, speed, subjects


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def dit():
    return subjects.tiny_dit(steps=2)


def network(pair, x):
    forward, params = pair
    return jax.jit(forward)(params, {}, x, jnp.full(2, 400.0), jnp.array([3, 36]))[0]


def test_planted_outliers_change_inputs_and_not_the_function(dit):
    planted = layers.planted(dit.pair)
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 1))
    chex.assert_trees_all_close(network(planted, x), network(dit.pair, x), rtol=1e-3, atol=1e-3)
    before, after = (
        flatten_params(pair[1])["blocks.0.modulation.kernel"] for pair in (dit.pair, planted)
    )
    grown = np.abs(after).max(0) / np.abs(before).max(0)
    assert (grown > 29).sum() == 4 * 4  # shift and scale of two norms, four channels each


def test_balancing_pays_where_channels_differ():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((512, 64)).astype(np.float32)
    x[:, :3] *= 50
    w = jnp.asarray(rng.standard_normal((64, 32)), jnp.float32)
    x = jnp.asarray(x)
    found = layers.errors(x, w, jnp.abs(x).max(0))
    assert set(found) == set(layers.RECIPES)
    assert found["both"] < min(found["token"], found["static tensor"])


@pytest.mark.parametrize("recipe", ["static tensor", "qwix PTQ", "SmoothQuant"])
def test_recipes_code_the_same_layers(dit, recipe):
    forward, params = quality.RECIPES[recipe](dit, 8, 8)
    leaves = {path: x for path, x in flatten_params(params).items() if isinstance(x, QTensor)}
    assert len(leaves) == 6 * 6
    leaf = leaves["blocks.0.attn.to_q.kernel"]
    assert leaf.activations.dynamic == (recipe != "static tensor")
    assert leaf.activations.quantizer.levels == ("n+1/2" if recipe == "qwix PTQ" else "n")
    assert (leaf.smoothing_scale is None) == (recipe != "SmoothQuant")
    assert forward.patches == dit.pair[0].patches


def test_the_text_model_is_judged_on_unseen_captions():
    pixart = subjects.tiny_pixart(steps=2)
    real, things = train_pixart.unseen(4096, 0)
    assert things.held_out.all()
    pipe = effjax.pipeline(train_pixart.WEIGHTS, dtype="float32", progress=False)
    chex.assert_trees_all_equal(pixart.conditions(3, 2), pipe.conditions(things.captions()[3:5]))
    assert pixart.judged(real[:64])["all"] == 1.0
    assert pixart.judged(real[1:65])["all"] < 0.1  # the next image shows another thing


def test_sizes_agree_with_the_closed_form(results):
    sizes.main(["--layers", "1", "--chip", "none"])
    written = json.loads((results / "quantization_sizes.json").read_text())
    rows = written["tables"]["one_network_call"]
    assert [row["bits"] for row in rows] == ["bfloat16", "W8A8", "W4A8"] * 2
    for row in rows:
        closed, counted = row["quantized_layers_closed_form_GB"], row["quantized_layers_counted_GB"]
        assert closed <= counted < 1.02 * closed  # scales and zero points
    # The sheet's figure for 28 blocks, in one of them.
    assert rows[1]["quantized_layers_closed_form_GB"] == pytest.approx(0.594542592 / 28)


def test_speed_is_measured_side_by_side(results, monkeypatch):
    monkeypatch.setattr(speed, "SHAPES", ((128, 64),))
    monkeypatch.setattr(speed, "_torch", lambda x, w: {})
    speed.main(["--tokens", "32", "--repeats", "1"])
    rows = json.loads((results / "quantization_speed_cpu.json").read_text())["tables"]["products"]
    assert {row["program"] for row in rows} == {
        *("float32", "bfloat16", "W8A8", "W4A8", "W8A8, prepared")
    }
    assert all(row["milliseconds"] > 0 for row in rows)
