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
from effjax.cost import cost
from effjax.layers.stack import Stack
from effjax.methods import db_cache, even_steps, fb_cache, mag_cache, pab, taylor_seer, tea_cache
from effjax.methods.steps.cached import CachedStack, StepCaching, image_of, relative
from effjax.methods.steps.series import Series
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
    "db_cache": (
        db_cache,
        db_cache.DBCachePlan(steps=6, threshold=0.9, first_blocks=1, last_blocks=1, warmup=2),
    ),
    "taylor_seer": (taylor_seer, taylor_seer.TaylorSeerPlan(steps=6, every=2, warmup=2)),
    "pab": (pab, pab.PABPlan(times=(999.0, 700.0, 600.0, 500.0, 300.0, 100.0))),
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

    def test_even_steps_of_any_number(self):
        """One plan for samplers of all lengths: the mask of each, without its number."""
        plan = even_steps.EvenStepsPlan(every=3, warmup=2)
        assert plan.mask is None
        assert plan.calls is None
        for steps in (3, 5):
            subject = testing.tiny_flux(steps=steps)
            pairs = [
                even_steps.transform(each)(subject.forward, subject.params)
                for each in (plan, even_steps.EvenStepsPlan(steps=steps, every=3, warmup=2))
            ]
            chex.assert_trees_all_equal(*(sample(subject, pair) for pair in pairs))

    def test_samplers_compare_the_number_of_calls(self):
        subject = testing.tiny_dit(steps=4)
        plan = even_steps.EvenStepsPlan(steps=5)
        pair = even_steps.transform(plan)(subject.forward, subject.params)
        with pytest.raises(ValueError, match="planned for 5 network calls, but the sampler makes"):
            sample(subject, pair)
        assert not hasattr(StepCaching(fb_cache.FBCachePlan(), object, ()), "calls")


# Every kind on two stacks of two streams; one kind on all models.
@pytest.mark.parametrize(
    ("kind", "model"),
    [*((kind, "flux") for kind in PLANS), *(("tea_cache", m) for m in MODELS if m != "flux")],
)
def test_both_kinds_of_steps_give_the_same_samples(kind, model):
    """A step that is traced, and one that is static; what is skipped changes the samples."""
    layers = {} if model in ("sd3", "flux") else {"num_layers": 3}
    subject = MODELS[model](steps=6, **layers)
    method, plan = PLANS[kind]
    pair = method.transform(plan)(subject.forward, subject.params)
    fused = sample(subject, pair)
    options = {} if subject.uncond is None else {"uncond": subject.uncond}
    sampler = subject.sampler
    uncond = sampler.unconditional(pair[0], subject.cond, subject.uncond)
    carry = sampler.init(*pair, subject.cond, jax.random.key(0), **options)
    for step in range(6):
        carry = jax.jit(sampler.step, static_argnums=5)(*pair, carry, subject.cond, uncond, step)
    chex.assert_trees_all_close(carry.x, fused, atol=1e-5 * float(jnp.abs(fused).max()))
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
        cache = CachedStack(Stack([Adds()]), plan, step, None, ((0, 1),))
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
        before = carry.state["blocks.series.0.terms.0.tokens"]
        carry = sampler.step(forward, params, carry, subject.cond, uncond, step)
        kept.append(np.array_equal(before, carry.state["blocks.series.0.terms.0.tokens"]))
    assert kept == [False, True, True, True, False]


def test_streams_are_kept_apart():
    subject = tiny_joint(steps=4)
    plan = fb_cache.FBCachePlan(threshold=100.0)
    forward, params = fb_cache.transform(plan)(subject.forward, subject.params)
    state = subject.sampler.init(
        forward, params, subject.cond, jax.random.key(0), uncond=subject.uncond
    ).state
    assert {"blocks.series.0.terms.0.image", "blocks.series.0.terms.0.text"} < set(state)


