"""What callers give to diffusion pipelines: labels, prompts, noise, numbers of images, outputs."""

import copy
import dataclasses
import sys
import threading

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import testing
from effjax.finite import NotFiniteWarning
from effjax.forward import abstract
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import ClassConditionalPipeline, Pipeline, TextToImagePipeline, to_pil
from effjax.pipelines.labels import index_of, read_names
from effjax.pipelines.recent import Recent
from effjax.samplers import DDIM, DPMSolver
from experiments import train_pixart

OPTIONS = {"num_inference_steps": 2, "guidance_scale": 3.0, "progress": False}
NAMES = {0: "tench, Tinca tinca", 1: "crane", 2: "maillot", 3: "maillot, tank suit", 4: "crane"}


@pytest.fixture(scope="module")
def pipe():
    subject = testing.tiny_dit(in_channels=3, out_channels=3)
    scheduler = DDIM(steps=2, clip_sample=False).to_config()
    return ClassConditionalPipeline(subject.forward, subject.params, scheduler, names=NAMES)


@pytest.fixture(scope="module")
def text_pipe():
    subject = testing.tiny_pixart(in_channels=3, out_channels=3)
    config = T5Config(
        vocab_size=64, hidden_size=12, intermediate_size=24, num_layers=1, num_heads=3, head_dim=4
    )
    forward, shapes = abstract(T5Encoder, config)
    return TextToImagePipeline(
        subject.forward,
        subject.params,
        DPMSolver(steps=2).to_config(),
        text_encoder=(forward, testing.random_params(shapes)),
        tokenizer=train_pixart.tokenizer(),
    )


@pytest.fixture(scope="module")
def samples(pipe):
    """Of the classes 1, 1, 3, 3 by the sampler alone."""
    sampler = pipe.sampler(num_inference_steps=2, guidance_scale=3.0)
    labels = jnp.array([1, 1, 3, 3])
    return jax.jit(sampler)(pipe.forward, pipe.params, labels, jax.random.key(0))


def test_several_images_of_each_label(pipe, samples):
    asked = ([1, 3], jax.random.key(0), {**OPTIONS, "num_images_per_prompt": 2})
    labels, key, options = asked
    latents = pipe(labels, key=key, output_type="latent", **options)
    chex.assert_trees_all_close(latents, samples, atol=1e-5)
    assert not np.allclose(latents[0], latents[1], atol=0.1)
    arrays = pipe(labels, key=key, output_type="np", **options)
    assert (arrays.dtype, arrays.shape) == (np.float32, (4, 16, 16, 3))
    chex.assert_trees_all_close(arrays, np.clip(np.asarray(samples) / 2 + 0.5, 0, 1), atol=1e-5)
    images = pipe(np.array(labels), key=key, **options)
    assert [(image.mode, image.size) for image in images] == [("RGB", (16, 16))] * 4
    chex.assert_trees_all_equal(np.stack(images), np.rint(255 * arrays).astype(np.uint8))


def test_noise_that_is_given_is_what_sampling_starts_from(pipe, samples, untyped):
    sampler = pipe.sampler(num_inference_steps=2, guidance_scale=3.0)
    labels = jnp.array([1, 1, 3, 3])
    own = sampler.init(pipe.forward, pipe.params, labels, jax.random.key(0)).x
    noise = np.asarray(own / sampler.schedule.initial_scale, np.float64)
    options = {**OPTIONS, "latents": noise, "output_type": "latent"}
    same = pipe(labels, key=jax.random.key(9), **options)  # DDIM draws nothing after the start
    chex.assert_trees_all_close(same, samples, atol=1e-5)
    for wrong, got in (
        (noise.transpose(0, 3, 1, 2), r"float64\[4, 3, 16, 16\]"),
        (noise[:3], r"float64\[3, 16, 16, 3\]"),
        (np.zeros(noise.shape, np.int32), "int32"),
        ("noise", "str"),
    ):
        with pytest.raises(ValueError, match=r"must be float\[4, 16, 16, 3\].*got " + got):
            pipe(labels, key=jax.random.key(0), **{**options, "latents": wrong})


