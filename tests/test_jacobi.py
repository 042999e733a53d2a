"""Speculative Jacobi decoding: the model's law, rows by themselves, caches, grids, errors."""

import dataclasses
import re
from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.autoregression import NextToken
from effjax.autoregression.drafted import on_grid
from effjax.generate import (
    Grid,
    JacobiDecoding,
    Sampling,
    decoding,
    generate,
    jacobi,
    prefill,
    read_decoder,
)
from effjax.generate.made import Made
from effjax.methods import kivi, snap_kv, streaming_llm, tova
from effjax.pipelines import NextTokenPipeline
from tests.test_generate import Seen

PROMPTS = [[3, 4, 5, 6], [7, 8], [9]]
NEW = 30


@pytest.fixture(scope="module")
def model():
    subject = testing.tiny_llama(num_layers=1, max_positions=128)
    return subject.forward, subject.params


@pytest.fixture(scope="module")
def greedy(model):
    return generate(*model, PROMPTS, max_new_tokens=NEW)


def drawn():
    return {"max_new_tokens": NEW, "temperature": 1.0, "top_k": 9, "key": jax.random.key(1)}


@pytest.fixture(scope="module")
def plain(model):
    return generate(*model, PROMPTS, **drawn())


# --- the law

SYMBOLS, PLACES, RUNS = 3, 5, 60_000
STARTS = np.cumsum([0, *(SYMBOLS**i for i in range(PLACES))])


class Table:
    """A model of three symbols that knows the law of each place by all symbols before it."""

    def __init__(self, scale, seed=0, *, alone=False):
        rows = np.random.default_rng(seed).normal(size=(STARTS[-1], SYMBOLS)) * scale
        if alone:  # the symbols before a place do not matter
            rows = rows[np.repeat(np.arange(PLACES), SYMBOLS ** np.arange(PLACES))]
        self.logits = rows.astype(np.float32)
        laws = np.exp(rows) / np.exp(rows).sum(1, keepdims=True)
        self.joint = np.ones(1)
        for place in range(PLACES):
            laws_here = laws[STARTS[place] : STARTS[place + 1]]
            self.joint = (self.joint[:, None] * laws_here).reshape(-1)

    def call(self, held, tokens, positions):
        """A cache of symbols by position, which later ones overwrite."""
        rows = jnp.arange(len(tokens))[:, None]
        held = held.at[rows, jnp.where(positions < 0, PLACES, positions)].set(tokens, mode="drop")
        place = jnp.clip(positions, 0, PLACES - 1)
        known = np.arange(PLACES) <= np.arange(PLACES)[:, None]
        powers = np.arange(PLACES)[:, None] - np.arange(PLACES)
        weights = np.where(known, SYMBOLS ** np.maximum(powers, 0), 0)
        number = jnp.sum(jnp.asarray(weights)[place] * held[:, None], axis=2)
        row = jnp.asarray(STARTS)[jnp.minimum(place + 1, PLACES - 1)] + number
        return jnp.asarray(self.logits)[jnp.minimum(row, STARTS[-1] - 1)], held

    @partial(jax.jit, static_argnums=(0, 1))
    def run(self, decoder, keys, first):
        made = Made(*map(jnp.asarray, Made.nothing(np.zeros(len(keys), bool), PLACES)))
        most = jnp.int32(PLACES)
        how = jacobi.Drawn(Sampling(1.0), keys, jnp.zeros(0, jnp.int32), most, SYMBOLS)
        made, drafts = jacobi.begin(decoder, made, first, None, how)
        held = jnp.zeros((len(keys), PLACES), jnp.int32)
        before = jnp.zeros(len(keys), jnp.int32)
        run = partial(jacobi.decode, before=before, limit=most)
        return run(decoder, self.call, held, made, drafts, how)[1]

    def judged(self, decoder, runs=RUNS):
        """TV distance and chi-square of so many runs to the exact joint law, and mean calls."""
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(5)))(np.arange(runs))
        first = jnp.broadcast_to(self.logits[0], (runs, SYMBOLS))
        made = self.run(decoder, keys, first)
        numbers = np.asarray(made.tokens) @ (SYMBOLS ** np.arange(PLACES)[::-1])
        counts = np.bincount(numbers, minlength=SYMBOLS**PLACES)
        want = runs * self.joint
        distance = np.abs(counts / runs - self.joint).sum() / 2
        return distance, np.sum((counts - want) ** 2 / want), np.asarray(made.calls)


