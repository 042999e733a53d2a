"""Bits in the field's notation: W4A8 is weights of 4 bits and inputs of 8."""

from __future__ import annotations

import re

from effjax.quant.quantizer import FLOAT


def read_bits(word: str) -> tuple[int, int]:
    """Bits of weights and inputs that a word such as w8a8 or w4 says; inputs of w4 stay floats.

    Raises:
        ValueError: for another word.
    """
    found = re.fullmatch(r"w(\d{1,3})(?:a(\d{1,3}))?", word.lower())
    if found is None:
        raise ValueError(f"bits must be such as w8a8, w4a8 or w4; got {word[:80]!r}")
    return int(found[1]), FLOAT if found[2] is None else int(found[2])
