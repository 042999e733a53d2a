"""Hadamard rotations of any width that has one, applied as a product of small matrices.

H has entries +-1 and H H^T = n I. Known orders come from Paley's two constructions over a prime
field, from Williamson's four circulant matrices (156 and 172), and from Sylvester's doubling;
H_a (x) H_b has order a b. A rotation of width C = a b, R = diag(signs) H / sqrt(C), is applied as
two products: reshape to [a, b], multiply either side.
"""

from __future__ import annotations

import dataclasses
import math
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import Array

from effjax.fields import Checked, Count, Natural
from pallas_kernels.quantize_inputs import xla
from pallas_kernels.quantize_inputs.factors import join

# Largest factor that is multiplied as a dense matrix.
LARGEST = 256

# Signs of four symmetric circulant matrices of order n with A^2 + B^2 + C^2 + D^2 = 4 n I, by 4 n:
# the first (n + 1) / 2 of each first row, the others mirror them. Found by search; the rows of 172
# are constant on the classes of the cubic residues modulo 43.
_WILLIAMSON = {
    156: (
        "++------+--+-+--++-+",
        "++---+--++----+-+-++",
        "++-++-++---+-----+-+",
        "+-+-----+-+++--+++--",
    ),
    172: (
        "+++++-++----+-++--++-+",
        "+++---++--+-+-+-++----",
        "++-+-++++-+--+--+++--+",
        "+-++-----++++-+-+++-++",
    ),
}


