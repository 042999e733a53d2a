"""Starts are measured on programs that give a result."""

import json

from experiments import warm_start


def test_a_process_says_what_its_calls_took(tmp_path, capsys):
    for start in ("save", "executables"):
        warm_start.child("DiT-XL/2", start, tmp_path, quick=True)
    saved, (first, later) = map(json.loads, capsys.readouterr().out.splitlines())
    assert saved[0] > 0
    assert min(first, later) > 0
    assert warm_start.texts(quick=True)().tokens.shape == (1, 8)
