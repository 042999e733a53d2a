"""The plan of CSKV: how many features stand for keys and for values."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar

from jax import Array

from effjax.caches.quantization import FLOAT, Bits
from effjax.fields import Count, Range
from effjax.transform import Plan

NAME = "cskv"


Density = Annotated[float, Range(0, 1, above=True)]


# By path of a core: down_k [C, R_k], up_k [R_k, K D], down_v [C, R_v], up_v [R_v, K D].
Factors = dict[str, dict[str, Array]]


@dataclasses.dataclass(frozen=True)
class CSKVPlan(Plan):
    """Numbers of features, the window and bits.

    Attributes:
        k_density, v_density: number of features for keys and for values, as a share of the channels
            of a head, rounded down to a whole number. Keys need fewer than values.
        window: number of tokens of the window whose keys and values stay exact until it is full.
        bits: of the features: 16 (floats), 8 or 4.
    """

    k_density: Density = 0.25
    v_density: Density = 0.75
    window: Count = 32
    bits: Bits = FLOAT

    decomposes: ClassVar[tuple[str, ...]] = ("to_k", "to_v")  # layers that factors stand for

    def ranks(self, head_dim: int, kv_heads: int) -> tuple[int, int]:
        """The numbers of features R_k and R_v, for all heads of a layer together.

        Raises:
            ValueError: if a density leaves no channel, or an odd number for 4-bit values.
        """
        found = []
        for name in ("k_density", "v_density"):
            # What a product of decimals lacks to a whole number is no channel less.
            rank = int(getattr(self, name) * head_dim + 1e-9) * kv_heads
            if rank == 0:
                raise ValueError(
                    f"{name}={getattr(self, name)} keeps none of the {head_dim} channels of a "
                    f"head; take at least {1 / head_dim:g}"
                )
            if self.bits == 4 and rank % 2:
                raise ValueError(
                    f"{name}={getattr(self, name)} keeps {rank} channels of {kv_heads} heads "
                    f"together, and bits=4 puts two into a byte: take a density that keeps an even "
                    f"number, or bits=8"
                )
            found.append(rank)
        return found[0], found[1]

    def describe(self) -> str:
        """Densities and bits in a line."""
        share = (self.k_density + self.v_density) / 2 * self.bits / FLOAT
        return (
            f"keys {self.k_density:g}, values {self.v_density:g} of the channels, "
            f"{self.bits} bits: {share:.3f} of the cache; the last 1 ... {self.window} exact"
        )
