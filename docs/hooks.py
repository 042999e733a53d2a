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
from effjax.registry import methods, models, module_of
from effjax.transform import Method

SYSTEMS = Path(__file__).parent / "systems.toml"
STATES = ("not yet", "not possible here")  # of systems that no method is; the second has a reason
DECODING = "raster.md#several-tokens-in-a-call"  # the page of decoders
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
    built = {
        kind: {system: name for name, each in found.items() for system in each.systems}
        for kind, found in {
            "method": {method.name: method for method in methods().values()},
            "decoder": DECODERS,
            "model": models(),
        }.items()
    }
    listed = tomllib.loads(SYSTEMS.read_text(encoding="utf-8"))["systems"]
    names = [row["name"] for row in listed]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{SYSTEMS.name} has systems twice: {', '.join(twice)}")
    for method in methods().values():
        for system in (each for each in method.systems if each not in names):
            listed.append({"name": system, "family": "others", "paper": method.paper})
    return [_row(row, {k: of.get(row["name"], "") for k, of in built.items()}) for row in listed]


def _row(entry: Mapping[str, str], built: Mapping[str, str]) -> dict[str, str]:
    """A system, and the method, decoder or model that it is."""
    row = {"state": STATES[0], "reason": "", **entry, **built}
    if row["state"] not in STATES or not row["paper"]:
        raise ValueError(f"{row['name']} needs a paper and one of the states {STATES}; got {row}")
    if (row["state"] == STATES[1]) != bool(row["reason"]):
        raise ValueError(f"{row['name']}: what is {STATES[1]} has a reason, and nothing else has")
    return {**row, "state": "built", "reason": ""} if any(built.values()) else row


def coverage_page() -> str:
    """Published systems by family: which are built, by what, and why others cannot be."""
    rows = coverage()
    count = sum(row["state"] == "built" for row in rows)
    lines = [
        "# Coverage",
        "",
        f"{count} of {len(rows)} published systems are built. A system is built when the "
        "declaration of a method, a decoder or a model names it; what is not possible here lacks a "
        "source, a model, data or a device.",
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
            elif row["model"]:
                state = f"[model `{row['model']}`](api/models.md)"
            elif row["reason"]:
                state = f"{state}: {row['reason']}"
            lines.append(f"| {row['name']} | {state} | {row['paper']} |")
    return "\n".join(lines) + "\n"
