"""A world of text: Python's own library, and tasks whose answers stand far back in the context.

Every machine that runs this has the text; a tenth of its files is held out. The tasks are

    lookup   put amber fox / put cedar owl / ... / get amber -> fox      one key among many
    pass     library text with "The pass key is 4 0 7 1." somewhere, asked for at the end
    pairs    amber fox cedar owl amber fox cedar owl cedar owl ...       in random orders
    repeat   amber owl fox amber owl fox amber ...                       with a period of its own

A document is token ids with a weight for each: how much predicting this token counts in training.
What nobody could predict (a random value when it is put) has weight 0.
"""

from __future__ import annotations

import dataclasses
import functools
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

_LISTED = """
acorn actor agent alarm album alley amber angel ankle apple april apron arena arrow aspen atlas
attic audio award bacon badge bagel baker banjo barge baron basil basin beach beard berry birch
bison blade blaze block bloom board boat bonus booth bow brain brake brass bread brick bride brook
broom brush bugle cabin cable cactus camel canal candy canoe cargo carol cedar chain chair chalk
charm cheek chess chest chief child chord cider civic clam clay cliff clock cloud clown coach coast
cobra cocoa comet coral couch court cove crab crane crate creek crown curry daisy dance deer delta
desk diary diner ditch dough dove drama dress drum duck dune eagle earth easel elbow elm ember fable
falcon fern ferry field finch flame flask fleet flint flock flora flour flute foam forest fork fox
frost fruit gate ghost giant glass globe glove goat gold goose grape grass gravel grove guest gull
guitar harbor harp hawk hazel heart hedge heron hill hive honey horn horse hotel house igloo index
inlet iris iron island ivory ivy jacket jade jar jelly jewel judge juice kayak kettle king kite knee
knife knot koala label ladder lake lamp larch laser lemon lever lily linen lion lizard llama lobby
lotus lunar lynx magnet mango maple marble marsh meadow medal melon metal mint mirror mole moon
moose moss motor mouse museum nail navy needle nest noise north novel nurse oak oasis oboe ocean
olive onion opera orbit orchid otter owl oyster paddle paint palm panda paper parade patio peach
pearl pebble pencil pepper
"""
WORDS = tuple(_LISTED.split())

PASS = "The pass key is "
TEXT = 0.3  # weight of a token of the library
# Shares of the kinds of documents in training.
_SHORT = {"lookup": 0.5, "pairs": 0.5}
_LONG = {"lookup": 0.4, "pairs": 0.1, "repeat": 0.15, "passkey": 0.15, "passage": 0.2}
KEYS = 192  # words that are keys; the others are values


class Document(NamedTuple):
    """Tokens of one text.

    Attributes:
        tokens: int32[n].
        weights: float32[n], of predicting each token from those before it.
        answers: places in `tokens` that only somebody who has read the context can predict.
        context: how many tokens there are before the first question.
    """

    tokens: np.ndarray
    weights: np.ndarray
    answers: np.ndarray
    context: int = 0


