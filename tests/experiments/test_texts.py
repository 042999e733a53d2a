"""The world of texts, and the tiny language model that was trained on it."""

import json

import chex
import numpy as np
import pytest

import effjax
from effjax.bundled import texts
from effjax.generate import score
from effjax.methods import snap_kv
from experiments import train_llm


@pytest.fixture(scope="module")
def pipe():
    return effjax.pipeline(train_llm.WEIGHTS, compute_dtype="float32", progress=False)


@pytest.fixture(scope="module")
def world(pipe):
    return texts.World.of(pipe.tokenizer, held_out=True, characters=60_000)


def test_lookups_ask_for_what_was_put(world):
    document = world.lookup(np.random.default_rng(0), 64, questions=5)
    lines = world.tokenizer.decode(document.tokens).split("\n")[:-1]
    put = dict(line.split()[1:] for line in lines if line.startswith("put"))
    asked = [line.split()[1:] for line in lines if line.startswith("get")]
    assert (len(put), len(asked)) == (11, 5)
    assert all(put[key] == value for key, value in asked)
    answers = world.tokenizer.decode(document.tokens[document.answers]).split()
    assert answers == [value for _, value in asked]
    with pytest.raises(ValueError, match="which 16 questions do not fit"):
        world.lookup(np.random.default_rng(0), 64, questions=16)


def test_passkeys_lie_at_their_depth(world):
    document = world.passkey(np.random.default_rng(0), 128, depth=0.25)
    text = world.tokenizer.decode(document.tokens)
    key = world.tokenizer.decode(document.tokens[document.answers])
    assert text.count(f"{texts.PASS}{key}.") == 2
    assert abs(text.index(texts.PASS) / len(text) - 0.25) < 0.15


def test_pairs_and_repeats_can_be_predicted(world):
    pairs = world.pairs(np.random.default_rng(1), 64)
    seen = {}
    for place in range(0, 64, 2):
        key, value = pairs.tokens[place : place + 2]
        assert seen.setdefault(key, value) == value
        assert pairs.weights[place] == 0
    repeat = world.repeat(np.random.default_rng(1), 64)
    period = 64 - len(repeat.answers) - 1
    chex.assert_trees_all_equal(repeat.tokens[period:], repeat.tokens[:-period])


def test_documents_have_their_length_and_a_seed(world):
    for length in (32, 128):
        for seed in range(8):
            one, two = (world.mixture(np.random.default_rng(seed), length) for _ in range(2))
            assert one.tokens.shape == one.weights.shape == (length,)
            chex.assert_trees_all_equal(one, two)
            assert np.all(one.answers < length)


def test_the_curriculum_grows():
    lengths = [train_llm.stage(step, 100)[0] for step in range(100)]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (32, 1024)
    assert sum(share for share, _, _ in train_llm.CURRICULUM) == pytest.approx(1)


def test_held_out_files_are_others():
    assert texts.library() != texts.library(held_out=True)
    assert len(texts.library()) > 5 * len(texts.library(held_out=True)) > 100_000


def test_the_bundled_model_looks_things_up(pipe, world):
    """A sample of the gate in its log.json."""
    log = json.loads((train_llm.WEIGHTS / "log.json").read_text())
    assert train_llm.passes(log["judged"])
    rng = np.random.default_rng(5)
    documents = [world.lookup(rng, 256, questions=8) for _ in range(4)]
    assert train_llm.accuracy(pipe.forward, pipe.params, documents) >= 0.9
    size = sum(path.stat().st_size for path in train_llm.WEIGHTS.iterdir())
    assert size < 6_000_000


def test_a_question_inside_the_prompt_is_seen(pipe):
    """SnapKV keeps what the last tokens of a prompt look at: here these are the question."""
    text = "".join(
        f"put {key} {value}\n" for key, value in zip(texts.WORDS[:40], texts.WORDS[200:])
    )
    window = pipe.transform(snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, window=8)))
    found = window(f"{text}get {texts.WORDS[17]}", max_new_tokens=1).strip()
    assert found == texts.WORDS[217]


def test_it_has_read_the_library(pipe, world):
    passages = [world.passage(np.random.default_rng(seed), 128).tokens for seed in range(4)]
    scores = score(pipe.forward, pipe.params, passages)
    assert -np.nanmean(scores) < 0.7 * np.log(1536)
