"""A two-block model that is small enough to compute by hand."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from effjax.context import Layout, Model
from effjax.forward import functional
from effjax.layers.linear import Linear
from effjax.layers.stack import Stack


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    width: int = 3
    layers: int = 2
    param_dtype: str = "float32"


class ToyBlock(nnx.Module):
    def __init__(self, config, *, rngs):
        self.fc = Linear(config.width, config.width, role="up", rngs=rngs)

    def __call__(self, x):
        return x + self.fc(x)


class Toy(Model):
    Config = ToyConfig

    def __init__(self, config, *, rngs):
        self.config = config
        self.blocks = Stack([ToyBlock(config, rngs=rngs) for _ in range(config.layers)])

    def layout(self, x):
        return Layout(grid=(1, 1, x.shape[1]))

    def __call__(self, x):
        return self.blocks(x)


def toy(**options):
    forward, params = functional(Toy(ToyConfig(**options), rngs=nnx.Rngs(0)))
    return forward, params, jax.random.normal(jax.random.key(1), (2, 4, forward.config.width))


def by_hand(params, x):
    for block in params["blocks"].values():
        x = x + jnp.dot(x, block["fc"]["kernel"]) + block["fc"]["bias"]
    return x