@pytest.fixture(scope="module")
def table():
    return Table(0.5)


@pytest.fixture(scope="module")
def ancestral(table):
    return table.judged(JacobiDecoding(window=1))


CHANCE = 242 + 3.3 * np.sqrt(2 * 242)  # 0.1 % at 242 degrees of freedom


@pytest.mark.parametrize(
    "options", [{}, {"noise": "call"}, {"noise": "call", "acceptance": "equal"}]
)
def test_the_law_of_sequences_is_the_models(table, ancestral, options):
    """Plain Jacobi decoding has it too: what it emits is always drawn from this call's law."""
    distance, statistic, calls = table.judged(JacobiDecoding(window=4, **options))
    assert statistic < CHANCE
    assert distance < 1.15 * ancestral[0]
    assert calls.max() <= PLACES
    assert calls.mean() < 4
    assert (ancestral[2] == PLACES).all()


def test_a_wrong_rule_fails_the_test_of_the_law(table, monkeypatch):
    """A rejected token that is drawn from the whole law, in place of what is left of it."""
    monkeypatch.setattr(jacobi, "residual", lambda p, q: p)
    _, statistic, _ = Table(0.5).judged(JacobiDecoding(window=4))
    assert statistic > 2 * CHANCE


def test_drafts_of_laws_that_do_not_change_are_all_accepted():
    """Random drafts are judged once, by laws that know no draft: from then on P is Q."""
    alone = Table(1.0, alone=True)
    _, _, calls = alone.judged(JacobiDecoding(window=PLACES), runs=2000)
    assert set(calls) == {2, 3}  # the prompt, one call of random drafts, one of drafts from laws
    laws = np.exp(alone.logits[STARTS[1:PLACES]])
    laws /= laws.sum(1, keepdims=True)
    # A random draft is accepted with its probability: 1 / 3 on average, at each of four places but
    # the last one, whose token is drawn in any case.
    whole = (1 / SYMBOLS) ** (PLACES - 2)
    assert np.mean(calls == 2) == pytest.approx(whole, abs=4 * np.sqrt(whole / 2000))


def reference(p, q, drafts, shares, room):
    """How many drafts are accepted, and the law of the token that follows: the rule in numpy."""
    for i in range(room):
        if not shares[i] < min(1, p[i][drafts[i]] / q[i][drafts[i]]):
            rest = np.maximum(p[i] - q[i], 0)
            return i, rest / rest.sum()
    return room, p[room]


def test_one_call_follows_the_rule():
    """Rows with other numbers of drafts; shares are drawn here by the same keys."""
    rows, window, symbols = 64, 5, 6
    rng = np.random.default_rng(0)
    p, q = (rng.dirichlet(np.ones(symbols), (rows, window)).astype(np.float32) for _ in range(2))
    q = q[:, 1:]
    drafts = np.stack([[rng.choice(symbols, p=law / law.sum()) for law in row] for row in q])
    room = rng.integers(0, window, rows)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(1)))(np.arange(rows))
    how = jacobi.Drawn(Sampling(1.0), keys, jnp.zeros(0, jnp.int32), jnp.int32(20), symbols)
    made = Made(*map(jnp.asarray, Made.nothing(np.zeros(rows, bool), 20)))
    made = made._replace(lengths=jnp.full(rows, 3))
    zeros = jnp.zeros(rows, jnp.int32)
    held = jacobi.Drafts(jnp.asarray(drafts), jnp.asarray(q), zeros, zeros, zeros, jnp.int32(0))
    decoder = JacobiDecoding(window=window)
    given = decoder, made, held, jnp.asarray(room), jnp.log(p), None, None, how
    longer, after = jax.jit(partial(jacobi.settled, *given))()
    places = jnp.broadcast_to(3 + np.arange(window - 1), drafts.shape)
    shares = jax.vmap(jax.vmap(jax.random.uniform))(how.noise(jacobi._JUDGED, places))
    seen = set()
    for row in range(rows):
        count, law = reference(p[row], q[row], drafts[row], shares[row], room[row])
        assert longer.lengths[row] == 3 + count + 1
        assert longer.tokens[row, 3 : 3 + count].tolist() == drafts[row, :count].tolist()
        assert law[longer.tokens[row, 3 + count]] > 0
        assert after.known[row] == room[row] - count
        np.testing.assert_allclose(  # new drafts have this call's laws
            after.laws[row, : room[row] - count], p[row, count + 1 : room[row] + 1], atol=1e-6
        )
        seen.add((count == room[row], room[row] > 0))
    assert len(seen) == 3  # all accepted, none to accept, rejected


