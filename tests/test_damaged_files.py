"""Every damaged file is a ValueError that names it: thousands of loads, each with one thing wrong.

Two kinds of damage. *Nonsense*: a value that readers look at is replaced by one that no file can
hold there, and must be refused. *Noise*: bytes are changed, cut or added, keys dropped, renamed or
nulled: whatever that makes of a file, it loads, or is a ValueError with its name.
"""

import json
import math

import numpy as np
import pytest

import converters
import effjax
from effjax import fields, testing
from effjax.forward import abstract
from effjax.methods import dit_fast_attn, kivi, moa, round_to_nearest, vidit_q
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import ClassConditionalPipeline, TextPipeline
from effjax.samplers import DDIM
from tests.test_text_pipeline import make_tokenizer

NOISY = 80  # copies of each directory with noise

# By the type of the value that they replace.
NONSENSE = {
    bool: [0, 1, "true", "", 0.5, [], {}],
    int: [True, "7", 1.5, math.nan, math.inf, -3, 10**30, [], {}],
    float: [True, "0.1", math.nan, -math.inf, [], {}],
    str: [1, True, 0.5, "no such thing", [], {}],
    list: [3, "x", True, {}, [{}], [[None]]],
    dict: [3, "x", True, [1]],
}

# What says where a file comes from, or what nothing here depends on: any value is as good.
FREE = {
    "_diffusers_version",
    "ignore",
    "quantization_status",
    "architectures",
    "bos_token_id",
    "dropout",
    "dynamic_thresholding_ratio",
    "dropout_rate",
    "format",
    "is_encoder_decoder",
    "metric",
    "model",
    "norm_num_groups",
    "pad_token_id",
    "sample_max_value",
    "sampler",
    "source",
    "transformers_version",
    "upcast_attention",
    "use_cache",
    "version",
}
FREE_OF = {"pixart": {"num_embeds_ada_norm"}}

# Values that a file can hold all the same.
PLAUSIBLE = [
    ("eos_token_id", 3),
    ("id2label", "no such thing"),
    ("interpolation_scale", 1.5),
    ("model", "no such thing"),
    ("scheduler", "no such thing"),
    ("tokenizer", "no such thing"),
    ("transformer", "no such thing"),
]


def pair(subject):
    return subject.forward, subject.params


def dense(path, pair):
    converters.save_pretrained(*pair, path, progress=False)
    return lambda: converters.from_pretrained(path, progress=False)


def saved(path, subject, *transforms):
    made = pair(subject)
    for each in transforms:
        made = each(*made)
    effjax.save(path, *made, progress=False)
    return lambda: effjax.load(path, progress=False)


def of(model, config):
    forward, shapes = abstract(model, config)
    return forward, testing.random_params(shapes)


def llama(**options):
    return testing.tiny_llama(num_layers=1, **options)


def yarn(path):
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
    subject = llama(rope_scaling=tuple(sorted(scaling.items())), qkv_bias=True, window=8)
    return dense(path, pair(subject))


def packed(path):
    subject = llama(hidden_size=32, intermediate_size=64)
    plan = round_to_nearest.uniform(4, group_size=16)
    return dense(path, round_to_nearest.transform(plan)(*pair(subject)))


def fast_dit(path):
    subject = testing.tiny_dit(num_layers=1)
    strategies = (dit_fast_attn.Strategy.WARS, dit_fast_attn.Strategy.AST)
    plan = dit_fast_attn.uniform(strategies, layers=1, calls=4, tokens=64)
    return saved(path, subject, dit_fast_attn.transform(plan))


def quantized_dit(path):
    subject = testing.tiny_dit(num_layers=1)
    plan = vidit_q.uniform(4, alpha=None, rotate=True)
    return saved(path, subject, vidit_q.transform(plan))


def spans(path):
    plan = moa.uniform(1, 2, alpha=16.0, beta=0.5)
    return saved(path, llama(), moa.transform(plan))


def images(path):
    made = pair(testing.tiny_dit(num_layers=1))
    scheduler = DDIM(steps=4).to_config()
    ClassConditionalPipeline(*made, scheduler, names={0: "a", 4: "b"}).save(path)
    return lambda: effjax.pipeline(path, progress=False).sampler(num_inference_steps=2)


def texts(path):
    subject = llama(vocab_size=29)
    settings = {"eos_token_id": [3, 4], "temperature": 0.7, "top_k": 5, "max_new_tokens": 6}
    TextPipeline(*pair(subject), make_tokenizer(), settings).save(path)
    return lambda: effjax.pipeline(path, progress=False)


