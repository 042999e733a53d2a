"""Generated pages are those that their sources make now."""

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