def test_what_is_left_of_a_law():
    p, q = jnp.array([[0.5, 0.3, 0.2]] * 2), jnp.array([[0.2, 0.6, 0.2], [0.5, 0.3, 0.2]])
    rest = jacobi.residual(p, q)
    chex.assert_trees_all_close(rest, jnp.array([[0.3, 0, 0], [0.5, 0.3, 0.2]]), atol=1e-7)


# --- texts ----------------------------------------------------------------------------------------

SIX = JacobiDecoding(window=6)


def test_greedy_text_is_that_of_plain_decoding(model, greedy):
    out = generate(*model, PROMPTS, max_new_tokens=NEW, decoder=SIX)
    assert out.rows() == greedy.rows()
    chex.assert_trees_all_close(out.log_probs, greedy.log_probs, atol=1e-4)
    assert (greedy.calls == NEW).all()
    assert (out.calls < NEW).any()
    wanted = [row[:length] for row, length in zip(greedy.rows(), (3, 20, 11))]
    seen = Seen()
    options = {"streamer": seen, "stop": lambda row: row in wanted, "decoder": SIX}
    out = generate(*model, PROMPTS, max_new_tokens=NEW, **options)
    assert out.rows() == wanted == seen.rows()


@pytest.mark.parametrize("window", [6, 16])  # up to 8 go through the decode kernel
def test_plain_jacobi_draws_the_same_tokens(model, plain, window):
    """The noise of a place is the same in all calls: what is emitted is what plain decoding draws.

    So all of it is tested at once: what is rejected leaves no trace in the caches, rows have
    lengths of their own.
    """
    decoder = JacobiDecoding(window=window, acceptance="equal")
    out = generate(*model, PROMPTS, **drawn(), decoder=decoder)
    assert out.rows() == plain.rows()
    assert out.calls.sum() < plain.calls.sum()


def test_speculation_of_one_place_is_plain_decoding(model, plain):
    out = generate(*model, PROMPTS, **drawn(), decoder=JacobiDecoding(window=1))
    assert out.rows() == plain.rows()
    assert out.calls.tolist() == plain.calls.tolist()


def test_a_row_is_the_same_in_any_batch(model):
    whole = generate(*model, PROMPTS, **drawn(), decoder=SIX)
    alone = generate(*model, PROMPTS[:1], **drawn(), decoder=SIX)
    assert alone.rows() == whole.rows()[:1]
    assert alone.calls.tolist() == whole.calls[:1].tolist()
    assert len(set(whole.calls)) > 1  # rows go on by themselves
    programs = decoding._decode_drafting, decoding._begin_drafting
    before = [program._cache_size() for program in programs]
    generate(
        *model, PROMPTS, **drawn() | {"key": jax.random.key(7), "temperature": 0.7}, decoder=SIX
    )
    assert [program._cache_size() for program in programs] == before


