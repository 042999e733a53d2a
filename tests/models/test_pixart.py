"""PixArt and its text encoder: parity with stored outputs, structure, sizes, errors."""

import dataclasses
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import pixart, t5
from effjax import testing
from effjax.cost import weight_bytes
from effjax.forward import abstract, flatten_params, nest_params, parameter_count
from effjax.methods import dit_fast_attn
from effjax.models.pixart import PixArt, PixArtBlock, PixArtConfig, PromptEmbeddings
from effjax.models.t5 import T5Config, T5Encoder, relative_buckets

GOLDEN = Path(__file__).parent.parent / "golden" / "pixart.npz"  # made by make_pixart.py beside it
PIXART = PixArtConfig(
    sample_size=8, num_layers=2, num_heads=2, head_dim=8, caption_channels=12, interpolation=2.0
)
T5 = T5Config(
    vocab_size=50, hidden_size=12, intermediate_size=24, num_layers=2, num_heads=3, head_dim=4
)


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def load(golden, model, config, table, prefix):
    forward, shapes = abstract(model, config)
    binding = table.bind(flatten_params(shapes))
    params = {
        path: jnp.asarray(pieces[0].read(golden[f"{prefix}.{pieces[0].source}"]))
        for path, pieces in binding.targets.items()
    }
    return forward, nest_params(params)


def caption(golden):
    return PromptEmbeddings(jnp.asarray(golden["states"]), jnp.asarray(golden["in.mask"]))


def test_the_encoder_equals_that_of_transformers(golden):
    forward, params = load(golden, T5Encoder, T5, t5.TRANSFORMERS, "t5")
    ids, mask = jnp.asarray(golden["in.ids"]), jnp.asarray(golden["in.mask"])
    states, _ = jax.jit(forward)(params, {}, ids, mask)
    chex.assert_trees_all_close(states, golden["states"], atol=2e-5)
    # What stands in the padding does not matter to the rest.
    other, _ = jax.jit(forward)(params, {}, jnp.where(mask, ids, 1), mask)
    chex.assert_trees_all_close(other[1, :7], states[1, :7], atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "near"), [("float32", 2e-5), ("bfloat16", 0.04), ("float16", 0.005)]
)
def test_outputs_equal_those_of_diffusers(golden, dtype, near):
    """Of images that are not square and texts with padding; 16 bits within a few per cent."""
    config = dataclasses.replace(PIXART, dtype=dtype)
    forward, params = load(golden, PixArt, config, pixart.DIFFUSERS, "pixart")
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    x, t = jnp.asarray(golden["in.x"]), jnp.asarray(golden["in.t"])
    out, state = jax.jit(forward)(params, {}, x, t, caption(golden))
    assert state == {}
    assert out.dtype == jnp.dtype(dtype)
    near *= 1 if dtype == "float32" else np.abs(golden["out"]).max()
    chex.assert_trees_all_close(np.asarray(out, np.float32), golden["out"], atol=near)


def test_zero_gates_leave_only_the_text():
    subject = testing.tiny_pixart()
    (target, _) = subject.forward.target_modules(subject.params, PixArtBlock)
    block = target.module
    block.scale_shift_table.set_value(jnp.zeros((6, 16)))
    x = jax.random.normal(jax.random.key(0), (2, 64, 16))
    text = PromptEmbeddings(jnp.ones((2, 3, 16)), jnp.ones((2, 3), bool))
    out = block(x, jnp.zeros((2, 6, 16)), text)
    chex.assert_trees_all_equal(out, x + block.cross(x, *text))
    for leaf in (block.cross.to_out.kernel, block.cross.to_out.bias):
        leaf.set_value(jnp.zeros_like(leaf.get_value()))
    chex.assert_trees_all_equal(block(x, jnp.zeros((2, 6, 16)), text), x)


def test_sizes_are_those_of_the_released_checkpoints():
    """Also of T5-XXL, whose 19 GB are never allocated."""
    _, shapes = abstract(PixArt, PixArtConfig())
    assert parameter_count(shapes) == 610_856_096
    _, shapes = abstract(T5Encoder, T5Config(param_dtype="bfloat16"))
    d, inner, hidden = 4096, 4096, 10240
    by_hand = 32128 * d + 32 * 64 + 24 * (4 * d * inner + 3 * d * hidden + 2 * d) + d
    assert parameter_count(shapes) == by_hand == 4_762_310_656
    names = t5.TRANSFORMERS.bind(flatten_params(shapes)).sources
    assert len(names) == 24 * 9 + 3
    assert "encoder.block.23.layer.1.DenseReluDense.wi_1.weight" in names
    assert weight_bytes(shapes) == 2 * by_hand


def test_buckets_are_exact_near_and_logarithmic_far():
    buckets = relative_buckets(200, buckets=32, max_distance=128)
    assert buckets[0, :9].tolist() == [0, 17, 18, 19, 20, 21, 22, 23, 24]
    assert buckets[199, 0] == 15
    assert buckets[0, 199] == 31
    assert buckets[0, 16] == 16 + 8 + 2  # log(16 / 8) / log(128 / 8) * 8 = 2


def test_dit_fast_attn_leaves_the_cross_attention_alone():
    subject = testing.tiny_pixart()
    plan = dit_fast_attn.search(
        subject.forward,
        subject.params,
        subject.sampler,
        subject.cond,
        uncond=subject.uncond,
        key=jax.random.key(0),
        threshold=0.2,
        progress=False,
    )
    assert any(value for row in plan.strategies for value in row)
    forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
    run = jax.jit(subject.sampler)
    dense = run(subject.forward, params, subject.cond, jax.random.key(1), uncond=subject.uncond)
    fast = run(forward, params, subject.cond, jax.random.key(1), uncond=subject.uncond)
    assert 0 < float(jnp.abs(fast - dense).mean()) < 0.2 * float(jnp.abs(dense).mean())
    # The text still steers what is generated.
    other = run(forward, params, subject.uncond, jax.random.key(1), uncond=subject.uncond)
    assert float(jnp.abs(fast - other).max()) > 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1"),
        ({"sample_size": 9}, "multiple of patch_size"),
        ({"out_channels": 5}, r"in_channels \(4\) or twice"),
        ({"num_heads": 1, "head_dim": 6}, "multiple of 4"),
        ({"interpolation": 0.0}, "interpolation must be a finite number above 0"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        PixArtConfig(**change)
    with pytest.raises(ValueError, match="intermediate_size must be a whole number of at least 1"):
        T5Config(intermediate_size=0)
    with pytest.raises(ValueError, match="buckets must be a multiple of 4"):
        T5Config(max_distance=8)


def test_bad_inputs():
    subject = testing.tiny_pixart()
    t = jnp.ones(2)
    with pytest.raises(ValueError, match="images of 4 channels"):
        subject.forward(subject.params, {}, jnp.ones((2, 16, 16, 3)), t, subject.cond)
    with pytest.raises(ValueError, match="multiples of the patch size"):
        subject.forward(subject.params, {}, jnp.ones((2, 15, 16, 4)), t, subject.cond)
    wide = subject.cond._replace(embeds=jnp.ones((2, 5, 9)))
    with pytest.raises(ValueError, match="captions of 12 channels"):
        subject.forward(subject.params, {}, jnp.ones((2, 16, 16, 4)), t, wide)
    with pytest.raises(ValueError, match="PixArtConfig has no null condition: pass uncond="):
        subject.sampler(subject.forward, subject.params, subject.cond, jax.random.key(0))
