"""The VQVAE of VAR: parity with plain torch, sizes, the residual sum, resizing, errors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from converters import convert, from_pretrained
from effjax import testing
from effjax.forward import abstract, parameter_count
from effjax.layers.resize import matrix, resize
from effjax.models.vqvae import (
    VQVAE,
    VQVAEConfig,
    decode,
    encode,
    latents_of,
    quantizer_of,
    refinement_of,
    token_starts,
)

SIDES = (1, 2, 3, 4)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_resizing_equals_torch(mode):
    """To the rounding of torch's weights, which are float32."""
    torch = pytest.importorskip("torch")
    options = {} if mode == "area" else {"align_corners": False}
    x = np.random.default_rng(0).standard_normal((2, 13, 9, 3)).astype(np.float32)

    def theirs(height, width):
        nchw = torch.tensor(x).permute(0, 3, 1, 2)
        made = torch.nn.functional.interpolate(nchw, size=(height, width), mode=mode, **options)
        return made.permute(0, 2, 3, 1).numpy()

    for sides in [(1, 1), (6, 10), (13, 4), (16, 32), (5, 9)]:
        rows, columns = (matrix(*each, mode) for each in zip(x.shape[1:3], sides))
        ours = np.einsum("yh,xw,bhwc->byxc", rows, columns, x)
        np.testing.assert_allclose(ours, theirs(*sides), atol=1e-5)
    chex.assert_trees_all_close(resize(jnp.asarray(x), 16, 4, mode), theirs(16, 4), atol=1e-5)


def test_matrices_are_those_of_the_formulas(untyped):
    np.testing.assert_allclose(
        matrix(3, 6, "bicubic")[0], [1.1055, -0.1055, 0], atol=5e-5
    )  # cubic with a = -0.75 at a quarter, with the edge's pixel beyond the edge
    bins = [(0, 2), (1, 3), (2, 4), (3, 5), (4, 7)]
    for row, (start, stop) in enumerate(bins):
        expected = np.zeros(16)
        expected[start:stop] = 1 / (stop - start)
        np.testing.assert_allclose(matrix(16, 13, "area")[row], expected, atol=1e-7)
    for wrong in ((0, 3, "area"), (3, 4, "cubic")):
        with pytest.raises(ValueError, match=r"at least 1|mode must be one of bilinear"):
            matrix(*wrong)


def test_sizes_are_those_of_the_released_model():
    _, shapes = abstract(VQVAE, VQVAEConfig())
    assert parameter_count(shapes) == 108_948_355
    assert [refinement_of(i, 10, 4) for i in range(10)] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    starts = token_starts((1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert starts == (0, 1, 5, 14, 30, 55, 91, 155, 255, 424, 680)


def test_the_released_layout_equals_plain_torch(tmp_path):
    """Encoder, tokens, latents and decoder, from a file alone; and written once more."""
    torch = pytest.importorskip("torch")
    from tests.models import var_reference as reference

    sides = (1, 2)
    sd = reference.random_vae(widths=(32, 32, 64, 32, 32))
    torch.save(sd, tmp_path / "vae.pth")
    forward, params = from_pretrained(tmp_path / "vae.pth", progress=False)
    config = forward.config
    assert config.block_out_channels == (32, 32, 64, 32, 32)
    assert (config.latent_channels, config.vocab_size, config.layers_per_block) == (6, 40, 1)
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    given = jnp.asarray(images.permute(0, 2, 3, 1).numpy())
    latents = reference.encoded(sd, images)
    tokens, total = reference.tokens_of(sd, latents, sides)
    own = jax.jit(encode, static_argnums=3)(forward, params, given, sides)
    np.testing.assert_array_equal(own, tokens.numpy())
    own = jax.jit(latents_of, static_argnums=3)(forward, params, own, sides)
    chex.assert_trees_all_close(own, total.permute(0, 2, 3, 1).numpy(), atol=2e-4)
    made = reference.decoded(sd, total).permute(0, 2, 3, 1).numpy()
    chex.assert_trees_all_close(jax.jit(decode)(forward, params, own), made, atol=2e-4)

    convert(tmp_path / "vae.pth", tmp_path / "again", progress=False)
    again = from_pretrained(tmp_path / "again", progress=False)
    assert again[0] == forward
    chex.assert_trees_all_equal(again[1], params)

    sd["decoder.extra.weight"] = torch.zeros(2)
    torch.save(sd, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"decoder\.extra\.weight: unexpected"):
        from_pretrained(tmp_path / "other.pth", progress=False)


def test_tokens_are_the_residual_sum():
    forward, params = testing.tiny_vqvae()
    latents = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))

    @jax.jit
    def run(params, latents):
        quantizer = quantizer_of(forward, params)
        tokens = quantizer.encode(latents, SIDES)
        sums = quantizer.partial_sums(tokens, SIDES)
        h = quantizer.vectors(tokens[:, 14:]).reshape(2, 4, 4, 4)
        nearest = quantizer.nearest((latents - sums[2]).reshape(2, 16, 4))
        coarse = quantizer.partial_sums(tokens[:, :5], SIDES)
        return tokens, sums, 0.5 * h + 0.5 * quantizer.phi[3](h), nearest, coarse

    tokens, sums, last, nearest, coarse = run(params, latents)
    assert tokens.shape == (2, 30)
    chex.assert_trees_all_close(sums[3] - sums[2], last, atol=1e-5)
    chex.assert_trees_all_equal(tokens[:, 14:], nearest)  # of what the other scales left
    chex.assert_trees_all_equal(coarse, sums[:2])


def test_bad_input():
    forward, params = testing.tiny_vqvae()
    images = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match=r"that do not fall; got \(1, 3, 2\)"):
        token_starts((1, 3, 2))
    with pytest.raises(ValueError, match="last of patch_nums"):
        encode(forward, params, images, (1, 2))
    with pytest.raises(ValueError, match="whole scales are 1, 5, 14, 30; got 7"):
        latents_of(forward, params, jnp.zeros((1, 7), jnp.int32), SIDES)
    with pytest.raises(ValueError, match="latents of 4 channels"):
        decode(forward, params, jnp.zeros((1, 4, 4, 3)))
    with pytest.raises(ValueError, match="multiples of 2, got 7 x 8"):
        encode(forward, params, images[:, :7], SIDES)
    with pytest.raises(ValueError, match="either latents"):
        forward(params, {}, jnp.zeros((1, 4, 4, 4)), images)
    with pytest.raises(ValueError, match="multiple of norm_groups"):
        VQVAEConfig(block_out_channels=(48,))
