"""Methods that choose tokens of a prompt, against the scores and the kept tokens of kvpress.

Definitions differ where the choice does not: tokens that are always kept score infinity here, the
highest score and 1 there; Knorm measures keys before they are turned here and after it there, which
makes them longer by YaRN's factor. StreamingLLM's ratio is of the whole text here, of the prompt
there: they agree where no token may follow.
"""

import json
import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax import testing
from effjax.caches import AttentionInputs, KVCache
from effjax.caches.slots import told
from effjax.generate import generate, prefill
from effjax.layers.attention import CausalCore
from effjax.layers.rotary import Rotary
from effjax.methods import (
    ada_kv,
    chunk_kv,
    chunk_press,
    expected_attention,
    knorm,
    pyramid_kv,
    snap_kv,
    streaming_llm,
    tova,
)
from tests.models.test_llama import load

GOLDEN = Path(__file__).parent.parent / "golden" / "presses.npz"  # made by make_presses.py there
ARRAYS = dict(np.load(GOLDEN))
MODELS = [key.removesuffix("/tokens") for key in ARRAYS if key.endswith("/tokens")]
NAMES = {
    "compression_ratio": "ratio",
    "window_size": "window",
    "kernel_size": "kernel",
    "n_future_positions": "future",
    "n_sink": "sinks",
}


def transformed(method, model):
    """A model's forward with a method, its parameters, and a prompt that fills its room."""
    options = json.loads(str(ARRAYS["options"]))[method.name]
    plan = method.plan(**{NAMES[option]: value for option, value in options.items()})
    forward, params = method.transform(plan)(*load(model))
    tokens = jnp.asarray(ARRAYS[f"{model}/tokens"])[None]
    return forward.with_cache_length(tokens.shape[1], 0), params, tokens


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "method",
    [knorm.METHOD, snap_kv.METHOD, expected_attention.METHOD],
    ids=["knorm", "snap_kv", "expected_attention"],
)
def test_every_head_scores_and_keeps_as_a_press(method, model, monkeypatch):
    """Of a prompt that is read without jit, so that scores are seen."""
    forward, params, tokens = transformed(method, model)
    state, found, score = forward.init(params, tokens), [], method.plan.score

    def scores(*inputs):
        found.append(score(*inputs))
        return found[-1]

    monkeypatch.setattr(method.plan, "score", scores)
    _, state = forward(params, state, tokens, step=0)
    held = [value[0] for path, value in state.items() if path.endswith(".held")]
    chex.assert_trees_all_equal(np.stack(held), ARRAYS[f"{model}/{method.name}/kept"])
    got, want = np.concatenate(found), ARRAYS[f"{model}/{method.name}/scores"]
    always = np.isinf(got)
    assert (want[always] > want[~always].max()).all()
    got, want = got[~always], want[~always]
    if method is knorm.METHOD:
        got, want = got / got.min(), want / want.min()
    chex.assert_trees_all_close(got, want, rtol=1e-4)


def masks(forward, params, tokens):
    """Which tokens of a prompt every layer and head holds after it, bool[L, K, S]."""
    length = jnp.array([tokens.shape[1]])

    @jax.jit
    def held(params):
        state = told(forward.init(params, tokens[:, :1]), length)
        _, state = forward(params, state, tokens, step=0)
        module = forward.loaded(params, state, tokens[:, :1], step=1)
        caches = [node for _, node in nnx.iter_graph(module) if isinstance(node, KVCache)]
        return [cache.positions(length)[0] for cache in caches]

    heads = forward.config.num_kv_heads
    found = np.zeros((forward.config.num_layers, heads, tokens.shape[1]), bool)
    for layer, positions in enumerate(held(params)):
        for head, own in enumerate(np.broadcast_to(positions, (heads, positions.shape[1]))):
            assert len(set(own[own >= 0])) == np.count_nonzero(own >= 0)
            found[layer, head, own[own >= 0]] = True
    return found


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", [streaming_llm.METHOD, tova.METHOD], ids=lambda m: m.name)
def test_prompts_that_fill_their_room_keep_what_a_press_keeps(method, model):
    got = masks(*transformed(method, model))
    kept = ARRAYS[f"{model}/{method.name}/kept"]
    chex.assert_trees_all_equal(got.sum(-1), np.full(kept.shape[:2], kept.shape[2]))
    assert np.take_along_axis(got, kept, axis=2).all()


WRAPPERS = {
    pyramid_kv: {"options": (("window", 2),), "beta": 4},
    ada_kv: {"options": (("window", 6),), "floor": 0.2},
    chunk_press: {"press": "knorm", "chunk": 16},
    chunk_kv: {"press": "knorm", "chunk": 6},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", WRAPPERS, ids=lambda method: method.METHOD.name)
def test_budgets_of_layers_heads_and_chunks_are_those_of_presses(method, model):
    plan = method.METHOD.plan(ratio=0.6, **WRAPPERS[method])
    forward, params = method.transform(plan)(*load(model))
    tokens = jnp.asarray(ARRAYS[f"{model}/tokens"])[None]
    got = masks(forward.with_cache_length(tokens.shape[1], 0), params, tokens)
    chex.assert_trees_all_equal(got, ARRAYS[f"{model}/{method.METHOD.name}/mask"])


def test_the_press_of_the_page_runs():
    """docs/kv-cache.md, "How to write a new press": scores by the formula, and generation."""
    page = (Path(__file__).parents[2] / "docs" / "kv-cache.md").read_text()
    section = page[page.index("## How to write a new press") :]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL).group(1)
    names = {"__name__": "effjax.methods.cache.key_diff"}
    exec(code, names)
    subject = testing.tiny_llama(num_layers=1)
    plan = names["METHOD"].plan(ratio=0.5)
    forward, params = names["transform"](plan)(subject.forward, subject.params)
    prompts = [list(range(24)), [9, 9, 7, 1]]
    prefix = prefill(forward, params, prompts, new=3, buckets=None)
    assert [v.shape[1] for path, v in prefix.state.items() if path.endswith(".k")] == [12 + 3]
    assert generate(forward, params, prefix=prefix, max_new_tokens=3).lengths.tolist() == [3, 3]
    rng = np.random.default_rng(0)
    q, k, v, x = (rng.standard_normal((2, 6, *s)).astype(np.float32) for s in SHAPES)
    core = CausalCore(Rotary(8, theta=100.0))
    positions = jnp.asarray([[0, 1, 2, 3, 4, 5], [-1, -1, 0, 1, 2, 3]])
    inputs = AttentionInputs.of(*map(jnp.asarray, (q, k, v, x)), positions, core)
    got = np.asarray(plan.score(inputs))
    keys = np.asarray(inputs.rotated_k)
    keys = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    for row, first in enumerate((0, 2)):
        own = keys[row, first:]
        anchor = own.mean(0)
        cosines = np.einsum("skd,kd->ks", own, anchor / np.linalg.norm(anchor, axis=-1)[:, None])
        chex.assert_trees_all_close(got[row][:, first:], -cosines, atol=1e-5)


SHAPES = (4, 8), (2, 8), (2, 8), (16,)  # of queries, keys, values and tokens
