"""FasterCache: calls that run one branch of guidance, what they estimate, and states by branch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.calibration import Trajectory
from effjax.context import states
from effjax.cost import cost
from effjax.guidance import Guidance
from effjax.layers.stack import Stack
from effjax.methods import dit_fast_attn, even_steps, faster_cache, taylor_seer
from effjax.methods.attention.dit_fast_attn import Strategy, uniform
from effjax.methods.steps.faster_cache.attention import LastTwo
from effjax.methods.steps.faster_cache.plan import FasterCachePlan

TIMES = (900.0, 640.0, 600.0, 300.0, 200.0, 90.0)


def drawn(mask):
    return "".join("#" if each else "." for each in mask)


def test_masks_and_gains():
    plan = FasterCachePlan(TIMES, branch_every=3)
    assert plan.calls == 6  # what a pipeline takes, if a call does not say
    assert drawn(plan.branches) == "#..#.."
    assert drawn(plan.attention) == "#.###."
    assert drawn(FasterCachePlan(TIMES, guided=False, branch_every=3).attention) == "#.#.#."
    low, high = np.transpose(plan.gains)
    np.testing.assert_allclose(low, [1, 1.1, 1.1**2, 1, 1.1, 1.1])
    np.testing.assert_allclose(high, [1, 1, 1, 1, 1.1, 1.1**2])
    ramp = FasterCachePlan(TIMES, weights=(0.0, 1.0)).weight
    np.testing.assert_allclose(ramp, np.arange(6) / 5)


def test_attention_continues_its_last_change():
    """From predicted outputs too: 1, 3, then 3 + 2 w, then that + 2 w w."""
    values, seen = {}, []
    like = jnp.zeros((1, 1, 1))
    for step in range(4):
        memory = LastTwo(Stack([]), (0.5,) * 4)
        for path, state in states(memory).items():
            state.set_metadata(creating=True)
            if path in values:
                state.set_value(values[path])
        if step < 2:
            memory.renew(like + (1.0, 3.0)[step], step)
        else:
            seen.append(float(memory.predict(like, step)[0, 0, 0]))
        values = {path: state.get_value() for path, state in states(memory).items()}
    assert seen == [4.0, 4.5]


def test_branches_are_cond_and_their_last_difference():
    """The sheet of the method once more, for three interleaved branches, with a traced step."""
    subject = testing.tiny_dit(num_layers=1)
    plan = FasterCachePlan(TIMES, every=1, branch_every=3)
    forward, params = faster_cache.transform(plan)(subject.forward, subject.params)
    guidance = Guidance(("style", "cond", "uncond"), paired=True)
    call = jax.jit(functools.partial(forward, guidance=guidance))
    dense = jax.jit(subject.forward)
    rng = np.random.default_rng(0)
    labels = jnp.array([3, 1, 5, 4, 2, 5])  # two samples
    shape = 6, 16, 16, 4
    state = forward.init(params, jnp.zeros(shape), jnp.zeros(6), labels, guidance=guidance)
    differences = {}
    for step, time in enumerate(TIMES):
        x = guidance.duplicate(jnp.asarray(rng.standard_normal((2, *shape[1:])), jnp.float32))
        inputs = x, jnp.full(6, time), labels
        out, state = call(params, state, *inputs, step=jnp.int32(step))
        parts, (whole, _) = guidance.split(out), dense(params, {}, *inputs)
        wanted = {name: np.asarray(part) for name, part in guidance.split(whole).items()}
        for name in ("style", "uncond"):
            if step % 3:
                for kind, (least, most) in {"low": (99, 901), "high": (-1, 301)}.items():
                    differences[name][kind] *= 1.1 if least < time < most else 1.0
                shifted = differences[name]["low"] + differences[name]["high"]
                back = np.fft.ifft2(np.fft.ifftshift(shifted, axes=(1, 2)), axes=(1, 2)).real
                wanted[name] = wanted["cond"] + back
            else:
                found = np.fft.fft2(wanted[name] - wanted["cond"], axes=(1, 2))
                found = np.fft.fftshift(found, axes=(1, 2))
                row, column = np.ogrid[:16, :16]
                near = ((row - 8) ** 2 + (column - 8) ** 2 <= 3**2)[None, ..., None]
                differences[name] = {"low": found * near, "high": found * ~near}
        for name, part in parts.items():
            np.testing.assert_allclose(part, wanted[name], atol=2e-4)


COMPOSED = {
    "series": even_steps.transform(even_steps.EvenStepsPlan(steps=6, every=3, warmup=2, order=1)),
    "attention": taylor_seer.transform(taylor_seer.TaylorSeerPlan(6, every=2, warmup=2)),
    "window": dit_fast_attn.transform(
        uniform((Strategy.WARS, Strategy.AST), layers=2, calls=6, tokens=64)
    ),
}


@pytest.mark.parametrize(
    ("kind", "first"), [("series", True), ("attention", False), ("window", False)]
)
def test_each_branch_keeps_its_own_state(kind, first):
    """As two models, each of which sees one branch, in the calls in which it runs."""
    subject = testing.tiny_dit()
    plan = FasterCachePlan(TIMES, every=1, branch_every=4, branch_times=(-1.0, 1e3))
    chained = [faster_cache.transform(plan), COMPOSED[kind]]
    both = effjax.chain(*(chained if first else chained[::-1]))(subject.forward, subject.params)
    alone = COMPOSED[kind](subject.forward, subject.params)
    guidance = Guidance(("uncond", "cond"))
    labels = {"uncond": jnp.array([5, 5]), "cond": jnp.array([1, 2])}
    if first:  # static steps in the one order, traced ones in the other
        together = jax.jit(functools.partial(both[0], guidance=guidance), static_argnames="step")
        apart, number = jax.jit(alone[0], static_argnames="step"), int
    else:
        together = jax.jit(functools.partial(both[0], guidance=guidance))
        apart, number = jax.jit(alone[0]), jnp.int32
    inputs = jnp.zeros((2, 16, 16, 4)), jnp.zeros(2)
    own = {name: alone[0].init(alone[1], *inputs, labels[name]) for name in labels}
    joined = [guidance.duplicate(each) for each in inputs]
    state = both[0].init(both[1], *joined, guidance.join(labels), guidance=guidance)
    rng = np.random.default_rng(0)
    for step, time in enumerate(TIMES):
        x = jnp.asarray(rng.standard_normal((2, 16, 16, 4)), jnp.float32)
        given = guidance.duplicate((x, jnp.full(2, time)))
        out, state = together(both[1], state, *given, guidance.join(labels), step=number(step))
        for name in ("cond", "uncond") if plan.branches[step] else ("cond",):
            given = x, jnp.full(2, time), labels[name]
            wanted, own[name] = apart(alone[1], own[name], *given, step=number(step))
            np.testing.assert_allclose(guidance.branch(name, out), wanted, atol=1e-4)


def test_sharing_over_branches_leaves_the_only_one_as_it_is():
    """FULL_ASC gives the others what "cond" has; "cond" itself stays dense, alone or not."""
    subject = testing.tiny_dit(num_layers=1)
    plan = FasterCachePlan((600.0, 500.0), every=1)
    shared = dit_fast_attn.transform(uniform((Strategy.FULL_ASC,), layers=1, calls=2, tokens=64))
    pair = effjax.chain(shared, faster_cache.transform(plan))(subject.forward, subject.params)
    guidance = Guidance()
    x = guidance.duplicate(jnp.ones((2, 16, 16, 4)))
    inputs = x, jnp.full(4, 500.0), jnp.array([1, 2, 5, 5])
    state = pair[0].init(pair[1], *inputs, guidance=guidance)
    dense, _ = subject.forward(subject.params, {}, *inputs)
    for step in range(2):
        out, state = pair[0](pair[1], state, *inputs, step=step, guidance=guidance)
        found, wanted = (guidance.branch("cond", each) for each in (out, dense))
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_costs():
    """One of two branches costs half, and predicted attention its projections and products less."""
    subject = testing.tiny_sd3()
    plan = FasterCachePlan((600.0, 500.0, 400.0), branch_every=9)
    pair = faster_cache.transform(plan)(subject.forward, subject.params)
    inputs = subject.sampler.inputs(jnp.zeros((2, 16, 16, 4)), subject.cond, subject.uncond, 0)
    guidance = subject.sampler.joined
    state = pair[0].init(pair[1], *inputs, guidance=guidance)

    def counted(step):
        return cost(
            lambda *given: pair[0](*given, *inputs, step=step, guidance=guidance)[0], pair[1], state
        )

    full, predicted, alone = map(counted, range(3))
    assert full.flops == 2 * alone.flops
    assert predicted.scope("attention").flops == 0
    size, tokens, layers = 16, 2 * (64 + 5), 3
    projections = 8 * tokens * size**2 * layers  # q, k, v and out of every token
    projections -= 2 * 2 * 5 * size**2  # the text of the last block has no output
    projections += 8 * 2 * 64 * size**2  # the second attention of the first block
    assert alone.flops - predicted.flops == projections + alone.scope("attention").flops


def test_bad_input():
    with pytest.raises(ValueError, match="times must be those of the network calls"):
        FasterCachePlan(())
    subject = testing.tiny_flux(steps=6)
    pair = subject.forward, subject.params
    var = testing.tiny_var()
    with pytest.raises(ValueError, match="goes by the times of network calls, and NextScale has n"):
        faster_cache.search(faster_cache.Goals(), *pair, var.data(Trajectory))
    forward, params = faster_cache.transform(FasterCachePlan(TIMES))(*pair)
    with pytest.raises(ValueError, match="is for calls that are guided, and this one not: give gu"):
        subject.sampler(forward, params, subject.cond, jax.random.key(0))
    guided = testing.tiny_dit(steps=6)
    plan = FasterCachePlan(TIMES, guided=False)
    pair = faster_cache.transform(plan)(guided.forward, guided.params)
    with pytest.raises(ValueError, match="is for calls that are not guided, and this one is"):
        guided.sampler(*pair, guided.cond, jax.random.key(0))
    inputs = jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), subject.cond
    with pytest.raises(ValueError, match="step 6 lies outside the plan, which is for 6 network"):
        forward.patched(params, inputs, 6)
