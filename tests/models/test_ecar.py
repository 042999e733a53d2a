"""ECAR: windows and jumps, the loop over stages, parity with plain numpy, cost, methods, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.autoregression import stage_loss
from effjax.context import Layout
from effjax.cost import sampler_cost
from effjax.forward import abstract, parameter_count
from effjax.layers.stages import Stages, block_noise, by_token, enlarged, even_windows
from effjax.methods.quantization import round_to_nearest
from effjax.methods.steps import taylor_seer
from effjax.models.ecar import ECAR, ECARConfig
from effjax.samplers import sample_keys
from tests.models import ecar_reference as reference


@pytest.fixture(scope="module")
def subjects():
    return {head: testing.tiny_ecar(head=head) for head in ("mlp", "dit")}


@pytest.fixture(scope="module")
def small():
    """Two stages and one block in both parts: what compiles fast."""
    options = {"sample_size": 4, "num_stages": 2, "num_layers": 1, "head_layers": 1}
    return testing.tiny_ecar(head="dit", **options)


@jax.jit
def sample(loop, forward, params, labels, key):
    return loop(forward, params, labels, key)


def stages(count, size=8, patch=1):
    return Stages(size, patch, *even_windows(count))


def image(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


# --- windows and jumps --------------------------------------------------------------------------


def test_windows_are_those_of_the_paper():
    for count, starts, ends, tokens in (
        (1, [0], [1], [256]),
        (2, [0, 0.5], [0.6667, 1], [64, 256]),
        (3, [0, 0.3333, 0.6667], [0.5, 0.8, 1], [16, 64, 256]),
        (4, [0, 0.25, 0.5, 0.75], [0.4, 0.6667, 0.8571, 1], [4, 16, 64, 256]),
    ):
        made = stages(count, 16)
        assert made.starts == pytest.approx(starts, abs=1e-4)
        assert made.ends == pytest.approx(ends, abs=1e-4)
        assert [side**2 for side in made.sides] == tokens
        for stage in range(1, count):  # the least noise there is
            assert made.gamma(stage) == pytest.approx(-1 / 3)
            assert made.alpha(stage) == pytest.approx(3**0.5 * (1 - made.starts[stage]) / 2)
    later = Stages(16, 1, (0.0, 0.5), (1.0, 1.0))  # an end without noise takes white noise
    assert (later.alpha(1), later.gamma(1)) == (0.5, 0.0)


@pytest.mark.parametrize("end", [2 / 3, 0.8])
def test_a_jump_has_the_mean_and_the_covariance_of_the_next_start(end):
    """200,000 draws of one block of pixels that were one."""
    made, draws = Stages(2, 1, (0.0, 0.5), (end, 1.0)), 200_000
    ours, theirs = jax.random.split(jax.random.key(0))
    x = jnp.asarray([[1.5]])[None, ..., None]  # what the coarse stage should be
    noise = jax.random.normal(ours, (draws, 1, 1, 1))
    ends = end * x + (1 - end) * noise
    white = jax.random.normal(theirs, (draws, 2, 2, 1))
    got = np.asarray(made.jump(enlarged(ends, 2), white, 1)).reshape(draws, 4)
    assert got.mean(0) == pytest.approx(np.full(4, 0.5 * 1.5), rel=0.01)
    covariance = np.cov(got.T)
    assert np.diag(covariance) == pytest.approx(np.full(4, 0.25), rel=0.01)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() < 0.005
    # White noise of the same variance leaves a block's pixels alike; without any it is flat.
    wrong = np.cov(np.asarray(made.jump(enlarged(ends, 2), white, 1, gamma=0.0)).reshape(-1, 4).T)
    left = (0.5 * (1 - end) / end) ** 2
    assert wrong[0, 1] == pytest.approx(left, rel=0.05)


def test_jumps_ends_and_noise_equal_plain_numpy():
    made, x = stages(3), image(2, 8, 8, 3)
    starts, ends = reference.windows(3)
    coarse, small = reference.pool(x), reference.pool(reference.pool(x))
    noises = [image(2, side, side, 3, seed=side) for side in (2, 4, 8)]
    wanted = {0: (None, small), 1: (small, coarse), 2: (coarse, x)}
    for stage, (before, own) in wanted.items():
        s, e, n = starts[stage], ends[stage], noises[stage]
        start = n if before is None else s * reference.up(before) + (1 - s) * n
        chex.assert_trees_all_close(made.start(x, n, stage), start, atol=1e-6)
        chex.assert_trees_all_close(made.end(x, n, stage), e * own + (1 - e) * n, atol=1e-6)
    got = made.jump(enlarged(noises[0], 2), noises[1], 1)
    wanted = reference.jump(noises[0], starts[1], ends[0], noises[1])
    chex.assert_trees_all_close(got, wanted, atol=1e-6)
    for gamma in (-1 / 3, 0.25):
        draws = np.asarray(block_noise(image(50_000, 2, 2, 1), gamma)).reshape(-1, 4)
        wanted = np.full((4, 4), gamma) + (1 - gamma) * np.eye(4)
        chex.assert_trees_all_close(np.cov(draws.T), wanted, atol=0.02)


def test_coupled_noise_is_white_and_makes_starts_of_jumps():
    made, x = stages(3), image(4096, 8, 8, 1)
    noises = made.noises(jax.random.key(1), len(x), 1, coupled=True)
    for noise in noises:
        flat = np.asarray(noise).reshape(len(x), -1)
        chex.assert_trees_all_close(np.cov(flat.T), np.eye(flat.shape[1]), atol=0.1)
    # The start of a stage differs from the enlarged end before it by new noise alone.
    for stage in (1, 2):
        start, end = made.start(x, noises[stage], stage), made.end(x, noises[stage - 1], stage - 1)
        kept = made.starts[stage] / made.ends[stage - 1]
        new = np.asarray(start - kept * enlarged(end, 2))
        chex.assert_trees_all_close(reference.pool(new), 0 * reference.pool(new), atol=1e-5)
        assert np.std(new) == pytest.approx(made.alpha(stage), rel=0.01)


@pytest.mark.parametrize("steps", [(1, 1, 1), (2, 1, 5)])
def test_with_the_true_velocities_samples_are_the_images(subjects, steps):
    """Paths are straight: any number of steps is exact."""
    subject, x = subjects["mlp"], image(2, 8, 8, 1)
    loop = dataclasses.replace(subject.sampler, steps=steps, guidance=None)
    made, starts, ends = loop.stages, *reference.windows(3)
    carry = loop.init(subject.forward, subject.params, subject.cond, jax.random.key(0))
    pooled = [reference.pool(reference.pool(x)), reference.pool(x), x]
    for call in range(loop.calls):
        stage, own = loop.place(call)
        velocity = jnp.zeros((2, 8, 8, 1))
        if own is not None:
            s, e, tau = starts[stage], ends[stage], own / steps[stage]
            before = 0 if stage == 0 else s * reference.up(pooled[stage - 1])
            end, now = e * pooled[stage], np.asarray(made.part(carry.x, stage))
            noise = now - (1 - tau) * before - tau * end
            noise = noise / ((1 - tau) * (1 - s) + tau * (1 - e))
            velocity = end + (1 - e) * noise - before - (1 - s) * noise
        carry = loop.update(carry, velocity, call)
    chex.assert_trees_all_close(carry.x, x, atol=1e-5)


# --- the network and the loop -------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mlp", "dit"])
def test_samples_equal_plain_numpy(subjects, head):
    """Guided, through the caches; scales of guidance grow from 1 at the first stage."""
    subject = subjects[head]
    loop, keys = subject.sampler, sample_keys(jax.random.key(3), 2)
    got = sample(loop, subject.forward, subject.params, subject.cond, keys)
    noises = []
    for stage in range(3):
        shape = loop.stages.size(stage), loop.stages.size(stage), 1
        drawn = [jax.random.normal(jax.random.fold_in(key, stage), shape) for key in keys]
        noises.append(np.asarray(jnp.stack(drawn), np.float64))
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), subject.params)
    plain = reference.Reference(params, subject.forward.config)
    wanted = plain.sample(np.asarray(subject.cond), noises, loop.steps, (1.0, 2.0, 3.0))
    chex.assert_trees_all_close(got, wanted.astype(np.float32), atol=1e-4)
    assert np.std(wanted) > 0.1
    by_stage = dataclasses.replace(loop, guidance=(1.0, 2.0, 3.0))
    again = sample(by_stage, subject.forward, subject.params, subject.cond, keys)
    chex.assert_trees_all_close(again, got, atol=1e-6)


@pytest.mark.parametrize("head", ["mlp", "dit"])
def test_cached_calls_give_what_one_call_gives(subjects, head):
    subject, x = subjects[head], image(2, 8, 8, 1)
    forward, params, labels = subject.forward, subject.params, subject.cond
    made, keeping = forward.config.stages, subject.sampler.ready(forward)
    noisy, before = (image(2, 21, 4, seed=seed) for seed in (1, 2))
    times = jnp.asarray([[0.1, 0.4, 0.9], [0.2, 0.6, 0.7]])

    @jax.jit
    def both(params):
        whole = forward(params, {}, noisy, times, labels, before)[0]
        by_tokens = by_token(times[..., None], made.scales(0, 3))[..., 0]
        again = forward(params, {}, noisy, by_tokens, labels, before)[0]
        draws = jnp.tile(noisy, (2, 1, 1)), jnp.tile(times, (2, 1))
        twice = forward(params, {}, *draws, labels, before)[0]
        other = forward(params, {}, noisy, times, labels, before.at[:, 7].add(1.0))[0]
        state, parts = {}, []
        for stage, own in enumerate((slice(0, 1), slice(1, 5), slice(5, 21))):
            scales = made.scales(stage, stage + 1)
            inputs = None, None, labels, before[:, own], scales
            state = state or keeping.init(params, *inputs)
            _, state = keeping(params, state, *inputs, step=stage)
            now = noisy[:, own], times[:, stage : stage + 1], labels, None, scales
            velocity, state = keeping(params, state, *now, step=stage)
            parts.append(velocity)
        return whole, again, twice, other, jnp.concatenate(parts, axis=1)

    whole, again, twice, other, cached = both(params)
    chex.assert_trees_all_close(cached, whole, atol=1e-5)
    chex.assert_trees_all_close(again, whole, atol=1e-5)
    chex.assert_trees_all_close(twice, jnp.tile(whole, (2, 1, 1)), atol=1e-5)
    # A stage sees all of itself and of those before, and nothing that follows.
    chex.assert_trees_all_equal(other[:, :5], whole[:, :5])
    assert float(jnp.abs(other - whole)[:, 5:].max(axis=(0, 2)).min()) > 1e-5
    assert x.shape[1:] == forward.config.sample_shape


def test_one_program_for_all_labels_keys_and_guidance(small):
    subject, traces = small, []

    @jax.jit
    def run(loop, forward, params, labels, keys):
        traces.append(None)
        return loop(forward, params, labels, keys)

    keys, found = jax.random.split(jax.random.key(0), 2), []
    for guidance, change in ((1.0, 0), (4.0, 1)):
        loop = dataclasses.replace(subject.sampler, guidance=guidance)
        labels = (subject.cond + change) % 5
        found.append(run(loop, subject.forward, subject.params, labels, keys))
    # A sample does not depend on its neighbor.
    other = run(loop, subject.forward, subject.params, labels.at[0].set(4), keys.at[0].set(keys[1]))
    assert len(traces) == 1
    assert float(jnp.abs(found[0] - found[1]).max()) > 1e-3
    chex.assert_trees_all_equal(found[1][1], other[1])
    # A scale of 1 is no guidance; programs on the host give the same, and go on from a callback's.
    loop, seen = dataclasses.replace(subject.sampler, guidance=None), []
    args = subject.forward, subject.params, subject.cond, keys
    bare = sample(loop, *args)
    chex.assert_trees_all_close(bare, found[0], atol=1e-5)

    def look(call, x):
        seen.append(call)
        return None if call else x + 1.0

    chex.assert_trees_all_close(loop.stepwise(*args)[0], bare, atol=1e-5)
    changed = loop.stepwise(*args, callback=look)[0]
    assert seen == list(range(loop.calls))
    assert float(jnp.abs(changed - bare).max()) > 1e-2
    with pytest.raises(ValueError, match="a callback returns latents"):
        loop.stepwise(*args, callback=lambda call, x: x[:1])
    # Three runs, one after the other, are one run.

    @jax.jit
    def parts(forward, params, labels, keys):
        carry = loop.init(forward, params, labels, keys)
        for start, stop in ((0, 2), (2, 5), (5, None)):
            carry = loop.run(forward, params, carry, labels, start=start, stop=stop)
        return carry.x

    chex.assert_trees_all_close(parts(*args), bare, atol=1e-5)


# --- one stage, and the loss --------------------------------------------------------------------


def test_one_stage_is_plain_flow_matching():
    """The loss, and samples by Euler's steps from noise at 0 to data at 1."""
    subject, x = testing.tiny_ecar(num_stages=1, head="dit"), image(2, 8, 8, 1)
    forward, params, labels = subject.forward, subject.params, subject.cond
    made, key = forward.config.stages, jax.random.key(5)

    def velocity(params, x, t):
        tokens = made.tokens(x)
        out = forward(params, {}, tokens, t[:, None], labels, jnp.zeros_like(tokens))[0]
        return made.image(out, 0)

    @jax.jit
    def plain(params):
        noise_key, time_key = jax.random.split(key)
        noise = made.noises(noise_key, 2, 1)[0]
        t = jax.random.uniform(time_key, (2, 1, 1))[:, 0, 0]
        mixed = (1 - t)[:, None, None, None] * noise + t[:, None, None, None] * x
        loss = jnp.mean(jnp.square(velocity(params, mixed, t) - (x - noise)))
        shape, keys = made.size(0), sample_keys(jax.random.key(1), 2)
        begun = [jax.random.normal(jax.random.fold_in(k, 0), (shape, shape, 1)) for k in keys]
        y = jnp.stack(begun)
        for step in range(4):
            y = y + velocity(params, y, jnp.full(2, step / 4)) / 4
        return loss, y

    wanted, samples = plain(params)
    got = jax.jit(lambda params: stage_loss(forward, params, x, labels, key))(params)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5)
    loop = dataclasses.replace(subject.sampler, steps=(4,), guidance=None)
    chex.assert_trees_all_close(
        sample(loop, forward, params, labels, jax.random.key(1)), samples, atol=1e-5
    )
    assert dataclasses.replace(loop, guidance=2.5).scale(0) == 2.5


