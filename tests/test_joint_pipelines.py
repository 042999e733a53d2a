"""SD3 and FLUX pipelines: images of diffusers from the same noise, components, errors."""

import json
from typing import Any

import jax
import numpy as np
import pytest
from transformers import CLIPTextConfig, CLIPTokenizer, T5Config

import effjax
from effjax.methods import fb_cache
from effjax.pipelines import TextToImagePipeline
from effjax.pipelines.description import describe
from tests.test_pipeline_families import QUIET

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
WORDS = ["a", "red", "glyph", "b", "on", "blue"]
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
    "scaling_factor": 1.5,
    "shift_factor": 0.06,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


def clip_tokenizer(folder):
    """Letters and a few words, as CLIP's files have them."""
    folder.mkdir(parents=True)
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    tokens = {token: number for number, token in enumerate(vocabulary)}
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    made = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made.model_max_length = 77
    return made


def t5_tokenizer():
    from experiments import train_pixart

    return train_pixart.tokenizer()


def clip(tokenizer, projection):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=6,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config).eval()


def t5(tokenizer):
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=24,
        d_ff=32,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config).eval()


def certain(vae):
    """A VAE whose latents have next to no variance, so that a sample of them is their mean."""
    with torch.no_grad():
        vae.encoder.conv_out.weight[4:] = 0
        vae.encoder.conv_out.bias[4:] = -30
    return vae


def randomized(model):
    with torch.no_grad():
        for path, value in model.named_parameters():
            if value.ndim > 1 and "embed" not in path:
                value.copy_(torch.randn_like(value) * value[0].numel() ** -0.5)
            elif "norm" not in path or path.endswith("bias"):
                value.copy_(0.1 * torch.randn_like(value))
    return model.eval()


def sd3(folder, with_t5):
    torch.manual_seed(0)
    one = clip_tokenizer(folder / "one")
    other = t5_tokenizer()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        pos_embed_max_size=10,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=randomized(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=certain(randomized(diffusers.AutoencoderKL(**VAE))),
        text_encoder=clip(one, True),
        tokenizer=one,
        text_encoder_2=clip(one, True),
        tokenizer_2=one,
        text_encoder_3=t5(other) if with_t5 else None,
        tokenizer_3=other if with_t5 else None,
    )


def flux(folder, guidance_embeds):
    torch.manual_seed(0)
    one, other = clip_tokenizer(folder / "one"), t5_tokenizer()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        joint_attention_dim=24,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance_embeds,
    )
    dynamic = {"use_dynamic_shifting": True} if guidance_embeds else {}
    return diffusers.FluxPipeline(
        transformer=randomized(transformer),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(**dynamic),
        vae=certain(randomized(diffusers.AutoencoderKL(**VAE))),
        text_encoder=clip(one, False),
        tokenizer=one,
        text_encoder_2=t5(other),
        tokenizer_2=other,
    )


KINDS = {
    "sd3": lambda folder: sd3(folder, with_t5=True),
    "sd3 without T5": lambda folder: sd3(folder, with_t5=False),
    "flux-dev": lambda folder: flux(folder, guidance_embeds=True),
    "flux-schnell": lambda folder: flux(folder, guidance_embeds=False),
}


@pytest.fixture(scope="module", params=KINDS)
def released(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint")
    made = KINDS[request.param](folder)
    made.set_progress_bar_config(disable=True)
    made.save_pretrained(folder / "pipeline")
    return made, folder / "pipeline"


def test_images_equal_those_of_diffusers(released):
    """Not square, with a negative prompt, from the same noise: at most one of 255 apart."""
    theirs, folder = released
    pipe = effjax.pipeline(folder, **QUIET)
    assert isinstance(pipe, TextToImagePipeline)
    is_flux = pipe.forward.model.__name__ == "Flux"
    noise = np.random.default_rng(0).standard_normal((1, 8, 12, 4)).astype(np.float32)
    options: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 3}
    given = torch.tensor(noise.transpose(0, 3, 1, 2))
    if is_flux:
        given = diffusers.FluxPipeline._pack_latents(given, 1, 4, 8, 12)
        extra = {"max_sequence_length": theirs.tokenizer_2.model_max_length}
    else:
        extra = {"negative_prompt": "blue", "guidance_scale": 5.0}
        options |= {"guidance_scale": 5.0}
        if pipe.text_encoder_3 is not None:
            extra["max_sequence_length"] = theirs.tokenizer_3.model_max_length
    wanted = theirs(prompt="a red glyph", latents=given, output_type="np", **(options | extra))
    ours = dict(options) if is_flux else {**options, "negative_prompt": "blue"}
    got = pipe(
        "a red glyph",
        key=jax.random.key(0),
        latents=noise,
        output_type="np",
        progress=False,
        **ours,
    )
    same_images(got, wanted.images)


