"""The command line: figures on standard output, errors as one line and a status."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import effjax
from converters import load_lora
from effjax.cli import commands, main
from effjax.methods import dit_fast_attn, lora, paro_attention
from effjax.registry import methods
from tests.test_pipelines import write_pipeline, write_text_pipeline
from tests.test_text_pipeline import write_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    write_pipeline(path)
    return path


def run(capsys, *arguments):
    """Exit status, parsed JSON of standard output (None if there is none), standard error."""
    status = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    return status, json.loads(captured.out) if captured.out else None, captured.err


def test_info(capsys, folder):
    status, figures, _ = run(capsys, "info", folder)
    assert status == 0
    assert (figures["pipeline"], figures["methods"]) == ("DiTPipeline", [])
    assert figures["scheduler"]["_class_name"] == "DDIMScheduler"
    assert figures["components"]["vae"] is None
    status, model, _ = run(capsys, "info", folder, "--subfolder", "transformer")
    assert figures["components"]["transformer"] == model
    assert (model["model"], model["layout"]) == ("DiT", "diffusers")
    assert (model["dtype"], model["compute_dtype"]) == ("float32", "float32")
    assert model["config"]["num_layers"] == 2
    assert model["weight_bytes"] > 4 * model["parameters"]  # the layout stores copies
    assert main(["info", str(folder)]) == 0
    told = capsys.readouterr().out
    assert f"DiT, {model['parameters']:,} parameters float32, computes in float32" in told


def test_search_orders_and_masks(capsys, folder, tmp_path):
    """A search whose plan stands beside arrays that it measures."""
    fast = tmp_path / "fast"
    arguments = ("--steps", 2, "--labels", "a", "--block", 8, "--density", 0.6, "--bits", 8)
    status, figures, _ = run(capsys, "search", folder, fast, "paro_attention", *arguments)
    assert status == 0
    plan = paro_attention.ParoAttentionPlan.from_json(json.dumps(figures["plan"]))
    assert (plan.slots, plan.bits) == (2, 8)
    assert 0.5 < plan.mean_density <= 0.6
    asked = ("--labels", "b", "--steps", 2, "-o", tmp_path / "images")
    status, figures, _ = run(capsys, "sample", fast, *asked)
    assert status == 0
    assert len(figures["files"]) == 1


def test_convert(capsys, folder, tmp_path):
    status, figures, _ = run(capsys, "convert", folder, tmp_path / "half", "--dtype", "bfloat16")
    assert status == 0
    assert (tmp_path / "half" / "transformer" / "config.json").is_file()
    assert run(capsys, "info", tmp_path / "half")[1]["components"]["transformer"]["dtype"] == (
        "bfloat16"
    )
    _, full, _ = run(capsys, "info", folder)
    assert 2 * figures["bytes"] == full["weight_bytes"]


def test_adapters_of_files(capsys, folder, tmp_path):
    """Two beside the layers, by the names of their files; the second at half its strength."""
    pipe = effjax.pipeline(folder, progress=False)
    rng = np.random.default_rng(0)
    files, found = [], {}
    for name, layer in (("a b", "attn1.to_q"), ("c", "ff.net.2")):
        stem = f"transformer.transformer_blocks.0.{layer}"
        wide = (16, 64)[layer == "ff.net.2"]
        pair = {"A": rng.standard_normal((2, wide)), "B": rng.standard_normal((16, 2))}
        files.append(tmp_path / f"{name}.safetensors")
        tensors = {f"{stem}.lora_{p}.weight": each.astype(np.float32) for p, each in pair.items()}
        save_file(tensors, files[-1])
        found[name.replace(" ", "_")] = load_lora(files[-1], pipe.forward)
    words = ("apply", folder, tmp_path / "styled", "lora", "--file", files[0], "--file", files[1])
    status, figures, _ = run(capsys, *words, "--scale", 1, "--scale", 0.5)
    assert status == 0
    assert [name for name, _ in figures["plan"]["adapters"]] == ["a_b", "c"]
    forward, params = effjax.pipeline(tmp_path / "styled", progress=False).component("transformer")
    wanted = lora.add(found, {"c": 0.5})(pipe.forward, pipe.params)
    assert forward == wanted[0]
    chex.assert_trees_all_equal(params, wanted[1])
    for more, message in (
        (("--scale", 1), "once for each of the 2 files, or not at all; got 1"),
        (("--file", files[0]), "two files are called a_b"),
        (("--file", folder), "has no LoRA file"),
    ):
        status, _, error = run(capsys, *words[:2], tmp_path / "bad", *words[3:], *more)
        assert status == 1
        assert message in error
        assert not (tmp_path / "bad").exists()


def test_search_of_heads(capsys, folder, tmp_path):
    goals = ("--delta", 0.5, "--candidates", "cache,arrow_8")
    arguments = ("--steps", 2, "--guidance", 2.0, "--labels", "a,b")
    name = "dit_fast_attn_v2"
    status, figures, _ = run(capsys, "search", folder, tmp_path / "fast", name, *arguments, *goals)
    assert status == 0
    assert np.shape(figures["plan"]["half_width"]) == (2, 2, 2)
    assert figures["plan"]["candidates"] == ["cache", "arrow_8"]
    _, found, _ = run(capsys, "info", tmp_path / "fast")
    assert found["components"]["transformer"]["methods"] == [name]


def test_search_sample_bench(capsys, folder, tmp_path):
    fast = tmp_path / "fast"
    arguments = ("--steps", 3, "--guidance", 2.0, "--threshold", 0.05, "--labels", "a,b")
    status, figures, _ = run(capsys, "search", folder, fast, "dit_fast_attn", *arguments)
    assert status == 0
    assert len(figures["plan"]["strategies"]) == 2

    asked = ("--labels", '"c", 1', "--images-per-prompt", 2)
    status, figures, _ = run(capsys, "sample", fast, *asked, "-o", tmp_path / "images")
    assert status == 0
    assert [file.rpartition("/")[2] for file in figures["files"]] == [
        "000_c.png",
        "001_c.png",
        "002_1.png",
        "003_1.png",
    ]

    asked = ("--labels", "1", "--steps", 4, "--strength", 0.5, "-o", tmp_path / "changed")
    _, changed, _ = run(capsys, "sample", folder, *asked, "--image", figures["files"][0])
    status, other, _ = run(capsys, "sample", folder, *asked, "--image", figures["files"][2])
    assert status == 0
    assert len(changed["files"]) == len(other["files"]) == 1

    status, figures, _ = run(capsys, "info", fast)
    assert figures["methods"] == ["dit_fast_attn"]

    status, figures, _ = run(capsys, "bench", fast, "--batch", 1, "--repeats", 1)
    assert status == 0
    assert figures["ratio"]["attention_flops"] < 1
    assert figures["dense"]["seconds"] > 0


@pytest.mark.parametrize("method", ["vidit_q", "round_to_nearest"])
def test_quantize_and_bench(untyped, capsys, folder, tmp_path, method):
    small = tmp_path / "small"
    options = (method, "--steps", 2, "--labels", "a,b") if method == "vidit_q" else (method,)
    status, figures, _ = run(capsys, "apply", folder, small, *options, "--bits", "w8a8")
    assert status == 0
    assert figures["weight_bytes"] < figures["weight_bytes_before"]
    _, info, _ = run(capsys, "info", small)
    assert info["methods"] == [method]
    assert info["weight_bytes"] == figures["weight_bytes"]
    _, dense, _ = run(capsys, "info", folder)
    assert info["parameters"] == dense["parameters"]
    status, bench, _ = run(capsys, "bench", small, "--batch", 1, "--repeats", 1, "--steps", 2)
    assert status == 0
    assert bench["ratio"]["weight_bytes"] < 1
    # A rotation is a product of its own.
    assert (bench["ratio"]["flops"] > 1) == (method == "vidit_q")
    assert bench["compressed"]["peak_bytes"] > 0
    assert bench["disk_bytes"] > bench["compressed"]["weight_bytes"]
    assert bench["psnr_to_dense"] > 10
    assert bench["reference"] == {"kind": "dense", "model": str(folder)}

    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(figures["plan"]))
    again = tmp_path / "again"
    status, figures, _ = run(capsys, "apply", folder, again, *options, "--plan", plan)
    assert status == 0
    assert figures["weight_bytes"] == info["weight_bytes"]
    bad = tmp_path / "bad"
    for bits, message in (
        ("w9", "must be one of 2, 3, 4, 5, 6, 7, 8, 16, got 9"),
        ("eight", "bits must be such as"),
    ):
        status, _, error = run(capsys, "apply", folder, bad, *options, "--bits", bits)
        assert status == 1
        assert message in error
    assert not bad.exists()


def test_plans_are_said_in_short(capsys, folder, tmp_path, language_model):
    words = (FAST, "--pattern", "WARS,AST", "--calls", 4)
    _, figures, _ = run(capsys, "apply", folder, tmp_path / "shared", *words)
    assert figures["plan"]["strategies"] == [[0, 3, 1, 3]] * 2
    _, figures, _ = run(capsys, "apply", language_model[0], tmp_path / "half", "moa", "--beta", 0.5)
    assert figures["plan"]["betas"] == [[0.5, 0.5]] * 2


def test_bits_are_searched(capsys, folder, tmp_path):
    options = ("vidit_q", "--average-bits", 6, "--steps", 2, "--labels", "a,b")
    status, figures, _ = run(capsys, "search", folder, tmp_path / "found", *options)
    assert status == 0
    [(_, rules)] = figures["plan"]["segments"]
    assert {bits for _, bits, *_ in rules} <= {4, 6, 8}
    assert run(capsys, "info", tmp_path / "found")[1]["methods"] == ["vidit_q"]


def test_text_to_image(capsys, tmp_path):
    write_text_pipeline(tmp_path / "text")
    asked = ("--prompt", "a red A", "--prompt", "a blue 7", "--steps", 2)
    sample = (
        "sample",
        tmp_path / "text",
        *asked,
        "--width",
        24,
        "--negative-prompt",
        "a 7",
        "-o",
        tmp_path / "images",
    )
    status, figures, error = run(capsys, *sample)
    assert status == 0, error
    for file in figures["files"]:
        with Image.open(file) as image:
            assert image.size == (24, 16)
    assert [file.rpartition("/")[2] for file in figures["files"]] == [
        "000_a_red_A.png",
        "001_a_blue_7.png",
    ]
    small = tmp_path / "small"
    status, _, error = run(capsys, "apply", tmp_path / "text", small, "vidit_q", "--steps", 2)
    assert status == 1
    assert "give --prompt" in error
    status, figures, _ = run(capsys, "apply", tmp_path / "text", small, "vidit_q", *asked)
    assert status == 0
    status, bench, _ = run(capsys, "bench", small, "--batch", 1, "--repeats", 1, "--steps", 2)
    assert status == 0
    assert bench["ratio"]["weight_bytes"] < 1


def test_methods(capsys):
    status, figures, _ = run(capsys, "methods")
    assert status == 0
    assert figures["dit_fast_attn"]["search"] is True
    assert main(["methods"]) == 0
    assert "arXiv" in capsys.readouterr().out


FAST, ROUND = "dit_fast_attn", "round_to_nearest"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("info", "nowhere/at/all"), "nowhere/at/all"),
        (("sample", "FOLDER", "--labels", "z", "--steps", "2"), "no class 'z'"),
        (("bench", "FOLDER"), "is not compressed"),
        (("search", "FOLDER", "FOLDER", FAST), "exists and is not empty"),
        (("search", "FOLDER", "new", FAST, "--prompt", "a"), "on classes: give --labels"),
        (("sample", "FOLDER", "--labels", "a", "--width", "8"), "images of one size"),
        (("sample", "FOLDER"), "nothing is asked for: give --labels"),
        (("sample", "FOLDER", "--labels", '"a, b",c'), "no class 'a, b'"),
        (("sample", "FOLDER", "--labels", "a", "--negative-prompt", "b"), "conditioned on classes"),
        (("apply", "FOLDER", "new", FAST), "give --pattern --calls [--window] or --strategies"),
        (("apply", "FOLDER", "new", FAST, "--tokens", "8"), "--strategies --tokens"),
        (("apply", "FOLDER", "new", "snap_kv", "--ratio", "0.5"), "is for language models"),
        (("demo", "--steps", "1"), "at least 2 steps"),
        (("info", "FOLDER", "--variant", "fp99"), "no component of"),
        (("sample", "FOLDER", "--labels", ","), "no class ''"),
        (("apply", "FOLDER", "~nobody here/new", ROUND, "--bits", "eight"), "bits must be such as"),
        (("apply", "FOLDER", "new", ROUND, "--bits", "FOLDER"), "bits must be such as"),
        (("apply", "FOLDER", "new", ROUND, "--plan", "FOLDER"), "irectory"),
        (("apply", "FOLDER", "new", ROUND, "--plan", "plan.json"), "plan.json is not valid JSON"),
        (("apply", "FOLDER", "new", ROUND, "--plan", "deep.json"), "deep.json is not valid JSON"),
        (("apply", "FOLDER", "new", ROUND, "--plan", "deep.json", "--bits", "w4"), "out --bits"),
        (("apply", "FOLDER", "new", ROUND, "--bits", "w" + "9" * 5000), "bits must be such as"),
        (("apply", "FOLDER", "new", ROUND, "--plan", "none.json"), "none.json cannot be read"),
        (("apply", "FOLDER", "new\0", ROUND), "null byte"),
        (("methods", "magic"), "no method 'magic'"),
    ],
)
def test_errors_are_one_line_and_a_status(
    capsys, folder, arguments, message, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    arguments = [str(folder) if word == "FOLDER" else word for word in arguments]
    status, figures, error = run(capsys, *arguments)
    assert (status, figures) == (1, None)
    assert message in error
    assert "Traceback" not in error


def test_figures_are_json(capsys, monkeypatch):
    """JSON has no infinity: the PSNR of equal images is null (RFC 8259, section 6)."""
    from effjax.cli import about

    figures = {"psnr": float("inf"), "rows": [{"loss": float("nan")}, 0.5]}
    monkeypatch.setattr(about, "methods", lambda _: (figures, "psnr inf"))
    status, found, _ = run(capsys, "methods")
    assert status == 0
    assert found == {"psnr": None, "rows": [{"loss": None}, 0.5]}


def test_figures_that_nobody_reads(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert main(["methods"]) == 1


@pytest.mark.parametrize(
    "words",
    [
        ("demo", "--images", "0"),
        ("search", "a", "b", "dit_fast_attn", "--threshold", "nan"),
        ("search", "a", "b", "vidit_q", "--average-bits", "1.5"),
        ("search", "a", "b", "moa", "--lengths", "16,x"),
        ("search", "a", "b", "moa", "--lengths", ""),
        ("apply", "a", "b", "gptq", "--group-size=-8"),
        ("apply", "a", "b", "snap_kv", "--ratio", "1"),
        ("fit", "a", "b", "cskv", "--learning-rate", "0"),
        ("sample", "a", "--steps", "1.5"),
        ("sample", "a", "--guidance", "-1"),
        ("sample", "a", "--seed", "99999999999999999999"),
        ("sample", "a", "--images-per-prompt", "0"),
        ("generate", "a", "--prompt", "b", "--temperature", "inf"),
        ("bench", "a", "--repeats", "0"),
    ],
    ids=" ".join,
)
def test_arguments_have_ranges(capsys, words):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert "a whole number" in (said := capsys.readouterr().err) or "finite number" in said
    option = words[-1].partition("=")[0] if "=" in words[-1] else words[-2]
    assert f"argument {option}" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("search", "a", "b", "magic"), "no method 'magic'"),
        (("search", "a", "b", "--threshold", "0.1", FAST), "stands behind its name"),
        (("apply", "a", "b", "vidit_q", "--segments", '{"a":1}'), "must be a list, each a list"),
        (("apply", "a", "b", "moa", "--alphas", "[[1e400]]"), "each a finite number"),
        (("search", "a", "b", "snap_kv"), "has no search"),
        (("fit", "a", "b", "gptq"), "is not trained"),
        (("apply", "a", "b", "gptq", "--size", "2"), "unrecognized arguments: --size 2"),
        (("apply", "a", "b", "kivi", "--key-bits", "5"), "must be one of 4, 8"),
        (("sample", "a", "--speed", "2"), "unrecognized arguments: --speed 2"),
        (("apply", "a", "b"), "required: method"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_options_that_no_command_or_method_has(capsys, words, message):
    with pytest.raises(SystemExit) as error:
        main(words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_on_a_method_has_its_options(capsys):
    for words, shown in (
        (("apply", "--help"), "effjax methods"),
        (("apply", "a", "b", "kivi", "--help"), "--value-bits"),
        (("search", "a", "b", "moa", "--help"), "(default: 0.5)"),
        (("fit", "a", "b", "cskv", "--help"), "--checkpoints"),
        (("apply", "a", "b", "vidit_q", "--help"), "--plan-seed"),
    ):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 0
        assert shown in capsys.readouterr().out


@pytest.mark.parametrize("name", methods())
def test_every_method_says_what_it_takes(capsys, name):
    """And its examples are commands that exist."""
    status, figures, _ = run(capsys, "methods", name)
    assert status == 0
    for fields in figures["options"].values():
        assert all(each["about"].partition(";")[0] for each in fields.values())
    for example in figures["examples"]:
        assert commands.read(example.split()[1:]).method == name
    assert main(["methods", name]) == 0
    assert figures["examples"][0] in capsys.readouterr().out


def test_no_command_names_a_method():
    for path in Path(commands.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not [name for name in methods() if re.search(rf"\b{name}\b", text)], path
        assert len(text.splitlines()) <= 350


def test_version_and_defaults_are_shown(capsys):
    for words, shown in ((["--version"], "effjax "), (["bench", "--help"], "(default: 3)")):
        with pytest.raises(SystemExit) as error:
            main(words)
        assert error.value.code == 0
        assert shown in (said := capsys.readouterr().out)
        assert "None" not in said


def test_destinations_are_tried_before_a_search(capsys, folder, tmp_path):
    (tmp_path / "file").write_text("")
    for words in (("search", folder), ("apply", folder)):
        status, _, error = run(capsys, *words, tmp_path / "file" / "small", "vidit_q")
        assert status == 1
        assert "cannot be written" in error
        assert "give another destination" in error


def test_a_plan_that_cannot_be_saved_is_printed(capsys, folder, tmp_path, monkeypatch):
    def fail(*given, **options):
        raise OSError("no space left")

    monkeypatch.setattr("effjax.recipe.save", fail)
    words = ("search", folder, tmp_path / "new", FAST, "--steps", 2, "--labels", "a")
    status, _, error = run(capsys, *words)
    assert status == 1
    plan = next(line for line in error.splitlines() if line.startswith("{"))
    assert len(dit_fast_attn.DiTFastAttnPlan.from_json(plan).strategies) == 2
    assert "no space left" in error
    assert not (tmp_path / "new").exists()


def test_help_has_examples_and_unknown_words_exit_with_2():
    shown = subprocess.run(
        [sys.executable, "-m", "effjax.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "examples:" in shown.stdout
    loaded = "import sys; from effjax.cli import main\ntry: main(['bench', '--help'])\nfinally: \
assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", loaded], capture_output=True, check=True)
    with pytest.raises(SystemExit) as error:
        main(["fly"])
    assert error.value.code == 2


def test_generate(capsys, folder, tmp_path):
    model = tmp_path / "llama"
    write_language_model(model)
    arguments = ("generate", model, "--prompt", "a b c", "--prompt", "d", "--max-new-tokens", 4)
    status, figures, _ = run(capsys, *arguments)
    assert status == 0
    assert [each["prompt"] for each in figures] == ["a b c", "d"]
    assert run(capsys, *arguments)[1] == figures
    drawn = run(capsys, *arguments, "--seed", 1, "--temperature", 2.0)[1]
    assert drawn != figures
    assert run(capsys, *arguments, "--seed", 1, "--temperature", 0)[1] == figures
    assert run(capsys, *arguments, "--decoder", "jacobi,window=3")[1] == figures
    assert run(capsys, *arguments, "--chat")[0] == 0
    for wrong, message in (
        ((*arguments, "--temperature", 2.0), "--temperature needs --seed"),
        ((*arguments, "--decoder", "medusa"), "no decoder 'medusa'; there are jacobi"),
        (("generate", folder, "--prompt", "a"), "is no language model"),
        (("sample", model), "is a language model; use `effjax generate`"),
        (("search", folder, tmp_path / "x", "moa"), "moa is for language models"),
    ):
        status, figures, error = run(capsys, *wrong)
        assert (status, figures) == (1, None)
        assert message in error


@pytest.fixture
def language_model(tmp_path):
    """A tiny random language model, and a text for it."""
    write_language_model(tmp_path / "llama")
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 40)
    return tmp_path / "llama", ("--texts", tmp_path / "text.txt", "--tokens", 40)


def test_compress_and_bench_a_language_model(capsys, tmp_path, language_model):
    model, texts = language_model
    fields = ("--k-density", 0.5, "--v-density", 0.5, "--window", 4)
    options = (*texts, "--steps", 2, "--checkpoints", tmp_path / "steps")
    status, figures, _ = run(capsys, "fit", model, tmp_path / "low", "cskv", *fields, *options)
    assert status == 0
    assert figures["plan"]["k_density"] == 0.5
    assert (tmp_path / "steps" / "training" / "2").is_dir()
    timed = ("--new", 4, "--repeats", 1, "--batch", 2)
    status, figures, _ = run(capsys, "bench", tmp_path / "low", *texts, *timed)
    assert status == 0
    assert figures["ratio"]["kv_bytes"] < 1
    assert figures["dense"]["weight_bytes"] == figures["compressed"]["weight_bytes"] - sum(
        2 * 4 * (16 * 8 + 8 * 16) for _ in range(2)
    )
    for side in ("dense", "compressed"):
        assert figures[side]["decode_tokens_per_second"] > 0
        assert 0 <= figures[side]["answers_right"] <= 1
    options = ("--ratio", 0.5, "--bits", 4)
    other = run(capsys, "apply", model, tmp_path / "few", "snap_kv", *options)
    assert (other[1]["plan"]["ratio"], other[1]["plan"]["bits"]) == (0.5, 4)
    tokens, held = other[1]["cache_tokens"], other[1]["cache_bytes"]
    token = 2 * 2 * 8 * 4 * 2  # float32 keys and values of two heads of 8 in two layers
    assert other[1]["cache_bytes_before"] == {"allocated": tokens * token, "useful": tokens * token}
    kept = max(tokens // 2, 32 + 1)
    token = 2 * 2 * 2 * (8 // 2 + 2 * 4)  # 4 bits a channel, a scale and an offset for all
    positions = 2 * (2 * kept + 1) * 4  # of kept tokens, and how many were dropped
    assert held == {"allocated": kept * token + positions, "useful": kept * token + positions}
    short = ("generate", tmp_path / "few", "--prompt", "a b", "--max-new-tokens", 2)
    assert run(capsys, *short)[0] == 0


def test_quantize_a_language_model(capsys, tmp_path, language_model):
    model, texts = language_model
    for method in ("gptq", "awq", "round_to_nearest"):
        arguments = ("apply", model, tmp_path / method, method, "--bits", "w4")
        seen = () if method == ROUND else (*texts, "--samples", 2)
        status, figures, _ = run(capsys, *arguments, *seen)
        assert status == 0
        assert figures["weight_bytes"] < figures["weight_bytes_before"]
        assert run(capsys, "info", tmp_path / method)[1]["methods"] == [method]


def test_search_spans_of_a_language_model(capsys, tmp_path, language_model):
    model, texts = language_model
    options = ("--lengths", "64,128,96", "--density", 0.75, "--samples", 2)
    arguments = ("search", model, tmp_path / "spans", "moa", *options, *texts[:2])
    status, figures, _ = run(capsys, *arguments)
    assert status == 0
    assert len(figures["plan"]["alphas"]) == 2


def test_commands_on_language_models_name_what_is_wrong(capsys, tmp_path, language_model, folder):
    model, texts = language_model
    new, binary = tmp_path / "new", tmp_path / "binary"
    binary.write_bytes(bytes(range(256)))
    halves = ("cskv", "--k-density", 0.5, "--v-density", 0.5)
    for wrong, message in (
        (("apply", model, new, FAST, "--pattern", "WARS", "--calls", 2), "is for images"),
        (("fit", model, new, *halves, *texts, "--checkpoints", binary), "binary is no folder"),
        (("apply", model, new, "gptq", "--texts", binary), "binary: 'utf-8' codec"),
        (("generate", model, "--prompt", "a\udcff"), "'\\udcff' at 1, which is half a character"),
        (("apply", folder, new, "cskv"), "is for language models"),
        (("apply", model, model, "kivi"), "exists and is not empty"),
        (("search", model, new, "vidit_q"), "vidit_q is for images"),
        (("search", model, new, "moa", "--lengths", "32"), "two lengths or more"),
        (("search", model, new, "moa", "--lengths", "30,60"), "multiples of 16"),
        (("bench", model), "is not compressed"),
        (("bench", "nowhere", "--decoder", "greedy"), "there is no decoder 'greedy'"),
        (("apply", model, new, "gptq", *texts[:3], 9000), "texts of 9000 cannot be cut from it"),
    ):
        status, figures, error = run(capsys, *wrong)
        assert (status, figures) == (1, None)
        assert message in error
    assert not new.exists()
