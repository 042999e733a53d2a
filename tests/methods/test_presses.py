"""Methods that choose tokens of a prompt, against the scores and the kept tokens of kvpress.

Definitions differ where the choice does not: tokens that are always kept score infinity here, the
highest score and 1 there; Knorm measures keys before they are turned here and after it there, which
makes them longer by YaRN's factor. StreamingLLM's ratio is of the whole text here, of the prompt
there: they agree where no token may follow.
"""

import json
from pathlib import Path

import chex
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.layers.kv_cache import RingCache, told
from effjax.methods import expected_attention, knorm, snap_kv, streaming_llm
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
    ("method", "kind"),
    [
        (knorm.METHOD, knorm.KnormCache),
        (snap_kv.METHOD, snap_kv.SnapKVCache),
        (expected_attention.METHOD, expected_attention.ExpectedCache),
    ],
    ids=["knorm", "snap_kv", "expected_attention"],
)
def test_every_head_scores_and_keeps_as_a_press(method, kind, model, monkeypatch):
    """Of a prompt that is read without jit, so that scores are seen."""
    forward, params, tokens = transformed(method, model)
    state, found, score = forward.init(params, tokens), [], kind.scores

    def scores(*inputs):
        found.append(score(*inputs))
        return found[-1]

    monkeypatch.setattr(kind, "scores", scores)
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


@pytest.mark.parametrize("model", MODELS)
def test_streaming_llm_keeps_what_a_press_keeps(model):
    forward, params, tokens = transformed(streaming_llm.METHOD, model)
    kept = ARRAYS[f"{model}/streaming_llm/kept"]
    length = jnp.array([tokens.shape[1]])
    state = told(forward.init(params, tokens[:, :1]), length)
    module = forward.loaded(params, state, tokens[:, :1], step=1)
    held = [
        node.positions(length) for _, node in nnx.iter_graph(module) if isinstance(node, RingCache)
    ]
    held = np.sort(np.concatenate(held))
    chex.assert_trees_all_equal(np.broadcast_to(held, kept.shape), kept)
