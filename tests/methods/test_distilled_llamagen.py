"""Distilled Decoding of LlamaGen: the student, the loops of tokens, its pipeline."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.autoregression import FewTokens, FlowSolver, MappedTokens, flow_map, logits_of
from effjax.calibration import Samples
from effjax.cost import cost
from effjax.forward import abstract, flatten_params
from effjax.methods import distilled_decoding
from effjax.methods.distillation.distilled_decoding import DistilledPlan, Fitting
from effjax.models.distilled_llamagen import DistilledLlamaGen, DistilledLlamaGenConfig
from effjax.models.vq_model import quantizer_of
from effjax.pipelines import FewTokenPipeline, NextTokenPipeline
from effjax.targets import Wrapper
from pallas_kernels import use_implementation

PLAN = DistilledPlan((0, 6), split=10, solver_steps=5, code_channels=4)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_llamagen()


@pytest.fixture(scope="module")
def student(subject):
    forward, params = distilled_decoding.transform(PLAN)(subject.forward, subject.params)
    return forward, testing.random_params(params)


def test_a_student_begins_as_a_copy(subject):
    forward, params = distilled_decoding.transform(PLAN)(subject.forward, subject.params)
    assert (forward.model, forward.config.starts) == (DistilledLlamaGen, (0, 6))
    own, given = flatten_params(params), flatten_params(subject.params)
    assert given.keys() - own.keys() == {"embed_tokens"}
    for name in given.keys() & own.keys():
        chex.assert_trees_all_equal(own[name], given[name])
    assert own["slot_embed.kernel"].shape == (4, 16)


def test_a_slot_sees_itself_and_those_before(student):
    forward, params = student
    slots = jnp.asarray(np.random.default_rng(0).normal(size=(16, 4)), jnp.float32)
    changed = slots + jnp.eye(16)[:, :, None]  # one slot in every row
    given = jnp.concatenate([slots[None], changed])
    run = jax.jit(lambda known: forward(params, {}, given, jnp.full(17, 3), known)[0])
    for out in run(jnp.full(17, 5)):
        moved = np.asarray(jnp.abs(out[1:] - out[0]).max(-1))
        np.testing.assert_array_equal(moved > 1e-6, np.triu(np.ones((16, 16), bool)))
    for none, some in zip(run(jnp.full(17, 0)), run(jnp.full(17, 5))):
        assert float(jnp.abs(none - some)[0].max(-1).min()) > 1e-6


def test_slots_of_codes_are_the_tokens_of_the_model(subject, student):
    """Embedded alike, the student's hidden states are LlamaGen's, one column earlier in use."""
    forward, params = student
    width = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32)
    codes = quantizer_of(*subject.sampler.vae)
    teacher = {**subject.params, "embed_tokens": codes.codes() @ width}
    same = {name: teacher[name] for name in teacher.keys() - {"embed_tokens"}}
    own = {**params, **same, "marks": jnp.zeros_like(params["marks"])}
    own["slot_embed"] = {"kernel": jnp.asarray(width), "bias": jnp.zeros(16)}
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (2, 16)), jnp.int32)
    slots, known = codes.vectors(tokens), jnp.array([0, 16])
    logits = forward(own, {}, slots, subject.cond, known)[0][0]
    wanted = logits_of(subject.forward, teacher, tokens, subject.cond)
    chex.assert_trees_all_close(logits[:, :-1], wanted[:, 1:], atol=1e-4)


def test_cost_is_that_of_the_formulas():
    """A layer of LlamaGen-B's student."""
    config = DistilledLlamaGenConfig(num_layers=1)
    forward, params = abstract(DistilledLlamaGen, config)
    width, tokens, channels = config.hidden_size, config.image_tokens, config.code_channels
    labels = jax.ShapeDtypeStruct((1,), jnp.int32)
    shape = jax.ShapeDtypeStruct((1, tokens, channels), jnp.float32)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
    with use_implementation("xla"):
        found = cost(lambda *given: forward(zeros, {}, *given)[0], shape, labels, labels)
    inner = config.intermediate_size
    linear = 2 * (tokens + 1) * (4 * width**2 + 3 * width * inner)
    ends = 2 * tokens * width * (config.vocab_size + 2 * channels)
    attention = found.scope("attention")
    pairs = (tokens + 1) * (tokens + 2) // 2  # and what a kernel's blocks have beyond them
    assert 4 * width * pairs <= attention.flops <= 4 * width * (tokens + 1) ** 2
    assert found.flops - attention.flops == linear + ends


def perfect(subject, loop):
    """A patch to a student that knows the map: it predicts a teacher's token, if all before are."""

    class Perfect(Wrapper):
        def __call__(self, slots, labels, known):
            codes = quantizer_of(*loop.vae)
            tokens = codes.nearest(slots)
            raw = logits_of(subject.forward, subject.params, tokens, labels)
            tokens, _ = flow_map(slots, loop.log_probs(raw), codes.codes(), loop.solver)
            return jax.nn.one_hot(tokens, len(codes.codes())), 0 * slots

    return lambda module, context: Perfect(module)


