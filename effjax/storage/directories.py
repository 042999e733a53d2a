"""Directories that appear when they are complete, or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to fill, which takes its name only when it is complete.

    Of two writers to one name the second one fails, with nothing written. What writers left that
    were killed is removed.

    Raises:
        ValueError: if something other than an empty directory has that name, and for directories
            that cannot be replaced.
    """
    path = _free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        try:
            if path.is_dir():
                path.rmdir()
            os.replace(partial, path)
        except OSError as error:
            if not path.exists():
                raise
            raise ValueError(
                f"{path} was written by another program meanwhile, and is left as it is; give "
                f"another name"
            ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _lock(directory: Path) -> int | None:
    """Hold a directory until the descriptor is closed or this process ends.

    Returns:
        The descriptor; None if another process holds it, or where directories cannot be locked.
    """
    try:
        import fcntl

        descriptor = os.open(directory, os.O_RDONLY)
    except (ImportError, OSError):  # no fcntl on Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def _remove_abandoned(path: Path) -> None:
    """Remove what writers to this name left that were killed: no one holds it."""
    for partial in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if (lock := _lock(partial)) is not None:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _free(path: Path) -> Path:
    """Where a new directory goes, links followed; its name must be free."""
    path = Path(os.path.realpath(os.path.expanduser(path)))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists and is not empty; remove it, or give another name")
    if path.exists() and (path.is_mount() or path.samefile(os.curdir)):
        raise ValueError(
            f"{path} cannot be replaced, as it is a mount point or where this program runs; give "
            f"the name of a directory in it"
        )
    return path


def check_destination(path: Path) -> None:
    """Find out before long work whether `new_directory` can make this one; makes its parents.

    Raises:
        ValueError: if that name is taken, or nothing can be written there.
    """
    path = _free(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error}; give another destination") from None
