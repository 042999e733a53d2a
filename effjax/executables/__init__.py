"""Executables: programs that were compiled ahead of time, kept in files, and run without a trace.

    with executables.record() as calls:  # nothing is computed
        pipe([0], key=key)
    executables.save("dit-fast", calls)  # dit-fast/executables/cpu-...
    pipe = effjax.pipeline("dit-fast", executables=True)  # in another process

A file is what XLA serializes: machine code, which runs with the rights of the process that loads
it. So nothing is loaded unless it is asked for. What stands around it is JSON, and no pickle.

An executable is used for calls that it was made for: of the same program with equal static values
(model, recipe, sampler), and arguments of the same shapes and dtypes on one device. The versions,
the settings and the device must be those that it was compiled with.
"""

from effjax.executables.files import (
    FOLDER,
    INDEX,
    Entry,
    Executable,
    Executables,
    ExecutablesWarning,
    Index,
    load,
    save,
)
from effjax.executables.program import (
    Call,
    Calls,
    Program,
    Traced,
    record,
)

__all__ = [
    "FOLDER",
    "INDEX",
    "Call",
    "Calls",
    "Entry",
    "Executable",
    "Executables",
    "ExecutablesWarning",
    "Index",
    "Program",
    "Traced",
    "load",
    "record",
    "save",
]
