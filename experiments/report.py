"""Where experiments leave their figures, and the page that shows them.

    python -m experiments.report > docs/benchmarks.md

Each experiment writes `experiments/results/<name>.json` with the command that makes it.
"""

from __future__ import annotations

import importlib
import inspect
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


def write_peers(
    part: str, rows: Rows, *, backend: str, versions: dict[str, str], load: float
) -> Path:
    """Write one part of `experiments.peers` as measured here, beside the other parts."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"peers_{backend}_jax{'.'.join(versions['jax'].split('.')[:2])}.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = {"machine": machine(), "versions": versions, "load": load, "rows": rows}
    path.write_text(json.dumps({"parts": parts}, indent=1) + "\n")
    return path


def markdown(rows: Rows) -> str:
    """Rows of equal keys as a table."""
    columns = list(rows[0])

    def cell(value: Any) -> str:
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(cell(row[column]) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


BACKENDS = {"cpu": "CPU", "gpu": "GPU", "tpu": "TPU"}


def peers() -> str:
    """What `experiments.peers` measured, a column for each backend and JAX: ratios of seconds."""
    columns: dict[str, dict[str, Any]] = {}
    for backend, title in BACKENDS.items():
        paths = sorted(RESULTS.glob(f"peers_{backend}_jax*.json"))
        for path in paths:
            name = f"{title}, jax {path.stem.partition('_jax')[2]}"
            columns[name] = json.loads(path.read_text())["parts"]
        if not paths:
            columns[title] = {}
    text = [
        "## Against peers, and against float32",
        "`python -m experiments.peers`: shares of the other program's seconds, or of the weights' "
        "bytes for temporaries; below 1 is better. An empty column was not measured.",
    ]
    for part in sorted({part for parts in columns.values() for part in parts}):
        found: dict[tuple, dict[str, Any]] = {}
        for name, parts in columns.items():
            for row in parts.get(part, {"rows": []})["rows"]:
                key = row["what"], f"{row['measured']} / {row['against']}", row["at_most"]
                found.setdefault(key, {})[name] = row["ratio"]
        rows = [
            {"": what, "ratio of": pair, "aim": "" if aim is None else aim}
            | {name: own.get(name, "") for name in columns}
            for (what, pair, aim), own in found.items()
        ]
        told = inspect.getdoc(importlib.import_module(f"experiments.peers.{part}")) or ""
        text += [f"**{part}**", told, markdown(rows)]
        text += [
            f"{name}: {own['machine']}, "
            + ", ".join(f"{package} {version}" for package, version in own["versions"].items())
            + f", load {own['load']:.2g} when it began."
            for name, parts in columns.items()
            if (own := parts.get(part))
        ]
    return "\n\n".join(text)


def page() -> str:
    """All results as one Markdown page."""
    parts = ["# Benchmarks", "Made by `python -m experiments.report` from `experiments/results/`."]
    parts.append(peers())
    for path in sorted(RESULTS.glob("*.json")):
        if path.stem.startswith("peers_"):
            continue
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
