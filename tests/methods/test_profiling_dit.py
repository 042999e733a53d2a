"""ProfilingDiT: runs of cached blocks, what is foreground, which blocks prefer it, errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import capture, testing
from effjax.calibration import Trajectory
from effjax.context import Layout
from effjax.cost import sampler_cost
from effjax.layers.stack import Stack
from effjax.methods import profiling_dit
from effjax.methods.steps import foreground
from effjax.methods.steps.profiling_dit import RELEASED, Goals, ProfilingDiTPlan


def drawn(mask):
    return "".join("#" if each else "." for each in mask)


def test_masks_and_the_share_of_blocks_that_run():
    """The released schedules; of 2,000 evaluations of blocks 2.016 and 1.76 times fewer run."""
    plan = ProfilingDiTPlan(blocks=RELEASED["Wan2.1-14B"])
    assert drawn(plan.mask) == "######" + "#....." * 7 + "#."
    assert sum(plan.mask) == 14
    assert len(RELEASED["Wan2.1-14B"]) == 28
    assert 14 * 40 + 36 * (40 - 28) == 992
    single = [block - 20 for block in RELEASED["HunyuanVideo"]]
    assert (len(single), single[0], single[-1]) == (24, 0, 33)
    assert 14 * 40 + 36 * (40 - len(single)) == 1136
    listed = ProfilingDiTPlan(blocks=(0,), at=(6, 18, 26, 32, 38, 42, 46, 48))
    assert [i for i, each in enumerate(listed.mask) if each][6:] == list(listed.at)


def test_runs_of_several_stacks():
    plan = ProfilingDiTPlan(blocks=(0, 1, 3, 4, 6))
    assert plan.runs("x", [4, 5]) == [((0, 2), (3, 4)), ((0, 1), (2, 3))]
    assert plan.runs("x", [2, 1, 4]) == [((0, 2),), (), ((0, 2), (3, 4))]


def test_a_run_adds_what_it_added_and_the_others_compute():
    """By hand: blocks 0, 1 and 3 are cached, block 2 runs on what they leave."""
    subject = testing.tiny_dit(num_layers=4)
    plan = ProfilingDiTPlan(blocks=(0, 1, 3), steps=3, warmup=1, every=2)
    assert drawn(plan.mask) == "##."
    forward, params = profiling_dit.transform(plan)(subject.forward, subject.params)
    model, rng = subject.forward.module(subject.params), np.random.default_rng(0)
    labels, deltas = jnp.array([1, 2]), {}
    state = None
    for step in range(3):
        x = jnp.asarray(rng.standard_normal((2, 16, 16, 4)), jnp.float32)
        inputs = x, jnp.full(2, 500.0 - step), labels
        tokens, c = capture.stack_inputs(subject.forward, subject.params, inputs)
        for start, stop, cached in ((0, 2, True), (2, 3, False), (3, 4, True)):
            if step == 2 and cached:
                tokens = tokens + deltas[start]
                continue
            before = tokens
            for block in list(model.blocks)[start:stop]:
                tokens = block(tokens, c)
            deltas[start] = tokens - before
        state = forward.init(params, *inputs) if state is None else state
        tap = capture.Tap(Stack)
        _, state, seen = capture.tapped_call(forward, params, inputs, tap, state=state, step=step)
        np.testing.assert_allclose(seen["blocks"], tokens, atol=1e-5)


def test_skipped_blocks_cost_nothing():
    subject = testing.tiny_flux(steps=3)
    costs = {}
    for blocks in ((), (1,), (1, 2)):  # a dual block, and a single one
        pair = subject.forward, subject.params
        if blocks:
            plan = ProfilingDiTPlan(blocks=blocks, steps=3, warmup=1, every=2)
            pair = profiling_dit.transform(plan)(*pair)
        costs[blocks] = sampler_cost(subject.sampler, *pair, subject.cond).flops
    sizes = costs[()] - costs[(1,)], costs[(1,)] - costs[(1, 2)]
    width, tokens, batch = 32, 69, 2
    attention = 4 * batch * tokens**2 * width
    assert sizes[0] == attention + 2 * batch * (12 * tokens + 2 * 6) * width**2
    assert sizes[1] == attention + 2 * batch * (12 * tokens + 3) * width**2


@pytest.mark.parametrize(
    "tiny", [testing.tiny_pixart, functools.partial(testing.tiny_sd3, dual_layers=())]
)
def test_a_skipped_block_saves_what_one_more_costs(tiny):
    """In one call of three, and in a model whose blocks in the middle are equal."""
    costs = []
    for layers in (3, 4):
        subject = tiny(steps=3, num_layers=layers)
        pair, options = (subject.forward, subject.params), {"uncond": subject.uncond}
        costs.append(sampler_cost(subject.sampler, *pair, subject.cond, **options).flops)
    plan = ProfilingDiTPlan(blocks=(1,), steps=3, warmup=1, every=2)
    pair = profiling_dit.transform(plan)(*pair)
    cached = sampler_cost(subject.sampler, *pair, subject.cond, **options).flops
    assert 3 * (costs[1] - cached) == costs[1] - costs[0]


class TestForeground:
    def test_what_stands_out_is_foreground(self):
        rng = np.random.default_rng(0)
        samples = 0.1 * rng.standard_normal((2, 8, 8, 4)).astype(np.float32)
        samples[0, 2:4, 4:8] += 3.0
        samples[1, 6:, :2] -= 2.0
        found = foreground.foreground_of(samples, Layout((1, 4, 4)))
        wanted = np.zeros((2, 4, 4), bool)
        wanted[0, 1, 2:] = wanted[1, 3, 0] = True
        np.testing.assert_array_equal(found, wanted.reshape(2, -1))

    def test_places_of_videos(self):
        samples = np.zeros((1, 2, 4, 4, 3), np.float32)
        samples[0, 1, 2:, 2:] = 1.0
        found = foreground.foreground_of(samples, Layout((2, 2, 2)))
        assert found.tolist() == [[False] * 7 + [True]]

    @pytest.mark.parametrize("tiny", [testing.tiny_sd3, testing.tiny_flux])
    def test_preferences_are_shares_of_the_attention(self, tiny):
        """Once more from the whole maps of the first call, text left out."""
        subject = tiny(steps=1)
        data = subject.data(Trajectory)
        mask = np.random.default_rng(1).random((2, 64)) < [[0.2], [0.5]]
        pair = subject.forward, subject.params
        found = foreground.preferences(*pair, data, mask)
        options = {} if subject.uncond is None else {"uncond": subject.uncond}
        x = subject.sampler.init(*pair, subject.cond, data.key, **options).x
        inputs = subject.sampler.inputs(x, subject.cond, subject.uncond, 0)
        model, wanted = subject.forward.module(subject.params), {}
        paths = [target.path for target in foreground.attentions(model, *foreground.KINDS)]
        calls = capture.calls(model, [f"{path}.core" for path in paths], *inputs)
        for path in paths:
            ((q, k, _), _) = calls[f"{path}.core"][0]
            logits = jnp.einsum("bshd,bthd->bhst", q, k) * q.shape[-1] ** -0.5
            weights = np.asarray(jax.nn.softmax(logits, -1))
            if q.shape[1] > 64:  # with the text: before the image in FLUX, behind it in SD3
                first = 5 if tiny is testing.tiny_flux else 0
                weights = weights[..., first : first + 64, first : first + 64]
            rows = np.tile(mask, (len(q) // 2, 1))
            share = np.einsum("bhst,bt->bhs", weights, rows) / weights.sum(-1)
            own = (share.mean((1, 2)) / rows.mean(1)).mean()
            wanted.setdefault(path.rpartition(".")[0], []).append(own)
        assert found.shape == (1, len(wanted))
        np.testing.assert_allclose(found[0], [np.mean(each) for each in wanted.values()], rtol=1e-4)


class TestSearch:
    def test_blocks_that_prefer_the_background_are_cached(self, monkeypatch):
        subject = testing.tiny_dit(num_layers=4, steps=2)
        data = subject.data(Trajectory)
        measured = np.array([[1.2, 0.8, 1.0, 0.9], [1.4, 0.7, 1.1, 1.0]])
        monkeypatch.setattr(profiling_dit, "preferences", lambda *_: measured)
        for share, blocks in ((0.5, (1, 3)), (0.75, (1, 2, 3)), (None, (1, 3))):
            goals = Goals(share=share, warmup=1, every=2)
            plan = profiling_dit.search(goals, subject.forward, subject.params, data)
            assert plan == ProfilingDiTPlan(blocks=blocks, steps=2, warmup=1, every=2)
        with pytest.raises(
            ValueError, match=r"no block of 4 is in share=0\.1: give a larger share"
        ):
            profiling_dit.search(Goals(share=0.1), subject.forward, subject.params, data)

    def test_bad_input(self):
        with pytest.raises(ValueError, match="blocks must be different numbers of blocks in order"):
            ProfilingDiTPlan(blocks=())
        with pytest.raises(ValueError, match=r"got \(2, 1\)"):
            ProfilingDiTPlan(blocks=(2, 1))
        with pytest.raises(ValueError, match=r"at must be calls from warmup=6 to 9, got \[3, 10\]"):
            ProfilingDiTPlan(blocks=(0,), steps=10, at=(3, 8, 10))
        subject = testing.tiny_dit(steps=2)
        pair, data = (subject.forward, subject.params), subject.data(Trajectory)
        with pytest.raises(ValueError, match="profiling_dit caches block 2, but this model has 2"):
            profiling_dit.transform(ProfilingDiTPlan(blocks=(2,)))(*pair)
        with pytest.raises(ValueError, match="models, and NextScale is no Sampler of one"):
            profiling_dit.find(Goals(), *pair, testing.tiny_var().data(Trajectory))
        with pytest.raises(ValueError, match=r"foreground must be bool\[2, 64\], one row for each"):
            profiling_dit.find(Goals(), *pair, data, np.ones((2, 9), bool))
        mask = np.array([[True, False] * 32, [False] * 64])
        with pytest.raises(ValueError, match=r"the samples \[1\] have no foreground, or no backgr"):
            profiling_dit.find(Goals(), *pair, data, mask)
