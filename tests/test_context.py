"""Guidance arrangements, branches around modules, layouts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.context import Guidance, Layout, State, switch, when
from tests.tiny import toy

ARRANGEMENTS = [Guidance(c, p) for c in (True, False) for p in (True, False)]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(batch=st.integers(1, 5), which=st.sampled_from(ARRANGEMENTS))
def test_split_inverts_join(batch, which):
    cond = {"x": jnp.arange(batch * 3.0).reshape(batch, 3), "y": jnp.arange(batch)}
    uncond = jax.tree.map(lambda a: -a - 1, cond)
    joined = which.join(cond, uncond)
    chex.assert_trees_all_equal(which.split(joined), (cond, uncond))
    chex.assert_trees_all_equal(which.cond(joined), cond)
    chex.assert_trees_all_equal(which.split(which.duplicate(cond)), (cond, cond))


def test_join_orders():
    c, u = jnp.array([1, 2]), jnp.array([-1, -2])
    expected = {
        (True, False): [1, 2, -1, -2],
        (False, False): [-1, -2, 1, 2],
        (True, True): [1, -1, 2, -2],
        (False, True): [-1, 1, -2, 2],
    }
    for (cond_first, paired), order in expected.items():
        assert Guidance(cond_first, paired).join(c, u).tolist() == order


def test_an_odd_guided_batch_is_an_error():
    with pytest.raises(ValueError, match="must be even; got 3"):
        Guidance().split(jnp.ones((3, 2)))


def test_switch_static_and_traced_agree_and_unknown_quantized_values_are_errors():
    forward, params, x = toy()
    module = forward.module(params)
    branches = {1: lambda m, x: m(x), 4: lambda m, x: 2 * m(x), 9: lambda m, x: x}
    for code in branches:
        static = switch(code, branches, module, x)
        traced = jax.jit(lambda c: switch(c, branches, module, x))(code)
        chex.assert_trees_all_close(static, traced, rtol=1e-6)
    with pytest.raises(ValueError, match=r"no branch for code 2; .* \[1, 4, 9\]"):
        switch(2, branches, module, x)


def test_when_accepts_python_numpy_and_traced_predicates():
    forward, params, x = toy()
    module = forward.module(params)

    def run(predicate):
        return when(predicate, lambda m, x: x, lambda m, x: -x, module, x)

    for predicate in (True, np.bool_(True), jnp.asarray(True)):
        chex.assert_trees_all_equal(run(predicate), x)
    chex.assert_trees_all_equal(jax.jit(run)(False), -x)


def test_state_reads_and_writes_check_shape_and_dtype():
    state = State(fill=-jnp.inf)
    state.set_metadata(creating=True, path="a.b")
    assert state.empty
    assert bool(jnp.all(state.read((2,), jnp.float32) == -jnp.inf))
    with pytest.raises(ValueError, match=r"'a\.b' holds float32\[2\].*bfloat16\[2\]"):
        state.write(jnp.ones(2, jnp.bfloat16))
    with pytest.raises(ValueError, match=r"float32\[3\]"):
        state.read((3,), jnp.float32)
    lost = State()
    lost.set_metadata(path="c")
    with pytest.raises(ValueError, match="'c' is missing"):
        lost.write(jnp.ones(2))


def test_layout_counts_tokens():
    layout = Layout(grid=(2, 3, 4), text=5)
    assert (layout.image_tokens, layout.tokens) == (24, 29)
