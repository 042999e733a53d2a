"""Step caches: which calls compute, what is predicted, several stacks, costs, errors."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import states
from effjax.layers.stack import Stack
from effjax.methods import even_steps, fb_cache, mag_cache, tea_cache
from effjax.methods.steps.cached import CachedStack, StepCaching, image_of, relative
from effjax.targets import Wrapper, wrap
from tests.subjects.joint import tiny_joint

MODELS = {
    "dit": testing.tiny_dit,
    "pixart": testing.tiny_pixart,
    "sd3": testing.tiny_sd3,
    "flux": testing.tiny_flux,
}
PLANS = {
    "even_steps": (even_steps, even_steps.EvenStepsPlan(steps=6, every=3, order=1)),
    "fb_cache": (fb_cache, fb_cache.FBCachePlan(threshold=0.9)),
    "tea_cache": (tea_cache, tea_cache.TeaCachePlan(threshold=0.5, steps=6)),
}


def sample(subject, pair, **options):
    if subject.uncond is not None:
        options["uncond"] = subject.uncond
    return jax.jit(subject.sampler)(*pair, subject.cond, jax.random.key(0), **options)


class TestMasks:
    def test_even_steps(self):
        plan = even_steps.EvenStepsPlan(steps=10, every=3, warmup=2, last=1)
        assert "".join(str(int(each)) for each in plan.mask) == "1100100101"
        assert even_steps.EvenStepsPlan(steps=3, every=1).mask == (True,) * 3
        with pytest.raises(ValueError, match="last must be at most steps=3, got 4"):
            even_steps.EvenStepsPlan(steps=3, last=4)

    def test_samplers_compare_the_number_of_calls(self):
        subject = testing.tiny_dit(steps=4)
        plan = even_steps.EvenStepsPlan(steps=5)
        pair = even_steps.transform(plan)(subject.forward, subject.params)
        with pytest.raises(ValueError, match="planned for 5 network calls, but the sampler makes"):
            sample(subject, pair)
        assert not hasattr(StepCaching(fb_cache.FBCachePlan(), object), "calls")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("kind", PLANS)
def test_both_kinds_of_steps_give_the_same_samples(model, kind):
    """A step that is traced, and one that is static; what is skipped changes the samples."""
    subject = MODELS[model](steps=6)
    method, plan = PLANS[kind]
    pair = method.transform(plan)(subject.forward, subject.params)
    fused = sample(subject, pair)
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    sampler = subject.sampler
    uncond = sampler.unconditional(pair[0], subject.cond, subject.uncond)
    carry = sampler.init(*pair, subject.cond, jax.random.key(0), **options)
    for step in range(6):
        carry = jax.jit(sampler.step, static_argnums=5)(*pair, carry, subject.cond, uncond, step)
    chex.assert_trees_all_close(carry.x, fused, rtol=1e-4, atol=1e-5)
    exact = sample(subject, (subject.forward, subject.params))
    assert 1e-6 < float(relative(fused, exact)) < 1.0


class Adds(nnx.Module):
    """A block that adds what is linear in steps."""

    def __call__(self, x, step):
        return x + (2.0 + 0.5 * step)


def test_a_series_is_exact_on_what_is_linear_in_steps():
    """From the second computed call on; the first prediction holds what is known."""
    plan = even_steps.EvenStepsPlan(steps=7, every=3, warmup=2, order=2)
    values, added = {}, []
    for step in range(7):
        cache = CachedStack(Stack([Adds()]), plan, step, None)
        for path, state in states(cache).items():
            state.set_metadata(creating=True)
            if values.get(path) is not None:
                state.set_value(values[path])
        added.append(float(cache(jnp.ones((1, 1, 1)), jnp.float32(step))[0, 0, 0]) - 1.0)
        values = {path: state.get_value() for path, state in states(cache).items()}
    np.testing.assert_allclose(added, [2.0 + 0.5 * step for step in range(7)], rtol=1e-6)


def test_the_first_block_decides_by_its_change_since_it_was_computed():
    """The rule once more, on the trajectory of the cached model itself."""
    subject = testing.tiny_dit(steps=8)
    plan = fb_cache.FBCachePlan(threshold=0.9)
    forward, params = fb_cache.transform(plan)(subject.forward, subject.params)
    sampler, before, computed = subject.sampler, None, []
    uncond = sampler.unconditional(forward, subject.cond)
    carry = sampler.init(forward, params, subject.cond, jax.random.key(0))
    model = subject.forward.module(params)
    for step in range(8):
        x, t, labels = sampler.inputs(carry.x, subject.cond, uncond, step)
        tokens, c = _entering(model, x, t, labels)
        added = model.blocks[0](tokens, c) - tokens
        wanted = before is None or float(relative(added, before)) > 0.9
        before = added if wanted else before
        state = carry.state["blocks.before"]
        carry = sampler.step(forward, params, carry, subject.cond, uncond, step)
        changed = not np.array_equal(state, carry.state["blocks.before"])
        computed.append(changed)
        assert changed == wanted, relative(added, before)
    assert 1 < sum(computed) < 8


def _entering(model, x, t, labels):
    from effjax.layers.embeddings import sincos_2d

    config = model.config
    positions = jnp.asarray(sincos_2d(config.hidden_size, config.grid, config.grid))
    return model.patch(x) + positions, model.time(t) + model.label(labels)


def test_a_signal_that_stays_computes_the_first_and_last_call():
    subject = testing.tiny_dit(steps=5)
    plan = tea_cache.TeaCachePlan(threshold=1e-9, steps=5, coefficients=(0.0,))
    forward, params = tea_cache.transform(plan)(subject.forward, subject.params)
    sampler = subject.sampler
    uncond = sampler.unconditional(forward, subject.cond)
    carry, kept = sampler.init(forward, params, subject.cond, jax.random.key(0)), []
    for step in range(5):
        before = carry.state["blocks.series.0.tokens"]
        carry = sampler.step(forward, params, carry, subject.cond, uncond, step)
        kept.append(np.array_equal(before, carry.state["blocks.series.0.tokens"]))
    assert kept == [False, True, True, True, False]


def test_streams_are_kept_apart():
    subject = tiny_joint(steps=4)
    plan = fb_cache.FBCachePlan(threshold=100.0)
    forward, params = fb_cache.transform(plan)(subject.forward, subject.params)
    state = subject.sampler.init(
        forward, params, subject.cond, jax.random.key(0), uncond=subject.uncond
    ).state
    assert {"blocks.series.0.image", "blocks.series.0.text"} < set(state)


def test_what_cannot_be_cached_is_refused():
    subject = testing.tiny_dit(num_layers=1)
    with pytest.raises(ValueError, match="fb_cache keeps 1 blocks and needs more, there are 1"):
        fb_cache.transform(fb_cache.FBCachePlan())(subject.forward, subject.params)
    joint = tiny_joint()
    plan = tea_cache.TeaCachePlan(steps=4)
    pair = tea_cache.transform(plan)(joint.forward, joint.params)
    with pytest.raises(ValueError, match="JointBlock makes of its input by norm and modulation"):
        sample(joint, pair)


class TestMagCache:
    @pytest.mark.parametrize(
        ("steps", "mask"),
        [(28, "1111110101000100010001001011"), (20, "11110101000100010011")],
    )
    def test_masks_of_the_released_ratios(self, steps, mask):
        """Those of diffusers' hook with its defaults."""
        plan = mag_cache.MagCachePlan(steps=steps)
        assert "".join(str(int(each)) for each in plan.mask) == mask

    @pytest.mark.parametrize("model", MODELS)
    def test_ratios_are_those_of_what_blocks_add(self, model):
        """Once more from the outputs of the blocks themselves."""
        subject = MODELS[model](steps=3)
        data = subject.data(Trajectory)
        plan = mag_cache.search(mag_cache.Goals(), subject.forward, subject.params, data)
        assert plan.steps == 3
        assert plan.ratios[0] == 1.0
        sampler, norms = subject.sampler, []
        options = {} if subject.uncond is None else {"uncond": subject.uncond}
        uncond = sampler.unconditional(subject.forward, subject.cond, subject.uncond)
        pair = subject.forward, subject.params
        carry = sampler.init(*pair, subject.cond, jax.random.key(0), **options)
        for step in range(3):
            inputs = sampler.inputs(carry.x, subject.cond, uncond, step)
            norms.append(np.linalg.norm(_added(*pair, inputs), axis=-1))
            carry = sampler.step(*pair, carry, subject.cond, uncond, step)
        wanted = [float(np.mean(b / a)) for a, b in itertools.pairwise(norms)]
        np.testing.assert_allclose(plan.ratios[1:], wanted, rtol=1e-4)


def _added(forward, params, inputs):
    """What all stacks add to the image's tokens, from their inputs and outputs."""
    total = 0.0
    for target in forward.target_modules(params, Stack):
        seen = []

        class Look(Wrapper):
            def __call__(self, x, *conditioning, seen=seen):
                out = self.inner(x, *conditioning)
                seen.append((image_of(out) - image_of(x)).astype(jnp.float32))
                return out

        def look(module, context, path=target.path, kind=Look):
            wrap(module, path, kind)

        forward.patch(look)(params, {}, *inputs)
        (added,) = seen
        total = total + np.asarray(added[:, -64:])
    return total