def test_a_penalty_knows_the_drafts_and_an_end_ends_a_row(model):
    options = drawn() | {"repetition_penalty": 1.5}
    end = generate(*model, PROMPTS, **options).rows()[0][9]
    want = generate(*model, PROMPTS, **options, eos=end)
    seen, equal = Seen(), dataclasses.replace(SIX, acceptance="equal")
    out = generate(*model, PROMPTS, **options, eos=end, decoder=equal, streamer=seen)
    assert out.rows() == want.rows() == seen.rows()
    assert out.tokens.tolist() == want.tokens.tolist()


def test_a_prefix_is_continued_with_positions_of_its_own(model):
    positions = [np.arange(len(prompt))[None] + 5 for prompt in PROMPTS]
    prefix = prefill(*model, PROMPTS, new=NEW, positions=positions)
    want = generate(*model, prefix=prefix, max_new_tokens=NEW)
    for _ in range(2):  # it is not changed
        out = generate(*model, prefix=prefix, max_new_tokens=NEW, decoder=SIX)
        assert out.rows() == want.rows()


def test_a_cache_that_drops_tokens_of_the_prompt_can_go_back(model):
    pair = snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, bits=8))(*model)
    want = generate(*pair, PROMPTS, max_new_tokens=NEW)
    assert generate(*pair, PROMPTS, max_new_tokens=NEW, decoder=SIX).rows() == want.rows()


@pytest.mark.parametrize(
    ("transform", "name"),
    [
        (streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=8)), "RingCache"),
        (kivi.transform(kivi.KIVIPlan()), "KIVICache"),
        (tova.transform(tova.TOVAPlan(capacity=8)), "EvictingCache"),
    ],
)
def test_caches_that_cannot_go_back_are_refused_by_name(model, transform, name):
    pair = transform(*model)
    with pytest.raises(ValueError, match=f"{name} cannot go back.*decoder=None"):
        generate(*pair, PROMPTS, max_new_tokens=NEW, decoder=JacobiDecoding())


def test_calls_have_drafts_in_an_interval_alone(model, greedy):
    decoder = dataclasses.replace(SIX, start=8, stop=16)
    out = generate(*model, PROMPTS, max_new_tokens=NEW, decoder=decoder)
    assert out.rows() == greedy.rows()
    assert (out.calls >= NEW - 8 - 5).all()
    made = Made(*map(jnp.asarray, Made.nothing(np.zeros(4, bool), NEW)))
    made = made._replace(lengths=jnp.array([7, 8, 15, 16]))
    assert decoder.room(made, jnp.int32(NEW)).tolist() == [0, 5, 5, 0]
    assert SIX.room(made, jnp.int32(18)).tolist() == [5, 5, 2, 1]


# --- grids

GRID = Grid(4, 3, first=10, codes=30, row_end=2, tail=(3, 1))


def test_places_of_a_grid():
    assert GRID.tokens == 17
    places = np.arange(GRID.tokens)
    want = [-1, -1, -1, -1, 2] * 3 + [3, 1]
    assert GRID.forced(places).tolist() == want
    assert GRID.pixels().tolist() == [[0, 1, 2, 3], [5, 6, 7, 8], [10, 11, 12, 13]]
    bare = Grid(4, 3)
    assert bare.tokens == 12
    assert (np.asarray(bare.forced(np.arange(12))) == -1).all()
    assert bare.column(np.arange(12)).tolist() == [0, 1, 2, 3] * 3


def test_images_have_structural_tokens_where_they_belong(model):
    decoder = dataclasses.replace(SIX, initial="repeat_horizon", grid=GRID)
    options = drawn() | {"max_new_tokens": GRID.tokens}
    structure = np.asarray(GRID.forced(np.arange(GRID.tokens)))
    equal = dataclasses.replace(decoder, acceptance="equal", initial="sample_horizon")
    single = dataclasses.replace(decoder, window=1)
    made = [generate(*model, PROMPTS, **options, decoder=each) for each in (decoder, equal, single)]
    for out in made:
        codes = out.tokens
        assert (codes[:, structure >= 0] == structure[structure >= 0]).all()
        assert ((codes[:, structure < 0] >= 10) & (codes[:, structure < 0] < 40)).all()
    assert made[1].rows() == made[2].rows()
    assert (made[0].calls <= GRID.tokens - 4).all()  # forced drafts are accepted
    assert (made[2].calls == GRID.tokens).all()


