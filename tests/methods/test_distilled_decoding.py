"""Distilled Decoding: the flow map, pairs, students, sampling in few steps, the pipeline."""

import dataclasses
import itertools
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.autoregression import (
    FewScales,
    FlowSolver,
    MappedScales,
    flow_map,
    teacher_forced,
)
from effjax.autoregression.flow_map import posterior_mean
from effjax.calibration import Samples
from effjax.cost import cost
from effjax.forward import abstract, flatten_params
from effjax.generate import Sampling, process_logits
from effjax.loops import Carry
from effjax.methods import distilled_decoding, round_to_nearest
from effjax.methods.distillation.distilled_decoding import DistilledPlan, Fitting
from effjax.models.distilled_var import DistilledVAR, DistilledVARConfig
from effjax.models.vqvae import decode, quantizer_of
from effjax.samplers import sample_keys
from effjax.targets import Wrapper
from pallas_kernels import use_implementation
from pallas_kernels.block_mask import Levels, visible_pairs

# --- the flow map -------------------------------------------------------------------------------


def log(p, rows):
    return jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (rows, len(p)))


@jax.jit
def mean(x, t, logits, codes):
    return [posterior_mean(x, t, logits, codes, tile) for tile in (None, 3)]


def test_the_velocity_is_that_of_the_formula():
    """D(x, t) by its definition in float64; tiles of the codebook, the last one not full."""
    rng = np.random.default_rng(0)
    codes, x = rng.normal(size=(10, 4)), rng.normal(size=(6, 4))
    p = rng.dirichlet(np.ones(10), size=6)
    p[:, :4] = 0  # a whole tile is left out
    for t in (0.0, 0.3, 0.9):
        distances = np.square(x[:, None] - t * codes).sum(-1)
        w = p * np.exp(-distances / (2 * (1 - t) ** 2))
        wanted = (w / w.sum(-1, keepdims=True)) @ codes
        with np.errstate(divide="ignore"):
            given = x, t, np.log(p), codes
        for got in mean(*(jnp.asarray(each, jnp.float32) for each in given)):
            chex.assert_trees_all_close(got, wanted.astype(np.float32), atol=2e-5)


def test_the_map_is_the_inverse_of_the_cumulative_distribution():
    """In one dimension: what noise takes the code of its quantile, by solver and steps."""
    rng = np.random.default_rng(0)
    codes, p = np.sort(rng.normal(size=8)), rng.dirichlet(np.ones(8))
    noise = np.sort(rng.normal(size=20_000))
    quantiles = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in noise])
    wanted = np.searchsorted(np.cumsum(p)[:-1], quantiles)
    noise, codes = (jnp.asarray(each[:, None], jnp.float32) for each in (noise, codes))
    solvers = FlowSolver("euler", 50), FlowSolver("euler", 200), FlowSolver("2m", 50)
    for solver, share in zip(solvers, (0.974, 0.993, 0.997)):
        solve = jax.jit(flow_map, static_argnums=3)
        tokens, x = solve(noise, log(p, len(noise)), codes, solver)
        assert np.mean(np.asarray(tokens) == wanted) == pytest.approx(share, abs=2e-3)
        assert (np.diff(tokens) >= 0).all()
        # Nearly all noise ends on a code.
        assert float(jnp.mean(jnp.abs(x - codes[tokens]) < 1e-3)) > 0.99


def test_tokens_are_distributed_as_the_law_says():
    rng = np.random.default_rng(1)
    codes, p = rng.normal(size=(16, 4)), rng.dirichlet(np.ones(16))
    noise, codes = rng.normal(size=(40_000, 4)), jnp.asarray(codes, jnp.float32)
    tokens, _ = jax.jit(flow_map)(jnp.asarray(noise, jnp.float32), log(p, 40_000), codes)
    distance = 0.5 * np.abs(np.bincount(tokens, minlength=16) / 40_000 - p).sum()
    independent = 0.5 * np.sqrt(2 / np.pi * p * (1 - p) / 40_000).sum()  # expected of such draws
    assert distance < 2 * independent < 0.02


