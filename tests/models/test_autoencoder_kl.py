import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from converters.autoencoder_kl import FAMILY, read_config, write_config
from effjax.context import Layout
from effjax.forward import abstract, flatten_params, nest_params, parameter_count
from effjax.layers.attention import Attention
from effjax.layers.convolution import Conv2d, upsample_nearest_2x
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, decode, encode
from effjax.targets import Wrapper, wrap

TINY = AutoencoderKLConfig(
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_groups=4,
    sample_size=8,
    scaling_factor=0.5,
    shift_factor=0.25,
)
BARE = dataclasses.replace(  # no optional part; three levels of unequal width
    TINY,
    block_out_channels=(8, 24, 16),
    layers_per_block=2,
    latent_channels=6,
    in_channels=4,
    out_channels=2,
    shift_factor=0.0,
    use_quant_conv=False,
    use_post_quant_conv=False,
    mid_block_add_attention=False,
)
MIXED = dataclasses.replace(TINY, block_out_channels=(16, 8, 8), use_post_quant_conv=False)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def tiny(config=TINY):
    """A model whose every parameter is random: fresh biases are 0 and would hide mistakes."""
    forward, shapes = abstract(AutoencoderKL, config)
    flat = {}
    for number, (path, leaf) in enumerate(flatten_params(shapes).items()):
        value = normal(number, *leaf.shape)
        if path.endswith("kernel"):
            value /= np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            value = 0.1 * value + path.endswith("scale")
        flat[path] = jnp.asarray(value, leaf.dtype)
    return forward, nest_params(flat)


# One image shape in most tests, so that these programs compile once.
SHAPE = (2, 6, 10)
to_latents = jax.jit(encode)
to_images = jax.jit(decode)
moments = jax.jit(lambda forward, params, images: forward.module(params).encode(images))


def test_convolution_equals_its_definition_under_asymmetric_padding():
    conv = Conv2d(2, 3, stride=2, padding=((0, 1), (2, 1)), rngs=nnx.Rngs(0))
    conv.bias.set_value(jnp.array([1.0, 2.0, 3.0]))
    x, kernel = normal(0, 2, 4, 5, 2), np.asarray(conv.kernel.get_value())
    padded = np.pad(x, ((0, 0), (0, 1), (2, 1), (0, 0)))
    expected = np.zeros((2, 2, 3, 3))
    for row in range(2):
        for column in range(3):
            window = padded[:, 2 * row : 2 * row + 3, 2 * column : 2 * column + 3]
            expected[:, row, column] = np.einsum("brsi,rsio->bo", window, kernel)
    expected += np.array([1, 2, 3])
    np.testing.assert_allclose(conv(jnp.asarray(x)), expected, atol=1e-5)


def test_upsampling_repeats_pixels():
    x = normal(0, 2, 3, 4, 5)
    expected = x.repeat(2, axis=1).repeat(2, axis=2)
    np.testing.assert_array_equal(upsample_nearest_2x(jnp.asarray(x)), expected)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (AutoencoderKLConfig(), 83_653_863),
        (
            AutoencoderKLConfig(
                latent_channels=16, use_quant_conv=False, use_post_quant_conv=False
            ),
            83_819_683,
        ),
    ],
    ids=["stable-diffusion", "flux"],
)
def test_full_size_parameter_counts(config, count):
    forward, params = abstract(AutoencoderKL, config)
    assert parameter_count(params) == count
    assert forward.config.downscale == 8


