"""Streamlined Inference: parts of samples and tokens change nothing; Step Rehash; errors."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import capture, testing
from effjax.calibration import Trajectory
from effjax.cost import cost
from effjax.guidance import Guidance
from effjax.layers.linear import Linear
from effjax.layers.stack import Stack
from effjax.methods import even_steps, faster_cache, step_rehash, streamlined, taylor_seer
from effjax.methods.steps.step_rehash import Goals, StepRehashPlan
from effjax.methods.steps.streamlined import StreamlinedPlan


def sample(subject, *transforms):
    forward, params = effjax.chain(*transforms)(subject.forward, subject.params)
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    return jax.jit(subject.sampler)(forward, params, subject.cond, jax.random.key(0), **options)


def close(found, wanted):
    """Equal to 1e-5 of the largest value."""
    chex.assert_trees_all_close(found, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("tiny", [testing.tiny_sd3, testing.tiny_flux])
def test_parts_give_what_the_whole_gives(tiny):
    """Three parts of 22 of the image's 64 tokens, of which some are computed twice."""
    subject = tiny(steps=1, batch=3)
    parts = streamlined.transform(StreamlinedPlan(samples=2, tokens=24))  # 1 divides 3
    close(sample(subject, parts), sample(subject))


def test_parts_keep_the_states_of_their_samples():
    """With caches around the parts, inside of them, and of one branch alone."""
    subject = testing.tiny_pixart(steps=6)
    order = Guidance(("uncond", "cond"), paired=True)
    sampler = dataclasses.replace(subject.sampler, arrangement=order)
    subject = dataclasses.replace(subject, sampler=sampler)
    data = subject.data(Trajectory)
    goals = faster_cache.Goals(branch_every=3)
    caches = (
        faster_cache.transform(faster_cache.search(goals, *pair_of(subject), data)),
        even_steps.transform(even_steps.EvenStepsPlan(steps=6, every=3, warmup=2, order=1)),
    )
    parts = streamlined.transform(StreamlinedPlan(samples=1))
    whole = sample(subject, *caches)
    close(sample(subject, *caches, parts), whole)
    assert float(jnp.abs(whole - sample(subject)).max()) > 1e-2


def test_scanned_blocks_of_parts_keep_their_states():
    subject = testing.tiny_dit(steps=4)
    cache = taylor_seer.transform(taylor_seer.TaylorSeerPlan(4, every=3, warmup=2))
    parts = streamlined.transform(StreamlinedPlan(samples=1, tokens=32))
    scanned = sample(subject, cache, parts, effjax.scan_blocks(stack=True))
    close(scanned, sample(subject, cache))


def pair_of(subject):
    return subject.forward, subject.params


def test_samples_of_a_model_of_scales():
    """Each call has another number of tokens, and what the label decides is kept of the first."""
    subject = testing.tiny_var(batch=3)
    parts = streamlined.transform(StreamlinedPlan(samples=1, tokens=3))
    chex.assert_trees_all_equal(sample(subject, parts), sample(subject))


def test_work_is_that_of_the_whole():
    subject = testing.tiny_flux()
    inputs = subject.sampler.inputs(jnp.zeros((2, 16, 16, 4)), subject.cond, None, 0)
    plan = StreamlinedPlan(samples=1, tokens=23)  # three parts of the 69 tokens, 64 in 3 x 22
    counted = [
        cost(lambda params, own=forward: own(params, {}, *inputs)[0], params).flops
        for forward, params in (
            pair_of(subject),
            streamlined.transform(plan)(*pair_of(subject)),
        )
    ]
    twice = 2 * 2 * (3 * 22 - 64) * 8 * 32**2 * 2  # of the image in two dual blocks
    assert counted[1] - counted[0] == twice


class TestStepRehash:
    def test_the_last_block_runs_on_the_features_of_the_last_computed_call(self):
        subject = testing.tiny_dit()
        pair = step_rehash.transform(StepRehashPlan(compute=(1, 0)))(*pair_of(subject))
        model, rng = subject.forward.module(subject.params), np.random.default_rng(0)
        state, features = None, None
        for step in range(2):
            x = jnp.asarray(rng.standard_normal((2, 16, 16, 4)), jnp.float32)
            inputs = x, jnp.full(2, 500.0 - step), jnp.array([1, 2])
            tokens, c = capture.stack_inputs(*pair_of(subject), inputs)
            features = features if step else model.blocks[0](tokens, c)
            state = state or pair[0].init(pair[1], *inputs)
            tap, options = capture.Tap(Stack), {"state": state, "step": step}
            _, state, seen = capture.tapped_call(*pair, inputs, tap, **options)
            np.testing.assert_allclose(seen["blocks"], model.blocks[1](features, c), atol=1e-5)

    def test_calls_like_the_last_computed_one_are_skipped(self):
        """The cosines once more, from the outputs of the last but one block."""
        subject = testing.tiny_flux(steps=5)
        data = subject.data(Trajectory)
        carry = subject.sampler.init(*pair_of(subject), subject.cond, data.key)
        last, seen = "single_blocks.0", []
        for step in range(5):
            inputs = subject.sampler.inputs(carry.x, subject.cond, None, step)
            tapped = capture.tap(*pair_of(subject), inputs, pattern=last.replace(".", r"\."))
            seen.append(np.asarray(tapped[last]).ravel())
            carry = subject.sampler.step(*pair_of(subject), carry, subject.cond, None, step)
        normed = [each / np.linalg.norm(each) for each in seen]
        threshold = float(np.sort([a @ b for a, b in itertools.pairwise(normed)])[1]) - 1e-4
        compute, before = [1], normed[0]
        for each in normed[1:]:
            compute.append(int(each @ before < threshold))
            before = each if compute[-1] else before
        found = step_rehash.search(Goals(threshold=threshold), *pair_of(subject), data)
        assert found == StepRehashPlan(compute=tuple(compute))
        assert 1 < sum(compute) < 5


def test_bad_input():
    with pytest.raises(ValueError, match="samples must be a whole number of at least 1 or none"):
        StreamlinedPlan(samples=0)
    with pytest.raises(ValueError, match=r"compute must be 1 or 0 for each call, and begin with 1"):
        StepRehashPlan(compute=(0, 1))
    subject = testing.tiny_dit()
    plan = StepRehashPlan(compute=(1, 0), last_blocks=2)
    with pytest.raises(ValueError, match="the last 2 blocks; that must leave some of 2"):
        step_rehash.transform(plan)(*pair_of(subject))
    forward, params = streamlined.transform(StreamlinedPlan(tokens=8))(*pair_of(subject))
    inputs = jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), jnp.zeros(2, jnp.int32)
    watched = forward.patch(capture.Observe(Linear, r"blocks\..*fc1"))
    with pytest.raises(ValueError, match=r"run through a MLP in which another patch keeps state"):
        watched(params, watched.init(params, *inputs), *inputs)
    llama = testing.tiny_llama()
    pair = streamlined.transform(StreamlinedPlan(samples=1))(*pair_of(llama))
    with pytest.raises(ValueError, match="KV caches hold a whole batch, so streamlined cannot run"):
        llama.sampler.init(*pair, llama.cond)
    forward, params = streamlined.transform(StreamlinedPlan(samples=1))(*pair_of(subject))
    inputs = jnp.zeros((64, 16, 16, 4)), jnp.zeros(64), jnp.zeros(64, jnp.int32)
    with pytest.raises(ValueError, match="a batch of 64 rows cannot be cut into samples"):
        jax.eval_shape(lambda params: forward(params, {}, *inputs)[0], params)