@dataclasses.dataclass(frozen=True)
class Rotation(Checked):
    """An orthogonal matrix R [C, C] = diag(random signs) H / sqrt(C); static.

    Attributes:
        width: C.
        seed: of the signs; all matrices of one width and seed are equal.
        strict: an error if there is no Hadamard matrix of this width; else blocks on the diagonal,
            as large as there are.
    """

    width: Count
    seed: Natural = 0
    strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.strict and _factors(self.width) is None:
            raise ValueError(
                f"there is no known Hadamard matrix of order {self.width} here: an odd part must "
                f"come from orders such as {_orders()[:6]}. Use strict=False for "
                f"blocks of {_block(self.width)} on the diagonal, or leave this layer unrotated."
            )

    @property
    def factors(self) -> tuple[int, ...]:
        """Orders of the small matrices whose Kronecker product is H, and 1s for blocks.

        Programs join neighbors into the sizes that suit them.
        """
        return _factors(self.width) or (1, *(_factors(_block(self.width)) or ()))

    def signs(self) -> np.ndarray:
        """The random signs, float32[C]."""
        return np.random.default_rng(self.seed).choice((-1.0, 1.0), self.width).astype(np.float32)

    def matrices(self) -> tuple[np.ndarray, ...]:
        """The small orthogonal matrices whose Kronecker product is H / sqrt(C), or a block."""
        return tuple(hadamard(n) * np.float32(n**-0.5) for n in self.factors if n > 1)

    def apply(self, x: Array) -> Array:
        """x R along the last axis, in float32 inside.

        Args:
            x: float[..., C].
        """
        return self._products(x.astype(jnp.float32) * self.signs(), False).astype(x.dtype)

    def undo(self, x: Array) -> Array:
        """x R^T along the last axis: `undo(apply(x))` is x."""
        return (self._products(x.astype(jnp.float32), True) * self.signs()).astype(x.dtype)

    def _products(self, y: Array, transpose: bool) -> Array:
        """y H / sqrt(C), or with H^T: one product for each factor."""
        lead = y.shape[:-1]
        matrices = join(self.matrices(), xla.factor_cost)
        factors = [len(matrix) for matrix in matrices]
        y = y.reshape(*lead, self.width // math.prod(factors), *factors)
        for axis, matrix in enumerate(matrices):
            y = jnp.moveaxis(y, len(lead) + 1 + axis, -1)
            y = jnp.matmul(y, matrix.T if transpose else matrix, precision="highest")
            y = jnp.moveaxis(y, -1, len(lead) + 1 + axis)
        return y.reshape(*lead, self.width)

    def matrix(self) -> np.ndarray:
        """R itself, float32[C, C]."""
        return np.asarray(self.apply(jnp.eye(self.width)))


@cache
def hadamard(order: int) -> np.ndarray:
    """A Hadamard matrix, float32[n, n].

    Raises:
        ValueError: for an order that these constructions do not give.
    """
    if order == 1:
        return np.ones((1, 1), np.float32)
    if order & (order - 1) == 0:
        return np.kron(np.array([[1, 1], [1, -1]], np.float32), hadamard(order // 2))
    if order in _WILLIAMSON:
        matrix = _williamson(_WILLIAMSON[order])
    elif _is_prime(order - 1) and order % 4 == 0:
        matrix = _paley_first(order - 1)
    elif order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        matrix = _paley_second(order // 2 - 1)
    elif order % 8 == 0:
        return np.kron(np.array([[1, 1], [1, -1]], np.float32), hadamard(order // 2))
    else:
        raise ValueError(f"no Hadamard matrix of order {order} is known here")
    return matrix.astype(np.float32)


def _paley_first(q: int) -> np.ndarray:
    """Order q + 1, q = 3 mod 4."""
    skew = np.zeros((q + 1, q + 1), int)
    skew[0, 1:], skew[1:, 0] = 1, -1
    skew[1:, 1:] = _jacobsthal(q)
    return skew + np.eye(q + 1, dtype=int)


def _paley_second(q: int) -> np.ndarray:
    """Order 2 (q + 1), q = 1 mod 4."""
    symmetric = np.zeros((q + 1, q + 1), int)
    symmetric[0, 1:] = symmetric[1:, 0] = 1
    symmetric[1:, 1:] = _jacobsthal(q)
    eye = np.eye(q + 1, dtype=int)
    return np.kron(symmetric, [[1, 1], [1, -1]]) + np.kron(eye, [[1, -1], [-1, -1]])


def _williamson(halves: tuple[str, ...]) -> np.ndarray:
    """Order 4 n, of symmetric circulant matrices of odd order n: they commute."""
    rows = (np.array([1 if sign == "+" else -1 for sign in half]) for half in halves)
    a, b, c, d = (
        np.stack([np.roll(row, shift) for shift in range(len(row))])
        for row in (np.concatenate([half, half[:0:-1]]) for half in rows)
    )
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _jacobsthal(q: int) -> np.ndarray:
    """Quadratic character of differences modulo a prime."""
    character = np.full(q, -1)
    character[np.arange(q) ** 2 % q] = 1
    character[0] = 0
    place = np.arange(q)
    return character[(place[:, None] - place) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))


@cache
def _orders() -> tuple[int, ...]:
    """Orders of `hadamard` that are no powers of two, up to the largest factor."""
    first = [q + 1 for q in range(3, LARGEST) if q % 4 == 3 and _is_prime(q)]
    second = [2 * (q + 1) for q in range(5, LARGEST // 2) if q % 4 == 1 and _is_prime(q)]
    return tuple(sorted(n for n in {*first, *second, *_WILLIAMSON} if n <= LARGEST and n & (n - 1)))


@cache
def _factors(width: int) -> tuple[int, ...] | None:
    """Orders with a Hadamard matrix whose product is the width; None if there are none.

    Powers of two are cut small, for programs to join; but for them there is one order, if one does.
    """
    if width & (width - 1) == 0:
        powers = [min(width, 32)] if width > 1 else []
        while width > (held := math.prod(powers)):
            powers.insert(0, min(width // held, 4))
        return tuple(powers)
    orders = [order for order in _orders() if width % order == 0]
    for order in sorted(orders, key=lambda order: (width // order) & (width // order - 1) != 0):
        if (rest := _factors(width // order)) is not None:
            return (order, *rest)
    return None


def _block(width: int) -> int:
    """The largest order that divides a width and has a Hadamard matrix."""
    return next(
        width // count
        for count in range(1, width + 1)
        if width % count == 0 and _factors(width // count) is not None
    )
