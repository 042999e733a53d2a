"""What a program's equations do not tell about its work, written into names of jitted calls.

Blockwise kernels compute whole blocks, masked-out elements included: `useful` says which share the
mask keeps. A kernel that cannot declare its cost (Mosaic's for GPUs, before JAX 0.12) is wrapped
in `declared`. Both are known exactly when the program is traced, and both are ratios, so that in
the name of a `jit` equation they survive `vmap` and `scan`, and `useful` also `grad`; whoever
counts the work of a program can read them there.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import jax

_USEFUL = re.compile(r"__useful_(\d+)_of_(\d+)")
_WORK = re.compile(r"__work_(\d+)_moves_(\d+)_per_(\d+)")


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
    return _named(function, f"__useful_{numerator}_of_{denominator}")


def useful_fraction(name: str) -> Fraction | None:
    """The fraction that `useful` wrote into the name of a jitted call; None for other names."""
    found = _USEFUL.search(name)
    return Fraction(int(found[1]), int(found[2])) if found else None


class Work(NamedTuple):
    """What one element of a call's first result costs.

    Attributes:
        flops, bytes_: a share of the whole call's.
    """

    flops: Fraction
    bytes_: Fraction


def declared(
    function: Callable[..., Any], *, flops: int, bytes_accessed: int, elements: int
) -> Callable[..., Any]:
    """Declare the work of a function whose equations do not show it, and that has no gradients.

    Args:
        function: a function of arrays; it becomes one jitted call.
        flops, bytes_accessed: of one call.
        elements: elements of its first result, at least 1, to which the work is in proportion.
    """
    return _named(function, f"__work_{flops}_moves_{bytes_accessed}_per_{elements}")


def declared_work(name: str) -> Work | None:
    """The work that `declared` wrote into the name of a jitted call; None for other names."""
    found = _WORK.search(name)
    if not found:
        return None
    flops, moved, elements = map(int, found.groups())
    return Work(Fraction(flops, elements), Fraction(moved, elements))


def _named(function: Callable[..., Any], suffix: str) -> Callable[..., Any]:
    def marked(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    name = re.sub(r"\W", "", getattr(inner, "__name__", "function"))
    marked.__name__ = marked.__qualname__ = name + suffix
    return jax.jit(marked, inline=False)
