"""What is compiled for TPUs that are not there, see `effjax.chips`: import it before JAX starts."""

from __future__ import annotations

from effjax.chips import TOPOLOGIES as TOPOLOGIES  # sets what libtpu wants to see
from effjax.chips import chip as chip

# isort: split
import jax

CHIPS = ("v5e", "v5p", "v6e", "tpu7x")  # those that every kernel compiles for


def on_chip(name: str, shapes):
    """A tree of arrays or shapes as shapes on one chip."""
    place = chip(name)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
    )
