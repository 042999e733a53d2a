"""Generation: equal to transformers', independent of the batch, and what it refuses."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.caches import Caches, as_it_is
from effjax.cost import state_bytes
from effjax.finite import NotFiniteWarning
from effjax.generate import (
    Sampling,
    cache_bytes,
    decoding,
    extend,
    generate,
    perplexity,
    prefill,
    prefix_cache,
    process_logits,
    score,
)
from effjax.methods import moa
from effjax.samplers import sample_keys
from tests.models.test_llama import ARRAYS, CONFIGS, MASK, load

PROMPTS = [row[keep].tolist() for row, keep in zip(ARRAYS["tokens"], MASK)]  # 20, 13, 1 tokens
NEW = 8


@pytest.fixture(scope="module")
def model():
    return load("llama3")


@pytest.fixture(scope="module")
def greedy(model):
    return generate(*model, PROMPTS, max_new_tokens=NEW, eos=2)


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_text_equals_that_of_transformers(name):
    """Token for token, of uneven prompts; a text ends with its end token."""
    rows = generate(*load(name), PROMPTS, max_new_tokens=NEW, eos=2).rows()
    for row, want in zip(rows, ARRAYS[f"{name}/greedy"].tolist(), strict=True):
        assert row == want[: len(row)]
        assert len(row) == NEW or row[-1] == 2


@pytest.mark.parametrize("name", ["llama2", "mistral", "qwen2 window"])
def test_prompts_may_be_read_in_chunks(name):
    forward, params = load(name)
    whole = prefill(forward, params, PROMPTS, new=NEW)
    for chunk in (6, 9):  # up to 8 tokens go through the decode kernel
        pieces = prefill(forward, params, PROMPTS, new=NEW, chunk=chunk)
        chex.assert_trees_all_close(pieces.logits, whole.logits, atol=1e-5)
        chex.assert_trees_all_equal(pieces.lengths, whole.lengths)
        chex.assert_trees_all_equal(pieces.occurred, whole.occurred)


def test_log_probs_are_the_models_own(model, greedy):
    forward, params = model
    texts = [prompt + row for prompt, row in zip(PROMPTS, greedy.rows())]
    scores = score(forward, params, texts)
    for row, prompt in enumerate(PROMPTS):
        count = greedy.lengths[row]
        own = scores[row, len(prompt) : len(prompt) + count]
        chex.assert_trees_all_close(greedy.log_probs[row, :count], own, atol=1e-4)


def test_scores_through_the_cache_are_those_of_one_call(model):
    whole = score(*model, PROMPTS)
    chex.assert_trees_all_close(score(*model, PROMPTS, context=5), whole, atol=1e-5)
    assert np.isnan(whole[2]).all()  # one token: nothing to predict
    scored = whole[~np.isnan(whole)]
    assert scored.size == 19 + 12
    assert perplexity(whole) == pytest.approx(np.exp(-scored.mean()), rel=1e-6)


def test_the_same_key_gives_the_same_text_in_any_batch(model):
    options = {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 9, "key": jax.random.key(3)}
    together = generate(*model, PROMPTS, **options).rows()
    assert generate(*model, PROMPTS[:1], **options).rows() == together[:1]
    keys = sample_keys(jax.random.key(3), 3)
    alone = generate(*model, PROMPTS[1:2], **{**options, "key": keys[1:2]})
    assert alone.rows() == together[1:2]
    assert generate(*model, PROMPTS, **{**options, "key": jax.random.key(4)}).rows() != together
    # Equal prompts at different places are drawn independently.
    twice = generate(*model, [PROMPTS[0]] * 2, **options).rows()
    assert twice[0] != twice[1]


def test_a_cold_temperature_is_greedy(model, greedy):
    options = {"max_new_tokens": NEW, "eos": 2, "key": jax.random.key(0)}
    cold = generate(*model, PROMPTS, temperature=1e-4, **options)
    assert cold.rows() == greedy.rows()


def reference(logits, temperature, kept):
    """The distribution of one row in float64; at most one of the tokens' filters."""
    with np.errstate(under="ignore"):
        weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    found = weights / weights.sum()
    falling = np.sort(found)[::-1]
    for name, value in kept.items():
        least = {
            "top_k": falling[int(value) - 1],
            "top_p": falling[np.argmax(np.cumsum(falling) >= value)],
            "min_p": value * falling[0],
        }[name]
        found = np.where(found < least * (1 - 1e-6), 0, found)
    return found / found.sum()


