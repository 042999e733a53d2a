"""States of a batch, as calls see them that run on a part of its rows."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from effjax.context import State
from effjax.guidance import Guidance, current_guidance, guided_by, on_condition
from effjax.rows import Rows, on_rows


@dataclasses.dataclass(frozen=True)
class First(Rows):
    """The first rows."""

    batch: int
    count: int

    def fits(self, rows: int) -> bool:
        return rows == self.batch

    def take(self, whole: jax.Array) -> jax.Array:
        return whole[: self.count]

    def put(self, whole: jax.Array, part: jax.Array) -> jax.Array:
        return whole.at[: self.count].set(part)


def state(value):
    made = State()
    made.set_metadata(path="here")
    made.set_value(jnp.asarray(value, jnp.float32))
    return made


@pytest.mark.parametrize("paired", [False, True])
def test_a_branch_has_its_rows(paired):
    guidance = Guidance(("uncond", "cond", "style"), paired=paired)
    held = state(jnp.arange(12.0).reshape(6, 2))
    whole = held.get_value()
    with guided_by(guidance), on_condition(guidance, 6):
        assert current_guidance() == Guidance(("cond",))
        chex.assert_trees_all_equal(held.read((2, 2), jnp.float32), guidance.branch("cond", whole))
        held.write(jnp.full((2, 2), -1.0))
        # What does not have the batch's rows is the same for all branches.
        assert state(3.0).read((), jnp.float32) == 3.0
        assert state(jnp.ones(2)).read((2,), jnp.float32).shape == (2,)
        assert state(jnp.ones(6)).read((6,), jnp.float32).shape == (6,)
    assert current_guidance() is None
    after = guidance.split(held.get_value())
    assert (after["cond"] == -1).all()
    for name in ("uncond", "style"):
        chex.assert_trees_all_equal(after[name], guidance.branch(name, whole))


def test_parts_of_parts():
    """A chunk of the rows of a branch; a state of that branch alone is cut once."""
    guidance = Guidance()
    held, own = state(jnp.arange(8.0)), state(jnp.arange(4.0))
    with on_condition(guidance, 8), on_rows(First(4, 2)):
        assert held.read((2,), jnp.float32).tolist() == [0, 1]
        assert own.read((2,), jnp.float32).tolist() == [0, 1]
        held.write(jnp.array([10.0, 11.0]))
        own.write(jnp.array([20.0, 21.0]))
    assert held.get_value().tolist() == [10, 11, 2, 3, 4, 5, 6, 7]
    assert own.get_value().tolist() == [20, 21, 2, 3]


def test_other_rows_are_refused():
    held = state(jnp.zeros((6, 2)))
    with pytest.raises(ValueError, match=r"holds float32\[6, 2\], but this call needs float32\[4"):
        held.read((4, 2), jnp.float32)
    with (
        on_condition(Guidance(), 6),
        pytest.raises(ValueError, match=r"this call needs float32\[2"),
    ):
        held.write(jnp.zeros((2, 2)))