@pytest.mark.parametrize("head", ["mlp", "dit"])
def test_the_loss_is_the_sum_over_stages_for_noisy_ends(subjects, head):
    """Once more with the plain network: its stages read the ends that were made with noise."""
    subject, x = subjects[head], image(2, 8, 8, 1)
    made, config, key = subject.sampler.stages, subject.forward.config, jax.random.key(8)
    loss = jax.jit(
        lambda params: stage_loss(subject.forward, params, x, subject.cond, key, draws=2)
    )(subject.params)
    noise_key, time_key = jax.random.split(key)
    noises = [np.asarray(n, np.float64) for n in made.noises(noise_key, 2, 1)]
    count = 3 if head == "dit" else 21
    local = np.asarray(jax.random.uniform(time_key, (4, count, 1)))[..., 0]
    plain = reference.Reference(
        jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), subject.params), config
    )
    starts, ends = reference.windows(3)
    pooled = [reference.pool(reference.pool(x)), reference.pool(x), x]
    after = [e * p + (1 - e) * n for e, p, n in zip(ends, pooled, noises)]
    maps, wanted = plain.maps(np.asarray(subject.cond), after[:2]), 0.0
    for k, (n, s, e) in enumerate(zip(noises, starts, ends)):
        begun = n if k == 0 else s * reference.up(pooled[k - 1]) + (1 - s) * n
        goal, own = after[k] - begun, slice(sum(4**i for i in range(k)), None)
        for row, taus in enumerate(local):
            b = row % 2
            tau = np.full(4**k, taus[k]) if head == "dit" else taus[own][: 4**k]
            fine = reference.unpatches(np.repeat(tau[None, :, None], 4, axis=2), 2)[0]
            mixed = (begun[b] + fine * goal[b])[None]
            for token, each in enumerate(tau):  # the plain network has one time for a call
                out = plain.velocity(mixed, s + each * (e - s), maps[k][b : b + 1], k)
                error = reference.patches(out - goal[b][None], 2)[0, token]
                wanted += np.mean(error**2) / 4**k / 4
                if head == "dit":
                    wanted += np.mean((out - goal[b]) ** 2) / 4 - np.mean(error**2) / 4**k / 4
                    break
    assert float(loss) == pytest.approx(float(wanted), rel=1e-4)