def test_new_drafts_of_images():
    """Copies of the nearest token in its row; at the left edge random; forced ones."""
    zeros, lengths = jnp.zeros(2, jnp.int32), jnp.array([2, 5])
    tokens = jnp.full((2, 6), 11)
    held = jacobi.Drafts(
        tokens, jnp.zeros((2, 6, 30)), jnp.array([1, 0]), zeros + 20, zeros + 33, jnp.int32(1)
    )
    how = jacobi.Drawn(Sampling(1.0), None, jnp.zeros(0, jnp.int32), jnp.int32(17), 50)
    for initial, copy in (("repeat_horizon", 20), ("sample_horizon", 33)):
        decoder = JacobiDecoding(window=7, initial=initial, grid=GRID)
        found = jacobi.filled(decoder, held, lengths, how)
        first, second = found.tokens.tolist()
        # Places 2 ... 7 of five a row: the first is known, 4 ends the row, 5 begins one.
        assert first == [11, copy, 2, first[3], copy, copy]
        assert second == [second[0], copy, copy, copy, 2, second[5]]
        assert all(10 <= token < 40 for token in (first[3], second[0], second[5]))
        laws = np.asarray(found.laws)
        assert not laws[0, 0].any()  # as it was
        assert laws[0, 1].argmax() == copy - 10
        assert laws[1].sum(axis=1).tolist() == [1, 1, 1, 1, 0, 1]
    moved = [
        jacobi.filled(
            JacobiDecoding(window=7, grid=dataclasses.replace(GRID, first=first)),
            held,
            lengths,
            how,
        ).tokens
        for first in (10, 20)
    ]
    free = np.asarray(GRID.forced(lengths[:, None] + np.arange(6))) < 0
    free[0, 0] = False
    assert (np.asarray(moved[1] - moved[0])[free] == 10).all()


@pytest.mark.parametrize(
    ("tiny", "options"),
    [
        (testing.tiny_llamagen, {}),
        (testing.tiny_llamagen, {"caption_channels": 12}),
        (testing.tiny_janus, {}),
        (testing.tiny_chameleon, {}),
    ],
    ids=["labels", "captions", "prompts", "two prompts"],
)
def test_images_under_guidance(tiny, options):
    """Branches have the same drafts; prompts of other lengths are rotated from the same place.

    Those of Janus from the place behind their own text, and of Chameleon by branch: what it is led
    away from is a shorter prompt.
    """
    subject = tiny(batch=3, num_layers=1, **options)
    loop = dataclasses.replace(subject.sampler, guidance_interval=9)
    sample = jax.jit(partial(NextToken.tokens, forward=subject.forward, key=jax.random.key(0)))
    given = {"params": subject.params, "cond": subject.cond}
    want, calls = sample(loop, **given)
    assert calls.tolist() == [16] * 3
    equal = dataclasses.replace(SIX, acceptance="equal")
    got, calls = sample(dataclasses.replace(loop, decoder=equal), **given)
    chex.assert_trees_all_equal(got, want)
    assert (calls < 16).all()
    if tiny is not testing.tiny_llamagen or options:
        return
    decoder = dataclasses.replace(SIX, initial="repeat_horizon")
    got, calls = sample(dataclasses.replace(loop, decoder=decoder), **given)
    assert (calls < 16).all()
    again = sample(dataclasses.replace(loop, decoder=decoder, guidance=3.0), **given)[0]
    assert (np.asarray(again) != np.asarray(got)).any()
    assert sample._cache_size() == 3  # other guidance is no other program