@pytest.mark.parametrize("kept", [{}, {"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}])
def test_any_temperature_gives_its_own_distribution(kept):
    """From where tokens that are tied stay alone, or are nearly tied, to where all are alike."""
    logits = np.float32([[3, -80, 3, 2.999, 0], [-1e30, 1e30, 5, -5, 0]])
    given = jnp.asarray(logits)
    temperatures = np.float32([digit * 10.0**n for n in range(-45, 4) for digit in (1, 4)])
    process = jax.jit(jax.vmap(lambda t: process_logits(given, Sampling(temperature=t, **kept))))
    assert temperatures.min() > 0
    for temperature, got in zip(temperatures, np.exp(process(temperatures))):
        want = [reference(row, np.float64(temperature), kept) for row in logits]
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_steps_that_are_off_change_nothing(model, greedy):
    options = {"max_new_tokens": NEW, "key": jax.random.key(3)}
    plain = generate(*model, PROMPTS, temperature=1.0, **options)
    off = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert generate(*model, PROMPTS, temperature=1.0, **off, **options).rows() == plain.rows()
    assert generate(*model, PROMPTS, temperature=0.0, max_new_tokens=NEW, eos=2).rows() == (
        greedy.rows()
    )


def test_several_end_tokens(model, greedy):
    first, second = greedy.rows()[0][2], greedy.rows()[1][1]
    rows = generate(*model, PROMPTS, max_new_tokens=NEW, eos=[first, second]).rows()
    for row, whole in zip(rows, greedy.rows()):
        ends = [i for i, token in enumerate(whole) if token in (first, second)]
        assert row == whole[: ends[0] + 1 if ends else None]


def test_a_stop_function_ends_a_row(model, greedy):
    wanted = greedy.rows()[0][:3]
    out = generate(*model, PROMPTS, max_new_tokens=NEW, stop=lambda row: row == wanted)
    assert out.rows()[0] == wanted
    assert len(out.rows()[1]) == NEW


class Seen:
    """A streamer of any batch, as its protocol says."""

    def __init__(self):
        self.put_, self.ended = [], 0

    def put(self, value):
        self.put_.append(value)

    def end(self):
        self.ended += 1

    def rows(self):
        columns = np.stack(self.put_[1:], axis=1)
        ended = columns < 0
        assert (ended[:, 1:] >= ended[:, :-1]).all()  # a row that has ended stays so
        return [row[row >= 0].tolist() for row in columns]


@pytest.mark.parametrize("lengths", [(20, 20, 20), (1, 2, 3), (8, 1, 9), (20, 3, 16)])
def test_what_is_streamed_is_what_is_returned(model, lengths):
    """Rows stop at any place of the eight tokens that come at once, or not at all."""
    whole = generate(*model, PROMPTS, max_new_tokens=20).rows()
    wanted = [row[:length] for row, length in zip(whole, lengths)]

    def stop(row):
        return row in wanted

    seen = Seen()
    out = generate(*model, PROMPTS, max_new_tokens=20, streamer=seen, stop=stop)
    assert out.rows() == wanted == seen.rows()
    assert seen.ended == 1
    shown = seen.put_[0]
    assert [row[row >= 0].tolist() for row in shown] == PROMPTS
    beyond = np.arange(out.tokens.shape[1]) >= out.lengths[:, None]
    assert not out.log_probs[beyond].any()


def test_an_end_token_is_the_last_that_is_streamed(model, greedy):
    seen = Seen()
    out = generate(*model, PROMPTS, max_new_tokens=NEW, eos=greedy.rows()[0][1], streamer=seen)
    assert out.rows() == seen.rows()
    assert len(seen.rows()[0]) == 2


def test_one_context_many_questions(model):
    """The context is read once, the questions do not see each other."""
    forward, params = model
    context, questions = PROMPTS[:2], ([[7, 8, 9], [30]], [[4], [5, 6]])
    prefix = prefill(forward, params, context, new=3 + NEW)
    for question in questions:
        got = generate(forward, params, question, prefix=prefix, max_new_tokens=NEW)
        joined = [a + b for a, b in zip(context, question)]
        assert got.rows() == generate(forward, params, joined, max_new_tokens=NEW).rows()
    onward = generate(forward, params, prefix=prefix, max_new_tokens=NEW)
    assert onward.rows() == generate(forward, params, context, max_new_tokens=NEW).rows()
    twice = extend(params, extend(params, prefix, [[7], [30]]), [[8], [31]])
    assert twice.lengths.tolist() == [22, 15]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_counts_the_prompt(model, penalty):
    logits = jnp.array([[2.0, -1.0, 0.5, -3.0]])
    occurred = jnp.array([[True, True, False, False]])
    got = process_logits(logits, Sampling(repetition_penalty=penalty), occurred)
    want = jax.nn.log_softmax(jnp.array([[2.0 / penalty, -1.0 * penalty, 0.5, -3.0]]))
    chex.assert_trees_all_close(got, want, atol=1e-6)
    text = generate(*model, PROMPTS, max_new_tokens=NEW, repetition_penalty=50.0).rows()
    for prompt, row in zip(PROMPTS, text):
        assert len(set(row)) == len(row)
        assert not set(row) & set(prompt)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_k=2), [0, 1]),
        (Sampling(temperature=1.0, top_k=99), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, top_p=0.5), [0, 1]),
        (Sampling(temperature=1.0, top_p=0.4), [0]),
        (Sampling(temperature=1.0, top_p=0.01), [0]),
        (Sampling(temperature=1.0, top_p=1.0), [0, 1, 2, 3, 4]),
        (Sampling(temperature=1.0, min_p=0.5), [0, 1]),
        (Sampling(temperature=0.5, top_p=0.5), [0]),
        (Sampling(temperature=1.0, top_k=3, min_p=0.6), [0, 1]),
    ],
)
def test_what_is_left_out_of_the_distribution(sampling, kept):
    probabilities = jnp.array([[0.4, 0.3, 0.15, 0.1, 0.05]])
    got = jnp.exp(process_logits(jnp.log(probabilities), sampling))
    powered = probabilities ** (1 / sampling.temperature)
    want = jnp.zeros(5).at[jnp.array(kept)].set(powered[0, jnp.array(kept)])
    chex.assert_trees_all_close(got[0], want / want.sum(), atol=1e-6)


