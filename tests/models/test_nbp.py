"""NBP: masks and steps by definition, LlamaGen as blocks of one token, plain torch, errors."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import from_pretrained, nbp, save_pretrained
from effjax import testing
from effjax.autoregression import NextBlock, Started, group_loss, logits_of
from effjax.cost import sampler_cost
from effjax.layers.groups import GroupCore, blocks
from effjax.layers.rotary import RasterRotary
from effjax.methods import kivi, streaming_llm
from effjax.models.nbp import NBPConfig
from pallas_kernels import use_implementation


@pytest.fixture(autouse=True)
def _what_runs_here():
    """The programs of this machine: tracing the kernels of others beside them takes long."""
    with use_implementation("xla"):
        yield


@jax.jit
def sample(loop, forward, params, cond, key):
    return loop.sample(forward, params, cond, key)[1]


@pytest.fixture(scope="module")
def subject():
    return testing.tiny_nbp(num_layers=1)


@pytest.mark.parametrize(
    ("grid", "block"),
    [
        ((1, 3, 4), (1, 1, 4)),
        ((2, 4, 4), (1, 2, 2)),
        ((2, 2, 3), (1, 2, 3)),
        ((1, 2, 2), (1, 1, 1)),
    ],
)
def test_masks_and_steps(grid, block):
    """mask(q, k) = block(q) >= block(k), T H W / b steps, tokens in raster order inside and out."""
    groups = blocks(grid, block)
    size, count = np.prod(block), np.prod(grid)
    place = np.stack(np.unravel_index(np.asarray(groups.order), grid), axis=1)
    cell = place // np.asarray(block)
    number = np.ravel_multi_index(tuple(cell.T), tuple(np.asarray(grid) // block))
    assert number.tolist() == np.repeat(np.arange(count // size), size).tolist()
    for each in range(count // size):
        assert (np.diff(np.asarray(groups.order)[number == each]) > 0).all()
    assert groups.sizes == (size,) * (count // size)
    row = np.arange(1 + count)
    rotary = RasterRotary(8, theta=10.0, condition=1, columns=grid[2])
    rule = GroupCore(rotary, condition=1, sizes=groups.sizes).rule
    seen = rule.visible(row[:, None], row[None], len(row))
    assert (seen[1:, 1:] == (number[:, None] >= number[None])).all()
    assert seen[:, 0].all()
    assert not seen[0, 1:].any()
    for given in range(count // size):
        loop = NextBlock(None, (grid[0] * grid[1], grid[2]), groups=groups, given=given)
        assert loop.calls == (count // size - given if given else count // size + size - 1)
        drawn = loop.table.draws[loop.table.draws >= 0]
        assert sorted(drawn) == sorted(groups.order[given * size :])


def test_blocks_of_one_token_are_llamagen():
    """Mask, logits, loss and samples, to the bit; and a cache that takes tokens one by one."""
    plain, single = (
        testing.tiny_llamagen(num_layers=1),
        testing.tiny_nbp(num_layers=1, block=(1, 1, 1)),
    )
    chex.assert_trees_all_equal(single.params, plain.params)
    row = np.arange(17)
    rotary = RasterRotary(8, theta=10.0, condition=1, columns=4)
    core = GroupCore(rotary, condition=1, sizes=single.forward.config.groups.sizes)
    assert (core.rule.visible(row[:, None], row[None], 17) == np.tri(17, dtype=bool)).all()
    assert single.sampler.calls == plain.sampler.calls == 16
    for transform in (lambda *pair: pair, kivi.transform(kivi.KIVIPlan(group=4))):
        drawn = [
            sample(
                each.sampler, *transform(each.forward, each.params), each.cond, jax.random.key(3)
            )
            for each in (plain, single)
        ]
        chex.assert_trees_all_equal(*drawn)
    logits = [
        jax.jit(read)(each.forward, each.params, drawn[0], each.cond)
        for each, read in ((plain, logits_of), (single, NextBlock.logits))
    ]
    chex.assert_trees_all_close(*logits, atol=1e-5)
    chex.assert_trees_all_close(*(group_loss(each, drawn[0]) for each in logits), atol=1e-5)


def test_logits_equal_plain_torch(tmp_path):
    """Token j of a block predicts token j of the next one; the first block is causal."""
    torch = pytest.importorskip("torch")
    from tests.models import llamagen_reference as reference

    sd = reference.random_model(depth=1)
    torch.save({"model": sd}, tmp_path / "model.pt")
    config = NBPConfig(
        grid=4,
        num_layers=1,
        num_heads=2,
        head_dim=16,
        intermediate_size=24,
        vocab_size=40,
        num_classes=5,
        block=(1, 2, 2),
    )
    said = {"_class_name": "NBP", **nbp.write_config(config)}
    (tmp_path / "config.json").write_text(json.dumps(said))
    forward, params = from_pretrained(tmp_path / "model.pt", progress=False)
    assert forward.config == config
    save_pretrained(forward, params, tmp_path / "again")
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)

    tokens = torch.randint(40, (2, 16), generator=torch.Generator().manual_seed(0))
    labels, options = torch.tensor([3, 0]), {"heads": 2, "grid": 4}
    own = np.array([(row // 2) * 2 + column // 2 for row in range(4) for column in range(4)])
    seen = torch.ones(17, 17, dtype=torch.bool)
    seen[0, 1:] = False
    seen[1:, 1:] = torch.tensor(own[:, None] >= own[None])
    whole = reference.logits_of(sd, labels, tokens, seen=seen, **options)
    wanted = torch.zeros(2, 16, 40)
    for block in range(1, 4):
        before, mine = (1 + np.flatnonzero(own == each) for each in (block - 1, block))
        wanted[:, mine - 1] = whole[:, before]
    # The first block (places 0, 1, 4, 5) token by token: what is before a token, and the label.
    for number, place in enumerate([0, 1, 4, 5]):
        seen = torch.eye(17, dtype=torch.bool)
        for late, query in enumerate([0, 1, 4, 5][:number]):
            seen[1 + query, [0, *(1 + key for key in [0, 1, 4, 5][: late + 1])]] = True
        column = 0 if number == 0 else 1 + [0, 1, 4, 5][number - 1]
        read = reference.logits_of(sd, labels, tokens, seen=seen, **options)
        wanted[:, place] = read[:, column]
    given = jnp.asarray(tokens.numpy(), jnp.int32)
    got = jax.jit(NextBlock.logits)(forward, params, given, jnp.array([3, 0]))
    chex.assert_trees_all_close(got, wanted.numpy(), atol=1e-4)
    loss = torch.nn.functional.cross_entropy(wanted.flatten(0, 1), tokens.flatten())
    np.testing.assert_allclose(group_loss(got, given), loss.item(), rtol=1e-5)


@pytest.mark.parametrize("given", [0, 2])
def test_cached_calls_give_what_one_call_gives(given):
    """At every token of a video in blocks that are no runs of its raster; given blocks stay."""
    subject = testing.tiny_nbp(num_layers=1, frames=2, block=(1, 2, 4))
    forward, params, cond = subject.forward, subject.params, subject.cond
    loop = dataclasses.replace(subject.sampler, guidance=None, given=given)
    tokens = jnp.arange(2 * 16).reshape(2, 16) % 40
    begun = Started(cond, tokens) if given else cond

    @jax.jit
    def both(params):
        carry = loop.init(forward, params, begun, jax.random.key(1))
        out, _, state = loop.network(forward, params, carry.state, carry.x, begun, None, 0)
        carry = loop.update(carry._replace(state=state), out, 0)

        def body(carry, step):
            out, _, state = loop.network(forward, params, carry.state, carry.x, begun, None, step)
            return loop.update(carry._replace(state=state), out, step), out

        last, later = jax.lax.scan(body, carry, jnp.arange(1, loop.calls))
        return out, later, last.x, NextBlock.logits(forward, params, last.x, cond)

    first, later, made, whole = both(params)
    assert loop.calls == (2 if given else 4 + 7)
    for out, places in zip([first, *later], loop.table.draws, strict=True):
        own = places[places >= 0]
        chex.assert_trees_all_close(out[:, : len(own)], whole[:, own], atol=1e-4)
    if given:
        chex.assert_trees_all_equal(made[:, :16], tokens)


def test_guidance_rows_methods_and_cost(subject):
    """Given blocks stay under guidance; rows by themselves; a window; FLOPs in closed form."""
    forward, params, loop = subject.forward, subject.params, subject.sampler
    keys, tokens = jax.random.split(jax.random.key(0)), jnp.arange(8).reshape(2, 4)
    begun, given = Started(subject.cond, tokens), dataclasses.replace(loop, given=1)
    assert given.calls == 3
    drawn = sample(given, forward, params, begun, keys)
    chex.assert_trees_all_equal(drawn[:, :4], tokens)
    turned = jax.tree.map(lambda x: x[::-1], begun)
    chex.assert_trees_all_equal(sample(given, forward, params, turned, keys[::-1])[::-1], drawn)
    window = streaming_llm.transform(streaming_llm.StreamingLLMPlan(capacity=9, sinks=1))
    pair = window(forward, params)
    drawn = sample(given, *pair, begun, keys)
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < 40
    with pytest.raises(ValueError, match="RingCache of streaming_llm cannot go back"):
        loop.init(*pair, subject.cond, keys)
    with pytest.raises(ValueError, match=r"kivi takes new tokens one by one"):
        loop.init(*kivi.transform(kivi.KIVIPlan(group=4))(forward, params), subject.cond, keys)

    config, rows = forward.config, 2 * 2
    cost = sampler_cost(loop, forward, params, subject.cond)
    width, inner = config.hidden_size, config.intermediate_size
    columns, slots = 4 * (loop.calls - 1), 1 + 16 - 4
    linear = 2 * (1 + columns) * (4 * width**2 + 3 * width * inner)
    head, attention = 2 * (1 + columns) * width * 40, 4 * width * (1 + columns * slots)
    assert cost.scope("attention").flops == rows * attention
    assert cost.flops == rows * (linear + head + attention)


def test_bad_input(subject):
    forward, params, loop = subject.forward, subject.params, subject.sampler

    def refuse(message, cond=subject.cond, **changes):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(loop, **changes).init(forward, params, cond, jax.random.key(0))

    refuse(r"given must be 0 \.\.\. 3 of the 4 blocks, got 4", given=4)
    refuse(r"takes Started\(condition, tokens \[B, 4\]\), got a condition alone", given=1)
    begun = Started(subject.cond, jnp.zeros((2, 3), jnp.int32))
    refuse(r"takes Started\(condition, tokens \[B, 4\]\), got 3 tokens", begun, given=1)
    refuse("takes labels or captions, got 3 tokens", begun)
    refuse("give groups=forward.config.groups", groups=blocks((1, 4, 4), (1, 2, 2)))
    with pytest.raises(ValueError, match=r"not made of equal blocks of \(1, 1, 3\)"):
        NBPConfig(grid=4, block=(1, 1, 3))
    nar = testing.tiny_nar(num_layers=1)
    with pytest.raises(ValueError, match="a NextBlock samples models with NBPConfig"):
        loop.init(nar.forward, nar.params, nar.cond, jax.random.key(0))
