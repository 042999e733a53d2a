"""PixArt-Sigma and T5 against diffusers and transformers: weights, configurations, pipelines."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import converters
import effjax
from converters import pixart as family
from converters import t5
from effjax import testing
from effjax.forward import abstract
from effjax.models.pixart import PixArtConfig, PromptEmbeddings
from effjax.models.t5 import T5Config, T5Encoder
from effjax.samplers import DPMSolver, sample_keys
from tests.converters.conftest import assert_equal_params

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

CONFIG = PixArtConfig(
    sample_size=8, num_layers=2, num_heads=2, head_dim=8, caption_channels=12, interpolation=2.0
)
T5 = T5Config(
    vocab_size=50, hidden_size=12, intermediate_size=24, num_layers=2, num_heads=3, head_dim=4
)


@pytest.fixture(scope="module")
def models():
    """Ours with random parameters: PixArt, its encoder."""
    return {
        "transformer": _random(CONFIG, family.FAMILY.model, 0),
        "text_encoder": _random(T5, T5Encoder, 1),
    }


def _random(config, model, seed):
    forward, shapes = abstract(model, config)
    return forward, testing.random_params(shapes, seed=seed)


@pytest.mark.parametrize("name", ["transformer", "text_encoder"])
def test_round_trip_gives_the_same_bytes(models, name, tmp_path):
    converters.save_pretrained(*models[name], tmp_path / "one", layout=_layout(name))
    forward, params = converters.from_pretrained(tmp_path / "one")
    assert forward == models[name][0]
    assert_equal_params(params, models[name][1])
    converters.save_pretrained(forward, params, tmp_path / "two", layout=_layout(name))
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files[0] == "config.json"
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def _layout(name):
    return "transformers" if name == "text_encoder" else "diffusers"


@pytest.mark.torch
def test_diffusers_and_transformers_read_what_we_write(models, tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    for name, model in models.items():
        converters.save_pretrained(*model, tmp_path / name, layout=_layout(name))
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "text_encoder").eval()
    transformer = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "transformer")
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 50, (2, 9)).astype(np.int32), np.arange(9) < [[9], [4]]
    x, t = rng.standard_normal((2, 8, 12, 4)).astype(np.float32), np.float32([3.0, 871.0])
    with torch.no_grad():
        states = encoder(torch.tensor(ids), torch.tensor(mask).long()).last_hidden_state
        out = transformer(
            torch.tensor(x).permute(0, 3, 1, 2),
            encoder_hidden_states=states,
            timestep=torch.tensor(t),
            encoder_attention_mask=torch.tensor(mask).float(),
        ).sample
    encode, params = models["text_encoder"]
    ours, _ = jax.jit(encode)(params, {}, jnp.asarray(ids), jnp.asarray(mask))
    np.testing.assert_allclose(ours, states.numpy(), atol=2e-4)
    forward, params = models["transformer"]
    images, _ = jax.jit(forward)(params, {}, x, t, PromptEmbeddings(ours, jnp.asarray(mask)))
    np.testing.assert_allclose(images, out.permute(0, 2, 3, 1).numpy(), atol=2e-4)


@pytest.mark.torch
def test_a_whole_pipeline_of_diffusers(models, tmp_path):
    """Prompt to image through every component: the same pixels from the same noise."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    from experiments.train_pixart import tokenizer

    torch.manual_seed(0)
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer(),
        text_encoder=transformers.T5EncoderModel(
            transformers.T5Config(
                vocab_size=64,
                d_model=12,
                d_kv=4,
                d_ff=24,
                num_layers=2,
                num_heads=3,
                feed_forward_proj="gated-gelu",
            )
        ),
        transformer=diffusers.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            cross_attention_dim=16,
            sample_size=8,
            caption_channels=12,
            use_additional_conditions=False,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=(4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            scaling_factor=0.13025,
        ),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        part.eval()
    pipe.save_pretrained(tmp_path / "theirs")
    ours = effjax.pipeline(tmp_path / "theirs", progress=False)
    assert isinstance(ours.sampler().schedule, DPMSolver)
    assert (ours.sampler().calls, ours.sampler().guidance) == (20, 4.5)
    prompts, key = ["a red A at the top left", "a blue 7"], jax.random.key(0)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0}
    for size in ({"height": 16, "width": 16}, {"height": 8, "width": 24}):
        images = ours(prompts, key=key, negative_prompt="green", progress=False, **options, **size)
        pairs = jax.vmap(jax.random.split)(sample_keys(key, 2))
        shape = (size["height"] // 2, size["width"] // 2, 4)
        noise = jax.vmap(lambda k, shape=shape: jax.random.normal(k, shape))(pairs[:, 0])
        theirs = pipe(
            prompts,
            negative_prompt="green",
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=torch.tensor(np.asarray(noise)).permute(0, 3, 1, 2),
            max_sequence_length=ours.max_tokens,
            use_resolution_binning=False,
            **size,
        ).images
        for mine, other in zip(images, theirs, strict=True):
            assert mine.size == other.size
            np.testing.assert_allclose(np.asarray(mine, int), np.asarray(other, int), atol=1)


def test_configurations_both_ways():
    written = json.loads(json.dumps(family.write_config(CONFIG)))
    assert family.read_config(written) == CONFIG
    sigma = {"caption_channels": 4096, "use_additional_conditions": False, "norm_eps": 1e-6}
    assert family.read_config({**sigma, "interpolation_scale": None}) == PixArtConfig()
    half = {**written, "out_channels": None}
    assert family.read_config(half).out_channels == 4
    assert t5.read_config(json.loads(json.dumps(t5.write_config(T5)))) == T5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_additional_conditions": True}, "size conditions of PixArt-alpha"),
        ({"caption_channels": None}, "caption_channels must be a whole number"),
        ({"cross_attention_dim": 32}, "cross_attention_dim must be num_attention_heads"),
        ({"norm_type": "ada_norm_zero"}, "norm_type='ada_norm_zero'"),
    ],
)
def test_other_pixarts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        family.read_config({**family.write_config(CONFIG), **change})


def test_other_t5s_are_refused():
    config = t5.write_config(T5)
    with pytest.raises(ValueError, match="feed_forward_proj='relu'"):
        t5.read_config({**config, "feed_forward_proj": "relu"})
    del config["feed_forward_proj"]
    with pytest.raises(ValueError, match=r"T5 1\.0 with ReLU"):
        t5.read_config(config)


@pytest.mark.parametrize("alone", [False, True])
def test_tied_tables_of_older_files_are_read(alone, models, tmp_path):
    """Pickles of transformers hold the token table twice; other files under either name."""
    from safetensors.numpy import save_file

    converters.save_pretrained(*models["text_encoder"], tmp_path / "t5", layout="transformers")
    file = tmp_path / "t5" / "model.safetensors"
    tensors = load_file(file)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"].copy()
    if alone:
        del tensors["shared.weight"]
    save_file(tensors, file)
    _, params = converters.from_pretrained(tmp_path / "t5")
    assert_equal_params(params, models["text_encoder"][1])
