"""Caches: where tokens go, what queries see, what is refused, what it weighs."""

import itertools
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax import testing
from effjax.caches import Caches, DenseCache, RingCache, as_it_is, budgets
from effjax.caches.slots import ring_positions, ring_slot
from effjax.context import CacheLength, states
from effjax.layers.attention import CausalCore
from effjax.layers.rotary import Rotary

TEXT = 23  # tokens of the texts below


def heads(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


def texts(rows=2, tokens=TEXT):
    """Queries, keys, values and tokens of two texts."""
    q = heads(0, rows, tokens, 4, 8)
    return q, heads(1, rows, tokens, 2, 8), heads(2, rows, tokens, 2, 8), heads(3, rows, tokens, 16)


def run(kind, calls, *, core_window=None, new=16, **options):
    """Outputs of a cache for calls (columns, positions) on `texts`; states are carried along."""

    @partial(jax.jit, static_argnums=0)
    def call(first, parts, positions, values):
        core = CausalCore(Rotary(8, theta=100.0), window=core_window)
        cache = kind(core, first=first, cache_length=CacheLength(16, new), **options)
        held = states(cache)
        for path, state in held.items():
            state.set_metadata(path=str(path), creating=first)
            if not first:
                state.set_value(values[path])
        out = cache(*parts, positions)
        return out, {path: state.get_value() for path, state in held.items()}

    outputs, values = [], {}
    for number, (columns, positions) in enumerate(calls):
        parts = [x[:, columns] for x in texts()]
        positions = None if positions is None else jnp.asarray(positions)
        out, values = call(number == 0, parts, positions, values)
        outputs.append(out)
    return outputs, values


def expected(seen):
    """Attention of all tokens by a mask [S, T] of what they see, in numpy."""
    q, k, v, _ = (np.asarray(x) for x in texts())
    rotary = Rotary(8, theta=100.0)
    turns = jnp.arange(TEXT)[None]
    q, k = np.asarray(rotary(jnp.asarray(q), turns)), np.asarray(rotary(jnp.asarray(k), turns))
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    logits = np.einsum("bshd,bthd->bhst", q, k) / np.sqrt(8)
    logits = np.where(seen, logits, -np.inf)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bhst,bthd->bshd", weights, v)


def causal(*, sinks=0, local=TEXT):
    i, j = np.arange(TEXT)[:, None], np.arange(TEXT)[None]
    return (j <= i) & ((j < sinks) | (j > i - local))


def pieces(*sizes):
    """Calls over consecutive columns."""
    edges = np.cumsum([0, *sizes])
    return [
        (slice(a, b), np.broadcast_to(np.arange(a, b), (2, b - a)))
        for a, b in itertools.pairwise(edges)
    ]


@pytest.mark.parametrize(
    "sizes", [(10,) + (1,) * 13, (3, 12, 8), (16, 2, 5), (1, 22)], ids=lambda sizes: str(sizes)
)
def test_a_dense_cache_is_causal_attention(sizes):
    outputs, _ = run(DenseCache, pieces(*sizes))
    chex.assert_trees_all_close(jnp.concatenate(outputs, 1), expected(causal()), atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(10,) + (1,) * 13, (3, 12, 8), (16, 2, 5)], ids=lambda sizes: str(sizes)
)
@pytest.mark.parametrize(("sinks", "ring"), [(0, 6), (2, 5), (4, 1)])
def test_a_ring_shows_the_sinks_and_the_last_tokens(sizes, sinks, ring):
    outputs, _ = run(RingCache, pieces(*sizes), sinks=sinks, ring=ring)
    later = expected(causal(sinks=sinks, local=ring))[:, sizes[0] :]
    chex.assert_trees_all_close(jnp.concatenate(outputs[1:], 1), later, atol=1e-5)
    first = expected(causal())[:, : sizes[0]]  # the prefill is the core's own
    chex.assert_trees_all_close(outputs[0], first, atol=1e-5)


