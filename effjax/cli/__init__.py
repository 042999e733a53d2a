"""The command line: `effjax demo | info | convert | methods | apply | search | fit | sample | ...`.

Figures go to standard output (as JSON with --json), progress and messages to standard error. No
command names a method: its options come from the method's declaration (`effjax.transform.Method`).
Help and the checks of arguments need no JAX, but for the options of a method.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from effjax.cli import commands


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return the exit status (0, or 1 for an error, told on standard error)."""
    arguments = commands.read(sys.argv[1:] if argv is None else argv)
    for name, value in vars(arguments).items():
        if isinstance(value, Path):
            setattr(arguments, name, Path(os.path.expanduser(value)))
    module, _, function = arguments.run.partition(":")
    try:
        run = getattr(import_module(f"effjax.cli.{module}"), function)
        figures, text = run(arguments)
        if arguments.json:
            from effjax.storage.json_files import figures_json  # with JAX, loaded by now

            text = figures_json(figures)
        print(text, flush=True)
    except BrokenPipeError:  # whoever read the figures has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"effjax {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0
