"""Pipelines of ECAR: images of classes from pixels and from latents, files, commands, errors."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import effjax
from effjax import testing
from effjax.cli import main
from effjax.forward import abstract
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.pipelines import NextStagePipeline, to_pil
from effjax.pipelines.description import describe
from effjax.testing import random_params


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_ecar(head="dit")
    return NextStagePipeline(subject.forward, subject.params, names={1: "fox", 4: "dog"})


def test_images_files_and_commands(pipe, tmp_path):
    options = {"key": jax.random.key(0), "progress": False, "num_inference_steps": 2}
    images = pipe(["fox", 4], **options)
    assert [(image.mode, image.size) for image in images] == [("L", (8, 8))] * 2
    x = pipe([1, "dog"], output_type="latent", **options)
    chex.assert_trees_all_equal(np.asarray(to_pil(x)[1]), np.asarray(images[1]))
    seen = []
    pipe("fox", callback_on_step_end=lambda call, x: seen.append((call, x.shape)), **options)
    assert seen == [(call, (1, 8, 8, 1)) for call in range(9)]

    pipe.save(tmp_path / "copy")
    source, folder = str(tmp_path / "copy"), str(tmp_path / "images")
    again = effjax.pipeline(source, progress=False)
    assert (type(again), again.forward, again.names) == (
        NextStagePipeline,
        pipe.forward,
        pipe.names,
    )
    assert len(again("fox", num_images_per_prompt=2, **options)) == 2
    assert describe(source)["components"]["transformer"]["model"] == "ECAR"
    asked = ["sample", source, "--labels", "fox,dog", "--guidance", "4", "--steps", "2,1,2"]
    assert main([*asked, "-o", folder]) == 0
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["000_fox.png", "001_dog.png"]
    small = str(tmp_path / "small")
    assert main(["apply", source, small, "round_to_nearest", "--bits", "w8a16"]) == 0
    assert effjax.pipeline(small, progress=False).forward.recipe[0][0] == "round_to_nearest"


def test_latents_of_a_vae(tmp_path):
    """Its decoder makes the images, and both are saved."""
    config = AutoencoderKLConfig(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_groups=2
    )
    forward, shapes = abstract(AutoencoderKL, config)
    subject, vae = testing.tiny_ecar(in_channels=4), (forward, random_params(shapes))
    pipe = NextStagePipeline(subject.forward, subject.params, vae=vae)
    key = jax.random.key(1)
    x = pipe(2, key=key, num_inference_steps=[1, 1, 2], guidance_scale=1.0, output_type="latent")
    made = pipe(2, key=key, num_inference_steps=[1, 1, 2], guidance_scale=1.0, output_type="np")
    assert x.shape == (1, 8, 8, 4)
    wanted = np.clip((np.asarray(vae[0](vae[1], {}, x)[0]) + 1) / 2, 0, 1)
    chex.assert_trees_all_close(made, wanted, atol=1e-5)
    pipe.save(tmp_path / "copy")
    again = effjax.pipeline(tmp_path / "copy", progress=False)
    assert again.vae is not None
    assert again.vae[0] == vae[0]
    with pytest.raises(ValueError, match="makes latents of 4 channels, no pixels: give the VAE"):
        dataclasses.replace(pipe, vae=None)
    other = testing.tiny_ecar(in_channels=3)
    with pytest.raises(ValueError, match="the VAE decodes 4 channels and the model makes 3"):
        NextStagePipeline(other.forward, other.params, vae=vae)


def test_numbers_may_be_arrays(untyped, pipe):
    for read in (np.asarray, jnp.asarray):
        loop = pipe.sampler(num_inference_steps=read([1, 2, 3]), guidance_scale=read([1.0, 2, 3]))
        assert (loop.steps, loop.guidance) == ((1, 2, 3), (1.0, 2.0, 3.0))
        loop = pipe.sampler(num_inference_steps=read(2), guidance_scale=read(2.0))
        assert (loop.steps, loop.guidance) == ((2, 2, 2), 2.0)


def test_bad_input(untyped, pipe):
    key = jax.random.key(0)
    for options, message in (
        ({"labels": 5}, r"no class 5: a label is 0 \.\.\. 4"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"guidance_scale": [1.0, 2.0]}, "one for each of 3 stages"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1"),
        ({"num_inference_steps": [1, 2.5, 1]}, "num_inference_steps must be a whole number"),
        ({"num_inference_steps": [2, 2]}, "one for each of 3 stages"),
        ({"guidance_scale": "123"}, "guidance_scale must be a finite number of at least 0"),
        ({"output_type": "tokens"}, "output_type must be one of pil, np, latent; got"),
        ({"callback_on_step_end": 3}, "must be a function of a step and latents"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"labels": 1, "key": key, **options})
    with pytest.raises(TypeError, match="key must come from"):
        pipe(1, key=0)