def library(*, held_out: bool = False) -> str:
    """Source files of Python's standard library, joined; every tenth file is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    paths = [*sorted(folder.glob("*.py")), *sorted(folder.glob("[a-z]*/*.py"))]
    skipped = {"test", "tests", "idlelib", "encodings", "lib2to3", "ensurepip", "site-packages"}
    kept = [path for path in paths if path.parent.name not in skipped]
    chosen = [path for i, path in enumerate(kept) if (i % 10 == 9) == held_out]
    return "\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in chosen)


@dataclasses.dataclass(frozen=True, eq=False)
class World:
    """Documents of a length in tokens.

    Attributes:
        tokenizer: of transformers; every word of `WORDS` after a space is one token.
        text: tokens of the library.
    """

    tokenizer: Any
    text: np.ndarray

    @classmethod
    def of(cls, tokenizer: Any, *, held_out: bool = False, characters: int = 3_000_000) -> World:
        """The world in a tokenizer's tokens; what is held out is never trained on."""
        text = library(held_out=held_out)[:characters]
        return cls(tokenizer, encode(tokenizer, text))

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The token of every word after a space."""
        ids = [encode(self.tokenizer, f" {word}") for word in WORDS]
        split = [word for word, found in zip(WORDS, ids, strict=True) if len(found) != 1]
        if split:
            raise ValueError(f"the tokenizer has no single token for {', '.join(split)}")
        return np.concatenate(ids)

    @functools.cached_property
    def digits(self) -> np.ndarray:
        """The token of every digit."""
        return np.concatenate([self._fixed(str(digit)) for digit in range(10)])

    @functools.cache  # noqa: B019 - a handful of phrases, and a world lives as long as its program
    def _fixed(self, text: str) -> np.ndarray:
        return encode(self.tokenizer, text)

    def lookup(self, rng: np.random.Generator, length: int, *, questions: int) -> Document:
        """Pairs of a key and a value, then questions about the keys, each asked as often."""
        put, get, end = (self._fixed(text)[0] for text in ("put", "get", "\n"))
        pairs = min(length // 4 - questions, KEYS)
        if not 0 < questions < length // 4:
            raise ValueError(
                f"{length} tokens hold {length // 4} lines, which {questions} questions do not fit"
            )
        keys = rng.permutation(self.words[:KEYS])[:pairs]
        values = rng.choice(self.words[KEYS:], pairs)
        asked = np.resize(rng.permutation(pairs), questions)
        rows = [
            np.stack([np.full(len(k), verb), k, v, np.full(len(k), end)], axis=1)
            for verb, k, v in ((put, keys, values), (get, keys[asked], values[asked]))
        ]
        rule = [
            np.tile([0.05, 0, of_value, 0.05], (len(each), 1))
            for each, of_value in zip(rows, (0, 1))
        ]
        tokens, weights = (np.concatenate(each).reshape(-1) for each in (rows, rule))
        answers = 4 * pairs + 2 + 4 * np.arange(questions)
        return _document(tokens, weights, answers, context=4 * pairs)

    def pairs(self, rng: np.random.Generator, length: int) -> Document:
        """A few pairs of words again and again, each time in another order."""
        count = int(rng.integers(3, max(length // 8, 4) + 1))
        pair = np.stack(
            [rng.permutation(self.words)[:count], rng.choice(self.words, count)], axis=1
        )
        rounds = -(-length // (2 * count))
        order = np.concatenate([rng.permutation(count) for _ in range(rounds)])
        answers = np.arange(2 * count + 1, length, 2)
        weights = np.zeros(length)
        weights[answers] = 1
        return _document(pair[order].reshape(-1)[:length], weights, answers)

    def repeat(self, rng: np.random.Generator, length: int) -> Document:
        """Words again and again, with a random period of at most a third of the text."""
        period = int(rng.integers(4, max(length // 3, 5)))
        tokens = np.resize(rng.choice(self.words, period), length)
        weights = np.ones(length)
        weights[: period + 1] = 0
        return _document(tokens, weights, np.arange(period + 1, length))

    def passkey(
        self, rng: np.random.Generator, length: int, *, depth: float | None = None
    ) -> Document:
        """Library text with a pass key at a depth 0 ... 1 (random if None), asked at the end."""
        key = rng.choice(self.digits, 5)
        phrase, end = self._fixed(PASS), self._fixed(".\n")
        told, asked = (np.concatenate([self._fixed("\n"), phrase, key, end]) for _ in range(2))
        filler = self.passage(rng, length - len(told) - len(asked)).tokens
        depth = rng.random() if depth is None else depth
        place = round(depth * len(filler))
        tokens = np.concatenate([filler[:place], told, filler[place:], asked])
        weights = np.full(len(tokens), TEXT)
        start = place + 1 + len(phrase)
        weights[start : start + 5] = 0
        first = len(tokens) - 5 - len(end)
        weights[first : first + 5] = 2
        context = len(tokens) - len(asked)
        return _document(tokens, weights, first + np.arange(5), context=context)

    def passage(self, rng: np.random.Generator, length: int) -> Document:
        """Library text from a random place."""
        start = int(rng.integers(len(self.text) - length))
        tokens = self.text[start : start + length]
        return _document(tokens, np.full(length, TEXT), np.zeros(0, np.int64))

    def mixture(self, rng: np.random.Generator, length: int) -> Document:
        """A document of a random kind, for training; exactly `length` tokens.

        Short ones are tasks alone: what a text needs is learned best without other texts.
        """
        kinds = _SHORT if length <= 64 else _LONG
        kind = rng.choice(list(kinds), p=list(kinds.values()))
        if kind == "lookup":
            questions = int(rng.integers(length // 12, length // 6 + 1))
            made = self.lookup(rng, length, questions=questions)
        else:
            made = getattr(self, kind)(rng, length)
        return self.filled(rng, made, length)

    def filled(self, rng: np.random.Generator, document: Document, length: int) -> Document:
        """A document after so much library text that it has `length` tokens."""
        lacking = length - len(document.tokens)
        if lacking == 0:
            return document
        before = self.passage(rng, lacking)
        parts = zip(before[:2], document[:2], strict=True)
        tokens, weights = (np.concatenate(pair) for pair in parts)
        return Document(tokens, weights, document.answers + lacking, document.context + lacking)

    @functools.cached_property
    def has_words(self) -> bool:
        """Whether every word is one token of its own, which lookups need."""
        ids = [encode(self.tokenizer, f" {word}").tolist() for word in WORDS]
        return all(len(each) == 1 for each in ids) and len(set(map(tuple, ids))) == len(WORDS)


def batch(documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of one length as tokens int32[B, S] and weights float32[B, S]."""
    tokens, weights = (np.stack([each[i] for each in documents]) for i in range(2))
    return tokens, weights


def _document(
    tokens: np.ndarray, weights: np.ndarray, answers: np.ndarray, *, context: int = 0
) -> Document:
    return Document(tokens.astype(np.int32), weights.astype(np.float32), answers, context)


def encode(tokenizer: Any, text: str) -> np.ndarray:
    """The tokens int32[n] of a text."""
    found = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return np.asarray(found, np.int32)
