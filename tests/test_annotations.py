"""Annotations are checked in every test; what conftest.py remembers of them changes nothing."""

import beartype
import jax
import jax.numpy as jnp
import pytest
from jaxtyping import Float, Int, TypeCheckError, jaxtyped


def outer(shape):
    @jaxtyped(typechecker=beartype.beartype)
    def inner(x: Float[jax.Array, shape], y: "Int[jax.Array, ' N']"):
        return x

    return inner


def test_inner_functions_are_checked_each_time():
    x, y = jnp.ones((2, 3)), jnp.ones(2, jnp.int32)
    for _ in range(2):
        assert outer("N M")(x, y) is x
        assert outer("M N")(x, jnp.ones(3, jnp.int32)) is x
        for shape, wrong in (("N M", (x, y[:1])), ("N M", (x, x[:, 0])), ("M N", (x, y))):
            with pytest.raises(TypeCheckError):
                outer(shape)(*wrong)
