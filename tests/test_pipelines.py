"""Pipelines: from a directory in diffusers' layout to PIL images, and back to disk compressed."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import converters
import effjax
from effjax import pipelines, testing
from effjax.forward import abstract
from effjax.methods import dit_fast_attn, round_to_nearest
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import diffusion, text_encoders, to_pil
from effjax.pipelines.images import prepared
from effjax.samplers import DDIM, DPMSolver, FlowMatchEuler
from experiments import train_pixart


def write_pipeline(path, *, vae=False, channels=1, params=None):
    """A tiny random pipeline with classes named a ... e."""
    subject = testing.tiny_dit(in_channels=channels, out_channels=channels)
    converters.save_pretrained(subject.forward, params or subject.params, path / "transformer")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(i): name for i, name in enumerate("abcde")},
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"] if vae else [None, None],
    }
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler").mkdir()
    scheduler = DDIM(steps=10, clip_sample=False).to_config()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    if vae:
        config = AutoencoderKLConfig(
            latent_channels=channels, block_out_channels=(4, 8), layers_per_block=1, norm_groups=2
        )
        forward, shapes = abstract(AutoencoderKL, config)
        converters.save_pretrained(forward, testing.random_params(shapes), path / "vae")
    return subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    write_pipeline(path)
    return path


@pytest.fixture(scope="module")
def pipe(folder):
    return effjax.pipeline(folder, progress=False)


def test_images_by_name_and_index(pipe):
    options = {"key": jax.random.key(0), "num_inference_steps": 3, "progress": False}
    seen = []
    images = pipe(["b", 4], callback_on_step_end=lambda step, x: seen.append(step), **options)
    assert [(image.mode, image.size) for image in images] == [("L", (16, 16))] * 2
    assert seen == [0, 1, 2]
    (alone,) = pipe([1], **options)  # the same key: the same image, whatever the batch
    np.testing.assert_allclose(np.asarray(images[0], int), np.asarray(alone, int), atol=1)
    fused = jax.jit(pipe.sampler(num_inference_steps=3))(
        pipe.forward, pipe.params, jnp.array([1, 4]), jax.random.key(0)
    )
    np.testing.assert_allclose(
        np.asarray(images[1], int), np.asarray(to_pil(fused)[1], int), atol=1
    )


def test_a_pipeline_has_its_buckets(untyped, folder, pipe):
    assert pipe.buckets == "powers of two"
    own = effjax.pipeline(folder, progress=False, buckets=[2])
    assert own.buckets == [2]
    assert own.transform().buckets == [2]
    with pytest.raises(ValueError, match="buckets must be"):
        effjax.pipeline(folder, progress=False, buckets=[0])
    with pytest.raises(ValueError, match="buckets must be"):
        dataclasses.replace(pipe, buckets="many")


def test_a_compressed_pipeline_is_saved_and_samples_by_its_plan(pipe, tmp_path):
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=3, tokens=64)
    fast = pipe.transform(dit_fast_attn.transform(plan))
    fast.save(tmp_path / "fast")
    again = effjax.pipeline(tmp_path / "fast", progress=False)
    assert again.forward == fast.forward
    assert (again.names, again.vae) == (pipe.names, None)
    chex.assert_trees_all_equal(again.params, fast.params)
    assert again.sampler().calls == 3  # the plan's
    assert pipe.sampler().calls == 50
    images = again(["a"], key=jax.random.key(0), progress=False)
    same = fast(["a"], key=jax.random.key(0), num_inference_steps=3, progress=False)
    np.testing.assert_array_equal(np.asarray(images[0]), np.asarray(same[0]))
    with pytest.raises(ValueError, match="planned for 3 network calls"):
        again(["a"], key=jax.random.key(0), num_inference_steps=4)


def test_latents_are_decoded(tmp_path):
    write_pipeline(tmp_path, vae=True, channels=4)
    pipe = effjax.pipeline(tmp_path, progress=False)
    (image,) = pipe(["c"], key=jax.random.key(0), num_inference_steps=2, progress=False)
    assert (image.mode, image.size) == ("RGB", (32, 32))
    pipe.save(tmp_path / "copy")
    again = effjax.pipeline(tmp_path / "copy", progress=False)
    (same,) = again(["c"], key=jax.random.key(0), num_inference_steps=2, progress=False)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(same))


def test_dtype_of_parameters_and_computation(folder, tmp_path):
    """They are loaded as stored, and computed in what they are stored in, unless told otherwise."""
    for stored in ("float32", "bfloat16"):
        converters.convert(folder / "transformer", tmp_path / stored / "transformer", dtype=stored)
        for part in ("model_index.json", diffusion.SCHEDULER):
            (tmp_path / stored / part).parent.mkdir(exist_ok=True)
            shutil.copy(folder / part, tmp_path / stored / part)
        for asked in (None, "float32", "bfloat16"):
            for computed in (None, "float32", "bfloat16"):
                options = {"dtype": asked, "compute_dtype": computed, "progress": False}
                pipe = effjax.pipeline(tmp_path / stored, **options)
                held = {leaf.dtype for leaf in jax.tree.leaves(pipe.params)}
                assert held == {jnp.dtype(asked or stored)}
                config = pipe.forward.config
                assert config.param_dtype == (asked or stored)
                assert config.dtype == (computed or asked or stored)


def test_dtypes_of_saved_pipelines(pipe, tmp_path):
    """As saved, or as asked for; quantized leaves keep their quantized values and scales."""
    transform = round_to_nearest.transform(round_to_nearest.uniform(8, 16))
    half = dataclasses.replace(
        pipe, params=jax.tree.map(lambda leaf: leaf.astype("bfloat16"), pipe.params)
    )
    small = half.transform(transform)
    small.save(tmp_path / "small")
    kept = effjax.pipeline(tmp_path / "small", progress=False)
    chex.assert_trees_all_equal_dtypes(kept.params, small.params)
    assert kept.forward == small.forward
    wide = effjax.pipeline(tmp_path / "small", dtype="float32", progress=False)
    chex.assert_trees_all_equal(wide.params, jax.tree.map(_widened, small.params))
    assert (wide.forward.config.param_dtype, wide.forward.config.dtype) == ("float32", "float32")
    computed = effjax.pipeline(tmp_path / "small", compute_dtype="bfloat16", progress=False)
    chex.assert_trees_all_equal(computed.params, small.params)
    assert computed.forward.config.dtype == "bfloat16"
    inputs = jnp.ones((1, 16, 16, 1)), jnp.array([500.0]), jnp.array([1])
    exact, rounded = (each.forward(each.params, {}, *inputs)[0] for each in (wide, computed))
    assert (exact.dtype, rounded.dtype) == (jnp.float32, jnp.bfloat16)
    assert 0 < jnp.abs(exact - rounded.astype("float32")).max() < 0.03 * jnp.abs(exact).max()
    with pytest.raises(ValueError, match=r"dtype must be one of .*'int8'"):
        effjax.pipeline(tmp_path / "small", dtype="int8")


def _widened(leaf):
    return leaf.astype("float32") if leaf.dtype == jnp.bfloat16 else leaf


@pytest.mark.parametrize("saved", [False, True])
def test_bad_values_are_named_when_asked_for(pipe, tmp_path, saved):
    bias = pipe.params["patch"]["bias"].at[0].set(jnp.nan).at[1].set(1e9)
    broken = dataclasses.replace(
        pipe, params={**pipe.params, "patch": {**pipe.params["patch"], "bias": bias}}
    )
    if saved:
        broken.save(tmp_path / "model")
    else:
        write_pipeline(tmp_path / "model", params=broken.params)
    effjax.pipeline(tmp_path / "model", progress=False)
    with pytest.raises(ValueError, match=r"bias: 1 of 16 values are NaN or infinite"):
        effjax.pipeline(tmp_path / "model", check_finite=True, progress=False)
    with pytest.raises(ValueError, match=r"bias: 1 values are beyond float16"):
        effjax.pipeline(tmp_path / "model", dtype="float16", progress=False)


def test_bad_pipelines_and_labels(pipe, folder, tmp_path):
    with pytest.raises(ValueError, match=r"no class 'z': a label is 0 \.\.\. 4, or one of a, b"):
        pipe(["z"], key=jax.random.key(0))
    with pytest.raises(ValueError, match="no class 5"):
        pipe([5], key=jax.random.key(0))
    with pytest.raises(ValueError, match=r"has no model_index\.json"):
        effjax.pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(ValueError, match="is a StableDiffusionPipeline"):
        effjax.pipeline(tmp_path)
    with pytest.raises(ValueError, match="no directory here and no hub repository"):
        effjax.pipeline(tmp_path / "nowhere" / "deep" / "down")
    with pytest.raises(ValueError, match="exists and is not empty"):
        pipe.save(folder)
    with pytest.raises(ValueError, match="latents need a decoder"):
        to_pil(np.zeros((1, 4, 4, 4)))


def test_pixels_are_rounded_and_clipped():
    (image,) = to_pil(np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 0.5]).reshape(1, 2, 3, 1))
    assert np.asarray(image).tolist() == [[0, 0, 128], [255, 255, 191]]


def test_images_to_change_are_arrays_of_one_kind():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    wanted = prepared("image", pixels, 2, (4, 6, 3))
    floats = jnp.asarray(pixels / np.float32(255))
    for given in (Image.fromarray(pixels), [pixels], floats, [floats, floats]):
        np.testing.assert_allclose(prepared("image", given, 2, (4, 6, 3)), wanted, atol=1e-6)
    half = prepared("image", floats.astype(jnp.bfloat16), 2, (4, 6, 3))
    np.testing.assert_allclose(half, wanted, atol=1e-2)
    for given in ([Image.fromarray(pixels[:2]), pixels], [pixels, pixels[:2]]):
        with pytest.raises(ValueError, match="image must be PIL images, or arrays of one shape"):
            prepared("image", given, 2, (4, 6, 3))


def test_a_strength_is_for_an_image(pipe):
    with pytest.raises(ValueError, match="how much of an image to change: give image="):
        pipe("a", key=jax.random.key(0), num_inference_steps=2, strength=1.0)
    subject = testing.tiny_dit(in_channels=1, out_channels=1, steps=4)
    fast = pipe.transform(dit_fast_attn.transform(dit_fast_attn.METHOD.ladder(subject)[0]))
    with pytest.raises(ValueError, match=r"makes 2\. .* leaves out 2 of 4 steps"):
        fast("a", key=jax.random.key(0), image=np.zeros((16, 16, 1)), strength=0.5, progress=False)


# Text to image ------------------------------------------------------------------------------


def write_text_pipeline(path):
    """A tiny random text-to-image pipeline of pixels that reads the glyphs' captions."""
    subject = testing.tiny_pixart(in_channels=3, out_channels=3)
    converters.save_pretrained(subject.forward, subject.params, path / "transformer")
    config = T5Config(
        vocab_size=64, hidden_size=12, intermediate_size=24, num_layers=1, num_heads=3, head_dim=4
    )
    forward, shapes = abstract(T5Encoder, config)
    encoder = (forward, testing.random_params(shapes))
    converters.save_pretrained(*encoder, path / "text_encoder", layout="transformers")
    train_pixart.tokenizer().save_pretrained(path / "tokenizer")
    index = {"_class_name": "PixArtSigmaPipeline", "vae": [None, None]}
    (path / "model_index.json").write_text(json.dumps(index))
    (path / "scheduler").mkdir()
    scheduler = DPMSolver(steps=10).to_config()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("text")
    write_text_pipeline(path)
    return path


