"""Text pipelines: from a directory in transformers' layout to text, and back to disk compressed."""

import json

import chex
import jax
import numpy as np
import pytest

import converters
import effjax
from effjax import testing
from effjax.methods import round_to_nearest, snap_kv
from effjax.pipelines import TextPipeline

WORDS = [*"abcdefghijklmnopqrst", "user", "assistant", "system", "Hello"]
MEGREZ = (
    "{% if messages[0]['role'] != 'system' %}<|role_start|>system<|role_end|>Hello<|turn_end|>"
    "{% endif %}{% for message in messages %}<|role_start|>{{ message['role'] }}<|role_end|>"
    "{{ message['content'] }}<|turn_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role_start|>assistant<|role_end|>{% endif %}"
)
SPECIAL = ["<|role_start|>", "<|role_end|>", "<|turn_end|>", "<|eos|>"]


def make_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["?", *SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|eos|>",
        unk_token="?",
        additional_special_tokens=SPECIAL[:3],
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = MEGREZ
    return made


def write_language_model(path):
    """A tiny random model as transformers would keep it."""
    subject = testing.tiny_llama(vocab_size=29)
    converters.save_pretrained(subject.forward, subject.params, path, progress=False)
    make_tokenizer().save_pretrained(path)
    settings = {"eos_token_id": [3, 4], "temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    (path / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "llama"
    write_language_model(path)
    return path


@pytest.fixture(scope="module")
def pipe(directory):
    return effjax.pipeline(directory, progress=False)


def test_a_directory_becomes_a_pipeline(pipe):
    assert isinstance(pipe, TextPipeline)
    assert pipe.ends == [3, 4]
    one = pipe("a b c")
    assert isinstance(one, str)
    assert pipe(["a b c", "d"])[0] == one
    assert 0 < len(one.split()) <= 6


def test_chats_follow_the_template(pipe):
    tokens = pipe.encode([{"role": "user", "content": "a b"}])
    text = pipe.tokenizer.decode(tokens)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat = [{"role": "system", "content": "c"}, *chat, {"role": "user", "content": "d"}]
    rendered = pipe.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|role_start|>system<|role_end|>c<|turn_end|><|role_start|>user<|role_end|>a<|turn_end|>"
        "<|role_start|>assistant<|role_end|>b<|turn_end|><|role_start|>user<|role_end|>d"
        "<|turn_end|><|role_start|>assistant<|role_end|>"
    )
    assert "Hello" in text
    assert isinstance(pipe([{"role": "user", "content": "a b"}]), str)
    assert len(pipe([[{"role": "user", "content": "a"}], "b"])) == 2


def test_a_key_draws_as_the_settings_say(pipe):
    drawn = pipe("a b c", key=jax.random.key(0), max_new_tokens=20)
    assert drawn == pipe("a b c", key=jax.random.key(0), max_new_tokens=20)
    options = {"temperature": 0.7, "top_k": 5, "max_new_tokens": 20}
    assert drawn == pipe("a b c", key=jax.random.key(0), **options)
    assert drawn != pipe("a b c", key=jax.random.key(1), max_new_tokens=20)
    with pytest.raises(TypeError, match="unknown options heat"):
        pipe("a", heat=3)


def test_stop_strings_cut_the_text(pipe):
    words = pipe("a b c").split()
    assert pipe("a b c", stop=words[2]).split() == words[: words.index(words[2])]


@pytest.mark.torch
def test_streams_into_transformers_streamers(pipe, capsys):
    pytest.importorskip("torch")
    from transformers import TextStreamer

    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = pipe("a b c", streamer=streamer)
    assert capsys.readouterr().out.split() == text.split()


def test_one_text_many_questions(pipe):
    context = pipe.compress("a b c d e f", new=20)
    for question in ("g h", "i"):
        assert pipe(question, context=context) == pipe(f"a b c d e f {question}")
    small = pipe.transform(snap_kv.transform(snap_kv.SnapKVPlan(capacity=4, window=2)))
    kept = small.compress("a b c d e f", new=20)
    assert isinstance(small("g h", context=kept), str)
    with pytest.raises(ValueError, match="room for 26; 40 more"):
        pipe("g", context=context, max_new_tokens=40)


def test_scores_and_perplexity(pipe):
    (scores,) = pipe.score("a b c d")
    assert scores.shape == (3,)
    assert pipe.perplexity(["a b c d"]) == pytest.approx(np.exp(-scores.mean()))


def test_compressed_pipelines_are_saved(pipe, tmp_path):
    quantised = pipe.transform(
        round_to_nearest.transform(round_to_nearest.uniform(8, 16)),
        snap_kv.transform(snap_kv.SnapKVPlan(capacity=4, window=2)),
    )
    quantised.save(tmp_path / "small")
    again = effjax.pipeline(tmp_path / "small")
    assert again.forward == quantised.forward
    chex.assert_trees_all_equal(again.params, quantised.params)
    assert again.settings == quantised.settings
    prompt = "a b c d e f g"
    assert again(prompt) == quantised(prompt)


def test_what_does_not_belong_together_is_named(pipe, tmp_path):
    subject = testing.tiny_llama(vocab_size=10)
    with pytest.raises(ValueError, match="the tokenizer has 29 tokens, the model knows 10"):
        TextPipeline(subject.forward, subject.params, pipe.tokenizer)
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TextPipeline(pipe.forward, pipe.params, plain)([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match=r"model_index\.json"):
        effjax.pipeline(tmp_path)