def test_what_cannot_be_cached_is_refused():
    subject = testing.tiny_dit(num_layers=1)
    with pytest.raises(ValueError, match="fb_cache always computes the first 1 and the last 0 blo"):
        fb_cache.transform(fb_cache.FBCachePlan())(subject.forward, subject.params)
    joint = tiny_joint()
    plan = tea_cache.TeaCachePlan(steps=4)
    pair = tea_cache.transform(plan)(joint.forward, joint.params)
    with pytest.raises(ValueError, match="JointBlock makes of its input by norm and modulation"):
        sample(joint, pair)


def test_a_series_of_order_two_takes_backward_differences():
    """y = i^2 computed at 0, 1, 2 is 8 at step 3: differences over p!, not the parabola."""
    values, seen = {}, []
    for step in range(4):
        series = Series(Stack([Adds()]), 2)
        for path, state in states(series).items():
            state.set_metadata(creating=True)
            if values.get(path) is not None:
                state.set_value(values[path])
        like = jnp.zeros((1, 1, 1))
        if step < 3:
            series.renew(like + float(step) ** 2, step)
        else:
            seen.append(float(series.predict(like, step)[0, 0, 0]))
        values = {path: state.get_value() for path, state in states(series).items()}
    assert seen == [8.0]


class TestDBCache:
    @pytest.mark.parametrize(
        ("name", "steps", "mask"),
        [
            ("slow", 28, "1111111101110011100110010001"),
            ("ultra", 28, "1111001000001000000100000001"),
            ("fast", 20, "11111101000100001000"),
        ],
    )
    def test_static_masks(self, name, steps, mask):
        plan = db_cache.DBCachePlan(
            steps=steps, compute=db_cache.named(name, steps), policy="static"
        )
        assert "".join(str(int(each)) for each in plan.mask) == mask

    def test_the_first_blocks_decide(self):
        """The rule once more, with its caps, on the trajectory of the cached model itself."""
        subject = testing.tiny_flux(steps=10)
        plan = db_cache.DBCachePlan(
            steps=10,
            threshold=0.6,
            first_blocks=1,
            last_blocks=1,
            warmup=4,
            warmup_interval=2,
            compute=(1, 1, 1, 0, 0, 0, 1),
            max_cached=5,
            max_continuous=2,
            max_accumulated=2.0,
        )
        forward, params = db_cache.transform(plan)(subject.forward, subject.params)
        sampler = subject.sampler
        carry = sampler.init(forward, params, subject.cond, jax.random.key(0))
        before, cached, row, total, computed = None, 0, 0, 0.0, []
        for step in range(10):
            inputs = sampler.inputs(carry.x, subject.cond, None, step)
            added = _first_block_adds(subject.forward, params, inputs)
            state = carry.state["blocks.before"]
            carry = sampler.step(forward, params, carry, subject.cond, None, step)
            changed = not np.array_equal(state, carry.state["blocks.before"])
            wanted = (step < 3 and step % 2 == 0) or (step < 7 and plan.compute[step] == 1)
            wanted = wanted or cached >= 5 or row >= 2 or total >= 2.0
            if not wanted:
                change = float(relative(added, before))
                total, wanted = total + change, change >= 0.6
            before = added if wanted else before
            cached, row = (cached, 0) if wanted else (cached + 1, row + 1)
            assert changed == wanted, step
            computed.append(changed)
        assert 3 < sum(computed) < 10

    def test_bad_plans(self):
        with pytest.raises(ValueError, match="is for a mask: give compute"):
            db_cache.DBCachePlan(policy="static")
        with pytest.raises(ValueError, match="compute has 28 entries for 20 steps"):
            db_cache.DBCachePlan(steps=20, compute=db_cache.named("slow"))
        with pytest.raises(ValueError, match="the first call must compute"):
            db_cache.DBCachePlan(warmup=0)
        with pytest.raises(ValueError, match="masks are slow, medium, fast, ultra"):
            db_cache.named("faster")
        subject = testing.tiny_flux()
        plan = db_cache.DBCachePlan(steps=4, first_blocks=3)
        with pytest.raises(
            ValueError, match=r"first 3 and the last 0 blocks; .* of the first stack"
        ):
            db_cache.transform(plan)(subject.forward, subject.params)


