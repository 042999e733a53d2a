"""Generated pages are those that their sources make now, and the pages become a site."""

import subprocess
import sys
from pathlib import Path

from effjax.cli import main
from experiments import report

DOCS = Path(__file__).parent.parent / "docs"


def test_the_method_table_is_current(capsys):
    assert main(["methods", "--markdown"]) == 0
    assert capsys.readouterr().out == (DOCS / "methods.md").read_text()


def test_the_benchmark_page_is_current():
    """`make docs` writes it from experiments/results/."""
    assert report.page() + "\n" == (DOCS / "benchmarks.md").read_text()


def test_the_site_builds_and_its_links_lead_somewhere(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=DOCS.parent, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "quantisation" / "index.html").is_file()