def torch_model(config, layout="diffusers"):
    """diffusers' model with our configuration and parameters, and its weights by name."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    forward, params = tiny(config)
    flat = flatten_params(params)
    binding = FAMILY.tables[layout].bind(flat)
    weights = {
        name: binding.assemble(name, lambda path: np.asarray(flat[path].astype(jnp.float32)))
        for name in binding.sources
    }
    model = diffusers.AutoencoderKL.from_config(write_config(config)).eval()
    tensors = {name: torch.from_numpy(array.copy()) for name, array in weights.items()}
    if layout == "diffusers":  # strict: the exported names and shapes are exactly diffusers'
        model.load_state_dict(tensors, strict=True)
    return torch, model, tensors, forward, params


def to_torch(torch, x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def from_torch(x):
    return np.moveaxis(x.detach().numpy(), 1, -1)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "shape"),
    [(TINY, SHAPE), (BARE, (1, 16, 8)), (MIXED, (1, 8, 12))],
    ids=["tiny", "bare", "mixed"],
)
def test_parity_with_diffusers(config, shape):
    torch, reference, _, forward, params = torch_model(config)
    images = normal(1, *shape, config.in_channels)
    factor = config.downscale
    z = normal(2, shape[0], shape[1] // factor, shape[2] // factor, config.latent_channels)
    with torch.no_grad():
        posterior = reference.encode(to_torch(torch, images)).latent_dist
        decoded = reference.decode(to_torch(torch, z)).sample
    scale, shift = config.scaling_factor, config.shift_factor

    mean, log_variance = moments(forward, params, jnp.asarray(images))
    np.testing.assert_allclose(mean, from_torch(posterior.mean), atol=2e-4)
    np.testing.assert_allclose(log_variance, from_torch(posterior.logvar), atol=2e-4)
    assert np.std(mean) > 0.1  # not a comparison of nothing
    ours = to_images(forward, params, (jnp.asarray(z) - shift) * scale)
    np.testing.assert_allclose(ours, from_torch(decoded), atol=2e-4)
    assert np.std(ours) > 0.1


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_bfloat16_stays_near_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16", param_dtype="bfloat16")
    torch, reference, _, forward, params = torch_model(config)  # reference: same weights, float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    images, latents = normal(1, 1, 8, 8, 3), normal(2, 1, 4, 4, 4)
    z = latents / config.scaling_factor + config.shift_factor
    with torch.no_grad():
        mean = from_torch(reference.encode(to_torch(torch, images)).latent_dist.mean)
        decoded = from_torch(reference.decode(to_torch(torch, z)).sample)
    ours = to_images(forward, params, jnp.asarray(latents))
    assert ours.dtype == jnp.bfloat16
    encoded = to_latents(forward, params, jnp.asarray(images))
    assert encoded.dtype == jnp.float32
    expected = (mean - config.shift_factor) * config.scaling_factor
    # 8 bits of mantissa through some twenty layers: a few percent of the whole
    for result, truth in ((ours, decoded), (encoded, expected)):
        error = np.linalg.norm(np.asarray(result, np.float32) - truth) / np.linalg.norm(truth)
        assert error < 0.04


def test_float16_is_upcast_where_the_config_says_so():
    """Latents that make activations of 1e5: float16 ends at 65504."""
    single = dataclasses.replace(TINY, dtype="float32", param_dtype="float16")
    forward, params = tiny(single)
    params["decoder"]["conv_in"]["kernel"] *= 30
    latents = 1e4 * jnp.asarray(normal(2, 1, 4, 4, 4))
    expected = to_images(forward, params, latents)
    for upcast, finite, dtype in ((True, True, "float32"), (False, False, "float16")):
        config = dataclasses.replace(single, dtype="float16", force_upcast=upcast)
        half, _ = abstract(AutoencoderKL, config)
        images = to_images(half, params, latents)
        assert images.dtype == dtype
        assert bool(jnp.isfinite(images).all()) == finite
        if upcast:
            np.testing.assert_allclose(images, expected, atol=1e-6)


@pytest.mark.parametrize("upcast", [True, False])
def test_force_upcast_is_read_and_written(upcast):
    config = write_config(dataclasses.replace(TINY, force_upcast=upcast))
    assert config["force_upcast"] is upcast
    assert read_config(config).force_upcast is upcast
    assert read_config({k: v for k, v in config.items() if k != "force_upcast"}).force_upcast


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
def test_attention_names_of_2022_are_what_diffusers_accepts():
    _, reference, tensors, _, _ = torch_model(TINY, layout="diffusers-2022")
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in tensors
    renamed = reference._fix_state_dict_keys_on_load(dict(tensors))
    reference.load_state_dict(renamed, strict=True)


@pytest.mark.parametrize("config", [TINY, BARE, MIXED], ids=["tiny", "bare", "mixed"])
@pytest.mark.parametrize("layout", FAMILY.tables)
def test_names_and_weights_round_trip(config, layout):
    _, params = tiny(config)
    flat = flatten_params(params)
    binding = FAMILY.tables[layout].bind(flat)
    exported = {
        name: binding.assemble(name, lambda path: np.asarray(flat[path]))
        for name in binding.sources
    }
    shapes = {name: array.shape for name, array in exported.items()}
    assert shapes == binding.source_shapes({path: leaf.shape for path, leaf in flat.items()})
    for path, pieces in binding.targets.items():
        (piece,) = pieces
        np.testing.assert_array_equal(piece.read(exported[piece.source]), flat[path])
    known = layout if config.mid_block_add_attention else "diffusers"  # else both names agree
    assert FAMILY.layout(exported) == known


@pytest.mark.parametrize("config", [TINY, BARE, AutoencoderKLConfig()])
def test_config_round_trip(config):
    written = json.loads(json.dumps(write_config(config)))
    assert read_config(written) == config


def test_config_defaults_are_those_of_diffusers():
    config = read_config({"block_out_channels": [32, 64], "shift_factor": None})
    assert (config.scaling_factor, config.shift_factor) == (0.18215, 0.0)
    assert (config.use_quant_conv, config.use_post_quant_conv) == (True, True)
    assert config.mid_block_add_attention
    assert (config.layers_per_block, config.latent_channels, config.norm_groups) == (1, 4, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"latents_mean": [0.0] * 4}, "latents_mean"),
        ({"down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]}, "down_block"),
        ({"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        (
            {"block_out_channels": [8, "16"]},
            r"block_out_channels\[1\] must be a whole number of at least 1",
        ),
        ({"sample_size": [8, 12]}, "sample_size must be a whole number of at least 1"),
    ],
)
def test_config_json_that_the_model_does_not_have(fields, message):
    with pytest.raises(ValueError, match=message):
        read_config({**write_config(TINY), **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"latent_channels": 0}, "latent_channels must be a whole number of at least 1"),
        ({"layers_per_block": 0}, "layers_per_block"),
        ({"block_out_channels": ()}, "multiple of norm_groups for each level"),
        ({"block_out_channels": (8, 10)}, "multiple of norm_groups"),
        (
            {"block_out_channels": (8, 0)},
            r"block_out_channels\[1\] must be a whole number of at least 1",
        ),
        ({"scaling_factor": 0.0}, "scaling_factor must be a finite number above 0"),
        ({"scaling_factor": float("nan")}, "scaling_factor must be a finite number above 0"),
        ({"shift_factor": float("inf")}, "shift_factor must be a finite number"),
        ({"dtype": "int8"}, "dtype must be one of 'float32'"),
    ],
)
def test_bad_config_values(untyped, fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **fields)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((None, jnp.zeros((1, 8, 9, 3))), "multiples of 2, got 8 x 9"),
        ((None, jnp.zeros((1, 7, 8, 3))), "multiples of 2, got 7 x 8"),
        ((None, jnp.zeros((1, 8, 8, 4))), "images of 3 channels"),
        ((jnp.zeros((1, 4, 4, 3)),), "latents of 4 channels"),
        ((None, None), "must be an array"),
        ((jnp.zeros((1, 4, 4, 4)), jnp.zeros((1, 8, 8, 3))), "either latents"),
    ],
)
def test_bad_inputs(inputs, message):
    forward, params = abstract(AutoencoderKL, TINY)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda params: forward(params, {}, *inputs), params)


def test_encode_samples_the_posterior_in_model_space(key):
    forward, params = tiny()
    images = jnp.asarray(normal(1, *SHAPE, 3))
    mean, log_variance = moments(forward, params, images)
    assert np.std(log_variance) > 0.1
    noise = jax.random.normal(key, mean.shape)
    expected = (mean + jnp.exp(0.5 * log_variance) * noise - TINY.shift_factor) * 0.5
    sample = to_latents(forward, params, images, key)
    np.testing.assert_allclose(sample, expected, atol=1e-5)
    without_noise = (mean - TINY.shift_factor) * 0.5
    np.testing.assert_allclose(to_latents(forward, params, images), without_noise, atol=1e-6)


def test_log_variance_is_clipped():
    forward, params = tiny()
    bias = jnp.array([0.0] * 4 + [1e3, 1e3, -1e3, -1e3])
    params = {**params, "quant_conv": {**params["quant_conv"], "bias": bias}}
    images = jnp.asarray(normal(1, *SHAPE, 3))
    _, log_variance = moments(forward, params, images)
    assert (log_variance[..., :2] == 20).all()
    assert (log_variance[..., 2:] == -30).all()


class Negate(Wrapper):
    def __call__(self, x):
        return -self.inner(x)


@dataclasses.dataclass(frozen=True)
class NegateAt:
    path: str

    def __call__(self, module, context):
        wrap(module, self.path, Negate)


def test_edits_reach_both_directions():
    forward, params = tiny()
    images, latents = jnp.asarray(normal(1, *SHAPE, 3)), jnp.asarray(normal(2, 2, 3, 5, 4))
    patched = forward.patch(NegateAt("quant_conv"), NegateAt("decoder.conv_out"))
    plain, negated = (to_images(f, params, latents) for f in (forward, patched))
    np.testing.assert_allclose(negated, -plain, atol=1e-6)
    plain, negated = (to_latents(f, params, images) for f in (forward, patched))
    offset = 2 * TINY.shift_factor * TINY.scaling_factor  # the shift is not negated
    np.testing.assert_allclose(negated + offset, -plain, atol=1e-5)


def test_forward_is_a_value_with_sites_and_layout():
    forward, params = abstract(AutoencoderKL, TINY)
    again, _ = abstract(AutoencoderKL, dataclasses.replace(TINY))
    assert (forward, hash(forward)) == (again, hash(again))
    paths = [target.path for target in forward.target_modules(params, Attention)]
    assert paths == ["decoder.mid.attention.attn", "encoder.mid.attention.attn"]
    module = forward.module(params)
    assert module.layout(jnp.zeros((1, 4, 6, 4))) == Layout(grid=(1, 4, 6))
    assert module.layout(None, jnp.zeros((1, 8, 12, 3))) == Layout(grid=(1, 4, 6))