def test_labels_by_any_of_their_names(pipe):
    for label in (0, np.int64(0), jnp.int32(0), "0", " 0", "tench", "Tinca tinca"):
        assert pipe.index(label) == 0
    assert pipe.index("tench,Tinca tinca") == 0
    assert pipe.index("maillot, tank suit") == 3
    assert index_of("1", {0: "1"}, 5) == 0  # a name comes before an index
    for one in (3, "tank suit", np.int32(3), np.array(3)):
        assert pipe.conditions(one)[0].tolist() == [3]
    assert pipe.conditions(jnp.array([2, 3]))[0].tolist() == [2, 3]
    many = {index: f"class {index}, c{index}" for index in range(1000)}
    with pytest.raises(ValueError, match=r"no class 'clas 77'.*near it: class 77"):
        index_of("clas 77", many, 1000)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (True, "a label is the index or the name of a class, got True"),
        (np.True_, "index or the name"),
        (1.7, r"got 1\.7"),
        (None, "got None"),
        (b"crane", "got b'crane'"),
        (5, r"no class 5: a label is 0 \.\.\. 4"),
        (-1, "no class -1"),
        ("²", "no class '²'"),
        ("crane", r"'crane' names 2 classes: 1 \(crane\); 4 \(crane\)\. Give the index"),
        ("maillot", r"names 2 classes: 2 \(maillot\); 3 \(maillot, tank suit\)"),
        ([], "labels is empty"),
        ({1, 2}, r"labels is a set, which has no order; give a list: \[1, 2\]"),
    ],
)
def test_what_is_no_label(pipe, label, message, untyped):
    with pytest.raises(ValueError, match=message):
        pipe(label, key=jax.random.key(0), **OPTIONS)


