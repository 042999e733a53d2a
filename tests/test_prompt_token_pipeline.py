"""Pipelines of Janus: a directory of transformers, prompts of uneven lengths, commands, errors."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

import effjax
from converters import convert
from effjax import testing
from effjax.cli import main
from effjax.methods import even_steps, kivi, knorm, round_to_nearest
from effjax.pipelines import PromptTokenPipeline
from effjax.pipelines.description import describe
from pallas_kernels import use_implementation

WORDS = ("<pad>", "<s>", "<boi>", "<unk>", "a", "<image>", "red", "fox", "in", "snow", "user", ":")
PROMPTS = ["a red fox in snow", "a fox"]
KEY = jax.random.key(0)


@pytest.fixture(autouse=True)
def _what_runs_here():
    with use_implementation("xla"):
        yield


def tokenizer(template=None, words=None):
    """One token per word; behind one that begins texts, unless words are given with their ids."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = words or {word: i for i, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>"}
    if words is None:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
        special |= {"pad_token": "<pad>", "bos_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, chat_template=template, **special)


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_janus()
    return PromptTokenPipeline(
        subject.forward, subject.params, subject.sampler.vae, tokenizer=tokenizer()
    )


def test_a_directory_of_transformers_is_a_pipeline(tmp_path):
    """Greedy tokens of uneven prompts are those of `generate`, also after saving and converting."""
    pytest.importorskip("torch")
    import torch

    from tests.models import janus_reference

    model, path = janus_reference.random_model(), tmp_path / "janus"
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    pipe = effjax.pipeline(path, progress=False)
    assert (type(pipe), pipe.size, pipe.family.guidance) == (PromptTokenPipeline, (6, 6, 3), 5.0)
    rows = [[1, 4, 6, 7, 8, 9, 5], [0, 0, 0, 1, 4, 7, 5]]  # tokens, padded at the left
    mask = [[1] * 7, [0] * 3 + [1] * 4]
    wanted = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        generation_mode="image",
        do_sample=False,
        guidance_scale=5.0,
    ).numpy()
    options = {"key": KEY, "top_k": 1, "output_type": "tokens", "progress": False}
    np.testing.assert_array_equal(pipe(PROMPTS, **options), wanted)
    np.testing.assert_array_equal(pipe(PROMPTS[1], **options), wanted[1:])
    assert describe(path)["model"] == "Janus"
    with pytest.raises(ValueError, match="holds a vqmodel beside its JanusForConditionalGen"):
        convert(path, tmp_path / "lost", progress=False)
    pipe.save(tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted", progress=False)
    for copy in ("saved", "converted"):
        again = effjax.pipeline(tmp_path / copy, progress=False)
        assert (type(again), again.forward) == (PromptTokenPipeline, pipe.forward)
        chex.assert_trees_all_equal((again.params, again.vae[1]), (pipe.params, pipe.vae[1]))


def test_prompts_stand_at_the_right(pipe):
    """As a user's words where the tokenizer has a template, else as they are."""
    cond, uncond = pipe.conditions(PROMPTS)
    assert uncond is None
    assert cond.tokens.shape == (2, 16)
    for row, own in enumerate(([1, 4, 6, 7, 8, 9, 2], [1, 4, 7, 2])):
        np.testing.assert_array_equal(cond.tokens[row], [0] * (16 - len(own)) + own)
        assert np.asarray(cond.mask[row]).tolist() == [False] * (16 - len(own)) + [True] * len(own)
    away = pipe.forward.config.null_condition(cond)
    np.testing.assert_array_equal(away.tokens[1, -4:], [1, 0, 0, 2])
    np.testing.assert_array_equal(away.mask, cond.mask)
    template = "{% for m in messages %}{{ m.role }} : {{ m.content[0].text }}{% endfor %}"
    talked = dataclasses.replace(pipe, tokenizer=tokenizer(template))
    np.testing.assert_array_equal(
        talked.conditions(PROMPTS[1])[0].tokens[0, -6:], [1, 10, 11, 4, 7, 2]
    )


def test_methods_and_commands(pipe, tmp_path):
    tokens = pipe(PROMPTS, key=KEY, output_type="tokens", progress=False)
    assert pipe.logits(tokens, PROMPTS).shape == (2, 16, 40)
    pipe.save(tmp_path / "copy")
    source, folder, small = (str(tmp_path / name) for name in ("copy", "images", "small"))
    asked = ["--guidance", "3", "--top-k", "5", "--decoder", "jacobi,window=4", "-o", folder]
    assert main(["sample", source, "--prompt", "a red fox", *asked]) == 0
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["000_a_red_fox.png"]
    assert main(["apply", source, small, "kivi", "--group", "4"]) == 0
    assert main(["bench", small, "--prompt", "a fox", "--repeats", "1"]) == 0
    changed = pipe.transform(
        round_to_nearest.transform(round_to_nearest.uniform(8, 16)),
        kivi.transform(kivi.KIVIPlan(group=4)),
    )
    assert [name for name, _ in changed.forward.recipe] == ["round_to_nearest", "kivi"]
    pressed = pipe.transform(knorm.transform(knorm.METHOD.plan(ratio=0.5)))
    assert pressed(PROMPTS, key=KEY, output_type="tokens", progress=False).shape == (2, 16)
    with pytest.raises(ValueError, match="even_steps keeps what a call computed"):
        pipe.transform(even_steps.transform(even_steps.EvenStepsPlan()))


def test_bad_input(untyped, pipe, capsys, tmp_path):
    for options, message in (
        ({"prompt": "a " * 47}, "a prompt has 49 tokens, and beside an image of 16 .* reads 48"),
        ({"guidance_scale": -1.0}, "guidance_scale must be a finite number of at least 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number"),
        ({"top_k": 41}, r"top_k must be 1 \.\.\. 40"),
        ({"prompt": 3}, "prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**{"prompt": "a fox", "key": KEY, **options})
    with pytest.raises(ValueError, match="a JanusPipeline needs its tokenizer"):
        dataclasses.replace(pipe, tokenizer=None)
    config = dataclasses.replace(pipe.forward.config, pad_token=None)
    with pytest.raises(ValueError, match=r"know its pad_token, .*: generation_config"):
        dataclasses.replace(pipe, forward=dataclasses.replace(pipe.forward, config=config))
    few = dataclasses.replace(pipe.forward.config, text_vocab_size=5)
    other = dataclasses.replace(pipe, forward=dataclasses.replace(pipe.forward, config=few))
    with pytest.raises(ValueError, match=r"the tokenizer makes token 7, and the model knows 0"):
        other.conditions("a fox")
    with pytest.raises(ValueError, match="VQ model has 30 codes, and the model predicts 40"):
        dataclasses.replace(pipe, vae=testing.tiny_vq_model(vocab_size=30))
    pipe.save(tmp_path / "copy")
    assert main(["sample", str(tmp_path / "copy"), "--labels", "1"]) == 1
    assert "conditioned on texts: give --prompt" in capsys.readouterr().err
