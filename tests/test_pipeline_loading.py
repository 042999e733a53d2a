"""What a pipeline is loaded from, and how: dtypes, components, variants, repositories."""

import ast
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest
from huggingface_hub import ModelCard

import converters
import effjax
from effjax import testing
from effjax.forward import abstract
from effjax.methods import dit_fast_attn, kivi, round_to_nearest
from effjax.models.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.pipelines import NextStagePipeline, families
from effjax.pipelines.base import INDEX, Origin
from effjax.storage import directories, new_directory
from experiments import train_pixart
from tests.test_pipelines import write_pipeline, write_text_pipeline
from tests.test_text_pipeline import make_tokenizer, write_language_model

QUIET = {"progress": False}
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    write_pipeline(path)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts")
    write_text_pipeline(path)
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    write_language_model(path)
    return path


def change_index(folder, **entries):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | entries))


def t5(width=12):
    config = T5Config(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=24,
        num_layers=1,
        num_heads=3,
        head_dim=4,
    )
    forward, shapes = abstract(T5Encoder, config)
    return forward, testing.random_params(shapes, seed=1)


def vae(channels):
    config = AutoencoderKLConfig(
        latent_channels=channels, block_out_channels=(4, 8), layers_per_block=1, norm_groups=2
    )
    forward, shapes = abstract(AutoencoderKL, config)
    return forward, testing.random_params(shapes)


def test_caches_have_the_dtype_of_the_computation(tmp_path):
    write_language_model(tmp_path / "wide")
    converters.convert(tmp_path / "wide", tmp_path / "half", dtype="bfloat16", progress=False)
    (tmp_path / "half" / "model.safetensors").replace(tmp_path / "wide" / "model.safetensors")
    for asked, computed in (({}, "bfloat16"), ({"compute_dtype": "float32"}, "float32")):
        pipe = effjax.pipeline(tmp_path / "wide", progress=False, **asked)
        assert {leaf.dtype for leaf in jax.tree.leaves(pipe.params)} == {jnp.dtype("bfloat16")}
        state = pipe.prefill("a b c", new=4).state
        held = {leaf.dtype for leaf in state.values() if leaf.dtype.kind not in "iub"}
        assert held == {jnp.dtype(computed)}


def test_components_that_are_missing_are_named_and_can_be_given(prompts, tmp_path):
    folder = tmp_path / "bare"
    shutil.copytree(prompts, folder)
    none = [None, None]
    change_index(folder, text_encoder=none, tokenizer=none)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name)
    with pytest.raises(ValueError, match=r"has no text encoder: give one.*text_encoder=conver"):
        effjax.pipeline(folder, **QUIET)
    encoder, tokenizer = t5(), train_pixart.tokenizer()
    with pytest.raises(ValueError, match=r"has no tokenizer: give one.*AutoTokenizer"):
        effjax.pipeline(folder, text_encoder=encoder, **QUIET)
    pipe = effjax.pipeline(folder, text_encoder=encoder, tokenizer=tokenizer, **QUIET)
    assert pipe.text_encoder is encoder
    assert pipe.tokenizer is tokenizer
    pipe.save(tmp_path / "whole")
    again = effjax.pipeline(tmp_path / "whole", **QUIET)
    chex.assert_trees_all_equal(again.text_encoder[1], encoder[1])
    # in the place of one that is there
    other = effjax.pipeline(prompts, text_encoder=encoder, **QUIET)
    assert other.text_encoder is encoder
    with pytest.raises(ValueError, match="gives 24 channels and the transformer reads 12"):
        effjax.pipeline(prompts, text_encoder=t5(24), **QUIET)
    with pytest.raises(ValueError, match=r"text_encoder must be a pair.*got str"):
        effjax.pipeline(prompts, text_encoder="google/t5-v1_1-xxl", **QUIET)
    change_index(folder, transformer=none)
    with pytest.raises(ValueError, match="has no transformer: put it there, and name"):
        effjax.pipeline(folder, text_encoder=encoder, tokenizer=tokenizer, **QUIET)


