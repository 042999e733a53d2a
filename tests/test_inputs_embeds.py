"""Language models on embeddings in place of tokens, and on positions of several rows."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.generate import extend, generate, prefill
from effjax.layers.rotary import Rotary
from effjax.methods import ada_kv, cskv, kivi, snap_kv, tova
from effjax.models.llama import LlamaConfig

PROMPTS = [[5, 9, 2, 7, 7, 31, 8, 4, 11], [3, 1, 4], [6, 2, 9, 9, 40]]
NEW = 5


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_llama(num_layers=1, rope_sections=(2, 1, 1))


def embeddings(subject, prompts=PROMPTS):
    """Those of the tokens, row by row."""
    table = np.asarray(subject.params["embed_tokens"])
    return [table[row] for row in prompts]


def equal_rows(prompts=PROMPTS, start=0):
    return [np.tile(np.arange(start, start + len(row)), (3, 1)) for row in prompts]


def test_each_frequency_goes_by_its_row():
    """M-RoPE of Qwen2-VL by sections; of Qwen3-VL by turns, and the first row has the rest."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 5, 3, 16)).astype(np.float32)
    positions = rng.integers(0, 50, (2, 3, 5))
    rates = 100.0 ** (-np.arange(8) / 8)
    for interleaved, rows in ((False, [0, 0, 0, 0, 1, 1, 2, 2]), (True, [0, 1, 2, 0, 1, 2, 0, 0])):
        rotary = Rotary(16, theta=100.0, sections=(4, 2, 2), interleaved=interleaved)
        want = np.zeros_like(x)
        for i, (row, rate) in enumerate(zip(rows, rates, strict=True)):
            angle = (positions[:, row] * rate)[:, :, None]
            left, right = x[..., i], x[..., i + 8]
            want[..., i] = left * np.cos(angle) - right * np.sin(angle)
            want[..., i + 8] = right * np.cos(angle) + left * np.sin(angle)
        got = rotary(jnp.asarray(x), jnp.asarray(positions))
        chex.assert_trees_all_close(got, want, atol=1e-5)
        same = np.broadcast_to(positions[:, :1], positions.shape)
        plain = Rotary(16, theta=100.0)(jnp.asarray(x), jnp.asarray(positions[:, 0]))
        chex.assert_trees_all_equal(rotary(jnp.asarray(x), jnp.asarray(same)), plain)


@pytest.mark.parametrize("rows", [False, True], ids=["places", "three rows"])
@pytest.mark.parametrize(
    "options", [{}, {"buckets": None}, {"chunk": 4}, {"chunk": 4, "buckets": None}], ids=str
)
def test_embeddings_of_tokens_are_the_tokens(subject, rows, options):
    """To the bit, whatever the sizes and pieces; rows of positions that are equal are one."""
    pair = subject.forward, subject.params
    want = generate(*pair, PROMPTS, max_new_tokens=NEW, **options)
    given = {"positions": equal_rows()} if rows else {}
    got = generate(*pair, inputs_embeds=embeddings(subject), max_new_tokens=NEW, **given, **options)
    chex.assert_trees_all_equal(got._asdict(), want._asdict())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        (snap_kv, {"ratio": 0.5, "window": 2}),
        (ada_kv, {"ratio": 0.5, "options": (("window", 2),)}),
        (tova, {"capacity": 6}),
        (kivi, {"group": 4}),
    ],
    ids=lambda value: getattr(value, "__name__", "").rpartition(".")[2],
)
def test_caches_keep_the_same_of_embeddings(subject, method, options):
    plan = method.METHOD.plan(**options)
    pair = method.transform(plan)(subject.forward, subject.params)
    want = generate(*pair, PROMPTS, max_new_tokens=NEW)
    rows = {"inputs_embeds": embeddings(subject), "positions": equal_rows()}
    got = generate(*pair, max_new_tokens=NEW, **rows)
    chex.assert_trees_all_equal(got._asdict(), want._asdict())


def test_a_penalty_knows_the_tokens_that_it_is_told(subject):
    pair, options = (subject.forward, subject.params), {"max_new_tokens": NEW}
    options["repetition_penalty"] = 5.0
    embeds = embeddings(subject)
    want = generate(*pair, PROMPTS, **options)
    told = generate(*pair, PROMPTS, inputs_embeds=embeds, **options)
    assert told.rows() == want.rows()
    silent = prefill(*pair, inputs_embeds=embeds, new=NEW)
    assert not np.asarray(silent.occurred).any()
    assert np.asarray(prefill(*pair, PROMPTS, new=NEW).occurred).any()


POSITIONS = [  # three tokens of text, an image of 2 x 3 patches, two tokens of text
    np.array(
        [
            [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7],
            [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7],
            [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7],
        ]
    ),
    np.array([[0, 1, 2, 2], [0, 1, 2, 3], [0, 1, 2, 2]]),
]