def test_codes_that_are_left_out_are_never_taken():
    """Top-k and top-p give probabilities of zero; one code that is left takes all noise."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(64, 12)), jnp.float32)
    noise, codes = (jnp.asarray(rng.normal(size=(n, 3)), jnp.float32) for n in (64, 12))
    some = process_logits(logits, Sampling(top_k=4, top_p=0.7))
    one = process_logits(logits, Sampling(top_k=1))
    for tile in (None, 5):
        solve = jax.jit(lambda x, law, tile=tile: flow_map(x, law, codes, FlowSolver(tile=tile)))
        tokens, x = solve(noise, some)
        chex.assert_tree_all_finite(x)
        assert jnp.isfinite(some[jnp.arange(64), tokens]).all()
        assert (tokens != one.argmax(-1)).any()  # not the likeliest code
        chex.assert_trees_all_equal(solve(noise, one)[0], one.argmax(-1).astype(jnp.int32))
    # Leading axes are kept, and noise may be as far out as it likes.
    tokens, x = flow_map(100 * noise.reshape(4, 16, 3), some.reshape(4, 16, 12), codes)
    assert (tokens.shape, x.shape) == ((4, 16), (4, 16, 3))


def test_noise_of_another_size_is_codes_of_another_size():
    rng = np.random.default_rng(2)
    noise, codes, logits = (
        jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((64, 3), (12, 3), (64, 12))
    )
    wanted, x = flow_map(noise, logits, codes)
    small, y = flow_map(noise / 16, logits, codes / 16, FlowSolver(noise_std=1 / 16))
    chex.assert_trees_all_equal(small, wanted)
    chex.assert_trees_all_close(y, x / 16, atol=1e-6)
    assert (flow_map(noise, logits, codes / 16)[0] != wanted).any()


def test_what_does_not_belong_together_is_refused(untyped):
    noise, logits, codes = jnp.zeros((4, 2)), jnp.zeros((4, 12)), jnp.zeros((12, 3))
    with pytest.raises(ValueError, match=r"belong together; got \[4, 2\], \[4, 12\] and \[12, 3\]"):
        flow_map(noise, logits, codes)
    for name, wrong in {"steps": 0, "kind": "heun", "tile": 0, "noise_std": 0.0}.items():
        with pytest.raises(ValueError, match=f"FlowSolver: {name} must be"):
            dataclasses.replace(FlowSolver(), **{name: wrong})


# --- the student --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_var()


@pytest.fixture(scope="module")
def student(subject):
    """What training begins with, but for weights that would be alike in all slots."""
    plan = DistilledPlan((0, 2), split=2)
    forward, params = distilled_decoding.transform(plan)(subject.forward, subject.params)
    return forward, testing.random_params(params)


def test_a_student_begins_as_a_copy(subject):
    """Tables: the start is the model's; slots of the first scale are new; all others are its."""
    plan = DistilledPlan((0, 2), split=2)
    forward, params = distilled_decoding.transform(plan)(subject.forward, subject.params)
    assert (forward.model, forward.config.starts) == (DistilledVAR, (0, 2))
    assert forward.recipe == ((distilled_decoding.NAME, plan),)
    own, given = flatten_params(params), flatten_params(subject.params)
    grown = {"start", "positions", "level_embed"}
    for name in given.keys() - grown:
        chex.assert_trees_all_equal(own[name], given[name])
    for name, rows in (("positions", 15), ("level_embed", 4)):
        assert own[name].shape[0] == rows
        chex.assert_trees_all_equal(own[name][0], given[name][0])
        chex.assert_trees_all_equal(own[name][2:], given[name][1:])
        assert 0 < float(jnp.abs(own[name][1]).max()) <= 0.04
    assert own["blocks.1.mark.kernel"].shape == (16, 16)
    four = testing.tiny_var(patch_nums=(2, 3))  # several tokens at the first scale
    _, params = distilled_decoding.transform(DistilledPlan((0,), 2))(four.forward, four.params)
    given = four.params["positions"]
    chex.assert_trees_all_equal(params["positions"][jnp.array([0, 5])], given[jnp.array([0, 4])])