@pytest.mark.parametrize("name", [*families.table()])
def test_models_of_another_kind_are_refused(images, name, tmp_path):
    """Folders that have changed places are an error that says what belongs there."""
    family, other = families.table()[name], testing.tiny_vq_model()
    for each in family.loaded_models:
        effjax.save(tmp_path / each, *other, **QUIET)
    shutil.copytree(images / "scheduler", tmp_path / "scheduler")
    saved = {each: ["effjax", "VQModel"] for each in family.loaded_models}
    (tmp_path / INDEX).write_text(json.dumps({"_class_name": name, **saved}))
    given = {each: make_tokenizer() for each, kind in family.kinds.items() if kind == "tokenizer"}
    wanted = rf"the {family.model} of a {name} is a {family.models[0]}.*is a VQModel"
    with pytest.raises(ValueError, match=wanted):
        effjax.pipeline(tmp_path, **given, **QUIET)


def test_components_of_another_kind_are_refused(prompts, tmp_path):
    subject = testing.tiny_llamagen()
    none = subject.forward, subject.params
    write_pipeline(tmp_path, channels=4)
    with pytest.raises(ValueError, match="the vae must decode latents, got a LlamaGen"):
        effjax.pipeline(tmp_path, vae=none, **QUIET)
    stages = testing.tiny_ecar(in_channels=4)
    with pytest.raises(ValueError, match="the vae must decode latents, got a LlamaGen"):
        NextStagePipeline(stages.forward, stages.params, vae=none)
    with pytest.raises(ValueError, match="text encoder, a AutoencoderKL, gives none channels"):
        effjax.pipeline(prompts, text_encoder=vae(4), **QUIET)


def test_latents_need_a_vae_and_pixels_none(images, texts, tmp_path):
    write_pipeline(tmp_path, channels=4)
    with pytest.raises(ValueError, match=r"has no vae: give one"):
        effjax.pipeline(tmp_path, **QUIET)
    decoder = vae(4)
    pipe = effjax.pipeline(tmp_path, vae=decoder, **QUIET)
    assert pipe.vae is decoder
    with pytest.raises(ValueError, match="the VAE decodes 2 channels and the model makes 4"):
        effjax.pipeline(tmp_path, vae=vae(2), **QUIET)
    assert effjax.pipeline(images, **QUIET).vae is None
    # what was saved without one comes back without one
    dataclasses.replace(pipe, vae=None).save(tmp_path / "saved")
    assert effjax.pipeline(tmp_path / "saved", **QUIET).vae is None
    with pytest.raises(ValueError, match=r"takes no text_encoder.*can be given vae"):
        effjax.pipeline(images, text_encoder=t5(), **QUIET)
    with pytest.raises(ValueError, match=r"takes no vae.*can be given tokenizer"):
        effjax.pipeline(texts, vae=decoder, **QUIET)


def test_variants_of_weights(prompts, texts, tmp_path):
    """As in diffusers: components that have the variant give it, others what they have."""
    shutil.copytree(prompts, tmp_path / "both")
    wide = effjax.pipeline(prompts, **QUIET)
    half = tmp_path / "half"
    converters.convert(prompts, half, subfolder="transformer", dtype="float16", **QUIET)
    stem = "diffusion_pytorch_model"
    shutil.copy(
        half / f"{stem}.safetensors",
        tmp_path / "both" / "transformer" / f"{stem}.fp16.safetensors",
    )
    pipe = effjax.pipeline(tmp_path / "both", variant="fp16", **QUIET)
    assert pipe.forward.config.param_dtype == "float16"
    chex.assert_trees_all_equal(
        pipe.params, jax.tree.map(lambda leaf: leaf.astype("float16"), wide.params)
    )
    chex.assert_trees_all_equal(pipe.text_encoder[1], wide.text_encoder[1])
    assert pipe.origin == Origin(str(tmp_path / "both"), variant="fp16")
    plain = effjax.pipeline(tmp_path / "both", **QUIET)
    chex.assert_trees_all_equal(plain.params, wide.params)
    with pytest.raises(ValueError, match=r"no component of .* has a variant 'fp32'"):
        effjax.pipeline(tmp_path / "both", variant="fp32", **QUIET)
    with pytest.raises(ValueError, match="There are weights for no variant"):
        effjax.pipeline(texts, variant="fp16", **QUIET)


