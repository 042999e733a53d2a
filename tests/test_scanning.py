"""Runs of equal blocks in one program: equal results, small programs, and why a run is cut."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax import export
from jax.sharding import NamedSharding

import effjax
from converters import from_pretrained, save_pretrained
from effjax import capture, recipe, testing
from effjax.context import State, Step, switch
from effjax.cost import sampler_cost
from effjax.forward import abstract, flatten_params
from effjax.layers.stack import Stack
from effjax.methods import dit_fast_attn, gptq, kivi, moa, round_to_nearest, snap_kv
from effjax.models.clip import CLIPText, CLIPTextConfig
from effjax.models.t5 import T5Config, T5Encoder
from effjax.parallel.sharding import device_mesh, shard, tensor_parallel
from effjax.samplers import Sampler
from effjax.scanning import (
    describe_runs,
    example_runs,
    find_runs,
    scan_blocks,
    stack_params,
    unscanned,
    unstack_params,
)
from effjax.stacking import Range, Stacks, updated
from effjax.targets import Wrapper, wrap
from tests.subjects.joint import tiny_joint

FORMS = pytest.mark.parametrize("stack", [False, True], ids=["picked", "stacked"])


def _t5(**options):
    config = T5Config(
        **{"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_layers": 3,
           "num_heads": 2, "head_dim": 8, **options}
    )  # fmt: skip
    forward, shapes = abstract(T5Encoder, config)
    ids = jnp.arange(12).reshape(2, 6)
    return forward, testing.random_params(shapes), (ids, ids % 5 > 0)


def _dit(**options):
    subject = testing.tiny_dit(num_layers=3, **options)
    inputs = jnp.ones((2, 16, 16, 4)), jnp.array([3.0, 400.0]), jnp.array([1, 2])
    return subject.forward, subject.params, inputs


def _pixart(**options):
    subject = testing.tiny_pixart(num_layers=3, **options)
    return subject.forward, subject.params, (jnp.ones((2, 16, 16, 4)), jnp.ones(2), subject.cond)


def _llama(**options):
    subject = testing.tiny_llama(num_layers=3, **options)
    return subject.forward, subject.params, (subject.cond,)


def _joint():
    subject = tiny_joint()
    sampler = subject.sampler
    x = jnp.ones((2, *subject.forward.config.sample_shape))
    return subject.forward, subject.params, sampler.inputs(x, subject.cond, subject.uncond, 0)


MODELS = {"dit": _dit, "pixart": _pixart, "t5": _t5, "llama": _llama, "joint": _joint}


def call(forward, params, inputs):
    return jax.jit(lambda params: forward(params, {}, *inputs)[0])(params)


def check_close(one, other):
    """Equal but for sums that XLA rounds otherwise where it fuses over blocks."""
    chex.assert_trees_all_close(one, other, rtol=1e-5, atol=5e-6)


@FORMS
@pytest.mark.parametrize("model", MODELS)
def test_results_are_equal(model, stack):
    forward, params, inputs = MODELS[model]()
    small, given = scan_blocks(stack=stack)(forward, params)
    runs = find_runs(small, given, *inputs)
    assert [run.stop - run.start for run in runs] == [forward.config.num_layers]
    check_close(call(small, given, inputs), call(forward, params, inputs))


def loops(forward, params, inputs):
    """Scans in a program, and how many products it has."""
    text = str(jax.make_jaxpr(lambda params: forward(params, {}, *inputs)[0])(params))
    return text.count("scan["), text.count("dot_general")


def test_a_run_is_one_program():
    forward, params, inputs = _dit()
    small, _ = scan_blocks()(forward, params)
    scans, products = loops(forward, params, inputs)
    fewer = loops(small, params, inputs)
    assert fewer[0] == scans + 1
    # of two blocks: modulation, four projections, two layers of the MLP
    assert products - fewer[1] == 2 * 7


@FORMS
def test_gradients_are_equal(stack):
    forward, params, inputs = _dit()
    small, given = scan_blocks(stack=stack)(forward, params)

    def loss(forward, params):
        return jnp.sum(jnp.square(forward(params, {}, *inputs)[0]))

    wanted = jax.jit(jax.grad(functools.partial(loss, forward)))(params)
    got = jax.jit(jax.grad(functools.partial(loss, small)))(given)
    chex.assert_trees_all_equal_shapes(got, given)
    chex.assert_trees_all_close(unstack_params(got), wanted, rtol=1e-4, atol=1e-4)


def test_optimizers_step_stacked_parameters_as_others():
    forward, params, _ = _dit()
    gradient = jax.tree.map(jnp.ones_like, params)
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def step(params, gradient):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        return jax.tree.map(jnp.add, params, updates)

    stacked = step(stack_params(forward, params), stack_params(forward, gradient))
    chex.assert_trees_all_equal(unstack_params(stacked), step(params, gradient))


class TestMethods:
    def plan(self, subject, *rows):
        """A plan of DiTFastAttn whose layers do different things at the same step."""
        plan = dit_fast_attn.METHOD.ladder(subject)[-1]
        strategies = tuple(
            tuple(dit_fast_attn.Strategy[name] for name in (row * plan.calls)[: plan.calls])
            for row in rows
        )
        first = tuple((dit_fast_attn.Strategy.FULL, *row[1:]) for row in strategies)
        return dataclasses.replace(plan, strategies=first)

    @FORMS
    def test_layers_with_their_own_actions_share_a_program(self, stack):
        subject = testing.tiny_dit(num_layers=3)
        plan = self.plan(subject, ["FULL", "WARS"], ["FULL", "AST"], ["WARS_ASC", "FULL"])
        forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
        small, given = scan_blocks("blocks", stack=stack)(forward, params)
        run = jax.jit(subject.sampler)
        key = jax.random.key(0)
        check_close(run(small, given, subject.cond, key), run(forward, params, subject.cond, key))

    def test_states_of_a_run_are_one_array(self):
        subject = testing.tiny_dit(num_layers=3)
        plan = self.plan(subject, ["FULL", "WARS"], ["FULL", "AST"], ["FULL", "FULL"])
        forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
        small, _ = scan_blocks()(forward, params)
        sampler = subject.sampler
        start = functools.partial(sampler.init, cond=subject.cond, key=jax.random.key(0))
        state = start(small, params).state
        assert {name: value.shape[0] for name, value in state.items()} == {
            "blocks.0:3.attn.output.tokens": 3,
            "blocks.0:3.attn.residual": 3,
        }
        assert (
            start(forward, params).state["blocks.0.attn.residual"].shape
            == state["blocks.0:3.attn.residual"].shape[1:]
        )

    def test_a_static_step_chooses_while_tracing(self):
        subject = testing.tiny_dit(num_layers=3)
        plan = self.plan(subject, ["FULL", "WARS"], ["FULL", "WARS"], ["FULL", "FULL"])
        forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
        small, _ = scan_blocks()(forward, params)
        sampler = subject.sampler
        assert isinstance(sampler, Sampler)
        uncond = sampler.unconditional(forward, subject.cond)
        inputs = sampler.inputs(jnp.ones((2, 16, 16, 4)), subject.cond, uncond, 1)
        runs = find_runs(small, params, *inputs, step=1, guidance=sampler.joined)
        assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 3)]
        assert "attn.action" in runs[1].differs
        costs = [sampler_cost(sampler, each, params, subject.cond) for each in (forward, small)]
        assert costs[0] == costs[1]
        key = jax.random.key(0)
        check_close(
            sampler.stepwise(small, params, subject.cond, key),
            sampler.stepwise(forward, params, subject.cond, key),
        )

    @pytest.mark.parametrize(
        ("transform", "stack"),
        [
            (kivi.transform(kivi.METHOD.ladder(testing.tiny_llama())[-1]), True),
            (snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, window=2)), False),
            (round_to_nearest.transform(round_to_nearest.uniform(4)), True),
        ],
        ids=["kivi-stacked", "snap_kv-picked", "w4-stacked"],
    )
    def test_caches_and_quantized_leaves_are_scanned_in_the_prefill(self, transform, stack):
        subject = testing.tiny_llama(num_layers=3)
        forward, params = transform(subject.forward, subject.params)
        small, given = scan_blocks(stack=stack)(forward, params)
        run = jax.jit(subject.sampler)
        key = jax.random.key(0)
        check_close(run(small, given, subject.cond, key), run(forward, params, subject.cond, key))


class Partly(Wrapper):
    """Calls other blocks at other steps: all of three, the first, or some twice."""

    replaces_internals = True
    inner: Stack

    def __init__(self, inner: Stack, step: Step):
        super().__init__(inner)
        self.step = step if isinstance(step, int) else nnx.data(step)

    def __call__(self, x, *conditioning):
        def run(*parts):
            def branch(module, x):
                for start, stop in parts:
                    x = module.inner.between(start, stop, x, *conditioning)
                return x

            return branch

        branches = {0: run((0, 3)), 1: run((0, 1)), 2: run((0, 2), (1, 3))}
        return switch(self.step % 3, branches, self, x)


class Halved(Wrapper):
    """Takes tokens of any dtype and gives bfloat16."""

    def __call__(self, x, *conditioning):
        return self.inner(x.astype(jnp.float32), *conditioning).astype(jnp.bfloat16)


class Whole(Wrapper):
    """Gives float32."""

    def __call__(self, *inputs):
        return self.inner(*inputs).astype(jnp.float32)


class Counting(Wrapper):
    """Keeps a state that has the name of a parameter."""

    def __init__(self, inner):
        super().__init__(inner)
        self.scale = State()

    def __call__(self, x):
        self.scale.write(self.scale.read(x.shape[-1:], x.dtype) + 1)
        return self.inner(x)


def _halved(module, context):
    for layer in range(3):
        wrap(module, f"blocks.{layer}", Halved)
    wrap(module, "blocks", Whole)


class TestStates:
    def pair(self, *patches):
        """A forward that keeps what attention of the call before gave, its parameters, inputs."""
        subject = testing.tiny_dit(num_layers=3)
        plan = TestMethods().plan(subject, ["FULL", "AST"], ["FULL", "AST"], ["FULL", "AST"])
        forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
        return forward.patch(*patches), params, _dit()[2]

    def check_steps(self, forward, small, params, inputs, steps=3):
        @jax.jit
        def run(forward, params):
            state = forward.init(params, *inputs)
            outputs = []
            for step in range(steps):
                out, state = forward(params, state, *inputs, step=jnp.int32(step))
                outputs.append(out)
            return outputs

        check_close(run(small, params), run(forward, params))

    def test_wrappers_may_call_other_parts_at_other_steps(self):
        def partly(module, context):
            wrap(module, "blocks", Partly, context.step)

        forward, params, inputs = self.pair(partly)
        small, _ = scan_blocks()(forward, params)
        state = small.init(params, *inputs)
        assert set(state) == {"blocks.0.attn.output.tokens", "blocks.1:3.attn.output.tokens"}
        self.check_steps(forward, small, params, inputs)

    def test_blocks_may_give_another_dtype_than_the_first_one_takes(self):
        forward, params, inputs = self.pair(_halved)
        small, _ = scan_blocks()(forward, params)
        state = small.init(params, *inputs)
        assert set(state) == {"blocks.0.attn.output.tokens", "blocks.1:3.attn.output.tokens"}
        text = str(jax.make_jaxpr(lambda state: small(params, state, *inputs)[0])(state))
        plain = forward.init(params, *inputs)
        plain = str(jax.make_jaxpr(lambda state: forward(params, state, *inputs)[0])(plain))
        assert text.count("scan[") == plain.count("scan[") + 1
        insisting, _ = scan_blocks("blocks")(forward, params)
        with pytest.raises(
            ValueError, match=r"blocks cannot be scanned: its blocks take .*float32"
        ):
            insisting.init(params, *inputs)

    def test_calibrations_take_the_state_of_the_scanned_forward(self):
        forward, params, inputs = self.pair()
        small, _ = scan_blocks()(forward, params)

        @jax.jit
        def look(forward, params):
            _, state = forward(params, forward.init(params, *inputs), *inputs, step=jnp.int32(0))
            options = {"pattern": r"blocks\.1", "step": jnp.int32(1)}
            return capture.tap(forward, params, inputs, state=state, **options)

        check_close(look(small, params), look(forward, params))

    def test_a_state_may_have_the_name_of_a_parameter(self):
        def counting(module, context):
            for layer in range(3):
                wrap(module, f"blocks.{layer}.norm1", Counting)

        forward, params, inputs = _llama()
        small, stacked = scan_blocks(stack=True)(forward.patch(counting), params)
        state = small.init(stacked, *inputs)
        out, state = jax.jit(lambda params, state: small(params, state, *inputs))(stacked, state)
        check_close(out, call(forward, params, inputs))
        chex.assert_trees_all_equal(*state.values(), jnp.ones((3, 16)))


class TestRuns:
    def test_a_fixed_step_is_the_one_that_is_looked_at(self):
        subject = testing.tiny_dit(num_layers=3)
        plan = TestMethods().plan(subject, ["FULL", "AST"], ["FULL", "AST"], ["FULL", "FULL"])
        forward, params = dit_fast_attn.transform(plan)(subject.forward, subject.params)
        inputs = _dit()[2]
        assert len(find_runs(forward, params, *inputs)) == 1
        runs = find_runs(forward.at(1), params, *inputs)
        assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 3)]

    def test_a_stack_that_must_be_one_run_may_decode(self):
        subject = testing.tiny_llama(num_layers=2)
        transform = kivi.transform(kivi.METHOD.ladder(subject)[-1])
        forward, params = transform(subject.forward, subject.params)
        small, _ = scan_blocks("blocks")(forward, params)
        run = jax.jit(subject.sampler)
        key = jax.random.key(0)
        check_close(run(small, params, subject.cond, key), run(forward, params, subject.cond, key))

    def test_a_window_cuts_a_run(self):
        subject = testing.tiny_llama(
            num_layers=4, window=6, window_layers=(False, False, True, True)
        )
        runs = find_runs(subject.forward, subject.params, subject.cond)
        assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 4)]
        assert describe_runs(runs) == (
            "blocks: 4 blocks, 2 programs\n"
            "  from 2: block 2 differs from block 1 in attn.core.window: None and 6"
        )
        small, _ = scan_blocks("blocks")(subject.forward, subject.params)
        with pytest.raises(ValueError, match="cannot be scanned as one: block 2 differs from bl"):
            call(small, subject.params, (subject.cond,))
        small, _ = scan_blocks()(subject.forward, subject.params)
        check_close(
            call(small, subject.params, (subject.cond,)),
            call(subject.forward, subject.params, (subject.cond,)),
        )

    def test_bits_cut_a_run_where_leaves_differ(self):
        forward, params, inputs = _dit()
        quantized = round_to_nearest.transform(round_to_nearest.uniform(4))(forward, params)[1]
        mixed = {**quantized, "blocks": {**quantized["blocks"], "2": params["blocks"]["2"]}}
        runs = find_runs(forward, mixed, *inputs)
        assert [(run.start, run.stop) for run in runs] == [(0, 2), (2, 3)]
        assert "QTensor" in runs[1].differs
        stacked = stack_params(forward, mixed)
        assert set(stacked["blocks"]) == {"0:2", "2"}
        small, _ = scan_blocks()(forward, mixed)
        wanted = call(forward, mixed, inputs)
        check_close(call(small, mixed, inputs), wanted)
        check_close(call(small, stacked, inputs), wanted)

    def test_unknown_stacks_are_named(self):
        forward, params, inputs = _dit()
        small, _ = scan_blocks("layers")(forward, params)
        with pytest.raises(ValueError, match=r"no stacks \['layers'\].* has \['blocks'\]"):
            call(small, params, inputs)


def test_models_that_read_every_block_are_not_scanned():
    """CLIP returns all hidden states."""
    sizes = {"vocab_size": 30, "hidden_size": 8, "intermediate_size": 16}
    config = CLIPTextConfig(**sizes, num_layers=2, num_heads=2)
    forward, shapes = abstract(CLIPText, config)
    runs = example_runs(forward, shapes)
    assert describe_runs(runs) == (
        "blocks: 2 blocks, 2 programs\n  from 1: the model reads what every block gives"
    )
    small, params = scan_blocks("blocks")(forward, testing.random_params(shapes))
    with pytest.raises(ValueError, match=r"CLIPText reads what each of its blocks gives\. Leave"):
        call(small, params, (jnp.ones((1, 4), jnp.int32),))


class TestParameters:
    def test_names_say_ranges(self):
        forward, params, inputs = _dit()
        stacked = stack_params(forward, params)
        flat = flatten_params(stacked)
        kernel = flat["blocks.0:3.attn.to_q.kernel"]
        chex.assert_trees_all_equal(kernel[1], params["blocks"]["1"]["attn"]["to_q"]["kernel"])
        assert not any(name.startswith("blocks.1.") for name in flat)
        chex.assert_trees_all_equal(unstack_params(stacked), params)
        chex.assert_trees_all_equal(stack_params(forward, stacked), stacked)
        # every forward takes either form
        check_close(call(forward, stacked, inputs), call(forward, params, inputs))

    def test_donated_arrays_are_given_up(self):
        forward, params, _ = _dit()
        given = jax.tree.map(jnp.copy, params)
        stacked = stack_params(forward, given, donate=True)
        assert given["blocks"]["1"]["attn"]["to_q"]["kernel"].is_deleted()
        chex.assert_trees_all_equal(unstack_params(stacked), params)

    def test_arrays_of_numpy_are_stacked_and_not_given_up(self):
        forward, params, _ = _dit()
        given = jax.device_get(params)
        chex.assert_trees_all_equal(
            unstack_params(stack_params(forward, given, donate=True)), params
        )
        chex.assert_trees_all_equal(given, params)

    def test_wrong_stacks_are_refused(self):
        forward, params, inputs = _dit()
        stacked = stack_params(forward, params)
        short = jax.tree.map(lambda x: x[:2], stacked["blocks"]["0:3"])
        with pytest.raises(ValueError, match=r"stands for 3 layers, which must be its first axis"):
            call(forward, {**stacked, "blocks": {"0:3": short}}, inputs)
        twice = {**stacked, "blocks": {**stacked["blocks"], "1": params["blocks"]["1"]}}
        with pytest.raises(ValueError, match="given twice, by itself and in a stack of layers"):
            call(forward, twice, inputs)

    def test_methods_take_weights_by_layer(self):
        forward, params, _ = _dit()
        transform = round_to_nearest.transform(round_to_nearest.uniform(4))
        with pytest.raises(ValueError, match=r"apply methods before scan_blocks\(stack=True\)"):
            transform(forward, stack_params(forward, params))

    def test_fitting_and_reordering_take_weights_by_layer(self):
        forward, params, inputs = _llama()
        stacked = stack_params(forward, params)
        with pytest.raises(ValueError, match=r"apply methods before scan_blocks\(stack=True\)"):
            gptq.fit(gptq.uniform(4), forward, stacked, [inputs], progress=False)
        plan = moa.METHOD.ladder(testing.tiny_llama(num_layers=3))[-1]
        with pytest.raises(ValueError, match=r"order_heads takes weights by layer"):
            moa.order_heads(plan, forward, stacked, tokens=20)

    def test_saving_takes_no_notice(self, tmp_path):
        forward, params, _ = _dit()
        recipe.save(tmp_path / "model", *scan_blocks(stack=True)(forward, params))
        loaded, weights = effjax.load(tmp_path / "model")
        assert loaded == forward
        chex.assert_trees_all_equal(weights, params)

    def test_checkpoints_take_no_notice(self, tmp_path):
        forward, params, _ = _llama()
        scanned = scan_blocks(stack=True)(forward, params)
        save_pretrained(*scanned, tmp_path / "model", progress=False)
        again, weights = from_pretrained(tmp_path / "model")
        assert again.config.num_layers == 3
        chex.assert_trees_all_equal(weights, params)

    def test_transforms_can_be_repeated(self):
        forward, params, _ = _dit()
        once, _ = scan_blocks()(forward, params)
        assert scan_blocks()(once, params)[0] == once
        assert unscanned(once) == forward

    def test_they_are_cut_over_devices(self):
        forward, params, inputs = _llama()
        mesh, rules = device_mesh(data=2, model=2), tensor_parallel(forward)
        placed = stack_params(forward, shard(params, mesh, rules))
        again = shard(stack_params(forward, params), mesh, rules)
        same = jax.tree.map(lambda a, b: a.sharding == b.sharding, placed, again)
        assert all(jax.tree.leaves(same))
        kernel = placed["blocks"]["0:3"]["attn"]["to_q"]["kernel"]
        assert isinstance(kernel.sharding, NamedSharding)
        assert tuple(kernel.sharding.spec) == (None, None, "model")
        small, _ = scan_blocks("blocks")(forward, params)
        wanted = call(forward, params, inputs)
        for given in (placed, shard(params, mesh, rules)):
            chex.assert_trees_all_close(call(small, given, inputs), wanted, atol=1e-5)


def test_a_scanned_program_is_exported():
    forward, params, inputs = _dit()
    small, _ = scan_blocks()(forward, params)
    run = jax.jit(lambda params, x: small(params, {}, x, *inputs[1:])[0])
    saved = export.export(run)(params, inputs[0]).serialize()
    again = export.deserialize(saved)
    chex.assert_trees_all_equal(again.call(params, inputs[0]), run(params, inputs[0]))


class TestNames:
    def test_ranges_are_read(self):
        assert Range.of("blocks.0:28.attn.k") == ("blocks.", 0, 28, ".attn.k")
        assert Range.of("blocks.2.attn.k") is None
        assert Range.of("blocks.3:3.k") is None
        assert Range("blocks.", 0, 2, ".k").names == ("blocks.0.k", "blocks.1.k")

    def test_new_values_take_the_place_of_the_same_layers(self):
        old, two = jnp.zeros((3, 2)), jnp.ones((2, 2))
        assert list(updated({"b.0:3.k": old, "x": old}, {"b.0:3.k": old})) == ["x", "b.0:3.k"]
        assert set(updated({"b.0:3.k": old}, {"b.1:3.k": two})) == {"b.0.k", "b.1:3.k"}
        assert set(updated({"b.0.k": old, "b.1.k": old}, {"b.1:3.k": two})) == {"b.0.k", "b.1:3.k"}

    def test_pieces_are_known_and_collected(self):
        stacks, whole = Stacks(), jnp.arange(6.0).reshape(3, 2)
        pieces = stacks.cut("a", whole)
        assert [stacks.run(some) for some in (pieces, pieces[1:])] == [
            ("a", 0, pieces[0]),
            ("a", 1, pieces[1]),
        ]
        assert stacks.run(pieces[::-1]) is None
        assert stacks.collect("a", dict(enumerate(pieces))) is whole
        new = stacks.collect("a", {0: pieces[0], 1: jnp.zeros(2), 2: pieces[2]})
        chex.assert_trees_all_equal(new, whole.at[1].set(0))
