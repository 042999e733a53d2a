"""Guidance arrangements, branches around modules, layouts."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.context import Layout, State, current_layout, switch, tokens_as, when
from effjax.guidance import Guidance
from tests.tiny import toy

ORDERS = (("cond", "uncond"), ("uncond", "cond"), ("perturbed", "cond", "uncond"))
ARRANGEMENTS = [Guidance(order, paired) for order in ORDERS for paired in (True, False)]


@settings(deadline=None, max_examples=20, derandomize=True)
@given(batch=st.integers(1, 5), which=st.sampled_from(ARRANGEMENTS))
def test_split_inverts_join(batch, which):
    one = {"x": jnp.arange(batch * 3.0).reshape(batch, 3), "y": jnp.arange(batch)}
    parts = {
        name: jax.tree.map(lambda a, i=i: (1 - 2 * i) * a - i, one)
        for i, name in enumerate(which.branches)
    }
    joined = which.join(parts)
    chex.assert_trees_all_equal(which.split(joined), parts)
    chex.assert_trees_all_equal(which.branch("cond", joined), parts["cond"])
    for part in which.split(which.duplicate(one)).values():
        chex.assert_trees_all_equal(part, one)


def test_join_orders():
    parts = {"cond": jnp.array([1, 2]), "uncond": jnp.array([-1, -2]), "style": jnp.array([7, 8])}
    expected = {
        (("cond", "uncond"), False): [1, 2, -1, -2],
        (("uncond", "cond"), False): [-1, -2, 1, 2],
        (("cond", "uncond"), True): [1, -1, 2, -2],
        (("uncond", "cond"), True): [-1, 1, -2, 2],
        (("cond", "style", "uncond"), False): [1, 2, 7, 8, -1, -2],
        (("cond", "style", "uncond"), True): [1, 7, -1, 2, 8, -2],
    }
    for (branches, paired), order in expected.items():
        assert Guidance(branches, paired).join(parts).tolist() == order


def test_branches_that_there_are_not_and_uneven_batches_are_errors():
    with pytest.raises(ValueError, match="must be a multiple of 2; got 3"):
        Guidance().split(jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"no branch 'style'; there are \('cond', 'uncond'\)"):
        Guidance().branch("style", jnp.ones((2, 2)))
    for branches in (("cond", "cond"), ("uncond",)):
        with pytest.raises(ValueError, match="different names, one of which is 'cond'"):
            Guidance(branches)


def test_a_layout_is_a_raster_until_a_method_changes_it():
    whole = Layout(grid=(2, 3, 4), text=5, text_first=True)
    assert (whole.image_tokens, whole.tokens, whole.raster("a window")) == (24, 29, (2, 3, 4))
    merged = whole.without_raster(18, "token_merging")
    assert (merged.image_tokens, merged.tokens, merged.text_first) == (18, 23, True)
    with pytest.raises(ValueError, match=r"a window needs .* but token_merging has left 18 tokens"):
        merged.raster("a window")


def test_what_the_tokens_are_is_said_around_a_call():
    assert current_layout() is None
    with tokens_as(Layout(grid=(1, 2, 2))):
        with tokens_as(None):
            assert current_layout() is None
        with pytest.raises(KeyError), tokens_as(Layout(grid=(1, 1, 1))):
            raise KeyError
        assert current_layout() == Layout(grid=(1, 2, 2))
    assert current_layout() is None


def test_switch_static_and_traced_agree_and_unknown_indices_are_errors():
    forward, params, x = toy()
    module = forward.module(params)
    branches = {1: lambda m, x: m(x), 4: lambda m, x: 2 * m(x), 9: lambda m, x: x}
    for key in branches:
        static = switch(key, branches, module, x)
        traced = jax.jit(lambda c: switch(c, branches, module, x))(key)
        chex.assert_trees_all_close(static, traced, rtol=1e-6)
    with pytest.raises(ValueError, match=r"no branch for index 2; .* \[1, 4, 9\]"):
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