def test_a_slot_sees_itself_and_the_scales_before(student):
    rule = Levels((1, 1, 4, 9, 16), whole=False)
    assert (
        visible_pairs(rule, 31)
        == 334
        == 1 + sum(n * (1 + s) for n, s in zip((1, 4, 9, 16), (1, 2, 6, 15)))
    )
    forward, params = student
    slots = jnp.asarray(np.random.default_rng(0).normal(size=(14, 4)), jnp.float32)
    changed = slots + jnp.eye(14)[:, :, None]  # one slot in every row
    given = jnp.concatenate([slots[None], changed])
    run = jax.jit(lambda known: forward(params, {}, given, jnp.full(15, 3), known)[0])
    scale = np.repeat([0, 1, 2], [1, 4, 9])
    seen = (scale[:, None] < scale) | np.eye(14, dtype=bool)
    for known in (0, 5):
        for out in run(jnp.full(15, known)):
            assert out.shape[:2] == (15, 14)
            moved = np.asarray(jnp.abs(out[1:] - out[0]).max(-1))
            np.testing.assert_array_equal(moved > 1e-6, seen)
    # What is data is told from noise, and neither head is blind to that.
    for none, some in zip(run(jnp.full(15, 0)), run(jnp.full(15, 5))):
        assert float(jnp.abs(none - some)[0].max(-1).min()) > 1e-6


def test_cost_is_that_of_the_formulas():
    """A layer of VAR-d16's student; half of what VAR's layers take with guidance."""
    config = DistilledVARConfig(num_layers=1)
    forward, params = abstract(DistilledVAR, config)
    width, slots, channels = config.hidden_size, 1 + config.tokens, config.code_channels
    pairs = visible_pairs(Levels(tuple(p**2 for p in config.slot_sides), whole=False), slots)
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    shape = jax.ShapeDtypeStruct((1, slots - 1, channels), jnp.float32)
    with use_implementation("xla"):
        found = cost(
            lambda *given: forward(params_of(params), {}, *given)[0], shape, labels, labels
        )
    linear = 24 * slots * width**2
    heads = 2 * (slots - 1) * width * (config.vocab_size + channels)
    embedding = 2 * (slots - 1) * channels * width
    marks = 2 * 2 * 2 * width**2  # of noise and data, for the block and the heads
    modulation = 2 * (6 + 2) * width**2
    attention = found.scope("attention")
    assert attention.useful_flops == 4 * pairs * width
    assert found.flops - attention.flops == linear + heads + embedding + marks + modulation
    assert 16 * linear == pytest.approx(274e9, rel=2e-3)
    assert 16 * linear / 547.608e9 == pytest.approx(0.5, rel=2e-3)


def params_of(shapes):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


# --- loops --------------------------------------------------------------------------------------


def perfect(subject, loop):
    """A patch to a student that knows the map: it predicts a teacher's tokens, if all before are.

    Those after them are of no use, and another call predicts them.
    """

    class Perfect(Wrapper):
        def __call__(self, slots, labels, known):
            codes = quantizer_of(*loop.vae)
            pair = subject.forward, subject.params
            raw = teacher_forced(*pair, loop.vae, codes.nearest(slots), labels)
            law = process_logits(raw, Sampling(top_k=loop.top_k, top_p=loop.top_p))
            tokens, _ = flow_map(slots, law, codes.codes(), loop.solver)
            return jax.nn.one_hot(tokens, len(codes.codes())), 0 * slots

    return lambda module, context: Perfect(module)


def test_a_perfect_student_is_the_teacher(subject, student):
    """Call by call, with the noise of the beginning: tokens are those of the map."""
    loop = dataclasses.replace(subject.sampler, guidance=None)
    loop = MappedScales.of(loop, FlowSolver(steps=10, noise_std=0.5))
    few = FewScales(loop.vae, loop.patch_nums, (0, 1, 2), split=3, noise_std=0.5)
    knows = student[0].patch(perfect(subject, loop))

    @jax.jit
    def both(keys):
        x, tokens = loop.sample(subject.forward, subject.params, subject.cond, keys)
        own, found = few.sample(knows, student[1], subject.cond, keys)
        noise = few.noise(keys, 4)
        return x, tokens, own, found, noise

    keys = jax.random.split(jax.random.key(0), 2)
    x, tokens, own, found, noise = both(keys)
    chex.assert_trees_all_equal(found, tokens)
    chex.assert_trees_all_close(own, x, atol=1e-5)
    assert float(jnp.abs(noise[0] - noise[1]).min()) > 0
    swapped = both(keys[::-1])[4]
    chex.assert_trees_all_equal(swapped[0], noise[1])
    with pytest.raises(ValueError, match="more_smooth mixes codes"):
        MappedScales.of(dataclasses.replace(subject.sampler, more_smooth=True), FlowSolver())


