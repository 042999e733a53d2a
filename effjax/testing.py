"""Tiny models with random weights, on which every method can be tried in a second."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.context import PyTree
from effjax.forward import Forward, Params, functional
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, Sampler


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model with what it takes to run it.

    Attributes:
        forward, params: the model.
        sampler: a guided sampler of a few steps.
        cond: its conditioning, with a leading batch axis.
    """

    forward: Forward
    params: Params
    sampler: Sampler
    cond: PyTree


def randomise(params: Params, key: jax.Array, *, scale: float = 0.05) -> Params:
    """Add noise to every leaf: new DiTs have zero gates and would ignore their blocks."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, len(leaves))
    noisy = [
        leaf + (scale * jax.random.normal(k, leaf.shape)).astype(leaf.dtype)
        for leaf, k in zip(leaves, keys)
    ]
    return jax.tree.unflatten(structure, noisy)


def tiny_dit(*, steps: int = 4, batch: int = 2, **options: Any) -> Subject:
    """A DiT of two layers on 16 x 16 images (64 tokens) with a guided DDIM sampler.

    Args:
        steps: steps of the sampler.
        batch: images to sample.
        options: fields of `DiTConfig` to change.
    """
    shape = {
        "sample_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "head_dim": 8,
        "num_classes": 5,
    }
    config = DiTConfig(**{**shape, **options})
    forward, params = functional(DiT(config, rngs=nnx.Rngs(0)))
    sampler = Sampler(DDIM(steps=steps), guidance=2.0)
    cond = jnp.arange(batch, dtype=jnp.int32) % config.num_classes
    return Subject(forward, randomise(params, jax.random.key(1)), sampler, cond)
