"""DiTFastAttn: formulas, identities, costs in closed form, search and replay, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import testing
from effjax.context import Layout, Model
from effjax.forward import functional
from effjax.guidance import Guidance
from effjax.layers.attention import SelfAttention
from effjax.methods.attention.dit_fast_attn import (
    CANDIDATES,
    DiTFastAttnPlan,
    Strategy,
    attention_macs,
    search,
    transform,
    uniform,
)
from effjax.samplers import DDIM, Sampler
from pallas_kernels.block_mask import Band, block_mask, dense_mask

FULL, AST, WARS_ASC, WARS, FULL_ASC = (int(strategy) for strategy in Strategy)
CALLS = 4


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_dit(steps=CALLS)


def sample(subject, plan=None, *, sampler=None, params=None):
    forward, params = subject.forward, params or subject.params
    if plan is not None:
        forward, params = transform(plan)(forward, params)
    run = jax.jit(sampler or subject.sampler)
    return run(forward, params, subject.cond, jax.random.key(3))


def plan_of(*strategies, window=8, tokens=64, layers=2):
    return DiTFastAttnPlan(strategies=(tuple(strategies),) * layers, tokens=tokens, window=window)


# ---- the formulas, written down once more without the library ----


def by_formula(subject, plan, arrangement):
    """The sheet's pseudo-code on one attention layer: outputs of every call."""
    (target, *_) = subject.forward.target_modules(subject.params, pattern=r"blocks\.0\.attn")
    attn = target.module
    mask = dense_mask(block_mask(Band(plan.window), plan.tokens))

    def attend(q, k, v, mask=None):
        logits = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
        logits = logits if mask is None else jnp.where(mask, logits, -jnp.inf)
        return jnp.einsum("bhst,bthd->bshd", jax.nn.softmax(logits), v)

    cached = residual = None
    for value, need, key in zip(
        plan.strategies[0], plan.need[0], jax.random.split(jax.random.key(5), plan.calls)
    ):
        x = jax.random.normal(key, (4, plan.tokens, 16))
        if value == AST:
            yield x, cached
            continue
        halved = value in (WARS_ASC, FULL_ASC)
        q, k, v = attn.project(arrangement.branch("cond", x) if halved else x)
        if value in (FULL, FULL_ASC):
            o = attend(q, k, v)
            if need:
                residual = o - attend(q, k, v, mask)
                residual = arrangement.duplicate(residual) if halved else residual
        else:
            kept = arrangement.branch("cond", residual) if halved else residual
            o = attend(q, k, v, mask) + kept
        y = attn.merge(o)
        cached = arrangement.duplicate(y) if halved else y
        yield x, cached


@pytest.mark.parametrize("branches", [("cond", "uncond"), ("uncond", "cond")])
@pytest.mark.parametrize("paired", [True, False])
def test_every_strategy_follows_the_formula(subject, branches, paired):
    """Run one attention layer by the plan, through a module that is nothing but that layer."""

    class Alone(Model):
        def __init__(self):
            self.config = subject.forward.config
            self.attn = SelfAttention(16, heads=2, head_dim=8, rngs=nnx.Rngs(0))

        def layout(self, x):
            return Layout(grid=(1, 8, 8))

        def __call__(self, x):
            return self.attn(x)

    arrangement = Guidance(branches, paired)
    strategies = (FULL, WARS, AST, WARS_ASC, FULL_ASC, WARS, WARS_ASC, AST, FULL, FULL_ASC, AST)
    plan = plan_of(*strategies, layers=1)
    forward, _ = functional(Alone())
    params = {"attn": subject.params["blocks"]["0"]["attn"]}
    patched, params = transform(plan)(forward, params)
    x = jnp.zeros((4, 64, 16))
    traced = static = patched.init(params, x, guidance=arrangement)
    assert sorted(traced) == ["attn.output.tokens", "attn.residual"]
    run = jax.jit(lambda p, s, x, t: patched(p, s, x, step=t, guidance=arrangement))
    for step, (x, expected) in enumerate(by_formula(subject, plan, arrangement)):
        out, traced = run(params, traced, x, step)
        chex.assert_trees_all_close(out, expected, atol=2e-5)
        out, static = patched(params, static, x, step=step, guidance=arrangement)
        chex.assert_trees_all_close(out, expected, atol=2e-5)
    chex.assert_trees_all_close(traced, static, atol=2e-5)


# ---- (a) identities ----