@pytest.mark.torch
def test_distributions_equal_those_of_transformers():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
    ids = torch.tensor(np.random.default_rng(1).integers(0, 50, (4, 9)))
    values = {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05}
    changed = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, torch.tensor(logits))
    for name, kind in {
        "temperature": transformers.TemperatureLogitsWarper,
        "top_k": transformers.TopKLogitsWarper,
        "top_p": transformers.TopPLogitsWarper,
        "min_p": transformers.MinPLogitsWarper,
    }.items():
        changed = kind(values[name])(ids, changed)
    occurred = jnp.zeros((4, 50), bool).at[jnp.arange(4)[:, None], ids.numpy()].set(True)
    got = process_logits(jnp.asarray(logits), Sampling(**values, repetition_penalty=1.3), occurred)
    chex.assert_trees_all_close(jnp.exp(got), changed.softmax(-1).numpy(), atol=1e-6)


def test_draws_follow_the_distribution():
    """Chi-square of 4,000 tokens drawn at random, as rows of a batch."""
    probabilities = np.array([0.5, 0.25, 0.15, 0.1])
    keys = sample_keys(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: jax.random.categorical(key, jnp.log(probabilities)))
    counts = np.bincount(np.asarray(draw(keys)), minlength=4)
    statistic = np.sum((counts - 4000 * probabilities) ** 2 / (4000 * probabilities))
    assert statistic < 16.3  # 0.1 % of chance at three degrees of freedom


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number of tokens, at least 1"),
        ({"max_new_tokens": -1}, "at least 1; got -1"),
        ({"max_new_tokens": True}, "at least 1; got True"),
        ({"max_new_tokens": 10**30}, "max_new_tokens must be a whole number"),
        ({"streamer": 3}, "a streamer has the functions put and end, got 3"),
        ({"prefix": "context"}, "a prefix cache is what prefill gives, got str"),
        ({"temperature": 10**400, "key": 0}, "temperature must be a finite number"),
        ({"temperature": jnp.ones(2), "key": 0}, "temperature must be a finite number"),
        ({"top_k": float("inf"), "key": 0}, "top_k must be a whole number"),
        ({"top_k": 10**30, "key": 0}, "top_k must be a whole number"),
        ({"temperature": 0.5}, "needs a key"),
        ({"temperature": -0.5, "key": 0}, "temperature must be a finite number of 0"),
        ({"temperature": float("nan"), "key": 0}, "temperature must be a finite number of 0"),
        ({"top_k": -1, "top_p": 2.0}, "top_k must be a whole number.*top_p must be from 0 to 1"),
        ({"min_p": -0.1}, "min_p must be from 0"),
        ({"repetition_penalty": 1e-60}, "repetition_penalty must be above 0"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty must be above 0"),
        ({"prompts": []}, "rows of one or more token ids"),
        ({"prompts": [np.ones(2)]}, "token ids are whole numbers"),
        ({"prompts": [[3, -1]]}, "token ids are whole numbers"),
        ({"prompts": [[1], []]}, "rows of one or more token ids"),
        ({"prompts": [[1, 40]]}, "knows tokens 0 ... 39, got 40. Is this another"),
        ({"prompts": [[1] * 60]}, "beyond the 64"),
        ({"prompts": None}, "give prompts, or a prefix cache"),
        ({"eos": 77}, "knows tokens 0 ... 39"),
        ({"chunk": 0}, "chunk must be a whole number of tokens, at least 1"),
        ({"temperature": 1.0, "key": "three"}, "one for each of the 1 samples"),
    ],
)
def test_bad_requests(untyped, model, options, message):
    keys = {0: jax.random.key(0), "three": jax.random.split(jax.random.key(0), 3)}
    asked = {"prompts": [[3, 4]], "max_new_tokens": NEW, **options}
    if "key" in asked:
        asked["key"] = keys[asked["key"]]
    with pytest.raises(ValueError, match=message):
        generate(*model, **asked)