def test_what_a_call_takes(subject, student):
    """Codes before split, vectors from there on; what is given stays; then the same noise again."""
    rng = np.random.default_rng(0)
    x, noise, vectors = (jnp.asarray(rng.normal(size=(2, 14, 4)), jnp.float32) for _ in range(3))
    logits = jnp.asarray(rng.normal(size=(2, 14, 40)), jnp.float32)
    loop = FewScales(subject.sampler.vae, (1, 2, 3), (0, 1), split=2)
    codes = quantizer_of(*loop.vae).vectors(logits.argmax(-1))
    carry = Carry(x, noise, {}, jax.random.split(jax.random.key(0), 2))
    first = loop.update(carry, (logits, vectors), 0).x
    chex.assert_trees_all_equal(first[:, :1], codes[:, :1])
    chex.assert_trees_all_equal(first[:, 1:], noise[:, 1:])
    second = loop.update(carry, (logits, vectors), 1).x
    for part, wanted in ((np.s_[:, :1], x), (np.s_[:, 1:5], codes), (np.s_[:, 5:], vectors)):
        chex.assert_trees_all_equal(second[part], wanted[part])
    # A call that is given everything changes nothing.
    chex.assert_trees_all_equal(loop.update(carry, (logits, vectors), 2).x, x)


def test_one_program_for_all_calls(subject, student):
    """Where calls start and vectors begin are data; a teacher goes on from a student's codes."""
    traces = []

    @jax.jit
    def run(loop, params, labels, keys):
        traces.append(None)
        return loop.sample(student[0], params, labels, keys)

    loop = FewScales(subject.sampler.vae, (1, 2, 3), (0, 2), split=3)
    keys = jax.random.split(jax.random.key(0), 2)
    x, _ = run(loop, student[1], subject.cond, keys)
    later, _ = run(
        dataclasses.replace(loop, starts=(0, 1), split=2), student[1], subject.cond, keys
    )
    swapped, _ = run(loop, student[1], subject.cond[::-1], keys[::-1])
    assert len(traces) == 1
    assert float(jnp.abs(later - x).max()) > 0
    chex.assert_trees_all_close(swapped[::-1], x, atol=1e-5)

    teacher = subject.forward, subject.params

    @jax.jit
    def shared(params, keys):
        (student_, own), given = student, (subject.sampler, subject.cond, keys)
        whole = subject.sampler.sample(subject.forward, params, subject.cond, keys)[1]
        rest = subject.sampler.after(subject.forward, params, whole[:, :5], subject.cond, keys)
        mixed = loop.with_teacher((student_, own), (subject.forward, params), *given, start=1)
        return whole, rest.memory, mixed

    whole, rest, mixed = shared(teacher[1], keys)
    chex.assert_trees_all_equal(rest, whole)
    assert (mixed[0].shape, mixed[1].shape) == (x.shape, (2, 14))
    calls = FewScales(loop.vae, (1, 2, 3), (0, 5))
    assert [calls.teacher_calls(start) for start in (4, 3, 0)] == [3, 4, 6]
    with pytest.raises(ValueError, match=r"start is 0 ... t - 1; got 2"):
        loop.with_teacher(student, teacher, subject.sampler, subject.cond, keys, start=2)


def test_errors(untyped, subject, student):
    forward, params = subject.forward, subject.params
    for starts in ((), (1,), (0, 2, 1), (0, 0), (0, 3)):
        with pytest.raises(ValueError, match=r"starts are the first .* and below 3; got"):
            distilled_decoding.transform(DistilledPlan(starts, split=3))(forward, params)
    with pytest.raises(ValueError, match="split is at most 3"):
        distilled_decoding.transform(DistilledPlan((0,), split=4))(forward, params)
    with pytest.warns(UserWarning, match="take a split of at least 2"):
        distilled_decoding.transform(DistilledPlan((0, 2), split=1))(forward, params)
    dit = testing.tiny_dit()
    with pytest.raises(
        ValueError, match="made of a VAR or a LlamaGen without other methods, got a DiT"
    ):
        distilled_decoding.transform(DistilledPlan((0,), 2))(dit.forward, dit.params)
    small = round_to_nearest.transform(round_to_nearest.uniform(8, 8))
    with pytest.raises(ValueError, match="is quantized: load the model in floats"):
        distilled_decoding.transform(DistilledPlan((0,), split=2))(*small(forward, params))
    with pytest.raises(ValueError, match="scales are sampled of a VAR with its VQVAE, got Dist"):
        subject.sampler.check(student[0])
    loop = FewScales(subject.sampler.vae, (1, 2, 3), (0,), split=2)
    with pytest.raises(ValueError, match="a few calls sample a DistilledVAR"):
        loop.check(forward)
    with pytest.raises(ValueError, match="they belong to different models"):
        dataclasses.replace(loop, vae=testing.tiny_vqvae(vocab_size=41)).check(student[0])
    with pytest.raises(ValueError, match=r"a slot of 4 channels for each of 14 tokens; got \[2, 9"):
        student[0](student[1], {}, jnp.zeros((2, 9, 4)), subject.cond, subject.cond)