@pytest.mark.parametrize("chunk", [None, 4])
def test_tokens_that_follow_go_on_from_the_highest_position(subject, chunk):
    """Greedy tokens of one call without a cache, which sees all positions at once."""
    rng = np.random.default_rng(4)
    embeds = [rng.standard_normal((p.shape[1], 16)).astype(np.float32) for p in POSITIONS]
    pair = subject.forward, subject.params
    given = {"inputs_embeds": embeds, "positions": POSITIONS, "chunk": chunk}
    made = generate(*pair, max_new_tokens=4, **given)
    for row, (own, positions) in enumerate(zip(embeds, POSITIONS, strict=True)):
        new = made.tokens[row]
        whole = np.concatenate([own, *embeddings(subject, [new])])
        later = positions.max() + 1 + np.arange(len(new))
        angles = np.concatenate([positions, np.tile(later, (3, 1))], axis=1)
        places = np.concatenate([np.arange(angles.shape[1])[None], angles])[None]
        logits, _ = subject.forward(
            subject.params, {}, None, jnp.asarray(places), None, None, jnp.asarray(whole)[None]
        )
        want = np.asarray(logits)[0, own.shape[0] - 1 : -1].argmax(-1)
        assert new.tolist() == want.tolist()


def test_a_question_continues_embeddings(subject):
    """Appended as tokens, as embeddings, and with positions of its own."""
    pair = subject.forward, subject.params
    question = [[8, 6], [7, 7, 9], [1]]
    rng = np.random.default_rng(5)
    embeds = [rng.standard_normal((p.shape[1], 16)).astype(np.float32) for p in POSITIONS]
    embeds.append(embeds[1][:2])
    positions = [*POSITIONS, POSITIONS[1][:, :2]]
    prefix = prefill(*pair, inputs_embeds=embeds, positions=positions, new=6)
    assert np.asarray(prefix.shift)[:3].tolist() == [8 - 11, 4 - 4, 0]
    want = extend(pair[1], prefix, question)
    starts = [8, 4, 2]
    rows = [equal_rows([row], start)[0] for row, start in zip(question, starts, strict=True)]
    for given in (
        {"inputs_embeds": embeddings(subject, question)},
        {"prompts": question, "positions": rows},
    ):
        got = extend(pair[1], prefix, **given)
        chex.assert_trees_all_equal(got.logits[:3], want.logits[:3])
        chex.assert_trees_all_equal(got.shift, want.shift)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "give prompts, or inputs_embeds in their place"),
        ({"inputs_embeds": [np.zeros((3, 8), np.float32)]}, r"rows \[S, 16\] .* got \[\[3, 8\]\]"),
        ({"inputs_embeds": [np.zeros((0, 16), np.float32)]}, "of one or more tokens"),
        ({"inputs_embeds": [np.zeros((3, 16), int)]}, "floats of one dtype, got int64"),
        (
            {"prompts": [[1, 2]], "inputs_embeds": [np.zeros((3, 16), np.float32)]},
            r"inputs_embeds are of \[3\] tokens, the sequences have \[2\]",
        ),
        ({"prompts": [[1, 2]], "positions": [np.zeros((3, 4), int)]}, r"positions are of \[4\]"),
        ({"prompts": [[1, 2]], "positions": [np.zeros((2, 2), int)]}, r"R is 1 or .* \(3\)"),
        ({"prompts": [[1, 2]], "positions": [-np.ones((3, 2), int)]}, "from 0 on"),
    ],
    ids=str,
)
def test_rows_that_do_not_fit_are_refused(subject, given, message):
    with pytest.raises(ValueError, match=message):
        prefill(subject.forward, subject.params, new=2, **given)


def test_rebuilt_keys_have_no_rows_of_positions(subject):
    """CSKV rotates what it rebuilds to the places of slots."""
    plan = cskv.CSKVPlan(window=4)
    pair = cskv.transform(plan)(subject.forward, subject.params)
    want = generate(*pair, PROMPTS, max_new_tokens=NEW)
    got = generate(*pair, inputs_embeds=embeddings(subject), max_new_tokens=NEW)
    assert got.rows() == want.rows()
    with pytest.raises(ValueError, match="cskv rotates rebuilt keys to their places"):
        generate(*pair, PROMPTS, positions=equal_rows(), max_new_tokens=NEW)


def test_a_model_takes_tokens_or_embeddings(subject):
    tokens, embeds = jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 16))
    with pytest.raises(ValueError, match="tokens or inputs_embeds, one of them"):
        subject.forward(subject.params, {}, tokens, None, None, None, embeds)
    plain = testing.tiny_llama(num_layers=1)
    with pytest.raises(ValueError, match="3 rows to rotate by, and this model has no sections"):
        plain.forward(plain.params, {}, tokens, jnp.zeros((1, 4, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"sections \(4, 4\) have 8 frequencies, heads of 8"):
        LlamaConfig(num_heads=2, num_kv_heads=2, head_dim=8, rope_sections=(4, 4))
