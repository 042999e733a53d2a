"""Scripts of findings/ keep the form that CONTRIBUTING.md describes; they are run by hand."""

import os
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(FOLDER.glob("*.sh"))


def test_every_script_is_listed_once():
    table = (FOLDER / "README.md").read_text()
    listed = re.findall(r"^\| \[(\w+\.sh)\]\((\w+\.sh)\)", table, flags=re.MULTILINE)
    assert listed == [(script.name, script.name) for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_form_of_a_finding(script):
    text = script.read_text()
    header, code = re.match(r"#!/usr/bin/env bash\n((?:#[^\n]*\n)+)(.*)", text, re.DOTALL).groups()
    parts = re.findall(r"^# (\w[\w ]*):", header, flags=re.MULTILINE)
    assert parts == ["Versions", "Expected", "Behavior", "Output seen"]
    assert os.access(script, os.X_OK)
    assert code.startswith(
        "set -euo pipefail\nfolder=$(mktemp -d)\ntrap 'rm -rf \"$folder\"' EXIT\n"
    )
    installed = re.findall(r"pip\" install --quiet (.*)", code)
    assert installed
    for line in installed:
        assert re.fullmatch(r"'[\w-]+==[\w.]+'(?: '[\w-]+==[\w.]+')*", line)
    # Other libraries alone, found by the name of their package.
    assert "effjax" not in text
    assert "://" not in text
    # The output that was seen ends as the script does.
    assert header.rstrip().endswith("#   as stated")
    assert 'print("as stated")' in code
    assert "changed" in code