def _first_block_adds(forward, params, inputs):
    seen = []

    class Look(Wrapper):
        def __call__(self, x, *conditioning):
            out = self.inner(x, *conditioning)
            seen.append(image_of(out) - image_of(x))
            return out

    def look(module, context):
        wrap(module, "blocks.0", Look)

    forward.patch(look)(params, {}, *inputs)
    return seen[0]


class TestAttentionCaches:
    def test_masks(self):
        """Those of diffusers' hooks; PAB's first call outside of its times computes anyhow."""
        plan = taylor_seer.TaylorSeerPlan(steps=28)
        assert "".join(map(str, map(int, plan.mask))) == "1110100001000010000100001000"
        assert all(taylor_seer.TaylorSeerPlan(steps=5, every=4, last=2).mask[3:])
        held = pab.PABPlan(times=(900.0, 790.0, 600.0, 400.0, 100.0, 50.0), every=3)
        assert "".join(map(str, map(int, held.mask(3)))) == "100111"
        assert (plan.calls, held.calls) == (28, 6)  # what a pipeline takes, if a call says none
        with pytest.raises(ValueError, match="times must be those of the network calls"):
            pab.PABPlan()

    def test_what_is_skipped_is_not_computed(self):
        """In a skipped call the projections and the products of attention are gone."""
        subject = testing.tiny_sd3(steps=4)
        plan = taylor_seer.TaylorSeerPlan(steps=4, every=4, warmup=2)
        pair = taylor_seer.transform(plan)(subject.forward, subject.params)
        assert plan.mask == (True, True, False, True)
        x = jnp.zeros((2, 16, 16, 4))
        inputs = subject.sampler.inputs(x, subject.cond, subject.uncond, 0)

        def counted(forward, params, step=0):
            state = forward.init(params, *inputs)
            return cost(lambda *given: forward(*given, *inputs, step=step)[0], params, state)

        dense = counted(subject.forward, subject.params)
        full, skipped = (counted(*pair, step) for step in (0, 2))
        assert full.flops == dense.flops
        attention = dense.scope("attention").flops
        assert skipped.scope("attention").flops == 0
        size, tokens, layers = 16, 4 * (64 + 5), 3
        projections = 8 * tokens * size**2 * layers  # q, k, v and out of every token
        projections -= 2 * 4 * 5 * size**2  # the text of the last block has no output
        projections += 8 * 4 * 64 * size**2  # the second attention of the first block
        assert dense.flops - attention - skipped.flops == projections


class TestTeaCache:
    def test_the_fit_is_the_regression_of_what_was_seen(self):
        """Signals and residuals once more from the uncached model."""
        subject = testing.tiny_dit(steps=6)
        goals = tea_cache.Goals(threshold=0.3, degree=2)
        data = subject.data(Trajectory)
        plan = tea_cache.search(goals, subject.forward, subject.params, data)
        assert (plan.threshold, plan.steps, len(plan.coefficients)) == (0.3, 6, 3)
        sampler, pair = subject.sampler, (subject.forward, subject.params)
        uncond = sampler.unconditional(subject.forward, subject.cond)
        carry = sampler.init(*pair, subject.cond, jax.random.key(0))
        model, signals, added = subject.forward.module(subject.params), [], []
        for step in range(6):
            inputs = sampler.inputs(carry.x, subject.cond, uncond, step)
            tokens, c = _entering(model, *inputs)
            signals.append(model.blocks[0].signal(tokens, c))
            added.append(jnp.asarray(_added(*pair, inputs)))
            carry = sampler.step(*pair, carry, subject.cond, uncond, step)
        changes = [
            [float(relative(after, before)) for before, after in itertools.pairwise(each)]
            for each in (signals, added)
        ]
        wanted = np.polyval(np.polyfit(*changes, 2), changes[0])
        np.testing.assert_allclose(np.polyval(plan.coefficients, changes[0]), wanted, rtol=2e-2)
        with pytest.raises(ValueError, match="degree 6 needs 8 or more steps, got 6"):
            tea_cache.search(tea_cache.Goals(degree=6), subject.forward, subject.params, data)


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
