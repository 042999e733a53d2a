"""JSON objects in files, and what stands there instead of them."""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        ValueError: naming the file, if it cannot be read, is no JSON in UTF-8, has a key twice, or
            holds something other than an object.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} {stand_in(text[:64]) or f'is not valid JSON: {error}'}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object, whose keys are all different.

    Raises:
        ValueError: for anything else.
    """

    def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = collections.Counter(key for key, _ in pairs)
            raise ValueError(f"keys stand twice: {[key for key in found if counts[key] > 1]}")
        return found

    try:
        value = json.loads(text.decode(), object_pairs_hook=distinct)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it must be a JSON object, got a {type(value).__name__}")
    return value


def stand_in(start: bytes) -> str | None:
    """What stands in the place of a file that begins so, if it is known not to be the file."""
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file; run `git lfs pull`"
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "is a web page, not the file; download it again"
    return None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """JSON with sorted keys."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")


def figures_json(figures: Any) -> str:
    """Figures as JSON text with sorted keys; NaN and infinities, which JSON has not, are null.

    The PSNR of equal images is such a figure.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(figures), indent=2, sort_keys=True, allow_nan=False)