@pytest.fixture(scope="module")
def text_pipe(text_folder):
    return effjax.pipeline(text_folder, progress=False)


def test_images_by_prompt(text_pipe):
    options = {"key": jax.random.key(0), "num_inference_steps": 2, "progress": False}
    one, two = text_pipe(["a red A", "A Blue 7 "], **options)
    assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() > 0
    assert (one.mode, one.size) == ("RGB", (16, 16))
    (alone,) = text_pipe("a RED a", **options)  # captions are read in lower case
    # A batch of another size is another program: a value may round to its neighbor.
    assert np.abs(np.asarray(one, int) - np.asarray(alone, int)).max() <= 1
    (led,) = text_pipe("a red a", negative_prompt="green", **options)
    assert np.abs(np.asarray(led, int) - np.asarray(one, int)).max() > 0
    (free,) = text_pipe("a red a", guidance_scale=1.0, **options)
    assert np.abs(np.asarray(free, int) - np.asarray(one, int)).max() > 0


def test_images_of_other_sizes(text_pipe):
    options = {"key": jax.random.key(0), "num_inference_steps": 2, "progress": False}
    (wide,) = text_pipe("a red a", height=8, width=24, **options)
    assert wide.size == (24, 8)
    (own,), (same,) = text_pipe("a red a", **options), text_pipe("a red a", width=16, **options)
    np.testing.assert_array_equal(np.asarray(own), np.asarray(same))
    with pytest.raises(ValueError, match=r"multiples of 2 pixels.*got 15 x 16"):
        text_pipe("a red a", height=15, **options)
    with pytest.raises(ValueError, match=r"width must be .* got 0"):
        text_pipe.sampler(width=0)


