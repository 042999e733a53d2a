"""The command of the package: measures the parts that are named, writes them and prints them."""

from __future__ import annotations

import argparse
import importlib.metadata
import os

import jax

from experiments import report
from experiments.peers import __doc__ as description
from experiments.peers import attention, compressed, dit, llm, products

PARTS = {
    "attention": attention,
    "compressed": compressed,
    "dit": dit,
    "llm": llm,
    "products": products,
}
PACKAGES = ("jax", "torch", "diffusers", "transformers")


def versions() -> dict[str, str]:
    """Versions of the packages that are compared, as far as they are here."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, once; prints only")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    backend, load, found = jax.default_backend(), os.getloadavg()[0], versions()
    print(f"{report.machine()}; {found}; load {load:.2f}")
    for name in arguments.parts or PARTS:
        rows = []
        for row in PARTS[name].rows(arguments.quick):
            rows.append(row)
            print(report.markdown([row]).splitlines()[-1], flush=True)
        if not rows:
            print(f"{name}: nothing to compare with; install the torch extra")
            continue
        if not arguments.quick:
            report.write_peers(name, rows, backend=backend, versions=found, load=load)


if __name__ == "__main__":
    main()