def test_pairs_go_on_as_they_were_made(subject, tmp_path):
    plan, data = DistilledPlan((0,), split=3, solver_steps=2), subject.data(Samples)

    def made(count=64, plan=plan, params=subject.params, **changes):
        own = dataclasses.replace(data, **changes)
        options = {"folder": tmp_path, "progress": False}
        return distilled_decoding.make_pairs(
            plan, subject.forward, params, own, count, **options
        ).tokens

    first = made()
    (tmp_path / "pairs_000001.npy.partial").write_bytes(b"of a run that was killed")
    chex.assert_trees_all_equal(made(128)[:64], first)
    other = jax.tree.map(lambda x: 2 * x, subject.params)
    guided = dataclasses.replace(data.sampler, guidance=3.0)
    for changes, message in (
        ({"sampler": guided}, "was made with guidance .*, and now it is 3.0: give the same"),
        ({"seed": 7}, "was made with seed 0, and now it is 7"),
        ({"params": other}, "was made with weights"),
        ({"plan": dataclasses.replace(plan, solver_steps=3)}, "was made with solver .*steps=2"),
    ):
        with pytest.raises(ValueError, match=message):
            made(**changes)
    (tmp_path / "made_of.json").unlink()
    with pytest.raises(ValueError, match=r"holds pairs_000000\.npy, and no made_of\.json"):
        made()


# --- training -----------------------------------------------------------------------------------


