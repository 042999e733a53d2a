"""Pipelines of Chameleon: a directory of transformers with the VQGAN's file, prompts, commands."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import converters
import effjax
from effjax import testing
from effjax.autoregression import logits_of
from effjax.cli import main
from effjax.methods import kivi
from effjax.pipelines import PromptTokenPipeline
from effjax.pipelines.description import describe
from pallas_kernels import use_implementation
from tests.test_prompt_token_pipeline import tokenizer

KEY = jax.random.key(0)
PROMPTS = ["a red fox in snow", "a fox"]


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_chameleon(num_layers=1)
    return PromptTokenPipeline(
        subject.forward, subject.params, subject.sampler.vae, tokenizer=tokenizer()
    )


def test_a_directory_of_transformers_with_its_vqgan_is_a_pipeline(tmp_path):
    """Guided greedy codes are those of its own forward; saved and converted copies are the same."""
    pytest.importorskip("torch")
    import torch

    from tests.models import chameleon_reference as reference

    model, path = reference.random_model(grid=4), tmp_path / "chameleon"
    model.save_pretrained(path)
    words = tokenizer(words={"fox": 20, "red": 21, "snow": 22, "a": 23, "in": 24, "<unk>": 25})
    words.save_pretrained(path)
    with pytest.raises(ValueError, match=r"has no vqgan\.ckpt, which decodes .*Texts alone are"):
        effjax.pipeline(path, progress=False)
    torch.save({"state_dict": reference.vqgan(model)}, tmp_path / "vqgan.ckpt")
    codes = converters.from_pretrained(tmp_path / "vqgan.ckpt", progress=False)
    given = effjax.pipeline(path, vae=codes, progress=False)
    (tmp_path / "vqgan.ckpt").rename(path / "vqgan.ckpt")
    pipe = effjax.pipeline(path, progress=False)
    assert (type(pipe), pipe.size, pipe.grid) == (PromptTokenPipeline, (64, 64, 3), (4, 4))
    assert (given.vae[0], given.forward) == (pipe.vae[0], pipe.forward)
    chex.assert_trees_all_equal(given.vae[1], pipe.vae[1])
    texts = ([23, 21, 20, 24, 22], [23, 20])  # of other lengths
    wanted = [reference.greedy_codes(model, text, 3.0) for text in texts]
    got = pipe(PROMPTS, top_k=1, key=KEY, output_type="tokens", progress=False)
    np.testing.assert_array_equal(got, wanted)
    assert len(np.unique(wanted)) > 3
    assert describe(path)["model"] == "Chameleon"
    pipe.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="holds a vqmodel beside its ChameleonForConditionalGen"):
        converters.convert(path, tmp_path / "lost", progress=False)
    converters.convert(tmp_path / "saved", tmp_path / "converted", progress=False)
    for copy in ("saved", "converted"):
        again = effjax.pipeline(tmp_path / copy, progress=False)
        assert (type(again), again.forward) == (PromptTokenPipeline, pipe.forward)
        chex.assert_trees_all_equal((again.params, again.vae[1]), (pipe.params, pipe.vae[1]))


def test_prompts_and_what_they_are_led_away_from(pipe):
    """What a user says, its end and an image's begin; and no text at all."""
    cond, uncond = pipe.conditions(PROMPTS)
    assert uncond is None
    for row, own in enumerate(([1, 4, 6, 7, 8, 9, 3, 2], [1, 4, 7, 3, 2])):
        np.testing.assert_array_equal(cond.tokens[row], [0] * (16 - len(own)) + own)
        assert np.asarray(cond.mask[row]).tolist() == [False] * (16 - len(own)) + [True] * len(own)
    config = pipe.forward.config
    assert config.framed([4, 7]) == [1, 4, 7, 3, 2]  # of a tokenizer that begins no text
    away = config.null_condition(cond)
    np.testing.assert_array_equal(away.tokens, [[0] * 14 + [1, 2]] * 2)
    np.testing.assert_array_equal(away.mask, [[False] * 14 + [True] * 2] * 2)


def test_defaults_and_logits(pipe):
    """Those of the released code; logits are of codes, and a draw is what they say."""
    loop = pipe.sampler()
    assert (loop.guidance, loop.top_k, loop.top_p, loop.temperature) == (3.0, None, 0.9, 0.7)
    assert pipe.sampler(temperature=1.0, top_p=1.0).temperature is None
    options = {"key": KEY, "guidance_scale": 1.0, "top_k": 1, "progress": False}
    tokens = pipe(PROMPTS, output_type="tokens", **options)
    logits = pipe.logits(tokens, PROMPTS)
    assert logits.shape == (2, 16, 40)
    np.testing.assert_array_equal(logits.argmax(-1), tokens)
    first = pipe.logits(tokens[:, :5], PROMPTS)
    chex.assert_trees_all_close(first, logits[:, :5], atol=1e-5)
    cond = pipe.conditions(PROMPTS)[0]
    wanted = jax.jit(logits_of)(pipe.forward, pipe.params, tokens, cond)
    chex.assert_trees_all_close(wanted, logits, atol=1e-5)


def test_commands(pipe, tmp_path):
    pipe.save(tmp_path / "copy")
    source, folder, small = (str(tmp_path / name) for name in ("copy", "images", "small"))
    asked = ["--guidance", "3", "--top-k", "5", "--decoder", "jacobi,window=4", "-o", folder]
    assert main(["sample", source, "--prompt", "a red fox", *asked]) == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000_a_red_fox.png"]
    assert main(["apply", source, small, "kivi", "--group", "4"]) == 0
    assert effjax.pipeline(small, progress=False).forward.recipe == (
        ("kivi", kivi.KIVIPlan(group=4)),
    )


@pytest.mark.slow
def test_a_small_model_is_measured_beside_its_own(pipe, tmp_path):
    small = str(tmp_path / "small")
    pipe.transform(kivi.transform(kivi.KIVIPlan(group=4))).save(small)
    asked = ["bench", small, "--prompt", "a fox", "--repeats", "1"]
    assert main(asked) == 0
    assert main([*asked, "--decoder", "jacobi,window=4"]) == 1  # kivi's cache cannot go back


def test_bad_input(untyped, pipe):
    for prompt, message in (
        ("a " * 46, "a prompt has 49 tokens, and beside an image of 16 .* reads 48"),
        ("a <image> fox", "the token 5, which stands for an image"),
        (3, "prompt must be a text"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(prompt, key=KEY)
    with pytest.raises(ValueError, match=r"top_k must be 1 \.\.\. 40"):
        pipe("a fox", key=KEY, top_k=41)
    config = dataclasses.replace(pipe.forward.config, boi_token=None)
    with pytest.raises(ValueError, match=r"know its boi_token, .*: vocabulary_map of config"):
        dataclasses.replace(pipe, forward=dataclasses.replace(pipe.forward, config=config))
    with pytest.raises(ValueError, match="VQ model has 30 codes, and the model predicts 40"):
        dataclasses.replace(pipe, vae=testing.tiny_vq_model(vocab_size=30))
    with pytest.raises(ValueError, match=r"tokens of prompts are 0 \.\.\. 63, got boi_token=64"):
        dataclasses.replace(config, boi_token=64)
