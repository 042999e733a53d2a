"""Runs of equal blocks in one program: equal results, small programs, and why a run is cut."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from jax.sharding import NamedSharding

import effjax
from effjax import recipe, testing
from effjax.cost import sampler_cost
from effjax.forward import abstract, flatten_params
from effjax.methods import dit_fast_attn, kivi, round_to_nearest, snap_kv
from effjax.models.t5 import T5Config, T5Encoder
from effjax.parallel.sharding import device_mesh, shard, tensor_parallel
from effjax.samplers import Sampler
from effjax.scanning import (
    describe_runs,
    find_runs,
    scan_blocks,
    stack_params,
    unscanned,
    unstack_params,
)
from effjax.stacking import Range, Stacks
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

    @FORMS
    @pytest.mark.parametrize(
        "transform",
        [
            kivi.transform(kivi.METHOD.ladder(testing.tiny_llama())[-1]),
            snap_kv.transform(snap_kv.SnapKVPlan(ratio=0.5, window=2)),
            round_to_nearest.transform(round_to_nearest.uniform(4)),
        ],
        ids=["kivi", "snap_kv", "w4"],
    )
    def test_caches_and_quantized_leaves_are_scanned_in_the_prefill(self, transform, stack):
        subject = testing.tiny_llama(num_layers=3)
        forward, params = transform(subject.forward, subject.params)
        small, given = scan_blocks(stack=stack)(forward, params)
        run = jax.jit(subject.sampler)
        key = jax.random.key(0)
        check_close(run(small, given, subject.cond, key), run(forward, params, subject.cond, key))


class TestRuns:
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

    def test_saving_takes_no_notice(self, tmp_path):
        forward, params, _ = _dit()
        recipe.save(tmp_path / "model", *scan_blocks(stack=True)(forward, params))
        loaded, weights = effjax.load(tmp_path / "model")
        assert loaded == forward
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