def test_a_plan_is_for_one_size(text_pipe):
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=2, tokens=4 * 12)
    fast = text_pipe.transform(dit_fast_attn.transform(plan))
    options = {"key": jax.random.key(0), "progress": False}
    (wide,) = fast("a red a", height=8, width=24, **options)
    assert wide.size == (24, 8)
    with pytest.raises(ValueError, match="made for 48 tokens, this call has 64"):
        fast("a red a", **options)


def test_shifts_by_size_follow_the_size(text_pipe):
    scheduler = FlowMatchEuler(steps=4, mu=0.5).to_config() | {"use_dynamic_shifting": True}
    pipe = dataclasses.replace(text_pipe, scheduler=scheduler)
    own, wide = pipe.sampler(num_inference_steps=4), pipe.sampler(num_inference_steps=4, width=64)
    assert own.schedule == own.schedule.for_tokens(64)
    assert wide.schedule == own.schedule.for_tokens(256)
    assert wide.sample_shape(pipe.forward) == (16, 64, 3)


def test_captions_are_remembered(text_pipe, monkeypatch):
    fresh = dataclasses.replace(text_pipe)
    read = []
    encode = pipelines.TextToImagePipeline._each
    monkeypatch.setattr(
        pipelines.TextToImagePipeline,
        "_each",
        lambda self, keys, lengths: (
            read.append([key[0] for key in keys]),
            encode(self, keys, lengths),
        )[1],
    )
    first = fresh.encode(["a red a", "", "a red a"])
    second = fresh.encode(["", "a red a", "a 7"])
    assert read == [["a red a", ""], ["a 7"]]
    chex.assert_trees_all_equal(first.embeds[0], second.embeds[1])
    assert first.mask.sum(1).tolist() == [4, 1, 4]
    assert first.embeds.shape == (3, 10, 12)
    fresh.encode([f"a {i}" for i in range(100)])
    assert len(fresh._captions) == text_encoders._REMEMBERED


def test_a_text_pipeline_is_saved_whole(text_pipe, tmp_path):
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=3, tokens=64)
    fast = text_pipe.transform(dit_fast_attn.transform(plan))
    fast.save(tmp_path / "fast")
    again = effjax.pipeline(tmp_path / "fast", progress=False)
    assert again.forward == fast.forward
    options = {"key": jax.random.key(0), "progress": False}
    (image,), (same,) = fast("a red a", **options), again("a red a", **options)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(same))


def test_bad_prompts_and_text_pipelines(text_pipe, text_folder, tmp_path):
    with pytest.raises(ValueError, match=r"a prompt has 13 tokens, this model reads 10.*'a a a a"):
        text_pipe(["a red a", "a " * 12], key=jax.random.key(0))
    copy = tmp_path / "copy"
    shutil.copytree(text_folder, copy)
    shutil.rmtree(copy / "tokenizer")
    with pytest.raises(ValueError, match="has no tokenizer: give one"):
        effjax.pipeline(copy, progress=False)