def same_images(got, wanted):
    images = [np.round(255 * np.asarray(each)).astype(int) for each in (got, wanted)]
    assert images[0].std() > 5
    assert np.abs(images[0] - images[1]).max() <= 1


def test_images_of_images_equal_those_of_diffusers(released):
    """Two of four steps change an image; the noise is drawn behind that of the VAE."""
    theirs, folder = released
    pipe = effjax.pipeline(folder, **QUIET)
    is_flux = pipe.forward.model.__name__ == "Flux"
    name = "FluxImg2ImgPipeline" if is_flux else "StableDiffusion3Img2ImgPipeline"
    changing = getattr(diffusers, name)(**theirs.components)
    changing.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    _, noise = (torch.randn((1, 4, 8, 12), generator=generator) for _ in range(2))
    image = np.random.default_rng(1).random((16, 24, 3)).astype(np.float32)
    options: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 4}
    options |= {"strength": 0.5, "output_type": "np", "guidance_scale": 3.5}
    reader = theirs.tokenizer_2 if is_flux else theirs.tokenizer_3
    length = {} if reader is None else {"max_sequence_length": reader.model_max_length}
    if is_flux and not pipe.forward.config.guidance_embeds:
        del options["guidance_scale"]
    wanted = changing(
        prompt="a red glyph",
        image=torch.tensor(image.transpose(2, 0, 1))[None],
        generator=torch.Generator().manual_seed(0),
        **options,
        **length,
    ).images
    asked: dict[str, Any] = {"key": jax.random.key(0), "progress": False, **options, "image": image}
    got = pipe("a red glyph", latents=noise.numpy().transpose(0, 2, 3, 1), **asked)
    same_images(got, wanted)
    with pytest.raises(ValueError, match=r"above 0 and at most 1, got 0\.0"):
        pipe("a", **{**asked, "strength": 0.0})
    with pytest.raises(ValueError, match="how much of an image to change: give image="):
        pipe("a", **{**asked, "image": None})
    with pytest.raises(ValueError, match=r"PIL image or an array \[16, 24, 3\]"):
        pipe("a", **{**asked, "image": image[:8]})
    with pytest.raises(ValueError, match=r"values in 0 ... 1, got -0.99"):
        pipe("a", **{**asked, "image": 2 * image - 1})


