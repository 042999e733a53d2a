"""The README's example runs, on the bundled model and with few steps."""

import re
import shlex
from pathlib import Path

import pytest

from effjax.bundled.demo import MODEL
from effjax.cli import main

README = Path(__file__).parent.parent / "README.md"


@pytest.mark.slow
def test_the_example_runs(tmp_path, monkeypatch):
    code, _ = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    changes = {
        '"facebook/DiT-XL-2-512", dtype="bfloat16"': f'{str(MODEL)!r}, dtype="float32"',
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
