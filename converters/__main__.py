"""`python -m converters SRC DST`: rewrite a checkpoint for diffusers or transformers."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from typing import Any


def lines(report: Mapping[str, Any]) -> list[str]:
    """What `convert` wrote, a line for each model."""
    return [
        f"{each['destination']}: {each['model']}, {each['layout']} layout, "
        f"{each['parameters']:,} parameters as stored, {each['bytes'] / 1e9:.3f} GB in "
        f"{len(each['files'])} file(s)"
        for each in report.get("components", {"": report}).values()
    ]


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m converters",
        description="Rewrite a checkpoint (diffusers directory, single file, original .pt, or hub "
        "repository) in diffusers' layout, holding one tensor in memory at a time.",
    )
    parser.add_argument("source", metavar="SRC", help="directory, weight file, or owner/name")
    parser.add_argument("destination", metavar="DST", help="directory to make")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="as stored if not given"
    )
    parser.add_argument("--layout", help="names of the tensors, if the family has several")
    parser.add_argument(
        "--subfolder", help="of one model in SRC; else a pipeline is converted whole"
    )
    parser.add_argument("--variant", help="which weights, such as fp16, if there are several")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        default=5_000_000_000,
        help="largest weight file (default: %(default)s)",
    )
    parser.add_argument(
        "--check-finite", action="store_true", help="reject NaN and infinite weights"
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")
    options = vars(parser.parse_args(argv))
    source, destination = options.pop("source"), options.pop("destination")
    as_json = options.pop("json")

    from converters.conversion import convert

    try:
        report = convert(source, destination, **options)
    except (ValueError, ImportError, OSError) as error:
        first, *listed = str(error).splitlines()
        line = f"error: {first} {'; '.join(map(str.strip, listed))}"
        print(line.rstrip(), file=sys.stderr)
        return 1
    if as_json:
        print(json.dumps(report))
    else:
        for line in lines(report):
            print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
