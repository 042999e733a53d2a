"""Forward: purity, equality, parameters and state by path, static and traced steps."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from effjax.context import State, switch, when
from effjax.forward import abstract, flatten_params, functional, nest_params, parameter_count
from effjax.guidance import Guidance
from effjax.targets import Wrapper, target_modules, wrap
from tests.tiny import Toy, ToyBlock, ToyConfig, by_hand, toy


class Scale(Wrapper):
    """Multiplies by a factor chosen by the step: 1, 2, 3, ..."""

    def __init__(self, inner, step):
        super().__init__(inner)
        self.step = step if isinstance(step, int) else nnx.data(step)

    def __call__(self, x):
        branches = {i: lambda m, x, i=i: m.inner(x) * (i + 1.0) for i in range(3)}
        return switch(self.step, branches, self, x)


@dataclasses.dataclass(frozen=True)
class ScalePatch:
    path: str

    def __call__(self, module, context):
        wrap(module, self.path, Scale, context.step)


class Memory(Wrapper):
    """Adds the sum of its earlier outputs, each averaged over its tokens."""

    def __init__(self, inner, when_even):
        super().__init__(inner)
        self.when_even = when_even if isinstance(when_even, bool) else nnx.data(when_even)
        self.total = State(fill=0.5)
        self.unused = State()

    def __call__(self, x, *conditioning):
        def yes(m, x, *conditioning):
            y = m.inner(x, *conditioning)
            y = y + m.total.read((x.shape[0], 1, x.shape[2]), x.dtype)
            m.total.write(jnp.mean(y, axis=1, keepdims=True))
            return y

        def no(m, x, *conditioning):
            return m.inner(x, *conditioning)

        return when(self.when_even, yes, no, self, x, *conditioning)


@dataclasses.dataclass(frozen=True)
class MemoryPatch:
    path: str

    def __call__(self, module, context):
        wrap(module, self.path, Memory, context.step % 2 == 0)


def test_forward_computes_the_model():
    forward, params, x = toy()
    out, state = forward(params, {}, x)
    assert state == {}
    chex.assert_trees_all_close(out, by_hand(params, x), atol=1e-6)


def test_equal_forwards_hit_one_compiled_program():
    traces = []

    @jax.jit
    def run(forward, params, x):
        traces.append(None)
        return forward(params, {}, x, step=1)[0]

    first, params, x = toy()
    second, _, _ = toy()
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    run(first, params, x)
    run(second, params, x)
    run(first.patch(ScalePatch("blocks.0")), params, x)
    run(second.patch(ScalePatch("blocks.0")), params, x)
    assert len(traces) == 2
    assert first.patch(ScalePatch("blocks.0")) != first
    assert toy(layers=1)[0] != first


def test_an_edit_that_holds_an_array_fails_at_the_jit_boundary():
    forward, params, x = toy()

    @dataclasses.dataclass(frozen=True)
    class Bad:
        array: jax.Array

        def __call__(self, module, context):
            pass

    bad = forward.patch(Bad(jnp.ones(2)))
    with pytest.raises(TypeError, match="unhashable"):
        jax.jit(lambda f, p, x: f(p, {}, x))(bad, params, x)
    # Inside jit the same patch may hold tracers.
    jax.jit(lambda a, p, x: forward.patch(Bad(a))(p, {}, x))(jnp.ones(2), params, x)


def test_a_call_changes_nothing_outside():
    forward, params, x = toy()
    patched = forward.patch(MemoryPatch("blocks.0"))
    state = patched.init(params, x)
    before = jax.tree.map(np.asarray, (params, state))
    patched(params, state, x)
    chex.assert_trees_all_equal(before, (params, state))


def test_params_round_trip_and_count():
    forward, params, _ = toy()
    assert set(flatten_params(params)) == {
        f"blocks.{i}.fc.{leaf}" for i in range(2) for leaf in ("kernel", "bias")
    }
    chex.assert_trees_all_equal(nest_params(flatten_params(params)), params)
    assert parameter_count(params) == 2 * (9 + 3)
    template = forward.abstract_params("bfloat16")
    assert template["blocks"]["0"]["fc"]["bias"] == jax.ShapeDtypeStruct((3,), jnp.bfloat16)
    abstract_forward, shapes = abstract(Toy, ToyConfig())
    assert abstract_forward == forward
    assert shapes == forward.abstract_params()


def test_every_problem_with_params_is_listed_at_once():
    forward, params, x = toy()
    flat = flatten_params(params)
    del flat["blocks.0.fc.bias"]
    flat["blocks.1.fc.kernel"] = jnp.ones((2, 2))
    flat["blocks.7.fc.kernel"] = jnp.ones((2, 2))
    with pytest.raises(ValueError, match="3 problems") as error:
        forward(nest_params(flat), {}, x)
    for part in ("missing: blocks.0.fc.bias", "misshapen: blocks.1.fc.kernel", "blocks.7.fc"):
        assert part in str(error.value)


def test_learned_parameters_reach_the_edit_and_not_the_model():
    forward, params, x = toy()
    seen = {}

    def patch(module, context):
        seen.update(context.learned)

    params = {**params, "methods": {"lora": {"blocks.0": {"a": jnp.ones(2)}}}}
    out, _ = forward.patch(patch)(params, {}, x)
    assert list(seen) == ["lora"]
    chex.assert_trees_all_close(out, by_hand({"blocks": params["blocks"]}, x), atol=1e-6)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_static_and_traced_steps_agree(step):
    forward, params, x = toy()
    patched = forward.patch(ScalePatch("blocks.1"))
    static, _ = patched.at(step)(params, {}, x)
    also_static, _ = patched(params, {}, x, step=step)
    traced, _ = jax.jit(lambda s: patched(params, {}, x, step=s))(step)
    chex.assert_trees_all_close((static, static), (also_static, traced), rtol=1e-6)
    assert "cond" not in str(jax.make_jaxpr(lambda x: patched.at(step)(params, {}, x))(x))
    with pytest.raises(ValueError, match="leave out step"):
        patched.at(step)(params, {}, x, step=step)
    with pytest.raises(ValueError, match="static step"):
        patched.at(-1)


def test_state_is_initialized_for_every_branch_and_flows():
    forward, params, x = toy()
    patched = forward.patch(MemoryPatch("blocks.0"))
    state = patched.init(params, x)
    assert list(state) == ["blocks.0.total"]  # what no branch touches is not kept
    chex.assert_trees_all_equal(state["blocks.0.total"], jnp.full((2, 1, 3), 0.5))
    assert list(patched.at(1).init(params, x)) == ["blocks.0.total"]

    run = jax.jit(patched)
    out0, state1 = run(params, state, x, step=0)
    first = by_hand({"blocks": {"0": params["blocks"]["0"]}}, x) + 0.5
    mean = jnp.mean(first, axis=1, keepdims=True)
    chex.assert_trees_all_close(state1["blocks.0.total"], mean, atol=1e-6)
    out1, state2 = run(params, state1, x, step=1)
    chex.assert_trees_all_equal(state1, state2)
    out2, _ = run(params, state2, x, step=2)
    chex.assert_trees_all_close(out1, by_hand(params, x), atol=1e-6)
    assert float(jnp.abs(out0 - out2).max()) > 0.1
    static2, _ = patched(params, state2, x, step=2)
    chex.assert_trees_all_close(static2, out2, atol=1e-6)


def test_state_errors_name_the_state():
    forward, params, x = toy()
    patched = forward.patch(MemoryPatch("blocks.0"))
    with pytest.raises(ValueError, match=r"blocks\.0\.total.*missing.*init"):
        patched(params, {}, x)
    state = patched.init(params, x)
    with pytest.raises(ValueError, match="does not keep"):
        forward(params, state, x)
    with pytest.raises(ValueError, match="one batch shape"):
        patched(params, state, x[:1])


def test_two_states_of_one_name_are_an_error():
    forward, params, x = toy()
    patched = forward.patch(MemoryPatch("blocks.0"), MemoryPatch("blocks.0"))
    with pytest.raises(ValueError, match=r"two patches keep a state named 'blocks\.0\.total'"):
        patched.init(params, x)


def test_state_keys_do_not_depend_on_the_order_of_edits():
    forward, params, x = toy()
    patches = (MemoryPatch("blocks.0"), MemoryPatch("blocks"), ScalePatch("blocks.0"))
    one = forward.patch(*patches).init(params, x)
    other = forward.patch(*patches[::-1]).init(params, x)
    assert list(one) == list(other) == ["blocks.0.total", "blocks.total"]


def test_stateful_modules_nest_inside_branches():
    """A stack cache around a stateful block around a stateful linear, with a traced step."""
    forward, params, x = toy()
    patched = forward.patch(
        MemoryPatch("blocks.0.fc"),
        MemoryPatch("blocks.0"),
        MemoryPatch("blocks"),
        ScalePatch("blocks"),
    )
    state = patched.init(params, x)
    assert list(state) == ["blocks.0.fc.total", "blocks.0.total", "blocks.total"]
    traced, static = state, state
    run = jax.jit(patched)
    for step in (0, 1, 2):
        out_traced, traced = run(params, traced, x, step=step)
        out_static, static = patched(params, static, x, step=step)
        chex.assert_trees_all_close(out_traced, out_static, rtol=1e-5)
        chex.assert_trees_all_close(traced, static, rtol=1e-5)


def test_forward_under_grad_vmap_and_scan():
    forward, params, x = toy()
    patched = forward.patch(MemoryPatch("blocks.0"))
    state = patched.init(params, x)

    def loss(params):
        return jnp.sum(patched(params, state, x, step=0)[0])

    gradients = jax.grad(loss)(params)
    expected = jax.grad(lambda p: jnp.sum(by_hand(p, x) ** 1))(params)
    chex.assert_trees_all_close(
        gradients["blocks"]["1"]["fc"]["bias"], expected["blocks"]["1"]["fc"]["bias"], atol=1e-5
    )
    many = jax.vmap(lambda x: forward(params, {}, x)[0])(jnp.stack([x, 2 * x]))
    chex.assert_trees_all_close(many[1], by_hand(params, 2 * x), atol=1e-5)

    def body(carry, step):
        out, carry = patched(params, carry, x, step=step)
        return carry, out

    last, outs = jax.lax.scan(body, state, jnp.arange(3))
    by_loop = state
    for step in range(3):
        out, by_loop = patched(params, by_loop, x, step=step)
        chex.assert_trees_all_close(outs[step], out, atol=1e-5)
    chex.assert_trees_all_close(last, by_loop, atol=1e-5)


def test_a_base_model_with_state_is_refused():
    class Stateful(Toy):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            self.cache = nnx.Cache(jnp.zeros(2))

    with pytest.raises(ValueError, match="no parameters"):
        functional(Stateful(ToyConfig(), rngs=nnx.Rngs(0)))


def test_the_context_carries_layout_and_guidance():
    forward, params, x = toy()
    seen = []
    guidance = Guidance(("uncond", "cond"))
    forward.patch(lambda module, context: seen.append(context))(
        params, {}, x, step=2, guidance=guidance
    )
    assert seen[0].layout.tokens == x.shape[1]
    assert (seen[0].step, seen[0].guidance) == (2, guidance)
    assert forward.layout(params, x).grid == (1, 1, 4)


def test_check_calls():
    forward, _, _ = toy()

    @dataclasses.dataclass(frozen=True)
    class Planned:
        calls: int

        def __call__(self, module, context):
            pass

    forward.patch(Planned(4), ScalePatch("blocks.0")).check_calls(4)
    with pytest.raises(ValueError, match="planned for 4 network calls"):
        forward.patch(Planned(4)).check_calls(5)


def test_forward_sites_hold_the_parameters():
    forward, params, _ = toy()
    found = forward.target_modules(params, ToyBlock)
    assert [target.path for target in found] == ["blocks.0", "blocks.1"]
    kernel = found[1].module.fc.kernel.get_value()
    chex.assert_trees_all_equal(kernel, params["blocks"]["1"]["fc"]["kernel"])
    assert [s.path for s in target_modules(forward.module(params), pattern=r"blocks\.\d\.fc")] == [
        "blocks.0.fc",
        "blocks.1.fc",
    ]
