"""Generated pages are those that their sources make now, and the pages become a site."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from effjax.cli import main
from effjax.pipelines import ClassConditionalPipeline, TextToImagePipeline
from experiments import report
from tests.test_pipelines import write_pipeline, write_text_pipeline

DOCS = Path(__file__).parent.parent / "docs"


def test_the_method_table_is_current(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == (DOCS / "methods.md").read_text()


def test_the_benchmark_page_is_current():
    """`make docs` writes it from experiments/results/."""
    assert report.page() + "\n" == (DOCS / "benchmarks.md").read_text()


@pytest.mark.slow
def test_the_code_of_the_page_on_pipelines_runs(tmp_path, monkeypatch):
    """On tiny models of random weights that have the names and texts of the page."""
    write_pipeline(tmp_path / "classes", channels=3)
    index = json.loads((tmp_path / "classes" / "model_index.json").read_text())
    index["id2label"] = {"0": "tench, Tinca tinca", "1": "golden retriever"}
    (tmp_path / "classes" / "model_index.json").write_text(json.dumps(index))
    write_text_pipeline(tmp_path / "texts")
    code = "\n".join(
        re.findall(r"```python\n(.*?)```", (DOCS / "pipelines.md").read_text(), flags=re.DOTALL)
    )
    changes = {
        "facebook/DiT-XL-2-512": "classes",
        "PixArt-alpha/PixArt-Sigma-XL-2-512-MS": "texts",
        "num_steps=20": "num_steps=2",
        "height=512, width=768": "height=8, width=24",
    }
    for old, new in changes.items():
        assert old in code
        code = code.replace(old, new)
    monkeypatch.setattr(ClassConditionalPipeline, "STEPS", 2)
    monkeypatch.setattr(TextToImagePipeline, "STEPS", 2)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert len(names["images"]) == 4
    assert (tmp_path / "retriever.png").is_file()
    expected = np.asarray(names["pictures"][0], np.float32) / 255
    np.testing.assert_allclose(names["arrays"][0], expected, atol=0.5 / 255 + 1e-6)
    assert names["again"].forward == names["small"].forward


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "quantisation" / "index.html").is_file()