def test_a_window_over_everything_is_full(subject):
    chex.assert_trees_all_close(
        sample(subject, plan_of(FULL, WARS, WARS, WARS, window=63)), sample(subject), atol=1e-5
    )


def test_equal_halves_make_asc_full(subject):
    null = dataclasses.replace(
        subject, cond=jnp.full((2,), subject.forward.config.num_classes, jnp.int32)
    )
    plan = plan_of(FULL, FULL_ASC, FULL_ASC, FULL_ASC)
    chex.assert_trees_all_close(sample(null, plan), sample(null), atol=1e-5)


def test_sharing_an_unchanged_input_is_full(subject):
    """AST of a layer that gets the same input again."""
    patched, params = transform(plan_of(FULL, AST, AST, AST))(subject.forward, subject.params)
    x, t, labels = jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond
    state = patched.init(params, x, t, labels)
    first, state = patched(params, state, x, t, labels, step=0)
    again, _ = patched(params, state, x, t, labels, step=1)
    chex.assert_trees_all_close(first, again, atol=1e-6)


def test_either_batch_order_gives_the_same_images(subject):
    plan = plan_of(FULL, WARS_ASC, FULL_ASC, AST)
    images = [
        sample(
            subject,
            plan,
            sampler=dataclasses.replace(subject.sampler, arrangement=Guidance(*order)),
        )
        for order in (
            (("cond", "uncond"), False),
            (("uncond", "cond"), False),
            (("cond", "uncond"), True),
        )
    ]
    chex.assert_trees_all_close(images[0], images[1], atol=1e-5)
    chex.assert_trees_all_close(images[0], images[2], atol=1e-5)


# ---- (b) costs ----


def test_need_flags():
    plan = plan_of(FULL, AST, WARS, FULL, FULL_ASC, AST, AST, WARS_ASC, WARS, FULL, AST, layers=1)
    assert plan.need == ((True, False, False, False, True) + (False,) * 6,)


def test_closed_form_costs():
    plan = plan_of(FULL, WARS, WARS_ASC, FULL_ASC, AST, WARS, tokens=1024, window=128, layers=1)
    dense = 2 * 2 * 1024**2 * 1152
    beta = ((2 * 128 + 1) * 1024 - 128 * 129) / 1024**2
    assert beta == pytest.approx(0.2352, abs=5e-5)
    shares = [1 + beta, beta, beta / 2, (1 + beta) / 2, 0, beta]
    macs = attention_macs(plan, batch=2, width=1152)
    np.testing.assert_allclose(macs[0] / dense, shares, rtol=1e-12)


# ---- search ----


def test_threshold_zero_is_dense_to_the_bit(subject):
    plan = search(
        subject.forward,
        subject.params,
        subject.sampler,
        subject.cond,
        key=jax.random.key(0),
        threshold=0.0,
        progress=False,
    )
    assert plan.strategies == ((FULL,) * CALLS,) * 2
    chex.assert_trees_all_equal(sample(subject, plan), sample(subject))


def test_the_found_plan_replays_the_search(subject):
    latents = {}
    plan = search(
        subject.forward,
        subject.params,
        subject.sampler,
        subject.cond,
        key=jax.random.key(3),
        threshold=0.02,
        window=4,
        progress=False,
        callback=lambda step, x: latents.update({step: x}),
    )
    used = {value for row in plan.strategies for value in row}
    assert len(used) >= 3, f"the plan should mix strategies, it has {used}"
    chex.assert_trees_all_close(sample(subject, plan), latents[CALLS - 1], atol=1e-5)
    assert (plan.tokens, plan.window, plan.calls, plan.guidance) == (64, 4, CALLS, 2.0)
    assert "DiT" in plan.model
    assert "DDIM" in plan.sampler


