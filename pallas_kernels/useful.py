"""How much of a function's executed work is useful, written into the name of its jitted call.

Blockwise kernels compute whole blocks, masked-out elements included. The share of elements that the
mask keeps is known exactly when the program is traced. As a ratio in the name of a `jit` equation
it survives `vmap`, `grad` and `scan`, and whoever counts the work of a program can read it there.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax

_SUFFIX = re.compile(r"__useful_(\d+)_of_(\d+)")


def useful(function: Callable[..., Any], numerator: int, denominator: int) -> Callable[..., Any]:
    """Declare that `numerator / denominator` of a function's executed products are useful.

    The fraction holds for each product in the function, so mark only the masked products: q k^T and
    (weights) v, without the projections around them. Marked functions do not nest.

    Args:
        function: a function of arrays; it becomes one jitted call.
        numerator: elements that the mask keeps, 0 ... denominator.
        denominator: elements that are computed, at least 1.

    Raises:
        ValueError: if the fraction is not between 0 and 1.
    """
    numerator, denominator = operator.index(numerator), operator.index(denominator)
    if not 0 <= numerator <= denominator or denominator == 0:
        raise ValueError(
            f"the useful part of the executed work must be between 0 and all of it; got "
            f"{numerator} of {denominator} elements"
        )

    def marked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = re.sub(r"\W", "", getattr(inner, "__name__", "function"))
    marked.__name__ = marked.__qualname__ = f"{name}__useful_{numerator}_of_{denominator}"
    return jax.jit(marked, inline=False)


def useful_fraction(name: str) -> Fraction | None:
    """The fraction that `useful` wrote into the name of a jitted call; None for other names."""
    found = _SUFFIX.search(name)
    return Fraction(int(found[1]), int(found[2])) if found else None