def test_rows_of_a_ring_use_what_their_own_length_allows():
    """7 tokens are to become 23 and 16 become 32: rings of half of these, beside the sinks."""
    p = np.arange(TEXT)
    left = np.stack([p[:16], np.where(p[:16] < 9, -1, p[:16] - 9)])
    calls = [(slice(0, 16), left)]
    calls += [(slice(16, 19), np.stack([p[16:19], p[7:10]]))]  # one at a time is another path
    calls += [(slice(i, i + 1), np.array([[i], [i - 9]])) for i in range(19, TEXT)]
    kept, own = budgets(None, 0.5, 32, always=2)
    assert kept == 16
    options = {"sinks": 2, "ring": kept - 2, "own": own}
    outputs, values = run(RingCache, calls, **options)
    want = expected(causal(sinks=2, local=14))[:, 16:]
    chex.assert_trees_all_close(np.concatenate(outputs[1:], 1)[0], want[0], atol=1e-5)
    alone = [(columns, np.stack([positions[1]] * 2)) for columns, positions in calls]
    single, held = run(RingCache, alone, sinks=2, ring=int(23 * 0.5) - 2)
    for got, want in zip(outputs[1:], single[1:], strict=True):
        chex.assert_trees_all_close(got[1], want[1], atol=1e-5)
    for name in ("k", "v"):
        (whole,), (short,) = (
            [v for path, v in x.items() if path[-1] == name] for x in (values, held)
        )
        chex.assert_trees_all_close(whole[1, :11], short[1], atol=1e-6)


def test_a_window_needs_no_more_than_a_ring():
    outputs, values = run(RingCache, pieces(10, 6, 1, 1, 5), core_window=6, sinks=0, ring=6)
    want = expected(causal(local=6))
    chex.assert_trees_all_close(jnp.concatenate(outputs, 1), want, atol=1e-5)
    assert all(value.shape == (2, 6, 2, 8) for value in values.values())


def test_ring_positions_by_counting():
    for sinks, ring in ((0, 4), (2, 3), (3, 1), (5, 7)):
        slots = np.full(sinks + ring, -1)
        for length in range(20):
            got = ring_positions(jnp.array([length]), sinks, ring, slots=sinks + ring)
            chex.assert_trees_all_equal(np.asarray(got[0]), slots)
            mixed = ring_positions(
                jnp.array([3, length]), sinks, jnp.array([ring + 4, ring]), slots=sinks + ring + 4
            )
            assert mixed[1].tolist() == [*slots, -1, -1, -1, -1]
            slots[int(ring_slot(jnp.array([[length]]), sinks, ring)[0, 0])] = length


@pytest.mark.parametrize(
    ("kind", "options"), [(DenseCache, {}), (RingCache, {"sinks": 2, "ring": 5})]
)
def test_padding_leaves_no_trace(kind, options):
    """A row padded at either side, in the prefill and later, is what it is alone."""
    whole, values = run(kind, pieces(10, 4, 1), **options)
    p = np.arange(TEXT)
    left = np.stack([p[:10], np.where(p[:10] < 3, -1, p[:10] - 3)])  # row 1: 7 tokens
    right = np.stack([p[10:14], [7, 8, -1, -1]])
    none = np.array([[14], [-1]])
    calls = [(slice(0, 10), left), (slice(10, 14), right), (slice(14, 15), none)]
    padded, held = run(kind, calls, **options)
    for got, want in zip(padded, whole, strict=True):
        chex.assert_trees_all_close(got[0], want[0], atol=1e-5)
        chex.assert_tree_all_finite(got)
    for path, value in held.items():
        chex.assert_trees_all_close(value[0], values[path][0], atol=1e-6)
    # Row 1 holds nine tokens: those of columns 3 ... 11.
    core = CausalCore(Rotary(8, theta=100.0))
    cache = kind(core, first=False, cache_length=CacheLength(16, 16), **options)
    slots = np.asarray(cache.positions(jnp.array([15, 9]))[1, 0])
    (v,) = (value for path, value in held.items() if path[-1] == "v")
    for slot in np.flatnonzero(slots >= 0):
        chex.assert_trees_all_close(v[1, slot], texts()[2][1, slots[slot] + 3], atol=1e-6)


