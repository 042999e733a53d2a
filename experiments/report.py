"""Where experiments leave their figures, and the page that shows them.

    python -m experiments.report > docs/benchmarks.md

Each experiment writes `experiments/results/<name>.json` with the command that makes it.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"

Rows = list[dict[str, Any]]


def machine() -> str:
    """Processor and accelerator in words."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else processor
    device = jax.devices()[0]
    return processor if device.platform == "cpu" else f"{processor}; {device.device_kind}"


def write(name: str, *, title: str, command: str, **tables: Rows) -> Path:
    """Write one experiment's tables beside the command that makes them."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    contents = {
        "title": title,
        "command": command,
        "machine": machine(),
        "jax": jax.__version__,
        "tables": tables,
    }
    path.write_text(json.dumps(contents, indent=1) + "\n")
    return path


def markdown(rows: Rows) -> str:
    """Rows of equal keys as a table."""
    columns = list(rows[0])

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row[column]) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def page() -> str:
    """All results as one Markdown page."""
    parts = ["# Benchmarks", "Made by `python -m experiments.report` from `experiments/results/`."]
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        parts += [
            f"## {result['title']}",
            f"`{result['command']}` on {result['machine']}, jax {result['jax']}.",
        ]
        parts += [
            text
            for name, rows in result["tables"].items()
            for text in (f"**{name.replace('_', ' ')}**", markdown(rows))
        ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(page())