def test_a_language_model_without_its_tokenizer(texts, tmp_path):
    converters.convert(texts, tmp_path / "bare", **QUIET)
    for file in (tmp_path / "bare").glob("*token*"):
        file.unlink()
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        effjax.pipeline(tmp_path / "bare", **QUIET)
    pipe = effjax.pipeline(tmp_path / "bare", tokenizer=make_tokenizer(), **QUIET)
    assert isinstance(pipe("a b", max_new_tokens=2), str)


def test_single_files_are_answered_with_what_to_give(images, texts, tmp_path):
    weights = images / "transformer" / "diffusion_pytorch_model.safetensors"
    for file, folder in ((weights, images), (texts / "model.safetensors", texts)):
        with pytest.raises(ValueError, match="is one file of a pipeline") as error:
            effjax.pipeline(file)
        assert str(error.value).endswith(f"give its directory, {folder}")
    lone = tmp_path / "lone.safetensors"
    shutil.copy(weights, lone)
    shutil.copy(images / "transformer" / "config.json", tmp_path / "config.json")
    wanted = rf"(?s)single file of a DiT.*from_pretrained\({str(lone)!r}\).*ClassConditionalPipe"
    with pytest.raises(ValueError, match=wanted):
        effjax.pipeline(lone)
    shutil.copy(texts / "model.safetensors", tmp_path / "llama.safetensors")
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer of a language model.*no config\.json beside"):
        effjax.pipeline(tmp_path / "llama.safetensors")
    with pytest.raises(ValueError, match="no hub repository"):
        effjax.pipeline("owner/name/model.safetensors")


