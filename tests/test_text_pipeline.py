"""Text pipelines: from a directory in transformers' layout to text, and back to disk compressed."""

import json
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import converters
import effjax
from effjax import testing
from effjax.finite import NotFiniteWarning
from effjax.generate import generate
from effjax.methods import round_to_nearest, snap_kv
from effjax.pipelines import TextPipeline
from effjax.pipelines.settings import GenerationSettings

WORDS = [*"abcdefghijklmnopqrst", "user", "assistant", "system", "Hello"]
MEGREZ = (
    "{% if messages[0]['role'] != 'system' %}<|role_start|>system<|role_end|>Hello<|turn_end|>"
    "{% endif %}{% for message in messages %}<|role_start|>{{ message['role'] }}<|role_end|>"
    "{{ message['content'] }}<|turn_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|role_start|>assistant<|role_end|>{% endif %}"
)
SPECIAL = ["<|role_start|>", "<|role_end|>", "<|turn_end|>", "<|eos|>"]


def make_tokenizer(around="$A", begin=None):
    """One token for each word; `around` a text stand special tokens, and `begin` is the first."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["?", *SPECIAL, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[(name, vocabulary[name]) for name in SPECIAL]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=begin,
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
    place = next(i for i, word in enumerate(words) if i and word not in " ".join(words[:i]))
    assert pipe("a b c", stop=words[place]).split() == words[:place]


@pytest.fixture(scope="module")
def drawn(pipe):
    """A text that goes on behind special tokens, and what it was drawn with."""
    endless = TextPipeline(pipe.forward, pipe.params, pipe.tokenizer, {"eos_token_id": None})
    for seed in range(200):
        how = {"key": jax.random.key(seed), "temperature": 2.0, "max_new_tokens": 20}
        row = generate(pipe.forward, pipe.params, [pipe.encode("a b c")], **how).rows()[0]
        places = [i for i, token in enumerate(row) if 1 <= token <= 4]
        if places and 2 < places[0] < 14 and row[places[0] + 1] > 4 and len(set(row[:3])) == 3:
            return endless, row, places[0], how
    raise AssertionError("no such text")


def words(pipe, tokens):
    return pipe.tokenizer.convert_ids_to_tokens(tokens)


class Kept:
    """A streamer that keeps the tokens of one text."""

    def __init__(self):
        self.put_ = []

    def put(self, value):
        self.put_.append(value)

    def end(self):
        self.tokens = [int(value[0]) for value in self.put_[1:]]


def test_stop_strings_may_be_special_tokens_and_span_tokens(drawn):
    """A text ends before the stop, wherever it begins; special tokens are not in it."""
    pipe, row, place, how = drawn
    names = words(pipe, row)
    for stop in (names[place], f"{names[place - 1]} {names[place]}", names[place][2:], names[2]):
        written = " ".join(names)
        end = written.index(stop)
        want = " ".join(name for name in written[:end].split() if not name.startswith("<|"))
        streamer = Kept()
        text = pipe("a b c", stop=["never", stop], streamer=streamer, **how)
        assert text.rstrip() == want
        last = len(written[: end + len(stop)].split())
        assert streamer.tokens == row[:last]


@pytest.mark.parametrize("stop", ["", ["a", ""], None, 3, [b"a"]])
def test_stop_strings_have_characters(untyped, pipe, stop):
    with pytest.raises(ValueError, match="stop takes texts of one or more characters"):
        pipe("a", stop=stop)


@pytest.mark.torch
def test_streams_into_transformers_streamers(pipe, capsys):
    pytest.importorskip("torch")
    from transformers import TextStreamer

    streamer = TextStreamer(pipe.tokenizer, skip_prompt=True, skip_special_tokens=True)
    text = pipe("a b c", streamer=streamer)
    assert capsys.readouterr().out.split() == text.split()


def test_one_text_many_questions(pipe):
    context = pipe.prefill("a b c d e f", new=20)
    for question in ("g h", "i"):
        assert pipe(question, prefix=context) == pipe(f"a b c d e f {question}")
    assert pipe("", prefix=context) == pipe("a b c d e f")
    small = pipe.transform(snap_kv.transform(snap_kv.SnapKVPlan(capacity=4, window=2)))
    kept = small.prefill("a b c d e f", new=20)
    assert isinstance(small("g h", prefix=kept), str)
    with pytest.raises(ValueError, match="another kind of cache"):
        pipe("g", prefix=kept)
    with pytest.raises(ValueError, match="room for 26; 40 more"):
        pipe("g", prefix=context, max_new_tokens=40)


@pytest.mark.parametrize(
    ("around", "text", "question"),
    [
        ("$A", [5, 6], [7]),
        ("<|role_start|> $A", [1, 5, 6], [7]),
        ("$A <|eos|>", [5, 6], [7, 4]),
        ("<|role_start|> <|role_end|> $A <|eos|>", [1, 2, 5, 6], [7, 4]),
    ],
)
def test_a_continuation_begins_no_text(pipe, around, text, question):
    """Tokens around a text stand at its beginning and at its end only."""
    tokenizer = make_tokenizer(around, begin="<|role_start|>")
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    assert own.encode("a b", ends=False) == text
    assert own.encode("c", begins=False) == question
    assert own.encode("a b c") == text + question
    assert own.encode("<|role_start|> a", begins=False)[:2] == [1, 5]  # one that was written


def test_a_continuation_is_the_whole_text(pipe):
    tokenizer = make_tokenizer("<|role_start|> $A", begin="<|role_start|>")
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, {"max_new_tokens": 6})
    context = own.prefill("a b c d e", new=20)
    assert context.lengths.tolist() == [6]
    assert own("g h", prefix=context) == own("a b c d e g h")


def test_chats_that_continue_a_context_begin_no_text(pipe):
    tokenizer = make_tokenizer(begin="<|role_start|>")  # as the template begins
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    chat = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    whole = own.encode(chat)
    assert own.encode(chat, begins=False) == whole[1:]
    context = own.prefill(chat[:1], new=20)
    opened = [1, *tokenizer.convert_tokens_to_ids(["system", "<|role_end|>", "a", "<|turn_end|>"])]
    assert own.encode(chat[:1], add_generation_prompt=False) == opened
    assert context.lengths.tolist() == [5]
    assert isinstance(own(chat[1:], prefix=context), str)


def test_scores_and_perplexity(pipe):
    (scores,) = pipe.score("a b c d")
    assert scores.shape == (3,)
    assert pipe.perplexity(["a b c d"]) == pytest.approx(np.exp(-scores.mean()))


def test_compressed_pipelines_are_saved(pipe, tmp_path):
    quantized = pipe.transform(
        round_to_nearest.transform(round_to_nearest.uniform(8, 16)),
        snap_kv.transform(snap_kv.SnapKVPlan(capacity=4, window=2)),
    )
    quantized.save(tmp_path / "small")
    again = effjax.pipeline(tmp_path / "small")
    assert again.forward == quantized.forward
    chex.assert_trees_all_equal(again.params, quantized.params)
    assert again.settings == quantized.settings
    prompt = "a b c d e f g"
    assert again(prompt) == quantized(prompt)


def settings_of(directory, tmp_path, generation, **config):
    """The pipeline of a copy of the model with other settings."""
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    before = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**before, **config}))
    return effjax.pipeline(tmp_path, progress=False)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, {}, [4]),  # the tokenizer's
        (None, {"eos_token_id": [1, 2]}, [1, 2]),
        (None, {"eos_token_id": None}, [4]),
        ({"temperature": 0.5}, {"eos_token_id": 2}, [2]),
        ({"eos_token_id": 3}, {"eos_token_id": 2}, [3]),
        ({"eos_token_id": None}, {"eos_token_id": 2}, []),
        ({"eos_token_id": [3, 4], "cache_implementation": {"unknown": 1}}, {}, [3, 4]),
    ],
)
def test_where_ends_come_from(directory, tmp_path, generation, config, ends):
    assert settings_of(directory, tmp_path, generation, **config).ends == ends


def test_settings_of_a_configuration_are_saved(directory, tmp_path):
    (tmp_path / "loose").mkdir()
    config = {"eos_token_id": [1, 2], "bos_token_id": 3, "pad_token_id": -1, "top_k": 7}
    found = settings_of(directory, tmp_path / "loose", None, **config)
    assert found.settings == config
    found.save(tmp_path / "saved")
    assert effjax.pipeline(tmp_path / "saved").settings == config


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("eos_token_id", "2"),
        ("eos_token_id", [2, True]),
        ("eos_token_id", -1),
        ("eos_token_id", {"id": 2}),
        ("bos_token_id", 1.5),
        ("pad_token_id", "pad"),
        ("do_sample", "false"),
        ("do_sample", 1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("temperature", "hot"),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 3.5),
        ("top_k", "5"),
        ("top_p", 1.5),
        ("top_p", [0.9]),
        ("min_p", -0.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", "1.1"),
    ],
)
def test_settings_have_types_and_ranges(pipe, name, value):
    with pytest.raises(ValueError, match=rf"a/generation_config\.json: {name} must be .*, got"):
        GenerationSettings.of({name: value, "other": value}, "a/generation_config.json")
    with pytest.raises(ValueError, match=rf"generation_config\.json: {name} must be"):
        TextPipeline(pipe.forward, pipe.params, pipe.tokenizer, {name: value})


def test_files_of_settings_are_named(directory, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json: top_k must be a whole number.*; top_p"):
        settings_of(directory, tmp_path, None, top_k="five", top_p=7)
    with pytest.raises(ValueError, match=r"eos_token_id \[29\] is no token .* knows 0 \.\.\. 28"):
        settings_of(directory, tmp_path, {"eos_token_id": [3, 29]})


def test_settings_that_are_off_change_nothing(pipe):
    def text(**settings):
        own = TextPipeline(pipe.forward, pipe.params, pipe.tokenizer, settings)
        return own("a b c", key=jax.random.key(0), max_new_tokens=6)

    want = text()
    assert want == text(top_k=0, min_p=0.0, top_p=1.0, repetition_penalty=1.0, do_sample=False)
    assert want == text(temperature=1, top_k=None, min_p=None, top_p=None, do_sample=None)
    greedy = pipe("a b c", max_new_tokens=6)
    tokens = pipe.settings["eos_token_id"]
    assert text(temperature=0, eos_token_id=tokens) == greedy
    assert text(temperature=1e-44, eos_token_id=tokens) == greedy
    # What is asked for goes before the settings: off, too.
    own = {"key": jax.random.key(0), "max_new_tokens": 6, "temperature": 1.0}
    assert pipe("a b c", top_k=0, **own) == text(eos_token_id=tokens)


REASONING = (
    "{% for message in messages %}{% if message.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('there is no role ' + message.role) }}{% endif %}"
    "{{ message.role }} {{ message.content }} {% endfor %}"
    "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}"
    "{% for document in documents or [] %}{{ document.text }} {% endfor %}"
    "{% if add_generation_prompt %}system {% if not enable_thinking | default(true) %}t {% endif %}"
    "{% endif %}"
)


def greet(a: str):
    """Say hello.

    Args:
        a: whom to.
    """


@pytest.mark.parametrize(
    ("options", "written"),
    [
        ({}, "user a system"),
        ({"enable_thinking": True}, "user a system"),
        ({"enable_thinking": False}, "user a system t"),
        ({"documents": [{"text": "q r"}]}, "user a q r system"),
        ({"add_generation_prompt": False}, "user a"),
        ({"chat_template": "{{ messages[0].content }} {{ more }}", "more": "s"}, "a s"),
    ],
)
def test_options_reach_the_chat_template(pipe, options, written):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REASONING
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    chat = [{"role": "user", "content": "a"}]
    assert words(pipe, own.encode(chat, **options)) == written.split()


def test_options_of_chats_in_calls(pipe):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REASONING
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    chat = [{"role": "user", "content": "a"}]
    answer = own(chat, enable_thinking=False, temperature=0.0)
    assert answer == own("user a system t")
    with pytest.raises(TypeError, match="unknown options enable_thoughts; there are temperature"):
        own(chat, enable_thoughts=False)
    with pytest.raises(TypeError, match=r"unknown options enable_thinking.*chats take"):
        own("a", enable_thinking=False)
    with pytest.raises(ValueError, match="cannot render this chat: there is no role tool"):
        own([{"role": "tool", "content": "a"}])
    with pytest.raises(ValueError, match="cannot render this chat"):
        own(chat, documents=3)


def test_tools_reach_the_chat_template(pipe):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = REASONING.replace("tool.function.name", "tool.function.description")
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    tokens = own.encode([{"role": "user", "content": "a"}], tools=[greet])
    assert words(pipe, tokens) == ["user", "a", "?", "?", "system"]  # "Say hello."


def test_a_last_message_of_the_assistant_is_continued(pipe):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    assert words(pipe, pipe.encode(chat))[-3:] == ["<|role_end|>", "b", "c"]
    closed = pipe.encode(chat, continue_final_message=False)
    assert words(pipe, closed)[-4:] == [
        "<|turn_end|>",
        "<|role_start|>",
        "assistant",
        "<|role_end|>",
    ]


def test_prompts_without_tokens_and_other_things(pipe):
    begun = TextPipeline(pipe.forward, pipe.params, make_tokenizer(begin="<|eos|>"), pipe.settings)
    assert begun.encode("") == [4]
    said = TextPipeline(pipe.forward, pipe.params, pipe.tokenizer, {"bos_token_id": 7})
    assert said.encode(" ") == [7]
    with pytest.raises(ValueError, match="the prompt '' has no tokens, and this model has none"):
        pipe("")
    for wrong in ([], [[]], ["a", []]):
        with pytest.raises(ValueError, match="a prompt is a text, or a chat"):
            pipe(wrong)
    for wrong in (0, -3, True):
        with pytest.raises(ValueError, match="max_new_tokens must be a whole number of tokens"):
            pipe("a", max_new_tokens=wrong)
    with pytest.raises(ValueError, match="nothing to predict"):
        pipe.perplexity(["a", "b"])


def test_a_tokenizer_may_know_more_than_the_model(pipe):
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<pad>"])
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    assert own("a b c") == pipe("a b c")
    with pytest.raises(
        ValueError, match=r"the token '<pad>' \(29\), and the model knows 0 \.\.\. 28"
    ):
        own("a <pad> b")
    tokenizer.eos_token = "<pad>"  # never made, so it ends nothing
    assert TextPipeline(pipe.forward, pipe.params, tokenizer).ends == []


def test_what_is_not_finite_is_warned_of(pipe):
    own = TextPipeline(
        pipe.forward, jax.tree.map(lambda x: x * jnp.nan, pipe.params), pipe.tokenizer
    )
    with pytest.warns(NotFiniteWarning, match=r"1 of 1 sequences"):
        own("a b c", max_new_tokens=6)
    with pytest.warns(NotFiniteWarning, match="3 of 3 values"):
        own.perplexity("a b c d")


def test_threads_share_a_pipeline(pipe):
    """Of a tokenizer that was saved with a length, which the first call takes away."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=9)
    own = TextPipeline(pipe.forward, pipe.params, tokenizer, pipe.settings)
    prompts = ["a b c", "d e f", "g h i", "j k l"]
    want, found = {prompt: pipe(prompt) for prompt in prompts}, []

    def work(number):
        for turn in range(4):
            prompt = prompts[(number + turn) % 4]
            found.append((prompt, own(prompt)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 32
    assert all(text == want[prompt] for prompt, text in found)


def test_what_does_not_belong_together_is_named(pipe, tmp_path):
    plain = make_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        TextPipeline(pipe.forward, pipe.params, plain)([{"role": "user", "content": "a"}])
    with pytest.raises(ValueError, match=r"model_index\.json"):
        effjax.pipeline(tmp_path)
