"""Tokenizers that are a sentencepiece model and no tokenizer.json, as older T5 checkpoints have."""

import io
import json
import sys

import pytest

import converters
import effjax
from effjax import testing

WORDS = ["a red fox jumps over the lazy dog", "amber fox cedar owl", "the quick brown fox"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A language model's folder, and the sentencepiece model that lies in it."""
    sentencepiece = pytest.importorskip("sentencepiece")
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(WORDS * 20),
        model_writer=made,
        vocab_size=60,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("models") / "llama"
    subject = testing.tiny_llama(vocab_size=64)
    converters.save_pretrained(subject.forward, subject.params, folder, progress=False)
    (folder / "spiece.model").write_bytes(made.getvalue())
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": 512}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder, sentencepiece.SentencePieceProcessor(model_proto=made.getvalue())


def test_its_tokens_are_sentencepieces(trained):
    folder, model = trained
    tokenizer = effjax.pipeline(folder, progress=False).tokenizer
    for text in (*WORDS, "owl over fox"):
        assert tokenizer(text)["input_ids"] == [*model.encode(text), 1]


def test_where_sentencepiece_is_missing_it_is_named(trained, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ValueError, match=r"no tokenizer\.json; .* pip install sentencepiece"):
        effjax.pipeline(trained[0], progress=False)