class Taught(NamedTuple):
    """A teacher whose tokens depend on each other, its student, and samples of both."""

    subject: testing.Subject
    plan: DistilledPlan
    learned: dict
    tokens: dict


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A teacher of 5 tokens of 16 codes with sharp logits; half a minute of training in pieces."""
    subject = testing.tiny_var(
        patch_nums=(1, 2), vocab_size=16, code_channels=2, head_dim=16, intermediate_size=64
    )
    loop = dataclasses.replace(subject.sampler, guidance=None, top_k=None, top_p=None)
    codes = loop.vae[1]["quantizer"]
    for tree in (codes, subject.params["head"]["proj"], subject.params["word_embed"]):
        tree |= {name: 3 * leaf for name, leaf in tree.items() if name in ("codebook", "kernel")}

    def labels(count, number):
        rng = np.random.default_rng(number)
        return jnp.asarray(rng.integers(0, 5, count), jnp.int32)

    data = Samples(loop, labels)
    plan = DistilledPlan((0, 1), split=2, solver_steps=25)
    fitting = Fitting(pairs=4096, steps=400, batch=128, learning_rate=3e-3, distance="codes")
    folder = tmp_path_factory.mktemp("distilled")
    options = {"checkpoints": folder, "progress": False}
    pair = subject.forward, subject.params
    # Another run finds pairs and the last step.
    distilled_decoding.fit(plan, dataclasses.replace(fitting, steps=2), *pair, data, **options)
    made = {file.name: file.stat().st_mtime_ns for file in (folder / "pairs").glob("pairs_*.npy")}
    learned, log = distilled_decoding.fit(plan, fitting, *pair, data, **options)
    assert len(made) == 64
    assert {f.name: f.stat().st_mtime_ns for f in (folder / "pairs").glob("pairs_*.npy")} == made
    assert [run["first_step"] for run in log["runs"]] == [0, 2]

    student, _ = distilled_decoding.transform(plan, learned)(*pair)
    cond, keys = jnp.arange(1000, dtype=jnp.int32) % 5, sample_keys(jax.random.key(9), 1000)
    mapped, two = MappedScales.of(loop, plan.solver), FewScales(loop.vae, (1, 2), (0, 1), split=2)

    @jax.jit
    def sample(params):
        one, other = (
            dataclasses.replace(two, starts=(0,)),
            jax.random.split(jax.random.key(3), 1000),
        )
        carry = two.init(student, learned, cond, keys)
        again = carry._replace(memory=two.noise(other, 2))
        return {
            "teacher": mapped.sample(subject.forward, params, cond, keys)[1],
            "one call": one.sample(student, learned, cond, keys)[1],
            "two calls": two.sample(student, learned, cond, keys)[1],
            "other noise": quantizer_of(*loop.vae).nearest(
                two.run(student, learned, again, cond).x
            ),
        }

    tokens = {name: np.asarray(each) for name, each in sample(subject.params).items()}
    return Taught(dataclasses.replace(subject, sampler=loop, cond=cond), plan, learned, tokens)


def test_orderings(taught):
    """One call is better than independent tokens, two are than one, and noise is to be kept."""
    subject, tokens = taught.subject, dict(taught.tokens)
    rng, mixed = np.random.default_rng(0), tokens["teacher"].copy()
    for label, place in itertools.product(range(5), range(5)):  # each from its own distribution
        rows = np.arange(label, 1000, 5)
        mixed[rows, place] = tokens["teacher"][rng.permutation(rows), place]
    tokens["independent"] = mixed

    @jax.jit
    def entropies(own):
        pair = subject.forward, subject.params
        logits = teacher_forced(*pair, subject.sampler.vae, own, subject.cond)
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), own[..., None], axis=-1)
        return -jnp.mean(own)

    nats = {name: float(entropies(jnp.asarray(own))) for name, own in tokens.items()}
    right = {name: np.mean(own == tokens["teacher"]) for name, own in tokens.items()}
    assert nats["independent"] - nats["teacher"] > 0.5
    assert nats["one call"] - nats["teacher"] < 0.3 * (nats["independent"] - nats["teacher"])
    assert nats["two calls"] <= nats["one call"]
    assert right["two calls"] > right["one call"] > 0.7
    assert right["other noise"] < 0.6 * right["two calls"]
    # The student keeps its model's variety.
    assert len(np.unique(tokens["one call"], axis=0)) > 0.7 * len(
        np.unique(tokens["teacher"], axis=0)
    )


def test_losses_are_those_of_the_formulas(taught):
    """Only what is not given counts; distances of codes, latents and images."""
    subject, learned = taught.subject, taught.learned
    student, _ = distilled_decoding.transform(taught.plan, learned)(subject.forward, subject.params)
    vae, rng = subject.sampler.vae, np.random.default_rng(0)
    loop = distilled_decoding.student_loop(subject.sampler, student)
    tokens = jnp.asarray(rng.integers(0, 16, (2, 5)), jnp.int32)
    noise = jnp.asarray(rng.normal(size=(2, 5, 2)), jnp.float32)
    labels, known = jnp.array([0, 3]), jnp.array([0, 1])

    @jax.jit
    def all_of(params, noise):
        codes = quantizer_of(*vae)
        data = codes.vectors(tokens)
        slots = jnp.where(jnp.arange(5)[:, None] < known[:, None, None], data, noise)
        out = student(params, {}, slots, labels, known)[0]
        given = loop, tokens, noise, labels, known
        options = {"weight": 2.0}
        found = [
            distilled_decoding.student_loss(student, params, *given, distance=each, **options)
            for each in ("codes", "latents", "images")
        ]
        made = jnp.where(jnp.arange(5)[:, None] < known[:, None, None], data, out[1])
        sums = [codes.sums_of_vectors(each, (1, 2))[-1] for each in (made, data)]
        return *found, *out, data, *sums, *(decode(*vae, each) for each in sums)

    *found, logits, vectors, data, x, y, a, b = map(np.asarray, all_of(learned, noise))
    asked = np.arange(5) >= np.asarray(known)[:, None]
    chances = jax.nn.log_softmax(logits)[np.arange(2)[:, None], np.arange(5), tokens]
    entropy = -np.asarray(chances)[asked].mean()
    distances = (
        np.square(vectors - data)[asked].mean() / np.square(data)[asked].mean(),
        np.square(x - y).mean() / np.square(y).mean(),
        np.square(a - b).mean(),
    )
    np.testing.assert_allclose(found, [entropy + 2 * each for each in distances], rtol=1e-4)
    # The noise of what is given is not read.
    other = all_of(learned, noise.at[1, 0].add(1.0))[:3]
    np.testing.assert_allclose(other, found, rtol=1e-6)