def test_a_perfect_student_is_the_teacher(subject, student):
    """Token by token, with the noise of the beginning; and a teacher goes on from codes."""
    loop = MappedTokens.of(dataclasses.replace(subject.sampler, guidance=None), FlowSolver(steps=5))
    few = FewTokens(loop.vae, loop.grid, tuple(range(16)), split=16)
    knows, cond = student[0].patch(perfect(subject, loop)), subject.cond
    pair = subject.forward, subject.params

    @jax.jit
    def both(keys):
        x, tokens = loop.sample(*pair, cond, keys)
        rest = loop.after(*pair, tokens[:, :5], cond, keys, stop=9)
        own = few.sample(knows, student[1], cond, keys)
        two = dataclasses.replace(few, starts=(0, 9), split=16)
        mixed = two.with_teacher((knows, student[1]), pair, loop, cond, keys, start=0)[1]
        return x, tokens, *own, rest.x, mixed

    x, tokens, own, found, rest, mixed = both(jax.random.split(jax.random.key(0), 2))
    chex.assert_trees_all_equal(found, tokens)
    chex.assert_trees_all_close(own, x, atol=1e-5)
    chex.assert_trees_all_equal(rest[:, :9], tokens[:, :9])
    assert not rest[:, 9:].any()
    chex.assert_trees_all_equal(mixed[:, :10], tokens[:, :10])
    with pytest.raises(ValueError, match="9 tokens are given, and sampling stops before token 9"):
        loop.after(*pair, tokens[:, :9], cond, jax.random.key(0), stop=9)


def test_sampling_goes_on_from_given_tokens(subject):
    """Guided draws too; from none it is the whole loop."""
    loop, pair = subject.sampler, (subject.forward, subject.params)

    @jax.jit
    def run(loop, params, keys):
        given = subject.forward, params
        tokens = loop.sample(*given, subject.cond, keys)[1]
        some = loop.after(*given, tokens[:, :6], subject.cond, keys).x
        return tokens, some, loop.after(*given, tokens[:, :0], subject.cond, keys).x

    tokens, some, none = run(loop, pair[1], jax.random.split(jax.random.key(0), 2))
    chex.assert_trees_all_equal(some, tokens)
    chex.assert_trees_all_equal(none, tokens)


@pytest.fixture(scope="module")
def teacher(subject, tmp_path_factory):
    path = tmp_path_factory.mktemp("pipelines") / "teacher"
    pair = subject.forward, subject.params
    NextTokenPipeline(*pair, subject.sampler.vae, names={1: "fox", 4: "dog"}).save(path)
    return effjax.pipeline(path, progress=False)


def test_a_pipeline_is_trained_saved_and_called(teacher, tmp_path):
    def labels(count, number):
        return jnp.asarray(np.random.default_rng(number).integers(0, 5, count), jnp.int32)

    data = Samples(teacher.sampler(guidance_scale=2.0, top_k=8), labels)
    fitting = Fitting(pairs=64, steps=2, batch=4, distance="images")
    given = teacher.forward, teacher.params, data
    learned, log = distilled_decoding.fit(PLAN, fitting, *given, progress=False)
    assert np.isfinite(list(log["loss"].values())).all()
    pipe = teacher.transform(distilled_decoding.transform(PLAN, learned))
    assert (type(pipe), pipe.names, pipe.grid) == (FewTokenPipeline, teacher.names, (4, 4))
    pipe.save(tmp_path / "student")
    index = json.loads((tmp_path / "student" / "model_index.json").read_text())
    assert index["_class_name"] == "DistilledLlamaGenPipeline"
    again = effjax.pipeline(tmp_path / "student", progress=False)
    options = {"key": jax.random.key(0), "progress": False, "output_type": "tokens"}
    tokens = again(["fox", 4], **options)
    chex.assert_trees_all_equal(tokens, pipe(["fox", 4], **options))
    one = again(["fox", 4], num_inference_steps=1, **options)
    chex.assert_trees_all_equal(one[:, :6], tokens[:, :6])
    mixed = again(["fox", 4], teacher=teacher, teacher_start=0, **options)
    chex.assert_trees_all_equal(mixed[:, :6], teacher(["fox", 4], **options)[:, :6])
    assert again("fox", key=jax.random.key(0), progress=False)[0].size == (8, 8)


def test_errors(untyped, subject, student):
    captions = testing.tiny_llamagen(caption_channels=6)
    with pytest.raises(ValueError, match="made of LlamaGens of classes, and this one has captions"):
        distilled_decoding.transform(PLAN)(captions.forward, captions.params)
    wrong = distilled_decoding.transform(dataclasses.replace(PLAN, starts=(0, 16)))
    with pytest.raises(ValueError, match=r"the first of the tokens .* and below 16; got \(0, 16\)"):
        wrong(subject.forward, subject.params)
    loop = FewTokens.of(subject.sampler, student[0].config)
    with pytest.raises(ValueError, match="a few calls sample a DistilledLlamaGen with the auto"):
        loop.check(subject.forward)
    with pytest.raises(ValueError, match=r"40 codes of 4 channels for tokens of .* different mod"):
        dataclasses.replace(loop, grid=(3, 3)).check(student[0])
    with pytest.raises(ValueError, match=r"a slot of 4 channels for each of 16 tokens; got \[2, 9"):
        student[0](student[1], {}, jnp.zeros((2, 9, 4)), subject.cond, subject.cond)
