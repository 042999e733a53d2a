"""Caches on the bundled tiny language model: what it still finds in its context, and the bytes.

    python -m experiments.llm.retrieval kinds --cache DIR      (or: factors, moa)

A context of `put KEY VALUE` lines is read once; then eight `get KEY` questions follow through the
cache, so no method knows what will be asked. Every method answers the same questions. For
perplexity library text that no training saw is continued: half is read at once, half goes through
the cache. Everything is bfloat16; bytes are those that the cache allocates.

DIR keeps what was searched and trained; without it the script makes them anew.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

import effjax
from effjax import generate
from effjax.bundled import WEIGHTS, texts
from effjax.bundled.retrieval import right
from effjax.cost import state_bytes
from effjax.forward import Params, abstract
from effjax.generate import Reading
from effjax.methods import cskv, kivi, moa, snap_kv, streaming_llm
from effjax.models.llama import Llama
from effjax.transform import Pair, identity
from experiments import report

QUESTIONS = 8
TAIL = 4 * QUESTIONS  # tokens of the questions
SPANS = {"block": 16, "sink": 16, "floor": 32}  # of MoA, for short texts
PROFILED, VALIDATED, TESTED = (256, 512), 704, (256, 512, 800)

Documents = Sequence[texts.Document]


@dataclasses.dataclass(frozen=True)
class Subject:
    """The model, and texts.

    Attributes:
        dense: forward and parameters, computing in bfloat16.
        exact: the same in float32, for searches and training.
        world: of held-out text, which only judges.
        training: of the text that the model was trained on, for CSKV's factors.
    """

    dense: Pair
    exact: Pair
    world: texts.World
    training: texts.World

    @classmethod
    def load(cls) -> Subject:
        pipe = effjax.pipeline(WEIGHTS / "llama_texts", progress=False, dtype="float32")
        config = dataclasses.replace(pipe.forward.config, dtype="bfloat16")
        worlds = [texts.World.of(pipe.tokenizer, held_out=held_out) for held_out in (True, False)]
        dense = abstract(Llama, config)[0], pipe.params
        return cls(dense, (pipe.forward, pipe.params), *worlds)

    def lookups(self, length: int, count: int, *, seed: int) -> list[texts.Document]:
        """Documents of a length, each with eight questions at its end."""
        rng = np.random.default_rng((seed, length))
        return [self.world.lookup(rng, length, questions=QUESTIONS) for _ in range(count)]


def held_bytes(pair: Pair, length: int) -> int:
    """Bytes of the cache of one text."""
    tokens = jnp.zeros((1, length), jnp.int32)
    return state_bytes(Reading(length - TAIL, TAIL).init(*pair, tokens).state)


def perplexity(pair: Pair, world: texts.World, length: int, count: int) -> float:
    """Of the second half of passages, which goes through the cache."""
    rng = np.random.default_rng((3, length))
    passages = [world.passage(rng, length).tokens for _ in range(count)]
    scores = generate.score(*pair, passages, context=length // 2)
    return generate.perplexity(scores[:, length // 2 :])


def row(pair: Pair, subject: Subject, documents: Documents) -> dict[str, Any]:
    """What one method keeps, at one length."""
    length = len(documents[0].tokens)
    bytes_ = held_bytes(pair, length)
    return {
        "tokens": length,
        "bytes_of_dense": bytes_ / held_bytes(subject.dense, length),
        "questions": QUESTIONS * len(documents),
        "right_%": 100 * float(right(pair, documents).mean()),
        "perplexity": perplexity(pair, subject.world, length, 8),
    }


# --- MoA ------------------------------------------------------------------------------------------


def moa_plan(subject: Subject, density: float, samples: int, cache: Path | None) -> moa.MoAPlan:
    """Searched on lookups of two lengths, validated at a third; or from the folder."""
    file = None if cache is None else cache / f"moa_{density:g}.json"
    if file is not None and file.exists():
        return moa.MoAPlan.from_json(file.read_text())

    def made(length: int, count: int, seed: int) -> moa.Samples:
        documents = subject.lookups(length, count, seed=seed)
        weights = np.zeros((count, length), np.float32)
        for each, document in zip(weights, documents, strict=True):
            each[document.answers] = 1
        return np.stack([document.tokens for document in documents]), weights

    plan = moa.search(
        *subject.exact,
        {length: made(length, samples, 11) for length in PROFILED},
        validation=made(VALIDATED, samples, 12),
        density=density,
        extend=TESTED[-1:],
        rules=moa.rule_grid(PROFILED, TESTED[-1:], step=64),
        **SPANS,
    )
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(plan.to_json())
    return plan


def against_windows(subject: Subject, plan: moa.MoAPlan, count: int) -> report.Rows:
    """A plan and one span for all heads, as many slots in sum: differences with intervals."""
    config, rows = subject.dense[0].config, []
    for length in TESTED:
        documents = subject.lookups(length, count, seed=2)
        slots = np.mean([plan.slots(layer, length) for layer in range(config.num_layers)])
        # Rounded up to whole blocks: in favor of the baseline.
        span = float(-(-slots // plan.block) * plan.block)
        window = dataclasses.replace(
            moa.uniform(config.num_layers, config.num_kv_heads, alpha=span, beta=0.0), **SPANS
        )
        answers, values = {}, {}
        for name, each in {"dense": None, "window": window, "moa": plan}.items():
            pair = subject.dense if each is None else moa.transform(each)(*subject.dense)
            answers[name] = right(pair, documents).mean(axis=1)
            values[name] = perplexity(pair, subject.world, length, 8)
        gain = 100 * (answers["moa"] - answers["window"])
        draws = np.random.default_rng(0).integers(0, count, (4000, count))
        low, high = np.percentile(gain[draws].mean(axis=1), [2.5, 97.5])
        rows.append(
            {
                "tokens": length,
                "density": float(slots) / length,
                **{f"{name}_right_%": 100 * float(own.mean()) for name, own in answers.items()},
                "gain": float(gain.mean()),
                "gain_95_%": f"{low:.1f} ... {high:.1f}",
                **{f"{name}_perplexity": value for name, value in values.items()},
            }
        )
        print(report.markdown(rows[-1:]), flush=True)
    return rows


# --- CSKV -----------------------------------------------------------------------------------------


def token_batches(world: texts.World, start: int = 0) -> Iterator[np.ndarray]:
    """Texts of 512 tokens for factors, of other seeds than what is judged."""
    for step in itertools.count(start):
        rng = np.random.default_rng((21, step))
        yield np.stack([world.mixture(rng, 512).tokens for _ in range(4)])


def trained_from(
    subject: Subject, plan: cskv.CSKVPlan, start: cskv.Factors, steps: int
) -> cskv.Factors:
    """Factors after so many steps."""
    found, _ = cskv.fit(
        plan,
        *subject.exact,
        start,
        lambda first: token_batches(subject.training, first),
        steps=steps,
        learning_rate=2e-3,
    )
    return found


def weighted(subject: Subject, plan: cskv.CSKVPlan) -> cskv.Factors:
    """ASVD with statistics of 64 texts."""
    texts_ = token_batches(subject.training, 10_000)
    found = cskv.magnitudes(*subject.exact, (next(texts_) for _ in range(16)))
    return cskv.factors(plan, *subject.exact, found)


def reconstruction(subject: Subject, plan: cskv.CSKVPlan, found: cskv.Factors) -> float:
    """Mean squared errors on held-out texts."""
    batches = token_batches(subject.world)
    forward, params = subject.exact

    @jax.jit
    def loss(params: Params, found: cskv.Factors, tokens: jax.Array) -> jax.Array:
        return cskv.reconstruction_loss(plan, forward, params, found, tokens)

    return float(np.mean([loss(params, found, next(batches)) for _ in range(4)]))


Cases = dict[str, tuple[cskv.CSKVPlan, cskv.Factors]]
LOW = cskv.CSKVPlan(0.15, 0.25)  # 4 and 8 of 32 channels: 0.1875 of the cache
LOWER = cskv.CSKVPlan(0.07, 0.13)  # 2 and 4: 0.094


def four(plan: cskv.CSKVPlan) -> cskv.CSKVPlan:
    """The plan with 4-bit values."""
    return dataclasses.replace(plan, bits=4)


def factor_cases(subject: Subject, steps: int, cache: Path | None) -> Cases:
    """Where factors of few channels start and how they are trained."""
    plain = cskv.factors(LOWER, *subject.exact)
    rng = np.random.default_rng(0)
    chance = jax.tree.map(
        lambda x: jnp.asarray(np.std(x) * rng.standard_normal(x.shape), x.dtype), plain
    )
    start = weighted(subject, LOWER)
    trained = kept(cache, "lower", lambda: trained_from(subject, LOWER, start, steps))
    # As many steps more with and without quantized values, for a fair comparison.
    aware = kept(cache, "lower_aware", lambda: trained_from(subject, four(LOWER), trained, steps))
    longer = kept(cache, "lower_longer", lambda: trained_from(subject, LOWER, trained, steps))
    return {
        "random": (LOWER, chance),
        "SVD": (LOWER, plain),
        "ASVD": (LOWER, start),
        "ASVD, trained": (LOWER, trained),
        "ASVD, trained, window of 1": (dataclasses.replace(LOWER, window=1), trained),
        "ASVD, trained twice as long": (LOWER, longer),
        "the same, then 4 bits": (four(LOWER), longer),
        "ASVD, trained, then with 4 bits": (four(LOWER), aware),
    }


def best_factors(subject: Subject, steps: int, cache: Path | None) -> dict[int, cskv.Factors]:
    """Trained factors of a fifth of the channels, by bits."""
    start = weighted(subject, LOW)
    trained = kept(cache, "low", lambda: trained_from(subject, LOW, start, steps))
    aware = kept(cache, "low_aware", lambda: trained_from(subject, four(LOW), trained, steps))
    return {16: trained, 4: aware}


def cskv_rows(subject: Subject, documents: Documents, cases: Cases) -> report.Rows:
    """What each of these factors keeps."""
    rows = []
    for name, (plan, found) in cases.items():
        pair = cskv.transform(plan, found)(*subject.dense)
        errors = {"reconstruction_error": reconstruction(subject, plan, found)}
        rows.append({"factors": name, **errors, **row(pair, subject, documents)})
        print(report.markdown(rows[-1:]), flush=True)
    return rows


def kinds(subject: Subject, documents: Documents, found: dict[int, cskv.Factors]) -> report.Rows:
    """Kinds of caches at about equal bytes."""
    transforms: dict[str, Callable[..., Pair]] = {
        "dense": identity,
        "kivi, 8 bits": kivi.transform(kivi.KIVIPlan(8, 8)),
        "kivi, 4 bits": kivi.transform(kivi.KIVIPlan(4, 4)),
        "cskv, 4 and 8 of 32 channels": cskv.transform(LOW, found[16]),
        "cskv, 4 bits": cskv.transform(four(LOW), found[4]),
    }
    for ratio in (0.5, 0.8):
        name = f"{1 - ratio:.0%} of the tokens"
        transforms[f"snap_kv, {name}"] = snap_kv.transform(snap_kv.SnapKVPlan(ratio=ratio))
        quantized = snap_kv.SnapKVPlan(ratio=ratio, bits=4)
        transforms[f"snap_kv, {name}, 4 bits"] = snap_kv.transform(quantized)
        streaming = streaming_llm.StreamingLLMPlan(ratio=ratio)
        transforms[f"streaming_llm, {name}"] = streaming_llm.transform(streaming)
    rows = []
    for name, transform in transforms.items():
        rows.append({"cache": name, **row(transform(*subject.dense), subject, documents)})
        print(report.markdown(rows[-1:]), flush=True)
    return rows


def kept(cache: Path | None, name: str, make: Callable[[], cskv.Factors]) -> cskv.Factors:
    """Factors from the folder, or made and put there."""
    file = None if cache is None else cache / f"{name}.safetensors"
    if file is not None and file.exists():
        found: cskv.Factors = {}
        for key, value in load_file(file).items():
            path, _, part = key.rpartition(".")
            found.setdefault(path, {})[part] = jnp.asarray(value)
        return found
    made = make()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        flat = {f"{path}.{n}": np.asarray(x) for path, own in made.items() for n, x in own.items()}
        save_file(flat, file)
    return made


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=("kinds", "factors", "moa"))
    parser.add_argument("--cache", type=Path, help="folder of plans and factors")
    parser.add_argument("--documents", type=int, default=64, help="with eight questions each")
    parser.add_argument("--samples", type=int, default=32, help="of MoA's search, for each length")
    parser.add_argument("--steps", type=int, default=400, help="of the training of factors")
    parser.add_argument("--density", type=float, default=0.5, help="of MoA")
    arguments = parser.parse_args(argv)
    subject = Subject.load()
    documents = subject.lookups(512, arguments.documents, seed=2)
    training, common = (arguments.steps, arguments.cache), f"--documents {arguments.documents}"
    if arguments.table == "kinds":
        title = "Kinds of caches on the tiny language model"
        options = f"--steps {arguments.steps}"
        rows = kinds(subject, documents, best_factors(subject, *training))
    elif arguments.table == "factors":
        title = "CSKV's factors on the tiny language model: 2 and 4 of 32 channels"
        options = f"--steps {arguments.steps}"
        rows = cskv_rows(subject, documents, factor_cases(subject, *training))
    else:
        title = "MoA against one window for all heads on the tiny language model"
        options = f"--samples {arguments.samples} --density {arguments.density}"
        plan = moa_plan(subject, arguments.density, arguments.samples, arguments.cache)
        print(plan.describe())
        rows = against_windows(subject, plan, arguments.documents)
    report.write(
        f"llm_{arguments.table}",
        title=title,
        command=f"python -m experiments.llm.retrieval {arguments.table} --cache DIR {common} "
        f"{options}",
        rows=rows,
    )


if __name__ == "__main__":
    main()
