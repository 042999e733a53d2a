"""Comparisons with peers: that each part runs, and what the page makes of them."""

import numpy as np
import pytest

from experiments import report
from experiments.peers import __main__ as command
from experiments.peers import llm


@pytest.fixture(autouse=True)
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "part", ["products", *(pytest.param(each, marks=pytest.mark.torch) for each in ("dit", "llm"))]
)
def test_quick_parts_print_ratios_and_write_nothing(part, capsys, results):
    if part != "products":
        for package in ("torch", "diffusers", "transformers"):
            pytest.importorskip(package)
    command.main([part, "--quick"])
    first, *rows = capsys.readouterr().out.strip().splitlines()
    assert "load" in first
    assert "'jax'" in first
    cells = [[cell.strip() for cell in row.split("|")] for row in rows if row.startswith("|")]
    assert len(cells) >= 3
    assert all(float(ratio) > 0 for _, _, _, _, ratio, *_ in cells)
    assert not list(results.iterdir())


def test_unknown_parts_are_named(capsys):
    with pytest.raises(SystemExit):
        command.main(["speed"])
    assert "no part speed; there are attention" in capsys.readouterr().err


@pytest.mark.torch
def test_both_make_the_same_tokens(tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    trio = llm.models("float32", 1, tmp_path)
    tokens = np.random.default_rng(0).integers(0, 1000, (2, 8)).astype(np.int32)
    made = [program() for program in llm.decoding(*trio, tokens, 3).values()]
    np.testing.assert_array_equal(*made)
    logits = [np.asarray(program()) for program in llm.reading(*trio, tokens).values()]
    np.testing.assert_allclose(logits[0], logits[1].reshape(logits[0].shape), atol=2e-4)


def test_the_page_has_a_column_for_each_machine_and_says_what_is_missing():
    row = {"what": "DiT", "measured": "effjax", "against": "diffusers", "at_most": 1.0}
    for backend, jax, ratio in (("cpu", "0.10.2", 0.5), ("cpu", "0.12.0.1", 0.25)):
        report.write_peers(
            "dit",
            [row | {"ratio": ratio, "seconds": 1.0}],
            backend=backend,
            versions={"jax": jax},
            load=0.1,
        )
    page = report.page()
    assert "|  | ratio of | aim | CPU, jax 0.10 | CPU, jax 0.12 | GPU | TPU |" in page
    assert "| DiT | effjax / diffusers | 1 | 0.5 | 0.25 |  |  |" in page
    assert "An empty column was not measured" in page
    report.write_peers(
        "dit", [row | {"ratio": 2.0}], backend="gpu", versions={"jax": "0.11.2"}, load=0.0
    )
    assert "| DiT | effjax / diffusers | 1 | 0.5 | 0.25 | 2 |  |" in report.page()
