"""NAR: parity with plain torch, the order of diagonals, the loop, caches, cost, errors."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert, from_pretrained
from effjax import testing
from effjax.autoregression import NextDiagonal, NextToken, group_loss
from effjax.cost import sampler_cost
from effjax.layers.groups import GroupCore, diagonals
from effjax.layers.rotary import RasterRotary
from effjax.methods import kivi, knorm, round_to_nearest, streaming_llm, tova
from effjax.models.llamagen import Caption
from effjax.models.nar import NARConfig
from effjax.registry import methods
from pallas_kernels import use_implementation

GRID = 3


@pytest.fixture(autouse=True)
def _what_runs_here():
    """The programs of this machine: tracing the kernels of others beside them takes long."""
    with use_implementation("xla"):
        yield


@jax.jit
def sample(loop, forward, params, cond, key):
    return loop.sample(forward, params, cond, key)


def teacher_forced(forward, params, tokens, cond):
    return NextDiagonal.logits(forward, params, tokens, cond)


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_nar(num_layers=1)


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (4, 4), (3, 5)])
def test_diagonals_and_what_they_see(rows, columns):
    """Sizes in closed form; a token sees the sum of all diagonals up to its own."""
    groups = diagonals(rows, columns)
    count = rows + columns - 1
    sizes = [min(k + 1, rows, columns, count - k) for k in range(count)]
    assert (groups.sizes, groups.widest) == (tuple(sizes), min(rows, columns))
    place = np.asarray(groups.order)
    distance = place // columns + place % columns
    assert (np.diff(distance) >= 0).all()
    assert (place[groups.numbers] == place[np.argsort(place)]).all()
    row = np.arange(2 + rows * columns)
    rotary = RasterRotary(8, theta=10.0, condition=2, columns=columns)
    rule = GroupCore(rotary, condition=2, sizes=groups.sizes).rule
    seen = rule.visible(row[:, None], row[None], len(row)).sum(axis=1)
    assert seen[:2].tolist() == [1, 2]
    assert (seen[2:] == 2 + np.cumsum(sizes)[distance]).all()


def test_calls_make_diagonals(subject):
    """Step k draws min(k + 1, 2 n - 1 - k) tokens and reads those of the step before."""
    table = subject.sampler.table
    assert subject.sampler.calls == 7
    for step in range(7):
        drawn = table.draws[step][table.draws[step] >= 0]
        assert len(drawn) == min(step + 1, 7 - step)
        assert (drawn // 4 + drawn % 4 == step).all()
        assert (np.diff(drawn) > 0).all()  # by rising rows
        assert table.before[step] == sum(min(k + 1, 7 - k) for k in range(step))
        if step:
            last = table.draws[step - 1]
            read = table.reads[step]
            assert ((read >= 0) == (last >= 0)).all()
            order = np.asarray(subject.forward.config.groups.order)
            assert (order[read[read >= 0]] == last[last >= 0]).all()


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classes", "captions"])
def test_logits_and_samples_equal_plain_torch(kind, tmp_path):
    """Teacher-forced logits; and guided greedy samples, diagonal by diagonal through the cache."""
    torch = pytest.importorskip("torch")
    from tests.models import nar_reference as reference

    channels = 10 if kind == "captions" else 0
    sd = reference.random_model(channels=channels)
    torch.save({"module": sd}, tmp_path / "model.pt")
    config = {
        "_class_name": "NAR",
        "grid": GRID,
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "intermediate_size": 24,
        "num_classes": 0 if channels else 5,
        "caption_channels": channels,
        "vocab_size": 40,
        "caption_tokens": 6,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    forward, params = from_pretrained(tmp_path / "model.pt", progress=False)
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(40, (2, GRID**2), generator=random)
    options = {"heads": 2, "grid": GRID}
    if channels:
        states = torch.randn(2, 6, channels, generator=random)
        mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1]])
        condition, null = states, sd["cls_embedding.uncond_embedding"][None].repeat(2, 1, 1)
        options["mask"] = mask
        cond = Caption(*map(jnp.asarray, (states.numpy(), mask.bool().numpy(), np.zeros(2, bool))))
    else:
        condition, null = torch.tensor([3, 0]), torch.tensor([5, 5])
        cond = jnp.asarray(condition.numpy(), jnp.int32)
    wanted = reference.logits_of(sd, condition, tokens, **options)
    given = jnp.asarray(tokens.numpy(), jnp.int32)
    got = jax.jit(teacher_forced)(forward, params, given, cond)
    chex.assert_trees_all_close(got, wanted.numpy(), atol=1e-4)
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), tokens.flatten())
    np.testing.assert_allclose(group_loss(got, given), loss.item(), rtol=1e-5)

    drawn = reference.greedy(sd, condition, null, scale=3.0, interval=3, **options)
    loop = NextDiagonal(
        testing.tiny_vq_model(),
        (GRID, GRID),
        guidance=3.0,
        guidance_interval=3,
        top_k=1,
        groups=forward.config.groups,
    )
    _, own = sample(loop, forward, params, cond, jax.random.key(0))
    np.testing.assert_array_equal(own, drawn.numpy())


def test_a_released_file_tells_all_but_the_size_of_images(tmp_path):
    torch = pytest.importorskip("torch")
    from tests.models import nar_reference as reference

    torch.save({"model": reference.random_model(width=768)}, tmp_path / "nar.pt")
    forward, params = from_pretrained(tmp_path / "nar.pt", progress=False)
    assert forward.config == NARConfig(
        num_layers=1, vocab_size=40, intermediate_size=24, num_classes=5
    )
    convert(tmp_path / "nar.pt", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)


# --- the loop -------------------------------------------------------------------------------------


def test_cached_calls_give_what_one_call_gives(subject):
    """At every token; rows alone and together, and with other keys beside them."""
    forward, params, cond = subject.forward, subject.params, subject.cond
    loop = dataclasses.replace(subject.sampler, guidance=None)

    @jax.jit
    def both(params, cond, keys):
        carry = loop.init(forward, params, cond, keys)
        out, _, state = loop.network(forward, params, carry.state, carry.x, cond, None, 0)
        carry = loop.update(carry._replace(state=state), out, 0)

        def body(carry, step):
            out, _, state = loop.network(forward, params, carry.state, carry.x, cond, None, step)
            return loop.update(carry._replace(state=state), out, step), out

        last, later = jax.lax.scan(body, carry, jnp.arange(1, loop.calls))
        return out, later, last.x, teacher_forced(forward, params, last.x, cond)

    keys = jax.random.split(jax.random.key(1), 2)
    first, later, tokens, whole = both(params, cond, keys)
    chex.assert_trees_all_close(first, whole[:, :1], atol=1e-4)
    for out, places in zip(later, loop.table.draws[1:], strict=True):
        own = places[places >= 0]
        chex.assert_trees_all_close(out[:, : len(own)], whole[:, own], atol=1e-4)
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 40
    # A sample depends on its own key and label alone.
    other = both(params, cond[::-1], keys[::-1])[2]
    chex.assert_trees_all_equal(other[::-1], tokens)
    changed = both(params, cond.at[0].set(3), jax.random.split(jax.random.key(2), 2))[2]
    assert (changed[0] != tokens[0]).any()
    mixed = both(params, cond.at[0].set(3), jnp.stack([jax.random.key(7), keys[1]]))[2]
    chex.assert_trees_all_equal(mixed[1], tokens[1])


def test_one_program_scans_all_calls_but_the_first(subject):
    """Whatever guidance, interval and labels; FLOPs as the closed form says."""
    traces = []

    @jax.jit
    def run(loop, labels, key):
        traces.append(None)
        return loop.tokens(subject.forward, subject.params, labels, key)

    found = []
    for guidance, interval in ((1.0, 99), (5.0, 99), (5.0, 0)):
        loop = dataclasses.replace(subject.sampler, guidance=guidance, guidance_interval=interval)
        tokens, calls = run(loop, subject.cond, jax.random.key(0))
        assert calls.tolist() == [7, 7]
        found.append(np.asarray(tokens))
    assert len(traces) == 1
    assert (found[0] == found[2]).all()  # after the interval the conditional branch alone draws
    assert (found[0] != found[1]).any()

    config, rows = subject.forward.config, 2 * 2
    cost = sampler_cost(subject.sampler, subject.forward, subject.params, subject.cond)
    width, inner = config.hidden_size, config.intermediate_size
    blocks, columns, slots = config.num_layers + 1, 6 * 4, 1 + 16 - 1
    linear = 2 * (1 + columns) * blocks * (4 * width**2 + 3 * width * inner)
    head = 2 * 2 * (1 + columns) * width * config.vocab_size
    attention = 4 * width * blocks * (1 + columns * slots)
    assert cost.scope("attention").flops == rows * attention
    assert cost.flops == rows * (linear + head + attention)


def test_methods_run_or_are_refused(subject):
    """Weights of 8 bits, a cache that forgets; others by name."""

    def begin(transform):
        pair = transform(subject.forward, subject.params)
        return pair, subject.sampler.init(*pair, subject.cond, jax.random.key(0))

    pair, _ = begin(round_to_nearest.transform(round_to_nearest.uniform(8, 8)))
    window = streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=9, sinks=1))
    pair, carry = begin(lambda *dense: window(*pair))
    assert max(leaf.shape[1] for leaf in carry.state.values() if leaf.ndim == 4) == 9
    tokens = sample(subject.sampler, *pair, subject.cond, jax.random.key(0))[1]
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 40
    even_steps = methods()["even_steps"]
    for transform, message in (
        (kivi.transform(kivi.KIVIPlan(group=4)), r"kivi takes new tokens one by one \(KIVICache\)"),
        (tova.transform(tova.METHOD.ladder(tova.METHOD.tiny())[0]), "tova takes new tokens one"),
        (even_steps.transform(even_steps.plan()), "even_steps keeps what a call computed"),
    ):
        with pytest.raises(ValueError, match=message):
            begin(transform)


def test_prompts_whose_tokens_are_dropped():
    """Presses of captions: keeping all is dense, dropping half holds less."""
    subject = testing.tiny_nar(num_layers=1, caption_channels=12)
    found, sizes = [], []
    for ratio in (None, 0.0, 0.5):
        pair = subject.forward, subject.params
        if ratio is not None:
            pair = knorm.transform(knorm.METHOD.plan(ratio=ratio))(*pair)
        found.append(sample(subject.sampler, *pair, subject.cond, jax.random.key(0))[1])
        carry = subject.sampler.init(*pair, subject.cond, jax.random.key(0))
        sizes.append(max(leaf.shape[1] for leaf in carry.state.values() if leaf.ndim == 4))
    chex.assert_trees_all_equal(found[1], found[0])
    assert sizes[2] < sizes[1] == sizes[0] == 6 + 15
    assert 0 <= int(found[2].min()) <= int(found[2].max()) < 40


def test_bad_input(subject):
    forward, params, loop = subject.forward, subject.params, subject.sampler

    def refuse(message, loop):
        with pytest.raises(ValueError, match=message):
            loop.init(forward, params, subject.cond, jax.random.key(0))

    refuse("predicts several tokens in a call", NextToken(loop.vae, (4, 4)))
    refuse("give groups=forward.config.groups", dataclasses.replace(loop, groups=diagonals(4, 5)))
    refuse(r"has 4 rows and 4 columns of tokens", dataclasses.replace(loop, grid=(4, 5)))
    refuse("takes no ids", dataclasses.replace(loop, ids=jnp.arange(40)))
    plain = testing.tiny_llamagen(num_layers=1)
    with pytest.raises(ValueError, match="a NextDiagonal samples models with NARConfig"):
        loop.init(plain.forward, plain.params, plain.cond, jax.random.key(0))
    with pytest.raises(ValueError, match="whole images of 16 tokens, got 5"):
        teacher_forced(forward, params, jnp.zeros((2, 5), jnp.int32), subject.cond)
    with pytest.raises(ValueError, match="logits of those of two others"):
        forward(params, {}, None, None, None, jnp.zeros((2, 1), jnp.int32), None, subject.cond)
