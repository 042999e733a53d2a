"""One line that makes a pipeline faster, and what it says of a call."""

import dataclasses

import jax
import numpy as np
import pytest

from effjax import testing
from effjax.methods import dit_fast_attn, fb_cache, pab, round_to_nearest
from effjax.pipelines import ClassConditionalPipeline, TextPipeline, recipes
from effjax.samplers import DDIM

TINY = {
    "DiT": testing.tiny_dit,
    "PixArt": testing.tiny_pixart,
    "SD3": testing.tiny_sd3,
    "Flux": testing.tiny_flux,
}
ASKED = {"key": jax.random.key(0), "output_type": "latent", "progress": False}


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_dit()
    scheduler = DDIM(steps=4).to_config()
    vae = {"vae": None}
    return ClassConditionalPipeline(subject.forward, subject.params, scheduler=scheduler, **vae)


def test_one_recipe_serves_every_number_of_steps(pipe):
    """Calls of other lengths leave nothing behind."""
    fast = pipe.accelerate()
    for steps in (6, 4, 6):
        got = fast([0, 1, 2], num_inference_steps=steps, **ASKED)
        assert fast.summary().calls == steps
        fresh = dataclasses.replace(pipe).accelerate()
        wanted = fresh([0, 1, 2], num_inference_steps=steps, **ASKED)
        np.testing.assert_array_equal(got, wanted)
        assert 0 < fast.summary().skipped["blocks"] < 1
    with pytest.raises(ValueError, match="nothing was sampled yet: call the pipeline first"):
        fast.transform(lambda *pair: pair).summary()


def test_a_pipeline_is_accelerated_once(pipe):
    """As a model takes one step cache; whoever made it."""
    cached = pipe.transform(fb_cache.transform(fb_cache.FBCachePlan()))
    for fast, name in ((pipe.accelerate(), "even_steps"), (cached, "fb_cache")):
        with pytest.raises(ValueError, match=f"has a step cache already, {name}, and a model"):
            fast.accelerate()
    for speed in (float("nan"), -1.0):
        with pytest.raises(ValueError, match="speed must be a finite number of at least 0"):
            pipe.accelerate(speed)


def test_every_pipeline_says_whether_it_has_a_recipe():
    subject = testing.tiny_llama()
    chat = TextPipeline(subject.forward, subject.params, tokenizer=None)
    with pytest.raises(ValueError, match="no recipe was measured for Llama; choose methods your"):
        chat.accelerate()


def test_the_mildest_recipe_that_is_fast_enough():
    for model in TINY:
        known = recipes.measured(model)
        assert sum(each.recommended for each in known) == 1
        assert [each.speed for each in known] == sorted(each.speed for each in known)
        assert recipes.choose(model, None).recommended
        assert recipes.choose(model, 1.0) == known[0]
        assert recipes.choose(model, known[-1].speed) == known[-1]
        assert all(len(each.measured) > 20 for each in known)
        with pytest.raises(ValueError, match=rf"no recipe of {model} is 99 times as fast; there"):
            recipes.choose(model, 99.0)
    with pytest.raises(ValueError, match="no recipe was measured for Other; choose methods your"):
        recipes.choose("Other", None)


@pytest.mark.parametrize("model", TINY)
def test_every_recipe_applies_to_its_model(model):
    subject = TINY[model](steps=5)
    for recipe in recipes.measured(model):
        forward, params = subject.forward, subject.params
        for transform in recipe.transforms(params):
            forward, params = transform(forward, params)
        forward.check_calls(5)
        forward.check_calls(50)
        assert [name for name, _ in forward.recipe] == [name for name, _ in recipe.methods]


def test_a_summary_says_what_was_decided_kept_and_rounded(pipe):
    """Of decisions that depend on data, of plans that say it before, of weights."""
    quantized = round_to_nearest.transform(round_to_nearest.uniform(8))
    cached = fb_cache.transform(fb_cache.FBCachePlan(threshold=0.9))
    fast = pipe.transform(quantized, cached)
    fast([0, 1, 2], num_inference_steps=8, **ASKED)  # in parts of two and one
    said = fast.summary()
    assert said.calls == len(said.computed["blocks"]) == 8
    assert said.computed["blocks"][0] == 1.0
    assert 0 < said.skipped["blocks"] < 1
    # What the first block and the others add, for both halves of the batch of three.
    assert said.cache_bytes >= 2 * 2 * 3 * 64 * pipe.forward.config.hidden_size * 4
    assert said.bits[8] > 0
    assert said.methods == ("round_to_nearest", "fb_cache")
    text = str(said)
    assert "8 network calls, methods: round_to_nearest, fb_cache" in text
    assert "layers in 8 bits" in text
    assert f"blocks computed in {sum(said.computed['blocks']):g} of 8: #" in text

    times = tuple(float(time) for time in pipe.sampler(num_inference_steps=4).schedule.times)
    held = pipe.transform(pab.transform(pab.PABPlan(times=times, every=2)))
    held(0, num_inference_steps=4, **ASKED)
    assert held.summary().computed["attention"] == tuple(map(float, pab.PABPlan(times).mask(2)))
    shared = dit_fast_attn.uniform((1, 3), layers=2, calls=3, tokens=64, window=8)
    held = pipe.transform(dit_fast_attn.transform(shared))
    held(0, num_inference_steps=3, **ASKED)
    band = np.abs(np.subtract.outer(np.arange(64), np.arange(64))) <= 8
    np.testing.assert_allclose(held.summary().computed["attention"], (1, 0, band.mean()))
    assert f"attention computed in {1 + band.mean():.2f} of 3: #.+" in str(held.summary())
    dense = dataclasses.replace(pipe)
    dense(0, num_inference_steps=2, **ASKED)
    assert dense.summary().computed == {}
    assert dense.summary().cache_bytes == 0


def test_coarse_inputs_are_held_and_not_continued(pipe):
    """Order 1 continues the noise of two calls; with 8 bits that is little, with 4 it is not."""
    for bits, order in ((8, 1), (4, 0)):
        rounded = round_to_nearest.transform(round_to_nearest.uniform(8, bits))
        (_, plan) = pipe.transform(rounded).accelerate().forward.recipe[-1]
        assert plan.order == order