def test_every_encoder_may_read_a_prompt_of_its_own(released):
    """prompt_2, prompt_3, their negative ones and the number of tokens, as in diffusers."""
    theirs, folder = released
    pipe = effjax.pipeline(folder, **QUIET)
    is_flux = pipe.forward.model.__name__ == "Flux"
    noise = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 2}
    options |= {"prompt_2": "a blue b", "negative_prompt": "b", "negative_prompt_2": "red"}
    options |= {"max_sequence_length": 6, "output_type": "np"}
    given = torch.tensor(noise.transpose(0, 3, 1, 2))
    if is_flux:
        given = diffusers.FluxPipeline._pack_latents(given, 1, 4, 8, 8)
        options["true_cfg_scale"] = 2.0
    else:
        options |= {"prompt_3": "on a", "negative_prompt_3": "glyph", "guidance_scale": 3.0}
    wanted = theirs(prompt="a red glyph", latents=given, **options).images
    asked: dict[str, Any] = {"key": jax.random.key(0), "progress": False, "latents": noise}
    same_images(pipe("a red glyph", **asked, **options), wanted)
    with pytest.raises(ValueError, match="at most 512 tokens for a"):
        pipe("a", **asked, **{**options, "max_sequence_length": 513})
    with pytest.raises(ValueError, match="prompt_2 must be one for all prompts"):
        pipe("a", **asked, **{**options, "prompt_2": ["a", "b"]})
    if is_flux:
        options |= {"negative_prompt": None, "negative_prompt_2": None}
        with pytest.raises(ValueError, match="from a negative prompt: give negative_prompt"):
            pipe("a", **asked, **options)
        with pytest.raises(ValueError, match="has no text_encoder_3: leave out prompt_3"):
            pipe("a", **asked, prompt_3="a", height=16, width=16)
    else:
        with pytest.raises(ValueError, match="one scale of guidance: give guidance_scale"):
            pipe("a", **asked, **options, true_cfg_scale=2.0)
        if pipe.text_encoder_3 is None:
            with pytest.warns(UserWarning, match="no text encoder reads the end of a prompt"):
                pipe("glyph " * 40, **asked, **{**options, "num_inference_steps": 1})


def test_pipelines_come_back_from_disk(released, tmp_path):
    _, folder = released
    pipe = effjax.pipeline(folder, **QUIET)
    said = describe(folder)["components"]["transformer"]["programs"]
    assert said.startswith("blocks: ")
    pipe.save(tmp_path / "again")
    assert describe(tmp_path / "again")["components"]["transformer"]["programs"] == said
    again = effjax.pipeline(tmp_path / "again", **QUIET)
    assert again.family == pipe.family
    options: dict[str, Any] = {"height": 16, "width": 16, "num_inference_steps": 1}
    options["progress"] = False
    one, other = (
        each("a glyph", key=jax.random.key(0), output_type="np", **options)
        for each in (pipe, again)
    )
    np.testing.assert_array_equal(np.asarray(one), np.asarray(other))


def test_a_distilled_model_takes_no_scale(tmp_path):
    flux(tmp_path, guidance_embeds=False).save_pretrained(tmp_path / "pipeline")
    pipe = effjax.pipeline(tmp_path / "pipeline", **QUIET)
    with pytest.raises(ValueError, match=r"takes no guidance scale, got 2\.0; leave out"):
        pipe("a", key=jax.random.key(0), guidance_scale=2.0, height=16, width=16)


def test_the_first_block_cache_is_that_of_diffusers(tmp_path):
    """The same latents as with diffusers' hook, which skips some of the calls here."""
    theirs = flux(tmp_path, guidance_embeds=True)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "pipeline")
    pipe = effjax.pipeline(tmp_path / "pipeline", **QUIET)
    fast = pipe.transform(fb_cache.transform(fb_cache.FBCachePlan(threshold=0.6)))
    config = diffusers.hooks.FirstBlockCacheConfig(threshold=0.6)
    theirs.transformer.enable_cache(config)
    computed = []
    last = theirs.transformer.single_transformer_blocks[-1].attn
    last.register_forward_hook(lambda *_: computed.append(None))
    noise = np.random.default_rng(0).standard_normal((1, 8, 12, 4)).astype(np.float32)
    options: dict[str, Any] = {"height": 16, "width": 24, "num_inference_steps": 28}
    options["output_type"] = "latent"
    length = theirs.tokenizer_2.model_max_length
    given = torch.tensor(noise.transpose(0, 3, 1, 2))
    given = diffusers.FluxPipeline._pack_latents(given, 1, 4, 8, 12)
    wanted = theirs("a red glyph", latents=given, max_sequence_length=length, **options).images
    wanted = diffusers.FluxPipeline._unpack_latents(wanted, 16, 24, 2).numpy().transpose(0, 2, 3, 1)
    got, dense = (
        np.asarray(
            each("a red glyph", key=jax.random.key(0), latents=noise, progress=False, **options)
        )
        for each in (fast, pipe)
    )
    assert 1 < len(computed) < 28
    np.testing.assert_allclose(got, wanted, atol=2e-4)
    assert np.abs(dense - wanted).max() > 0.1
