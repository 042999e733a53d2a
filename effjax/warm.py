"""Warm starts: a program that was compiled once is not compiled again in the next process.

`compilation_cache` keeps what XLA compiled; a later process traces a program and finds it.
(`effjax.executables` saves programs that are not traced either.)
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import jax

from effjax import compat

FOLDER = "EFFJAX_CACHE"  # environment variable


def compilation_cache(folder: str | os.PathLike | None = None) -> Path:
    """Keep all programs that are compiled from now on, for this process and later ones.

    Call it once, before the first program is compiled. A later process then traces its programs but
    does not compile them again. This is JAX's persistent compilation cache, with small programs in
    it too. Each version of JAX and each set of processor instructions has a folder of its own
    within the folder, so several machines may share it. No device is touched. A second call changes
    the folder.

    The programs are machine code that later processes run. Keep the folder from people that you do
    not trust. The folder grows; its files may be removed at any time.

    Args:
        folder: where to keep the programs; it is made if it does not exist. None takes the folder
            in the environment variable EFFJAX_CACHE, else `effjax` in the user's cache directory
            (XDG_CACHE_HOME, else ~/.cache).

    Returns:
        The folder of this machine and these versions within the folder.

    Raises:
        ValueError: if nothing can be written to the folder.
    """
    given = folder or os.environ.get(FOLDER) or Path(_user_cache()) / "effjax"
    own = Path(os.path.expanduser(given)).absolute() / _name()
    try:
        own.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=own):
            pass
    except OSError as error:
        raise ValueError(
            f"compiled programs cannot be kept in {own}: {error.strerror or error}. Give a folder "
            f"that can be written, or name one in {FOLDER}."
        ) from error
    compat.use_compilation_cache(own)
    return own


def processor() -> dict[str, str | list[str]]:
    """The architecture of this machine's processor, and the instructions that it knows."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    fields = (line.partition(":") for line in lines)
    found = [words for name, _, words in fields if name.strip() in ("flags", "Features")]
    # Without that file the kind of the processor has to do.
    known = sorted(set(found[0].split())) if found else [platform.processor(), platform.release()]
    return {"architecture": platform.machine(), "instructions": known}


@cache
def _name() -> str:
    """Of the folder of this machine and these versions."""
    keyed = [processor(), *(version(name) for name in ("jax", "jaxlib"))]
    digest = hashlib.sha256(json.dumps(keyed).encode()).hexdigest()
    return f"jax-{jax.__version__}-{digest[:16]}"


def _user_cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