def test_a_session_has_its_limits(model):
    forward, params = model
    prefix = prefill(forward, params, PROMPTS[:2], new=4)
    with pytest.raises(ValueError, match="20 tokens and room for 24; 5 more do not fit"):
        generate(forward, params, prefix=prefix, max_new_tokens=5)
    with pytest.raises(ValueError, match="read by another model or into another kind of cache"):
        generate(*load("qwen2"), prefix=prefix, max_new_tokens=1)
    other = forward.patch(Caches(as_it_is), Caches(as_it_is))
    with pytest.raises(ValueError, match="its patches"):
        generate(other, params, prefix=prefix, max_new_tokens=1)
    with pytest.raises(ValueError, match="2 sequences, got 1 continuations"):
        extend(params, prefix, [[3]])


def test_a_cache_asks_for_its_room(model):
    forward, params = model
    cached = forward.patch(Caches(as_it_is))
    with pytest.raises(ValueError, match=r"forward.with_cache_length\(prompt, new\)"):
        cached(params, {}, jnp.ones((1, 2), jnp.int32))
    with pytest.raises(ValueError, match="prompt of 1 or more"):
        cached.with_cache_length(0, 4)
    cache_length = cached.with_cache_length(4, 4)
    state = cache_length.init(params, jnp.ones((1, 1), jnp.int32))
    with pytest.raises(ValueError, match="a prompt of 5 tokens does not fit"):
        cache_length(params, state, jnp.ones((1, 5), jnp.int32))


def test_the_programs_are_compiled_once(model):
    """Other numbers, keys and texts of the same shape run the same programs."""
    options = {"max_new_tokens": NEW, "top_k": 9, "key": jax.random.key(3)}
    generate(*model, PROMPTS, temperature=1.0, **options)
    before = decoding._decode._cache_size(), prefix_cache._read_first._cache_size()
    options["key"] = jax.random.key(5)
    generate(*model, [row[::-1] for row in PROMPTS], temperature=0.6, **options)
    assert (decoding._decode._cache_size(), prefix_cache._read_first._cache_size()) == before


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_warned_of(model, value):
    """By rows: here the text of token 30."""
    forward, params = model
    broken = params | {"embed_tokens": params["embed_tokens"].at[30].set(value)}
    assert "lm_head" in params  # else token 30 is never finite
    prefix = prefill(forward, broken, [[7, 8], [30]], new=NEW)
    with pytest.warns(NotFiniteWarning, match=r"1 of 2 sequences \(rows \[1\]\).*compute_dtype"):
        generate(forward, broken, prefix=prefix, max_new_tokens=1)
    with pytest.warns(NotFiniteWarning, match="log-probabilities of sequences: 1 of 2 values"):
        score(forward, broken, [[7, 8], [30, 8]])


def test_a_generated_text_is_a_value(model, greedy):
    assert dataclasses.is_dataclass(prefill(*model, PROMPTS, new=1))
    assert greedy.tokens.dtype == np.int32
    assert greedy.log_probs.shape == greedy.tokens.shape


def test_a_repetition_penalty_needs_what_occurred():
    with pytest.raises(ValueError, match="which tokens occurred"):
        process_logits(jnp.zeros((1, 4)), Sampling(repetition_penalty=1.2))


def test_bytes_of_a_cache_and_what_a_text_uses(model):
    forward, params = model
    prefix = prefill(forward, params, [list(range(12)), list(range(6))], new=8, buckets=None)
    found = cache_bytes(params, prefix)
    assert found.allocated == state_bytes(prefix.state)
    assert found.useful == pytest.approx(found.allocated * (12 + 6) / 2 / 20, abs=1)


def test_slots_of_spans_are_all_used_by_long_texts():
    subject = testing.tiny_llama()
    plan = moa.MoAPlan(((0.0, 0.0),) * 2, ((0.2, 0.5),) * 2, block=2, sink=2, floor=4)
    for layout in moa.LAYOUTS:
        forward, params = moa.transform(dataclasses.replace(plan, layout=layout))(
            subject.forward, subject.params
        )
        prefix = prefill(forward, params, subject.cond[:, :16], new=4, buckets=None)
        found = cache_bytes(params, prefix)
        assert found.allocated == found.useful == state_bytes(prefix.state)