# --- cost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["mlp", "dit"])
def test_costs_are_the_closed_form(subjects, head):
    subject = subjects[head]
    cond = jax.ShapeDtypeStruct((1,), jnp.int32)
    for guidance, branches in ((3.0, 2), (None, 1)):
        loop = dataclasses.replace(subject.sampler, guidance=guidance)
        counted = sampler_cost(loop, subject.forward, subject.params, cond)
        wanted = reference.flops(subject.forward.config, loop.steps, branches)
        assert counted.flops == sum(wanted)


def test_stages_cut_the_flow_to_the_share_of_the_sheet():
    """Of heads that see single tokens, beside one stage of as many steps in all."""
    for count, share in ((2, 0.625), (3, 0.4375), (4, 0.332)):
        config = ECARConfig(num_stages=count)
        heads = [
            reference.flops(c, (12 // c.num_stages,) * c.num_stages, 1)[1]
            for c in (config, ECARConfig(num_stages=1))
        ]
        assert heads[0] / heads[1] == pytest.approx(share, abs=2e-3)
        assert config.tokens == {2: 320, 3: 336, 4: 340}[count]


def test_presets_have_the_sizes_of_mar():
    """MAR-B, -L and -H have 208, 479 and 943 million parameters."""
    for name, millions in (("B", 208), ("L", 479), ("H", 943)):
        config = ECARConfig.preset(name)
        one, two = (
            parameter_count(abstract(ECAR, dataclasses.replace(config, num_layers=n))[1])
            for n in (1, 2)
        )
        total = one + (config.num_layers - 1) * (two - one)
        assert total / 1e6 == pytest.approx(millions, rel=0.1)
    assert ECARConfig.preset("B") == ECARConfig()
    with pytest.raises(ValueError, match="no preset 'XL'; they are B, L, H"):
        ECARConfig.preset("XL")


# --- methods and errors -------------------------------------------------------------------------


def test_methods_that_change_weights_apply_and_step_caches_do_not(small, tmp_path):
    subject = small
    plan = round_to_nearest.uniform(8, 8)
    forward, params = round_to_nearest.transform(plan)(subject.forward, subject.params)
    key = jax.random.key(2)
    ours = sample(subject.sampler, forward, params, subject.cond, key)
    exact = sample(subject.sampler, subject.forward, subject.params, subject.cond, key)
    assert 0 < float(jnp.abs(ours - exact).max()) < 0.3
    effjax.save(tmp_path / "small", forward, params, progress=False)
    again = effjax.load(tmp_path / "small", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(jax.tree.leaves(again[1]), jax.tree.leaves(params))
    cached, _ = taylor_seer.transform(taylor_seer.TaylorSeerPlan(subject.sampler.calls, 2))(
        subject.forward, subject.params
    )
    with pytest.raises(ValueError, match="taylor_seer keeps tokens of a call for the next one"):
        jax.eval_shape(
            lambda params: subject.sampler.init(cached, params, subject.cond, key), subject.params
        )


def test_layouts_are_those_of_the_stage(subjects):
    forward, params = subjects["mlp"].forward, subjects["mlp"].params
    made = forward.config.stages
    one = None, None, subjects["mlp"].cond, image(2, 4, 4), made.scales(1, 2)
    assert forward.layout(params, *one) == Layout(grid=(1, 2, 2))
    whole = image(2, 21, 4), image(2, 3), subjects["mlp"].cond, image(2, 21, 4)
    assert forward.layout(params, *whole).tokens == 21
    with pytest.raises(ValueError, match="a call of several stages has left 21 tokens"):
        forward.layout(params, *whole).raster("a window")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_size": 12}, "sample_size must be a multiple of 8, got 12"),
        ({"num_stages": 4}, "multiple of 16, got 8"),
        ({"starts": (0.0, 0.5, 0.5)}, "starts must be 0 first, then rise"),
        ({"starts": (0.1, 0.5, 0.7)}, "starts must be 0 first"),
        ({"starts": (0.0, 0.5)}, "3 stages have as many starts and ends"),
        ({"ends": (0.3, 0.9, 1.0)}, r"stage 0 must end after stage 1 starts, got the end 0\.3"),
        ({"ends": (0.4, 0.9, 1.0)}, r"takes noise with gamma = -1\.286, and none is below -1/3"),
        ({"ends": (0.5, 0.9, 0.9)}, "and 1 last"),
        ({"head": "unet"}, "head must be"),
        ({"head": "dit", "head_width": 20}, "multiple of head_dim"),
        ({"head_width": 22}, "head_width must be a multiple of 4"),
    ],
)
def test_bad_configurations(untyped, options, message):
    with pytest.raises(ValueError, match=message):
        testing.tiny_ecar(**options)


def test_bad_calls(untyped, subjects):
    subject, dit = subjects["mlp"], testing.tiny_dit()
    forward, params, labels = subject.forward, subject.params, subject.cond
    made, noisy = forward.config.stages, image(2, 21, 4)
    for inputs, message in (
        ((None, None, labels), "is called with noisy tokens x and times t"),
        ((noisy, None, labels, noisy), "is called with noisy tokens x and times t"),
        ((noisy, image(2, 4), labels, noisy), "for each of 3 stages or of 21 tokens, got 4"),
        ((noisy[:, :, :3], image(2, 3), labels, noisy), r"stages of \(1, 2, 4\) tokens a side"),
        ((noisy[:, :6], image(2, 1), labels, noisy[:, :6]), "whole scales are 1, 5, 21; got 6"),
        ((image(3, 21, 4), image(3, 3), labels, noisy), "one draw for each of 2 images"),
        ((noisy, image(2, 3), labels), "come from a cache"),
        ((None, None, labels, noisy[:, 1:5], made.scales(1, 2)), "the scales before come from a"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(params, {}, *inputs)
    loop = subject.sampler
    for changes, message in (
        ({"steps": (2, 3)}, "one for each of 3 stages; got"),
        ({"steps": (2, 0, 3)}, "whole numbers of at least 1"),
        ({"guidance": (1.0, 2.0)}, "guidance is a number, or one for each of 3"),
        ({"gamma": -0.4}, r"lies in -1/3 \.\.\. 1; got -0.4"),
        ({"stages": stages(2)}, "give stages=forward.config.stages"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(loop, **changes).init(forward, params, labels, jax.random.key(0))
    with pytest.raises(ValueError, match="stages are sampled of an ECAR, got DiT"):
        loop.check(dit.forward)
    with pytest.raises(ValueError, match="a call's step is static"):
        loop.place(jnp.int32(3))
    with pytest.raises(ValueError, match=r"covariance gamma in -1/3 \.\.\. 1"):
        block_noise(image(1, 2, 2, 1), -0.5)
    with pytest.raises(ValueError, match="makes no token maps to cache"):
        loop.ready(dit.forward)(dit.params, {}, *dit.forward.module(dit.params).example_inputs())
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        loop.run(forward, params, None, labels, start=3, stop=2)