BUNDLES = {
    "dit": lambda path: dense(path, pair(testing.tiny_dit(num_layers=1))),
    "pixart": lambda path: dense(path, pair(testing.tiny_pixart(num_layers=1))),
    "llama": lambda path: dense(path, pair(llama())),
    "yarn": yarn,
    "t5": lambda path: dense(
        path,
        of(
            T5Encoder,
            T5Config(vocab_size=20, hidden_size=8, intermediate_size=12, num_layers=1, num_heads=2),
        ),
    ),
    "autoencoder": lambda path: dense(
        path,
        of(AutoencoderKL, AutoencoderKLConfig(block_out_channels=(8,), norm_groups=4)),
    ),
    "packed": packed,
    "kivi": lambda path: saved(path, llama(), kivi.transform(kivi.KIVIPlan(group=8))),
    "moa": spans,
    "dit_fast_attn": fast_dit,
    "vidit_q": quantized_dit,
    "images": images,
    "texts": texts,
}


@pytest.fixture(scope="module", params=BUNDLES)
def bundle(request, tmp_path_factory):
    path = tmp_path_factory.mktemp(request.param) / "held"
    load = BUNDLES[request.param](path)
    load()
    return path, load, FREE | FREE_OF.get(request.param, set())


def loads(path, load):
    """Whether a load succeeds; what it says if not must name a file."""
    try:
        load()
    except ValueError as error:
        if path.name in str(error):
            return False
        raise LookupError("does not name the file") from error
    return True


def places(value, free, within=()):
    """Every place in a JSON value that readers look at, with what stands there."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        if key in free:
            continue
        yield (*within, key), part
        if isinstance(part, dict | list):
            yield from places(part, free, (*within, key))


def replaced(value, place, new):
    copy = json.loads(json.dumps(value))
    inner = copy
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = new
    return copy


def test_nonsense_is_refused(untyped, bundle):
    path, load, free = bundle
    accepted, raw = [], []
    for file in sorted(path.rglob("*.json")):
        if file.parent.name == "tokenizer":
            continue
        text = file.read_text()
        for place, part in places(json.loads(text), free):
            for new in NONSENSE.get(type(part), []):
                if any(key in place and fields.same(new, held) for key, held in PLAUSIBLE):
                    continue
                file.write_text(json.dumps(replaced(json.loads(text), place, new)))
                try:
                    if loads(path, load):
                        accepted.append((file.name, place, new))
                except Exception as error:
                    raw.append((file.name, place, new, repr(error)[:200]))
        file.write_text(text)
    assert not raw, "\n".join(map(str, raw))
    assert not accepted, "\n".join(map(str, accepted))


def noisy(rng, file, free):
    """Contents of a file with one thing wrong."""
    data = file.read_bytes()
    kind = rng.integers(6)
    if kind < 2 and file.suffix == ".json":
        value = json.loads(data)
        found = [place for place, _ in places(value, free)]
        place = found[rng.integers(len(found))]
        if kind == 0:
            return json.dumps(replaced(value, place, None)).encode()
        word = json.dumps(str(place[-1])).encode()
        return data.replace(word, b'"' + word[1:2] + word[1:], 1)
    begin = int(rng.integers(len(data) if file.suffix == ".json" else min(len(data), 600)))
    if kind == 2:
        return data[:begin]
    if kind == 3:
        return data[:begin] + bytes(rng.integers(0, 256, 3, np.uint8)) + data[begin:]
    changed = bytearray(data)
    for place in begin + rng.integers(0, 8, 1 + kind % 3):
        if place < len(changed):
            changed[place] = rng.integers(256)
    return bytes(changed)


def test_noise_is_read_or_named(untyped, bundle):
    path, load, free = bundle
    raw = []
    files = [
        file for file in sorted(path.rglob("*")) if file.is_file() and file.name != "README.md"
    ]
    for seed in range(NOISY):
        rng = np.random.default_rng(seed)
        file = files[rng.integers(len(files))]
        whole = file.read_bytes()
        file.write_bytes(noisy(rng, file, free))
        try:
            loads(path, load)
        except Exception as error:
            raw.append((seed, file.name, repr(error)[:300]))
        file.write_bytes(whole)
    assert not raw, "\n".join(map(str, raw))
