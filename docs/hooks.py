"""Pages that are made when the docs are built: from declarations, and from `systems.toml`.

mkdocs calls `on_files`. No page that depends on methods is kept: a method that is added stands in
all of them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from effjax.cli import declarations
from effjax.generate import DECODERS
from effjax.registry import methods, module_of
from effjax.transform import Method

SYSTEMS = Path(__file__).parent / "systems.toml"
STATES = ("not yet", "not possible here")  # of systems that no method is; the second has a reason
DECODING = "autoregression.md#several-tokens-in-a-call"  # the page of decoders
BESIDE = (
    "effjax.methods.cache.press",
    "effjax.calibration",
    "effjax.search.allocation",
    "effjax.search.sensitivity",
    "effjax.training",
)


def on_files(files: Files, config: Any, **kwargs: Any) -> Files:
    """Add the generated pages to the site."""
    pages = {
        "methods.md": methods_page(),
        "coverage.md": coverage_page(),
        "api/methods.md": reference_page(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def methods_page() -> str:
    """All methods in a table, and what each takes."""
    lines = [
        "# Methods",
        "",
        "What each method is, and the options that it has on the command line and in its plan. "
        "`effjax methods NAME` prints the same.",
        "",
        "| method | for | changes | looks at | search | training | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, method in methods().items():
        seen = declarations.looks_at(method) or "the model alone"
        search, fit = ("yes" if each else "no" for each in (method.search, method.fit))
        changes = ", ".join(method.seams)
        lines.append(
            f"| [`{name}`](#{name}) | {method.domain} | {changes} | {seen} | {search} | {fit} "
            f"| {method.paper} |"
        )
    for method in methods().values():
        lines += ["", *_section(method)]
    return "\n".join(lines) + "\n"


def _section(method: Method) -> Iterator[str]:
    yield f"## {method.name}"
    yield ""
    yield declarations.about(method).partition("\n\n")[0].replace("\n", " ")
    yield f"See [the reference](api/methods.md#{module_of(method.name)})."
    for title, rows in declarations.figures(method)["options"].items():
        yield ""
        yield f"| {title} | | default |"
        yield "|---|---|---|"
        for name, row in rows.items():
            default = f"`{row['default']}`" if "default" in row else "needed"
            about = row["about"].replace("|", "\\|")
            yield f"| `--{name.replace('_', '-')}` | {about} | {default} |"
    yield ""
    yield "```"
    yield from declarations.examples(method)
    yield "```"


def reference_page() -> str:
    """The modules of all methods."""
    modules = [*map(module_of, methods()), *BESIDE]
    listed = "\n\n".join(f"::: {module}" for module in modules)
    return (
        "# Methods and their plans\n\nEach method is a module: its plan, its transform, its search "
        "or fit. [Methods](../methods.md) is the list with papers and options.\n\n"
        f"{listed}\n"
    )


def coverage() -> list[dict[str, str]]:
    """The systems of `systems.toml`, and those that only methods name, each with its state.

    Raises:
        ValueError: for a system that stands twice, has another state, no paper, or no reason for
            being impossible.
    """
    built = {system: method for method in methods().values() for system in method.systems}
    decoders = {system: name for name, decoder in DECODERS.items() for system in decoder.systems}
    listed = tomllib.loads(SYSTEMS.read_text(encoding="utf-8"))["systems"]
    names = [row["name"] for row in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{SYSTEMS.name} has systems twice: {', '.join(twice)}")
    rows = [_row(row, built.get(row["name"]), decoders.get(row["name"])) for row in listed]
    for system, method in built.items():
        if system not in names:
            entry = {"name": system, "family": "others", "paper": method.paper}
            rows.append(_row(entry, method))
    return rows


def _row(
    entry: Mapping[str, str], method: Method | None, decoder: str | None = None
) -> dict[str, str]:
    row = {"state": STATES[0], "reason": "", **entry, "method": "", "decoder": ""}
    if row["state"] not in STATES or not row["paper"]:
        raise ValueError(f"{row['name']} needs a paper and one of the states {STATES}; got {row}")
    if (row["state"] == STATES[1]) != bool(row["reason"]):
        raise ValueError(f"{row['name']}: what is {STATES[1]} has a reason, and nothing else has")
    if decoder is not None:
        return {**row, "state": "built", "decoder": decoder, "reason": ""}
    return row if method is None else {**row, "state": "built", "method": method.name, "reason": ""}


def coverage_page() -> str:
    """Published systems by family: which are built, by what method, and why others cannot be."""
    rows = coverage()
    count = sum(row["state"] == "built" for row in rows)
    lines = [
        "# Coverage",
        "",
        f"{count} of {len(rows)} published systems are built. A system is built when the "
        "declaration of a method or a decoder names it; what is not possible here lacks a source, "
        "a model, data or a device.",
    ]
    for family in dict.fromkeys(row["family"] for row in rows):
        lines += [
            "",
            f"## {family[0].upper()}{family[1:]}",
            "",
            "| system | state | paper |",
            "|---|---|---|",
        ]
        for row in (row for row in rows if row["family"] == family):
            state = row["state"]
            if row["method"]:
                state = f"[`{row['method']}`](methods.md#{row['method']})"
            elif row["decoder"]:
                state = f"[decoder `{row['decoder']}`]({DECODING})"
            elif row["reason"]:
                state = f"{state}: {row['reason']}"
            lines.append(f"| {row['name']} | {state} | {row['paper']} |")
    return "\n".join(lines) + "\n"