def test_rolling_back_is_appending_earlier():
    """What was appended and rejected has no influence on what comes later."""
    straight, _ = run(DenseCache, pieces(10, 1, 1))
    calls = pieces(10)
    rejected = (slice(15, 19), np.broadcast_to(np.arange(10, 14), (2, 4)))
    outputs, _ = run(DenseCache, [*calls, rejected, *pieces(10, 1, 1)[1:]])
    chex.assert_trees_all_close(outputs[-1], straight[-1], atol=1e-6)


@pytest.mark.parametrize("bits", [16, 8])
def test_padding_may_reach_beyond_the_last_slot(bits):
    """Of 23 slots the last two are filled by a call of six columns."""
    options = {"bits": bits, "new": 7}
    straight, _ = run(DenseCache, pieces(16, 5, 2), **options)
    columns = np.array([21, 22, 0, 1, 2, 3])
    positions = np.broadcast_to([21, 22, -1, -1, -1, -1], (2, 6))
    padded, _ = run(DenseCache, [*pieces(16, 5), (columns, positions)], **options)
    chex.assert_trees_all_close(padded[-1][:, :2], straight[-1], atol=1e-5)


def test_what_kinds_declare():
    core, cache_length = CausalCore(Rotary(8, theta=100.0)), CacheLength(16, 16)
    dense = DenseCache(core, first=True, cache_length=cache_length)
    assert dense.rollback
    assert dense.multi_token_append
    assert dense.exact_chunked_prefill
    ring = RingCache(core, sinks=2, ring=5, first=True, cache_length=cache_length)
    assert ring.multi_token_append
    assert not ring.rollback
    assert not ring.exact_chunked_prefill
    whole = RingCache(core, sinks=2, ring=30, first=True, cache_length=cache_length)
    assert whole.rollback
    assert whole.exact_chunked_prefill
    window = CausalCore(Rotary(8, theta=100.0), window=5)
    assert RingCache(
        window, sinks=0, ring=5, first=True, cache_length=cache_length
    ).exact_chunked_prefill
    with pytest.raises(ValueError, match="appends one token in a call, not several"):
        run(_Single, pieces(4, 3))


class _Single(DenseCache):
    @property
    def multi_token_append(self):
        return False


def test_too_long_prompts_are_refused():
    with pytest.raises(ValueError, match="a prompt of 17 tokens does not fit"):
        run(DenseCache, [(slice(0, 17), None)])


def test_a_model_without_causal_attention_has_no_cache():
    subject = testing.tiny_dit()
    forward = subject.forward.patch(Caches(as_it_is)).with_cache_length(4, 4)
    with pytest.raises(ValueError, match="DiT has no causal attention"):
        forward.init(subject.params, jnp.zeros((2, 16, 16, 4)), jnp.zeros(2), jnp.zeros(2, int))


def test_caches_are_cut_by_heads_on_devices():
    """Four devices, each with its own key head: the same logits."""
    subject = testing.tiny_llama(num_heads=8, num_kv_heads=4, head_dim=4)
    forward = subject.forward.patch(Caches(as_it_is)).with_cache_length(8, 4)
    tokens = jnp.asarray(subject.cond)
    mesh = jax.make_mesh((4,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    cut = NamedSharding(mesh, PartitionSpec(None, None, "heads"))

    @jax.jit
    def decode(params, state):
        _, state = forward(params, state, tokens[:, :8])
        return forward(params, state, tokens[:, 8:9], jnp.full((2, 1), 8), step=1)

    state = forward.init(subject.params, tokens[:, :1])
    alone, _ = decode(subject.params, state)
    spread = jax.tree.map(lambda leaf: jax.device_put(leaf, cut), state)
    whole = jax.device_put(subject.params, NamedSharding(mesh, PartitionSpec()))
    out, after = decode(whole, spread)
    chex.assert_trees_all_close(np.asarray(out), np.asarray(alone), atol=1e-5)
    assert all(len(leaf.sharding.device_set) == 4 for leaf in after.values())
