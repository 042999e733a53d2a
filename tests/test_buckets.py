"""Shapes that are rounded up: few programs, and results that do not depend on it."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from effjax import testing
from effjax.buckets import POWERS, bucket, by_parts, cut, parts
from effjax.forward import abstract
from effjax.generate import (
    Reading,
    decoding,
    extend,
    generate,
    prefill,
    prefix_cache,
    score,
    scoring,
)
from effjax.layers import token_scores
from effjax.models.llama import Llama
from effjax.parallel import device_mesh, shard
from effjax.registry import methods
from effjax.samplers import sample_keys, sampler

RNG = np.random.default_rng(5)
PROMPTS = [RNG.integers(0, 50, length).tolist() for length in (20, 13, 1)]
QUESTIONS = [RNG.integers(0, 50, length).tolist() for length in (1, 3, 2)]
NEW = 6

# By kind of cache: a plan that keeps much, and one that keeps little.
KINDS = {"dense": None, "window": None} | {
    name: method
    for name, method in methods().items()
    if "patches" in method.seams and isinstance(method.tiny().sampler, Reading)
}


def made(name, plan=-1):
    """A model of one layer with this kind of cache, for sequences of up to 300 tokens."""
    options = {"num_layers": 1, "max_positions": 300}
    if name == "window":
        options["window"] = 7
    subject = testing.tiny_llama(**options)
    if KINDS[name] is None:
        return subject.forward, subject.params
    method = KINDS[name]
    transform = method.transform(method.ladder(subject)[plan])
    return transform(subject.forward, subject.params)


@pytest.mark.parametrize(
    ("size", "buckets", "want"),
    [
        (5, None, 5),
        (5, "none", 5),
        (5, POWERS, 8),
        (8, POWERS, 8),
        (1, POWERS, 1),
        (0, POWERS, 0),
        (5, [6, 3], 6),
        (3, (3, 6), 3),
        (13, [3, 6], 18),
    ],
)
def test_a_size_goes_up_to_its_bucket(size, buckets, want):
    assert bucket(size, buckets) == want
    assert bucket(3, POWERS, least=64) == 64


@pytest.mark.parametrize("wrong", ["powers", [], [0], [True], [2.5], 7, [[3]]])
def test_other_buckets_are_refused(untyped, wrong):
    with pytest.raises(ValueError, match='buckets must be "powers of two", None or "none"'):
        bucket(3, wrong)


def test_a_batch_is_cut_or_filled_up_whatever_costs_less():
    assert [parts(size, POWERS) for size in (1, 3, 5, 7, 8)] == [
        [1],
        [2, 1],
        [4, 1],
        [4, 2, 1],
        [8],
    ]
    assert parts(31, POWERS) == [32]
    assert parts(9, [4]) == [4, 4, 4]
    assert parts(9, [1, 4]) == [4, 4, 1]
    assert parts(9, None) == [9]
    x = np.arange(18, dtype=np.float32).reshape(9, 2)
    seen = []

    def double(rows):
        seen.append(len(rows))
        return jax.numpy.asarray(2 * rows)

    np.testing.assert_array_equal(by_parts(double, [4], x), 2 * x)
    assert seen == [4, 4, 4]


@pytest.mark.parametrize("name", KINDS)
def test_no_cache_sees_the_padding(name):
    """Uneven prompts, and three rows as four: the same tokens and log-probabilities."""
    forward, params = made(name)
    plain, padded = (
        prefill(forward, params, PROMPTS, new=NEW + 3, buckets=buckets)
        for buckets in (None, POWERS)
    )
    assert (plain.forward.cache_length.prompt, padded.forward.cache_length.prompt) == (20, 64)
    check_equal(forward, params, plain, padded)
    if name in ("dense", "window", "snap_kv", "kivi"):  # one of each class
        plain = extend(params, plain, QUESTIONS, buckets=None)
        check_equal(forward, params, plain, extend(params, padded, QUESTIONS))


def check_equal(forward, params, plain, padded):
    assert padded.sequences == plain.sequences == 3
    chex.assert_trees_all_close(padded.logits[:3], plain.logits, atol=1e-5)
    assert padded.lengths.tolist() == [*plain.lengths.tolist(), 0]
    options = {"max_new_tokens": NEW, "eos": 7}
    want, got = (generate(forward, params, prefix=each, **options) for each in (plain, padded))
    assert got.rows() == want.rows()
    chex.assert_trees_all_close(got.log_probs, want.log_probs, atol=1e-5)


@pytest.fixture(scope="module")
def model():
    return made("dense")


def test_drawn_texts_are_equal_under_any_buckets(model):
    key = jax.random.key(3)
    exact = generate(*model, PROMPTS, max_new_tokens=5, key=key, temperature=1.0, buckets=None)
    for own, buckets in ((key, POWERS), (sample_keys(key, 3), [24])):
        options = {"max_new_tokens": 5, "key": own, "buckets": buckets, "temperature": 1.0}
        assert generate(*model, PROMPTS, **options).rows() == exact.rows()


def test_other_lengths_and_batches_run_the_same_programs(model):
    """One program reads, one chooses the first token and one goes on."""
    programs = prefix_cache._read_first, decoding._begin, decoding._decode
    before = [program._cache_size() for program in programs]
    for length, new in ((3, 5), (40, 1), (64, 64), (17, 30)):
        generate(*model, [[9] * length], max_new_tokens=new, eos=7)
    assert [program._cache_size() for program in programs] == [one + 1 for one in before]


def test_a_session_has_the_room_that_was_asked_for(model):
    """What is rounded up is not given away: a compressed cache has no slots for it."""
    forward, params = model
    prefix = prefill(forward, params, PROMPTS[:2], new=4)
    assert prefix.forward.cache_length.total == 128
    with pytest.raises(ValueError, match="20 tokens and room for 24; 5 more do not fit"):
        generate(forward, params, prefix=prefix, max_new_tokens=5)
    long = prefill(forward, params, [[3] * 270], new=30)
    assert long.forward.cache_length.total == forward.config.max_length == 300
    assert long.state["blocks.0.attn.core.tokens.k"].shape[1] == 300
    assert prefill(forward, params, [[3] * 270], new=30, chunk=100).forward == long.forward


def test_scores_are_equal_under_any_buckets():
    for name in ("dense", "moa"):
        forward, params = made(name)
        exact = score(forward, params, PROMPTS, buckets=None)
        got = score(forward, params, PROMPTS)
        assert got.shape == exact.shape == (3, 20)
        chex.assert_trees_all_close(got, exact, atol=1e-5)


def test_scores_hold_few_logits(model, monkeypatch):
    """Of 512 tokens over 50,000 words, in chunks: the same scores, a fraction of the memory."""
    config = dataclasses.replace(model[0].config, vocab_size=50_000, max_positions=512)
    forward, shapes = abstract(Llama, config)
    params = testing.random_params(shapes)
    tokens = RNG.integers(0, 50_000, (1, 512)).astype(np.int32)
    positions = np.arange(512, dtype=np.int32)[None]
    monkeypatch.setattr(token_scores, "CHUNK", 1 << 20)  # 20 tokens at once
    program = scoring._score.lower(forward, params, {}, tokens, positions, 512).compile()
    whole = 512 * 50_000 * 4
    assert program.memory_analysis().temp_size_in_bytes < whole / 5
    logits, _ = jax.jit(forward)(params, {}, tokens, positions)
    want = jax.nn.log_softmax(logits[:, :-1])
    want = np.take_along_axis(np.asarray(want), tokens[:, 1:, None], axis=-1)[..., 0]
    got = program(forward, params, {}, tokens, positions)
    np.testing.assert_allclose(got[:, 1:], want, atol=2e-5)


# Images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [testing.tiny_dit, testing.tiny_pixart])
def test_a_batch_of_images_is_cut_into_parts(make):
    """Each part is one of few programs, the images are those of the whole batch at once."""
    subject = make(steps=2, batch=7, num_layers=1)
    key, seen = jax.random.key(1), []
    options = {"uncond": subject.uncond, "progress": False}
    model = subject.forward, subject.params
    whole = subject.sampler.stepwise(*model, subject.cond, key, **options)
    before = sampler._compiled_step._cache_size()
    for own in (key, sample_keys(key, 7)):
        options["callback"] = lambda step, x: seen.append(x)
        cut = subject.sampler.stepwise(*model, subject.cond, own, buckets=POWERS, **options)
        chex.assert_trees_all_close(cut, whole, atol=1e-4, rtol=1e-4)
        chex.assert_trees_all_equal(seen[-1], cut)
    assert len(seen) == 4
    assert sampler._compiled_step._cache_size() == before + 3  # 4, 2 and 1
    noise = np.asarray(whole)
    options["callback"] = None
    given = subject.sampler.stepwise(*model, subject.cond, key, noise=noise, **options)
    cut = subject.sampler.stepwise(*model, subject.cond, key, noise=noise, buckets=[8], **options)
    chex.assert_trees_all_close(cut, given, atol=1e-4, rtol=1e-4)


def test_a_traced_batch_stays_whole():
    found = []

    def call(x):
        found.append(cut(5, POWERS, x))
        return x

    jax.eval_shape(call, jax.ShapeDtypeStruct((5,), np.float32))
    assert found == [[5]]


def test_a_batch_that_is_spread_over_devices_stays_whole():
    subject = testing.tiny_dit(steps=2, batch=4, num_layers=1)
    places = jax.NamedSharding(device_mesh(data=4), jax.P("data"))
    cond = jax.device_put(subject.cond, places)
    model = subject.forward, shard(subject.params, device_mesh(data=4), ())
    options = {"progress": False, "buckets": [1]}
    spread = subject.sampler.stepwise(*model, cond, jax.random.key(1), **options)
    assert len(spread.sharding.device_set) == 4
    alone = subject.sampler.stepwise(
        subject.forward, subject.params, subject.cond, jax.random.key(1), **options
    )
    chex.assert_trees_all_close(np.asarray(spread), np.asarray(alone), atol=1e-4)