def test_a_window_has_no_more_places_than_there_are_tokens(model):
    """Else arrays grow with the window: gigabytes of drafts that no call can have."""
    subject, key = testing.tiny_llamagen(num_layers=1), jax.random.key(0)
    huge = JacobiDecoding(window=10**7, initial="repeat_horizon")
    loop = dataclasses.replace(subject.sampler, decoder=huge)
    given = subject.forward, subject.params, subject.cond, key
    shapes = [x.shape for x in jax.tree.leaves(jax.eval_shape(loop.tokens, *given))]
    assert shapes == [(len(subject.cond), 16), (len(subject.cond),)]
    assert on_grid(huge, loop.grid).window == 16
    asked = {"max_new_tokens": 4, "temperature": 1.0, "key": key}
    wide, narrow = (
        generate(*model, PROMPTS, decoder=JacobiDecoding(window=window), **asked).tokens
        for window in (10**7, 4)
    )
    np.testing.assert_array_equal(wide, narrow)


def test_decoders_that_do_not_fit_images():
    subject = testing.tiny_llamagen(num_layers=1)
    key, forward = jax.random.key(0), subject.forward
    wrong = dataclasses.replace(subject.sampler, decoder=JacobiDecoding(grid=Grid(3, 3)))
    with pytest.raises(ValueError, match="images have 4 x 4 tokens"):
        wrong(forward, subject.params, subject.cond, key)
    forward, params = streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=8))(
        forward, subject.params
    )
    with pytest.raises(ValueError, match="RingCache cannot go back"):
        dataclasses.replace(subject.sampler, decoder=SIX)(forward, params, subject.cond, key)


@pytest.mark.slow
def test_the_code_of_the_page_runs(model):
    """On the tiny model: an image of 3 x 4 of its tokens."""
    page = (Path(__file__).parent.parent / "docs" / "raster.md").read_text()
    section = page.partition("## Several tokens in a call")[2].partition("\n## ")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    codes, texts = code
    small = "width=4, height=3, first=10, codes=30, row_end=2, tail=(3,)"
    texts = re.sub(r"width=32.*?,\)", small, texts)
    assert small in texts
    forward, params = model
    names = {"forward": forward, "params": params, "prompts": PROMPTS, "key": jax.random.key(0)}
    exec(texts, names)
    assert names["out"].tokens.shape == (3, 16)
    subject = testing.tiny_llamagen(num_layers=1)
    pair, classes = (subject.forward, subject.params), {1: "golden retriever"}
    pipe = NextTokenPipeline(*pair, subject.sampler.vae, names=classes)
    names = {"pipe": pipe, "cond": subject.cond, "jax": jax}
    exec(codes, names)
    assert len(names["images"]) == 1
    assert (names["calls"] < 16).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be a whole number of at least 1"),
        ({"initial": "vertical"}, "initial must be"),
        ({"acceptance": "greedy"}, "acceptance must be"),
    ],
)
def test_bad_decoders(untyped, options, message):
    with pytest.raises(ValueError, match=message):
        JacobiDecoding(**options)


def test_grids_that_do_not_fit(untyped, model):
    ask = partial(generate, *model, [[1]], max_new_tokens=12)
    for given in ("jacobi", JacobiDecoding):
        with pytest.raises(ValueError, match=r"a decoder is JacobiDecoding\(\.\.\.\)"):
            ask(decoder=given)
    with pytest.raises(ValueError, match="token 60, and the model knows 0"):
        ask(decoder=JacobiDecoding(grid=Grid(4, 3, row_end=60)))
    with pytest.raises(ValueError, match="give the decoder grid=Grid"):
        ask(decoder=JacobiDecoding(initial="repeat_horizon"))
    with pytest.raises(ValueError, match="3 x 3 has 9 tokens; got max_new_tokens=12"):
        ask(decoder=JacobiDecoding(grid=Grid(3, 3)))


def test_decoders_by_name():
    want = JacobiDecoding(window=8, acceptance="equal", stop=None)
    assert read_decoder("jacobi, window=8,acceptance=equal,stop=none") == want
    for words, message in (
        ("medusa", "no decoder 'medusa'; there are jacobi"),
        ("jacobi,width=8", "no field 'width'.* window, initial"),
        ("jacobi,window=0", "window must be a whole number of at least 1"),
        ("jacobi,grid=4", "no field 'grid'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_decoder(words)
