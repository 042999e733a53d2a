"""DiT: parity with stored outputs of diffusers, structure, sizes, errors."""

from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.dit import DIFFUSERS
from effjax import testing
from effjax.forward import abstract, flatten_params, nest_params, parameter_count
from effjax.layers.embeddings import PatchEmbed, sincos_2d, sinusoidal, unpatchify
from effjax.models.dit import DiT, DiTBlock, DiTConfig

GOLDEN = Path(__file__).parent.parent / "golden" / "dit.npz"  # made by make_dit.py beside it


@pytest.fixture(scope="module")
def golden():
    return dict(np.load(GOLDEN))


def load(golden, **numerics):
    config = DiTConfig(
        sample_size=8,
        out_channels=4,
        num_layers=2,
        num_heads=2,
        head_dim=8,
        num_classes=5,
        **numerics,
    )
    forward, shapes = abstract(DiT, config)
    binding = DIFFUSERS.bind(flatten_params(shapes))
    params = {
        path: jnp.asarray(pieces[0].read(golden[pieces[0].source]))
        for path, pieces in binding.targets.items()
    }
    return forward, nest_params(params)


def inputs(golden):
    return tuple(jnp.asarray(golden[f"in.{name}"]) for name in ("x", "t", "labels"))


def test_outputs_equal_those_of_diffusers(golden):
    forward, params = load(golden)
    out, state = jax.jit(forward)(params, {}, *inputs(golden))
    assert state == {}
    chex.assert_trees_all_close(out, golden["out"], atol=2e-4)


def test_bfloat16_stays_near(golden):
    """Parameters and computation in 8-bit mantissas: a few per cent of the output's range."""
    forward, params = load(golden, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    out, _ = jax.jit(forward)(params, {}, *inputs(golden))
    assert out.dtype == jnp.bfloat16
    error = np.abs(np.asarray(out, np.float32) - golden["out"]).max()
    assert error < 0.04 * np.abs(golden["out"]).max()


def test_zero_gates_make_blocks_the_identity():
    subject = testing.tiny_dit()
    (target, _) = subject.forward.target_modules(subject.params, DiTBlock)
    block = target.module
    for leaf in (block.modulation.kernel, block.modulation.bias):
        leaf.set_value(jnp.zeros_like(leaf.get_value()))
    x = jax.random.normal(jax.random.key(0), (2, 64, 16))
    chex.assert_trees_all_equal(block(x, jnp.ones((2, 16))), x)


def test_samples_of_a_batch_are_independent(golden):
    forward, params = load(golden)
    x, t, labels = inputs(golden)
    all_, _ = forward(params, {}, x, t, labels)
    one, _ = forward(params, {}, x[1:2], t[1:2], labels[1:2])
    chex.assert_trees_all_close(all_[1:2], one, atol=1e-5)


@pytest.mark.parametrize("name", ["DiT-S/2", "DiT-B/4", "DiT-L/8", "DiT-XL/2"])
def test_presets_have_the_sizes_of_the_paper(name):
    config = DiTConfig.preset(name)
    _, shapes = abstract(DiT, config)
    assert config.tokens == (32 // config.patch_size) ** 2
    assert parameter_count(shapes) == closed_form(config)
    # Table 1 and the released checkpoints, millions
    millions = {"DiT-S/2": 33, "DiT-B/4": 131, "DiT-L/8": 459, "DiT-XL/2": 675}[name]
    assert parameter_count(shapes) / 1e6 == pytest.approx(millions, abs=0.6)


def closed_form(config):
    """Parameters by hand: embedders, blocks, final layer."""
    d, p = config.hidden_size, config.patch_size
    embed = p * p * config.in_channels * d + d
    time = 256 * d + d + d * d + d
    label = (config.num_classes + 1) * d
    block = (6 * d * d + 6 * d) + 4 * (d * d + d) + (4 * d * d + 4 * d) + (4 * d * d + d)
    out = p * p * config.out_channels
    final = 2 * d * d + 2 * d + d * out + out
    return embed + time + label + config.num_layers * block + final


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers must be a whole number of at least 1"),
        ({"sample_size": 9}, "multiple of patch_size"),
        ({"out_channels": 5}, r"in_channels \(4\) or twice"),
        ({"num_heads": 1, "head_dim": 6}, "multiple of 4"),
    ],
)
def test_bad_configurations(change, message):
    with pytest.raises(ValueError, match=message):
        DiTConfig(**change)


def test_bad_presets_and_inputs():
    with pytest.raises(ValueError, match="no preset 'DiT-H/2'"):
        DiTConfig.preset("DiT-H/2")
    subject = testing.tiny_dit()
    for shape in ((2, 16, 12, 4), (2, 16, 16, 3)):
        with pytest.raises(ValueError, match=r"takes images \[16, 16, 4\]"):
            subject.forward(subject.params, {}, jnp.ones(shape), jnp.ones(2), subject.cond)


def test_sinusoid_has_cosines_first_and_the_shift():
    t = jnp.array([0.0, 10.0])
    plain, shifted = sinusoidal(t, 8), sinusoidal(t, 8, shift=1.0)
    chex.assert_trees_all_equal(plain[0], jnp.array([1.0] * 4 + [0.0] * 4))
    frequencies = np.exp(-np.log(10_000) * np.arange(4) / 4)
    chex.assert_trees_all_close(plain[1, 4:], np.sin(10 * frequencies), atol=1e-6)
    frequencies = np.exp(-np.log(10_000) * np.arange(4) / 3)
    chex.assert_trees_all_close(shifted[1, :4], np.cos(10 * frequencies), atol=1e-6)


def test_positions_encode_the_column_first():
    table = sincos_2d(8, 2, 3).reshape(2, 3, 8)
    chex.assert_trees_all_equal(table[0, :, :4], table[1, :, :4])
    chex.assert_trees_all_equal(table[:, 0, 4:], table[:, 2, 4:])
    np.testing.assert_allclose(table[1, 2, 0], np.sin(2.0), rtol=1e-6)
    np.testing.assert_allclose(table[1, 2, 4], np.sin(1.0), rtol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        sincos_2d(6, 2, 2)


def test_patches_go_in_and_out_in_raster_order():
    embed = PatchEmbed(1, 4, patch=2, rngs=nnx.Rngs(0))
    embed.kernel.set_value(jnp.eye(4).reshape(2, 2, 1, 4))
    image = jnp.arange(24.0).reshape(1, 4, 6, 1)
    tokens = embed(image)
    assert tokens[0, 1].tolist() == [2.0, 3.0, 8.0, 9.0]
    chex.assert_trees_all_equal(unpatchify(tokens, 2, 3, patch=2), image)
    with pytest.raises(ValueError, match="multiples of the patch size 2"):
        embed(jnp.ones((1, 3, 6, 1)))