def test_home_is_found_in_every_path(images, texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(images, tmp_path / "images")
    shutil.copytree(texts, tmp_path / "texts")
    for name in ("images", "texts"):
        pipe = effjax.pipeline(f"~/{name}", **QUIET)
        assert pipe.origin == Origin(f"~/{name}")
        pipe.save(f"~/saved/{name}")
        assert effjax.pipeline(f"~/saved/{name}", **QUIET).forward == pipe.forward
    effjax.save("~/alone", pipe.forward, pipe.params)
    assert effjax.load("~/alone", **QUIET)[0] == pipe.forward
    converters.convert("~/images", "~/half", subfolder="transformer", dtype="bfloat16", **QUIET)
    assert (tmp_path / "half" / "config.json").is_file()
    assert not list(tmp_path.glob("*~*"))


def test_one_line_says_what_a_pipeline_is(images, texts):
    pipe = effjax.pipeline(images, dtype="bfloat16", compute_dtype="float32", **QUIET)
    count = sum(leaf.size for leaf in jax.tree.leaves(pipe.params))
    fast = pipe.transform(
        dit_fast_attn.transform(dit_fast_attn.uniform((3,), layers=2, calls=3, tokens=64))
    )
    assert repr(pipe) == (
        f"ClassConditionalPipeline(DiT, {count:,} parameters in bfloat16, computed in float32, "
        f"methods: none)"
    )
    assert repr(fast).endswith("methods: dit_fast_attn)")
    chat = effjax.pipeline(texts, **QUIET)
    assert re.fullmatch(r"TextPipeline\(Llama, [\d,]+ parameters in .*methods: none\)", repr(chat))


def test_nothing_prints_its_arrays(texts):
    """Not in a notebook, nor in an error."""
    chat = effjax.pipeline(texts, **QUIET)
    small = chat.transform(round_to_nearest.transform(round_to_nearest.uniform(4, 16)))
    leaf = small.params["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert repr(leaf) == "QTensor([16, 24], 4 bits)"
    assert repr(chat.forward) == "Forward(Llama, methods: none, patches: 0)"
    assert repr(small.forward).startswith("Forward(Llama, methods: round_to_nearest, patches: ")
    context = small.prefill("a b c", new=4)
    assert repr(context).startswith("PrefixCache(Forward(Llama, ")
    held = sum(leaf.nbytes for leaf in context.state.values())
    assert repr(context).endswith(f"1 sequences, {held:,} bytes of cache)")
    assert repr(testing.tiny_dit()).startswith("Subject(Forward(DiT, methods: none")


def test_a_saved_pipeline_has_a_card_and_remembers_what_it_was_made_of(images, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(images, source)
    (source / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A model\n")
    pipe = effjax.pipeline(source, **QUIET)
    small = pipe.transform(round_to_nearest.transform(round_to_nearest.uniform(8, 16)))
    small.save(tmp_path / "small")
    card = ModelCard.load(tmp_path / "small" / "README.md")
    assert card.data.library_name == "effjax"
    assert card.data.license == "cc-by-nc-4.0"
    assert card.data.base_model is None  # no one else has this directory
    assert set(card.data.tags) == {"effjax", "jax", "round_to_nearest"}
    assert 'effjax.pipeline("small")' in card.text
    assert small.forward.recipe[0][1].describe() in card.text
    again = effjax.pipeline(tmp_path / "small", **QUIET)
    assert again.origin == pipe.origin == Origin(str(source))
    change_index(tmp_path / "small", origin={"model": 3, "commit": "a"})
    with pytest.raises(ValueError, match=r"model_index\.json, origin.*commit"):
        effjax.pipeline(tmp_path / "small", **QUIET)
    (source / "README.md").write_text("---\n{: [\n---\n")  # no one needs a card
    small.save(tmp_path / "again")
    assert ModelCard.load(tmp_path / "again" / "README.md").data.license is None


class FakeHub:
    """Repositories as folders, in the place of `HfApi` and of downloads."""

    def __init__(self, root):
        self.root, self.calls, self.fetched = root, [], []

    def __call__(self, token=None):
        return self

    def create_repo(self, repo_id, **options):
        from huggingface_hub import RepoUrl

        self.calls.append(("create_repo", repo_id, options))
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message, delete_patterns):
        self.calls.append(("upload_folder", repo_id, commit_message))
        self.deleted = delete_patterns
        shutil.copytree(folder_path, self.root / repo_id / "snapshots" / ("c" * 40))

    def download(self, repo, name, *, revision, **options):
        from huggingface_hub.errors import EntryNotFoundError

        self.fetched.append((name, revision))
        path = self.root / repo / "snapshots" / (revision or "c" * 40) / name
        if not path.is_file():
            raise EntryNotFoundError(name)
        return str(path)


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    hub = FakeHub(tmp_path / "hub")
    monkeypatch.setattr("huggingface_hub.HfApi", hub)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub.download)
    return hub


@pytest.mark.parametrize("kind", ["images", "prompts"])
def test_a_pipeline_is_pushed_and_loads_by_its_id(kind, request, fake_hub, monkeypatch):
    loads_local_tokenizers(monkeypatch, fake_hub)
    pipe = effjax.pipeline(request.getfixturevalue(kind), **QUIET)
    plan = dit_fast_attn.uniform((3, 1), layers=2, calls=3, tokens=64)
    fast = pipe.transform(dit_fast_attn.transform(plan))
    fast.push_to_hub("me/fast", private=True, commit_message="first", token="t")
    assert fake_hub.calls == [
        ("create_repo", "me/fast", {"private": True, "exist_ok": True}),
        ("upload_folder", "me/fast", "first"),
    ]
    assert "transformer/*" in fake_hub.deleted
    uploaded = fake_hub.root / "me" / "fast" / "snapshots" / ("c" * 40)
    assert "origin" not in json.loads((uploaded / INDEX).read_text())  # a path of this machine
    assert 'effjax.pipeline("me/fast")' in (uploaded / "README.md").read_text()
    (uploaded / "not_needed.bin").write_bytes(b"")

    again = effjax.pipeline("me/fast", **QUIET)
    assert again.forward == fast.forward
    chex.assert_trees_all_equal(again.params, fast.params)
    assert again.origin == Origin("me/fast", "c" * 40)
    # all of one commit, and nothing that is not needed
    models = [(name, at) for name, at in fake_hub.fetched if "/" in name]
    assert {at for _, at in models} == {"c" * 40}
    assert not {"README.md", "not_needed.bin"} & {name for name, _ in fake_hub.fetched}


def test_a_language_model_is_pushed_and_says_what_it_was_made_of(texts, fake_hub, monkeypatch):
    base = fake_hub.root / "org" / "base" / "snapshots" / ("c" * 40)
    shutil.copytree(texts, base)
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    loads_local_tokenizers(monkeypatch, fake_hub)
    pipe = effjax.pipeline("org/base", **QUIET)
    small = pipe.transform(kivi.transform(kivi.KIVIPlan(group=8)))
    assert small.origin == Origin("org/base", "c" * 40)
    small.push_to_hub("me/small")
    card = ModelCard.load(fake_hub.root / "me/small/snapshots" / ("c" * 40) / "README.md")
    assert (card.data.base_model, card.data.license) == ("org/base", "apache-2.0")
    again = effjax.pipeline("me/small", **QUIET)
    assert again.forward == small.forward
    assert again.origin == small.origin
    assert again("a b c") == small("a b c")


def loads_local_tokenizers(monkeypatch, hub):
    """transformers asks the hub by itself: send it to the folder of the commit."""
    from transformers import AutoTokenizer

    load = AutoTokenizer.from_pretrained

    def from_folder(source, *, subfolder="", revision=None, token=None, **options):
        options.pop("cache_dir", None), options.pop("local_files_only", None)
        if not isinstance(source, str):
            return load(source, **options)
        return load(hub.root / source / "snapshots" / revision / subfolder, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", from_folder)


@pytest.mark.parametrize("named", ["tokenizer_config.json", "config.json"])
def test_code_beside_a_tokenizer_is_neither_offered_nor_run(named, texts, tmp_path, monkeypatch):
    """transformers would ask on the terminal, where a pipe may answer."""
    folder, ran = tmp_path / "model", tmp_path / "ran"
    shutil.copytree(texts, folder)
    (folder / "own.py").write_text(
        f"open({str(ran)!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast\n"
        "class Own(PreTrainedTokenizerFast): pass\n"
    )
    config = json.loads((folder / named).read_text())
    config["auto_map"] = {"AutoTokenizer": ["own.Own", None], "AutoConfig": "own.Own"}
    if named == "tokenizer_config.json":
        config["tokenizer_class"] = "Own"
    (folder / named).write_text(json.dumps(config))
    asked = []
    monkeypatch.setattr("builtins.input", lambda *prompt: asked.append(prompt) or "y")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\ny\n"))
    if named == "tokenizer_config.json":
        with pytest.raises(
            ValueError, match=r"needs code that stands beside it.*tokenizer=\.\.\.\)"
        ):
            effjax.pipeline(folder, **QUIET)
        pipe = effjax.pipeline(folder, tokenizer=make_tokenizer(), **QUIET)
    else:  # the classes that are known suffice
        pipe = effjax.pipeline(folder, **QUIET)
    assert pipe.tokenizer("a b")
    assert not asked
    assert not ran.exists()


def test_transformers_is_never_trusted_to_run_code():
    """Every call of one of its Auto classes that loads something says so."""
    calls = [
        (path.name, node.lineno, node)
        for folder in ("effjax", "converters", "experiments", "tests", "pallas_kernels")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and ast.unparse(node.func.value).split(".")[-1].startswith("Auto")
    ]
    assert len(calls) >= 3
    for file, line, call in calls:
        said = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert said.get("trust_remote_code") == "False", f"{file}:{line}"


def test_a_damaged_tokenizer_is_named(texts, tmp_path):
    shutil.copytree(texts, tmp_path / "model")
    (tmp_path / "model" / "tokenizer.json").write_text('{"model": {"type": "Nope"}}')
    with pytest.raises(ValueError, match=r"model has no tokenizer that can be read: .*"):
        effjax.pipeline(tmp_path / "model", **QUIET)


def test_two_writers_to_one_directory(tmp_path):
    """The second one fails with a sentence, and leaves nothing."""
    path = tmp_path / "new"

    def overtaken():
        with new_directory(path) as slow:
            (slow / "file").write_text("slow")
            with new_directory(path) as quick:
                (quick / "file").write_text("quick")

    with pytest.raises(ValueError, match="was written by another program meanwhile"):
        overtaken()
    assert (path / "file").read_text() == "quick"
    assert [each.name for each in tmp_path.iterdir()] == ["new"]


def test_what_killed_writers_left_is_removed(tmp_path):
    code = (
        "import os, pathlib, sys\n"
        "from effjax.storage import new_directory\n"
        "with new_directory(pathlib.Path(sys.argv[1])) as partial:\n"
        "    (partial / 'file').write_text('half')\n"
        "    os._exit(1)\n"
    )
    path = tmp_path / "new"
    subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    (left,) = tmp_path.glob(".new.*.partial")
    with new_directory(path) as partial:
        assert not left.exists()
        directories._remove_abandoned(path)
        assert partial.is_dir()  # its writer lives