def test_names_that_belong_to_no_class(pipe, untyped):
    with pytest.raises(ValueError, match=r"'fox' has the index 5, but this model has 5 classes"):
        dataclasses.replace(pipe, names={5: "fox"})
    with pytest.raises(ValueError, match=r"by class index.*got the key 'fox'"):
        dataclasses.replace(pipe, names={"fox": 1})
    with pytest.raises(ValueError, match="name of class 1 must be a text, got 7"):
        dataclasses.replace(pipe, names={1: 7})
    assert read_names(None) == {}
    assert read_names({"3": "fox"}) == {3: "fox"}
    with pytest.raises(ValueError, match=r"model_index\.json: id2label.*'1\.5' is no index"):
        read_names({"1.5": "fox"})
    with pytest.raises(ValueError, match=r"id2label must be an object.*got list"):
        read_names(["fox"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a whole number of at least"),
        ({"num_images_per_prompt": True}, "num_images_per_prompt.*got True"),
        ({"num_images_per_prompt": 2.0}, r"num_images_per_prompt.*got 2\.0"),
        (
            {"num_inference_steps": "2"},
            "num_inference_steps must be a whole number of at least 1, got '2'",
        ),
        ({"num_inference_steps": 0}, "num_inference_steps.*got 0"),
        ({"num_inference_steps": 1.5}, r"num_inference_steps.*got 1\.5"),
        ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number.*got nan"),
        ({"guidance_scale": -1}, "guidance_scale.*got -1"),
        ({"guidance_scale": "4"}, "guidance_scale.*got '4'"),
        ({"guidance_scale": True}, "guidance_scale.*got True"),
        ({"num_images_per_prompt": 2**31}, "num_images_per_prompt.*got 2147483648"),
        ({"height": 10**30}, "height must be a whole number"),
        ({"latents": np.array(["a"])}, r"must be float\[1, 16, 16, 3\].*got <U1\[1\]"),
        ({"callback_on_step_end": 1}, "callback_on_step_end must be a function.*got 1"),
        ({"prompt": "a \udcff"}, r"prompt has '\\udcff' at 2, which is half a character"),
        ({"negative_prompt": "\ud83d"}, "negative_prompt has .* half a character"),
        ({"output_type": np.zeros(2)}, "output_type must be one of"),
        ({"output_type": "pt"}, "output_type must be one of pil, np, latent; got 'pt'"),
        ({"height": 16.0}, r"height must be a whole number of at least 1, got 16\.0"),
        ({"width": True}, "width must be a whole number of at least 1, got True"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": ["a", 7]}, "prompt must be a text, or a sequence of texts; got 7"),
        ({"prompt": None}, "prompt must be a text.*got None"),
        ({"negative_prompt": ["", ""]}, "negative_prompt must be one for all.*of the 1; got 2"),
        ({"negative_prompt": [0]}, "negative_prompt must be a text.*got 0"),
        ({"latents": np.zeros((1, 16, 16, 4), np.float32)}, r"must be float\[1, 16, 16, 3\]"),
    ],
)
def test_bad_options(text_pipe, options, message, untyped):
    options = {"key": jax.random.key(0), "prompt": "a red a", **OPTIONS, **options}
    with pytest.raises(ValueError, match=message):
        text_pipe(**options)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (0, r"got 0; write jax\.random\.key\(0\)"),
        (jax.random.PRNGKey(0), r"legacy key of uint32; write jax\.random\.wrap_key_data\(key\)"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_key(pipe, key, message, untyped):
    with pytest.raises(TypeError, match=r"key must come from jax\.random\.key\(seed\).*" + message):
        pipe(1, key=key, **OPTIONS)
    sampler = pipe.sampler(num_inference_steps=2)
    with pytest.raises(TypeError, match=message):
        sampler.stepwise(pipe.forward, pipe.params, jnp.array([1]), key, progress=False)


def test_negative_prompts(text_pipe):
    prompts = ["a red a", "a blue 7"]
    none = text_pipe.conditions(prompts)
    chex.assert_trees_all_equal(text_pipe.conditions(prompts, negative_prompt=""), none)
    chex.assert_trees_all_equal(text_pipe.conditions(prompts, negative_prompt=["", None]), none)
    _, led = text_pipe.conditions(prompts, negative_prompt=["green", "a 7"])
    chex.assert_trees_all_equal(led, text_pipe.encode(["green", "a 7"]))
    _, led = text_pipe.conditions(prompts, negative_prompt="green")
    chex.assert_trees_all_equal(led, text_pipe.encode(["green", "green"]))


def test_threads_share_the_remembered_captions(text_pipe):
    shared = dataclasses.replace(text_pipe)
    words = [f"a {color} {name}" for color in ("red", "blue", "green") for name in "ABCDEFGH7"]
    alone = {word: text_pipe.encode([word]) for word in words}
    object.__setattr__(shared, "_captions", Recent(3))  # so that they are dropped all the time
    errors = []

    def serve(seed):
        rng = np.random.default_rng(seed)
        for _ in range(20):
            asked = str(rng.choice(words))
            try:
                chex.assert_trees_all_close(shared.encode([asked]), alone[asked], atol=1e-6)
            except Exception as error:
                errors.append(error)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=serve, args=(seed,)) for seed in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
    finally:
        sys.setswitchinterval(before)
    assert not errors


def test_what_was_asked_for_last_is_remembered():
    made = []

    def make(keys):
        made.append(list(keys))
        return [key.upper() for key in keys]

    recent = Recent(2)
    assert recent.get(["a", "b", "a"], make) == ["A", "B", "A"]
    assert recent.get(["a"], make) == ["A"]
    assert recent.get(["c"], make) == ["C"]  # drops b
    assert recent.get(["a", "c"], make) == ["A", "C"]
    assert recent.get(["b", "d", "e"], make) == ["B", "D", "E"]
    assert made == [["a", "b"], ["c"], ["b", "d", "e"]]
    assert len(recent) == 2
    assert len(copy.deepcopy(recent)) == 0


def test_the_lock_is_not_held_while_values_are_made():
    recent, meeting = Recent(4), threading.Barrier(2, timeout=20)

    def make(keys):
        meeting.wait()  # ends only if both threads are here at once
        return keys

    threads = [threading.Thread(target=recent.get, args=([key], make)) for key in "ab"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(recent) == 2


def test_results_that_are_not_finite_are_named(pipe, text_pipe, monkeypatch):
    asked = {"key": jax.random.key(0), **OPTIONS, "num_images_per_prompt": 2}
    broken = dataclasses.replace(pipe, params=jax.tree.map(lambda x: x * jnp.nan, pipe.params))
    with pytest.warns(NotFiniteWarning, match=r"latents after the last step.*dtype=\"float32\""):
        images = broken([1, 3], **asked)
    assert np.asarray(images[0]).max() == 0
    forward, params = text_pipe.text_encoder
    params = jax.tree.map(lambda x: x * jnp.inf, params)
    unread = dataclasses.replace(text_pipe, text_encoder=(forward, params))
    with pytest.warns(NotFiniteWarning, match="text embeddings: ") as caught:
        unread("a red a", output_type="latent", **asked)
    assert len(caught) == 1  # the first stage alone
    monkeypatch.setattr(Pipeline, "decode", lambda self, x: x * jnp.inf)
    with pytest.warns(NotFiniteWarning, match="decoded images: "):
        pipe([1, 3], **asked)
    with pytest.warns(NotFiniteWarning, match="images: 1 of 12 values"):
        to_pil(np.array([np.nan] + 11 * [0.5], np.float32).reshape(1, 2, 2, 3))
