"""The README's example runs, on a model of two layers and with few steps."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from effjax import testing
from effjax.cli import main
from effjax.forward import abstract
from effjax.models.dit import DiT
from experiments import train_dit

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    code, _ = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    config = dataclasses.replace(train_dit.TINY, num_layers=2, num_heads=2, patch_size=4)
    forward, shapes = abstract(DiT, config)
    train_dit.export(tmp_path / "tiny", forward, testing.random_params(shapes))
    changes = {
        '"facebook/DiT-XL-2-512", dtype="bfloat16"': '"tiny", dtype="float32"',
        "num_inference_steps=50": "num_inference_steps=3",
        "[207, 360]": '["A", 7]',
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(names["images"]) == 2
    assert (tmp_path / "dit-fast" / "transformer" / "recipe.json").is_file()


def test_the_tiny_language_model_says_what_the_readme_shows(monkeypatch, capsys):
    (block,) = re.findall(r"```\n\$ effjax (generate .*?)```", README.read_text(), flags=re.DOTALL)
    command, _, shown = block.partition("'\n")
    words = shlex.split(command.replace("\\\n", "").replace("$'", "'") + "'")
    monkeypatch.chdir(README.parent)
    assert main([word.replace(r"\n", "\n") for word in words]) == 0
    assert capsys.readouterr().out == shown


def test_every_file_that_the_readme_links_exists():
    for link in re.findall(r"\]\(([^)#:]+)\)", README.read_text()):
        assert (README.parent / link).exists(), link