def test_the_search_is_greedy_and_graded(subject):
    """Redo the decisions of one layer and call with separate programs."""
    options = {"key": jax.random.key(3), "window": 4, "progress": False}
    arguments = (subject.forward, subject.params, subject.sampler, subject.cond)
    threshold = 0.02
    plan = search(*arguments, threshold=threshold, **options)
    found = np.array(plan.strategies)

    from effjax.metrics import relative_difference

    sampler, params, cond = subject.sampler, subject.params, subject.cond
    uncond = sampler.unconditional(subject.forward, cond)
    patched, _ = transform(dataclasses.replace(plan))(subject.forward, params)
    carry = sampler.init(patched, params, cond, jax.random.key(3))
    carry = sampler.step(patched, params, carry, cond, uncond, 0)
    dense = sampler.network(subject.forward, params, {}, carry.x, cond, uncond, 1)[1]
    for layer in range(2):
        for strategy in CANDIDATES:
            # Layers before this one as decided, the ones after it dense.
            strategies = np.array(found[:, :2])
            strategies[layer, 1] = strategy
            strategies[layer + 1 :, 1] = FULL
            # A third call with a window makes the first one keep its residual.
            rows = tuple((*map(int, row), WARS) for row in strategies)
            trial, _ = transform(dataclasses.replace(plan, strategies=rows))(
                subject.forward, params
            )
            first = sampler.init(
                dataclasses.replace(trial, patches=()), params, cond, jax.random.key(3)
            )
            state = trial.init(
                params, *sampler.inputs(first.x, cond, uncond, 0), guidance=sampler.joined
            )
            _, _, state = sampler.network(trial, params, state, first.x, cond, uncond, 0)
            _, raw, _ = sampler.network(trial, params, state, carry.x, cond, uncond, 1)
            passes = relative_difference(dense, raw) < (layer + 1) / 2 * threshold
            if passes:
                break
        else:
            strategy = FULL
        assert found[layer, 1] == strategy


def test_an_unguided_search_leaves_out_sharing_over_halves(subject):
    sampler = Sampler(DDIM(steps=CALLS))
    plan = search(
        subject.forward,
        subject.params,
        sampler,
        subject.cond,
        key=jax.random.key(0),
        threshold=5.0,
        progress=False,
    )
    assert {value for row in plan.strategies for value in row} == {FULL, AST}
    assert plan.guidance is None
    sample(subject, plan, sampler=sampler)


def test_plans_read_back(subject):
    plan = dataclasses.replace(plan_of(FULL, WARS), guidance=4.0, threshold=0.1, model="m")
    assert DiTFastAttnPlan.from_json(plan.to_json()) == plan
    with pytest.raises(
        ValueError, match=r"missing fields \['strategies'\] and unknown fields \['code'\]"
    ):
        DiTFastAttnPlan.from_dict({"code": [[0]], "tokens": 4, "window": 1})


# ---- (d) errors ----


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategies": ((AST, FULL),)}, r"layers \[0\] do not start with FULL"),
        ({"strategies": ((FULL, FULL), (WARS, FULL))}, r"layers \[1\] do not start with FULL"),
        ({"strategies": ((FULL, 7),)}, r"unknown strategies \[7\]"),
        ({"strategies": ((FULL, AST), (FULL,))}, r"lengths \[2, 1\]"),
        ({"strategies": ()}, "at least one layer"),
        ({"window": -1}, "window must be a whole number of at least 0"),
    ],
)
def test_bad_plans(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(plan_of(FULL, AST), **change)


def test_a_plan_for_something_else_is_refused(subject):
    short = plan_of(*(FULL,) * 3)
    with pytest.raises(ValueError, match="planned for 3 network calls, but the sampler makes 4"):
        sample(subject, short)
    patched, params = transform(short)(subject.forward, subject.params)
    inputs = (jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond)
    with pytest.raises(ValueError, match="step 3 lies outside the plan"):
        patched(params, {}, *inputs, step=3)
    with pytest.raises(ValueError, match="has 3 layers"):
        transform(plan_of(FULL, layers=3))(subject.forward, subject.params)
    with pytest.raises(ValueError, match="made for 60 tokens, this call has 64"):
        sample(subject, plan_of(*(FULL,) * 4, tokens=60))
    with pytest.raises(ValueError, match="not guided"):
        sample(subject, plan_of(FULL, FULL_ASC, FULL, FULL), sampler=Sampler(DDIM(steps=CALLS)))
    odd = plan_of(FULL, FULL_ASC)
    patched, params = transform(odd)(subject.forward, subject.params)
    inputs = (jnp.ones((3, 16, 16, 4)), jnp.ones(3), jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="must be a multiple of 2; got 3"):
        patched(params, {}, *inputs, step=1, guidance=Guidance())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"threshold": -0.1}, "threshold"), ({"threshold": 0.1, "metric": "lpips"}, "unknown metric")],
)
def test_bad_searches(subject, options, message):
    arguments = (subject.forward, subject.params, subject.sampler, subject.cond)
    with pytest.raises(ValueError, match=message):
        search(*arguments, key=jax.random.key(0), **options)


def test_uniform_plans():
    plan = uniform((WARS, AST), layers=3, calls=5, tokens=64)
    assert plan.strategies == ((FULL, WARS, AST, WARS, AST),) * 3
    assert plan.window == 8
