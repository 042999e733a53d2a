import dataclasses
import math
from fractions import Fraction
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec

from effjax.context import State, switch
from effjax.cost import (
    Cost,
    ScopeCost,
    array_bytes,
    compiled_memory,
    cost,
    sampler_cost,
    state_bytes,
    weight_bytes,
)
from effjax.forward import abstract, parameter_count
from effjax.models.dit import DiT, DiTConfig
from effjax.samplers import DDIM, Sampler
from effjax.targets import Wrapper, wrap
from pallas_kernels.marks import declared, declared_work, useful, useful_fraction


def shape(*dimensions, dtype="float32"):
    return jax.ShapeDtypeStruct(dimensions, jnp.dtype(dtype))


def multiply(x, w):
    return x @ w


def attention(x, w):
    with jax.named_scope("attention"):
        return x @ w


DENSE = 2 * 3 * 4 * 5  # FLOPs of [3, 4] @ [4, 5]
X, W, SQUARE = shape(3, 4), shape(4, 5), shape(4, 4)


class TestProducts:
    def test_dense(self):
        counted = cost(multiply, X, W)
        assert counted.flops == counted.useful_flops == DENSE
        assert counted.bytes_ == 4 * (3 * 4 + 4 * 5 + 3 * 5)

    def test_arrays_and_keyword_arguments(self):
        assert cost(multiply, jnp.ones((3, 4)), w=jnp.ones((4, 5))).flops == DENSE

    def test_batched_dot(self):
        counted = cost(partial(jnp.einsum, "bshd,bthd->bhst"), shape(2, 5, 3, 4), shape(2, 7, 3, 4))
        assert counted.flops == 2 * (2 * 3) * 5 * 7 * 4

    def test_elementwise_work_is_not_counted(self):
        assert cost(lambda x: jnp.sort(jnp.exp(x).sum(0)), X) == Cost()

    @pytest.mark.parametrize("stride", [1, 2])
    def test_convolution(self, stride):
        def conv(x, kernel):
            return jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )

        outputs = 2 * (8 // stride) ** 2 * 6
        assert cost(conv, shape(2, 8, 8, 4), shape(3, 3, 4, 6)).flops == 2 * outputs * 9 * 4

    def test_convolution_feature_groups(self):
        def depthwise(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", feature_group_count=4)

        # NCW, OIW: 8 outputs channels, each from one input channel
        assert cost(depthwise, shape(2, 4, 9), shape(8, 1, 3)).flops == 2 * (2 * 8 * 7) * 3

    def test_convolution_batch_groups(self):
        def grouped(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, (1,), "VALID", batch_group_count=2)

        assert cost(grouped, shape(4, 3, 9), shape(6, 3, 2)).flops == 2 * (2 * 6 * 8) * (3 * 2)

    def test_ragged_dot_and_its_gradients_count_each_row_once(self):
        args = shape(6, 4), shape(2, 4, 5), shape(2, dtype="int32")
        once = 2 * 6 * 4 * 5
        assert cost(jax.lax.ragged_dot, *args).flops == once
        loss = jax.grad(lambda x, w, groups: jax.lax.ragged_dot(x, w, groups).sum(), (0, 1))
        assert cost(loss, *args).flops == 3 * once


class TestTransforms:
    def test_jit_and_vmap(self):
        batched = jax.jit(jax.vmap(multiply, (0, None)))
        assert cost(batched, shape(7, 3, 4), W).flops == 7 * DENSE

    def test_gradient_of_a_matmul_is_three_times_the_matmul(self):
        loss = jax.value_and_grad(lambda x, w: (x @ w).sum(), (0, 1))
        assert cost(loss, X, W).flops == 3 * DENSE

    def test_remat_counts_the_second_forward(self):
        def loss(x, w):
            return jnp.sin(jnp.sin(x @ w) @ w).sum()

        grad, remat = (jax.grad(f, (0, 1)) for f in (loss, jax.checkpoint(loss)))
        one = 2 * 4**3
        assert cost(grad, SQUARE, SQUARE).flops == 6 * one
        assert cost(remat, SQUARE, SQUARE).flops == 8 * one

    def test_custom_derivatives(self):
        jvp, vjp = jax.custom_jvp(multiply), jax.custom_vjp(multiply)
        jvp.defjvp(lambda p, t: (p[0] @ p[1], t[0] @ p[1] + p[0] @ t[1]))
        vjp.defvjp(lambda x, w: (x @ w, w), lambda w, g: (g @ w.T, None))
        vmapped = jax.custom_batching.custom_vmap(multiply)
        vmapped.def_vmap(lambda size, batched, x, w: (x @ w, True))
        for function in (jvp, vjp, vmapped):
            assert cost(function, X, W).flops == DENSE

    def test_scan_times_its_length(self):
        def function(x, w):
            return jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=6)[0]

        assert cost(function, X, SQUARE).flops == 6 * 2 * 3 * 4 * 4

    def test_while_needs_trips_if_it_holds_products(self):
        def function(x, w):
            return jax.lax.while_loop(lambda x: (x @ w).sum() < 3, lambda x: x @ w, x)

        once = 2 * 3 * 4 * 4
        with pytest.raises(ValueError, match="while_trips"):
            cost(function, X, SQUARE)
        assert cost(function, X, SQUARE, while_trips=5).flops == 5 * once + 6 * once
        assert cost(function, X, SQUARE, while_trips=lambda scope: 0).flops == once
        free = partial(jax.lax.while_loop, lambda x: x.sum() < 3, lambda x: x + 1)
        assert cost(free, X) == Cost()

    def test_shard_map_counts_every_device(self):
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        specs = {"in_specs": (PartitionSpec("data"), PartitionSpec())}
        sharded = jax.shard_map(multiply, mesh=mesh, **specs, out_specs=PartitionSpec("data"))
        assert cost(sharded, shape(8, 4), W).flops == 2 * 8 * 4 * 5

    def test_unknown_loops_with_products_are_errors(self):
        def solve(x, w):
            return jax.lax.custom_linear_solve(
                lambda v: w @ v, x, lambda matvec, b: b, symmetric=True
            )

        with pytest.raises(ValueError, match="custom_linear_solve"):
            cost(solve, shape(4), SQUARE)


class TestBranches:
    @staticmethod
    def function(index, x, w):
        def branch(count):
            def run(x):
                for _ in range(count):
                    x = x @ w
                return x

            return run

        with jax.named_scope("layer"):
            return jax.lax.switch(index, [branch(count) for count in (1, 3, 0)], x)

    @pytest.mark.parametrize(
        ("branch", "products"),
        [("max", 3), ("min", 0), (0, 1), (1, 3), (lambda count, scope: count - 3, 1)],
    )
    def test_choice(self, branch, products):
        counted = cost(self.function, shape(dtype="int32"), X, SQUARE, branch=branch)
        assert counted.flops == products * 2 * 3 * 4 * 4

    def test_the_choice_sees_the_scope(self):
        seen = []
        choose = lambda count, scope: seen.append((count, scope)) or 0  # noqa: E731
        cost(self.function, shape(dtype="int32"), X, SQUARE, branch=choose)
        assert seen == [(3, "layer")]

    @pytest.mark.parametrize("branch", [3, -1])
    def test_out_of_range(self, branch):
        with pytest.raises(ValueError, match=f"branch {branch} of a switch with 3 branches"):
            cost(self.function, shape(dtype="int32"), X, SQUARE, branch=branch)

    def test_unknown_name(self):
        with pytest.raises(ValueError, match="most"):
            cost(multiply, X, W, branch="most")

    def test_a_switch_without_products_needs_no_choice(self):
        def function(flag, x):
            return jax.lax.cond(flag, jnp.sin, jnp.cos, x)

        assert cost(function, shape(dtype="bool"), X, branch=7) == Cost()


class TestScopes:
    def test_prefix_reaches_inner_programs(self):
        def function(x, w):
            with jax.named_scope("block"):
                x = jax.jit(attention)(x, w)
                return jax.lax.scan(lambda x, _: (attention(x, w), None), x, None, length=2)[0] @ w

        once = 2 * 3 * 4 * 4
        counted = cost(function, X, SQUARE)
        assert [part[:2] for part in counted.scopes] == [
            ("block", once),
            ("block/attention", 3 * once),
        ]
        assert counted.scope("attention").flops == 3 * once
        assert counted.scope("block") == counted
        assert counted.scope("block/attention") == counted.scope("attention")
        assert counted.scope("atten") == Cost()

    def test_scopes_are_found_below_transforms(self):
        def loss(x, w):
            inner = jax.vmap(jax.checkpoint(attention), (0, None))(jnp.sin(x @ w), w)
            return jnp.sin(inner).sum()

        counted = cost(jax.grad(loss), shape(7, 3, 4), SQUARE)
        once = 7 * 2 * 3 * 4 * 4
        assert counted.flops == 4 * once
        assert counted.scope("attention").flops == 2 * once

    def test_sum_and_multiple(self):
        one, two = cost(attention, X, W), cost(multiply, X, W)
        total = one + 3 * two
        assert total == two * 3 + one
        assert (total.flops, total.scope("attention").flops) == (4 * DENSE, DENSE)
        assert total.bytes_ == one.bytes_ + 3 * two.bytes_
        assert dataclasses.asdict(one)["scopes"] == (ScopeCost("attention", *one.scopes[0][1:]),)


class TestUseful:
    @staticmethod
    def banded(x, w):
        return useful(attention, 3, 4)(x, w)

    def test_fraction_in_the_name(self):
        assert useful_fraction(useful(multiply, 15584, 22528).__name__) == Fraction(15584, 22528)
        assert useful_fraction("multiply") is None
        assert useful_fraction(useful(partial(lambda a, b: a, b=1), 0, 2).__name__) == 0

    @pytest.mark.parametrize("fraction", [(3, 2), (-1, 2), (0, 0)])
    def test_bad_fraction(self, fraction):
        with pytest.raises(ValueError, match="between 0 and all"):
            useful(multiply, *fraction)

    def test_values_do_not_change(self):
        x, w = jnp.ones((3, 4)), jnp.full((4, 5), 2.0)
        assert (self.banded(x, w) == x @ w).all()

    @pytest.mark.parametrize("transform", ["none", "jit", "vmap", "scan", "grad", "vmap of grad"])
    def test_survives(self, transform):
        def scan(x, w):
            return jax.lax.scan(lambda x, _: (self.banded(x, w), None), x, None, length=2)[0]

        loss = lambda x, w: jnp.sin(self.banded(x, w)).sum()  # noqa: E731
        batch = shape(6, 3, 4)
        function, x, products = {
            "none": (self.banded, X, 1),
            "jit": (jax.jit(self.banded), X, 1),
            "vmap": (jax.vmap(self.banded, (0, None)), batch, 6),
            "scan": (scan, X, 2),
            "grad": (jax.grad(loss, (0, 1)), X, 3),
            "vmap of grad": (jax.vmap(jax.grad(loss, (0, 1)), (0, None)), batch, 18),
        }[transform]
        counted = cost(function, x, SQUARE)
        executed = products * 2 * 3 * 4 * 4
        assert (counted.flops, counted.useful_flops) == (executed, executed * 3 // 4)
        assert counted.scope("attention").useful_flops == counted.useful_flops

    def test_no_whole_number(self):
        with pytest.raises(ValueError, match="no whole number"):
            cost(useful(multiply, 3, 7), X, SQUARE)

    def test_nested(self):
        with pytest.raises(ValueError, match="contains another"):
            cost(useful(self.banded, 1, 2), X, SQUARE)


class TestDeclared:
    @staticmethod
    def twice(x, w):
        return declared(multiply, flops=50, bytes_accessed=7, elements=12)(x, w)

    def test_work_in_the_name(self):
        name = declared(multiply, flops=50, bytes_accessed=7, elements=12).__name__
        assert declared_work(name) == (Fraction(50, 12), Fraction(7, 12))
        assert declared_work("multiply") is None

    def test_instead_of_what_the_equations_show(self):
        counted = cost(self.twice, X, SQUARE)
        assert (counted.flops, counted.useful_flops, counted.bytes_) == (50, 50, 7)
        batched = cost(jax.vmap(self.twice, (0, None)), shape(6, 3, 4), SQUARE)
        assert (batched.flops, batched.bytes_) == (300, 42)
        assert cost(useful(self.twice, 1, 2), X, SQUARE).useful_flops == 25


class TestPallas:
    @staticmethod
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] @ x_ref[...]

    def call(self, estimate):
        return pl.pallas_call(
            self.kernel,
            out_shape=SQUARE,
            interpret=True,
            cost_estimate=estimate,
            name="squaring",
        )

    def test_declared_cost(self):
        estimate = pl.CostEstimate(flops=128, bytes_accessed=77, transcendentals=5)
        counted = cost(self.call(estimate), SQUARE)
        assert (counted.flops, counted.bytes_) == (128, 77)
        batched = cost(jax.vmap(useful(self.call(estimate), 1, 2)), shape(3, 4, 4))
        assert (batched.flops, batched.useful_flops) == (3 * 128, 3 * 64)

    def test_missing_cost(self):
        with pytest.raises(ValueError, match=r"'squaring' declares no cost.*pl\.CostEstimate"):
            cost(self.call(None), SQUARE)


class TestDiT:
    def test_tiny_closed_form(self):
        config = DiTConfig(num_layers=2, num_heads=2, head_dim=8, num_classes=5, sample_size=8)
        forward, params = abstract(DiT, config)
        B, N, C = 2, config.tokens, config.hidden_size
        inputs = shape(B, 8, 8, 4), shape(B), shape(B, dtype="int32")
        counted = cost(forward, params, {}, *inputs)

        attention = 2 * (2 * B * N * N * C)
        projections = 4 * (2 * B * N * C * C)
        mlp = 2 * (2 * B * N * C * 4 * C)
        modulation = 2 * B * C * 6 * C
        patch = 2 * B * N * (2 * 2 * 4) * C
        time = 2 * B * 256 * C + 2 * B * C * C
        final = 2 * B * C * 2 * C + 2 * B * N * C * (2 * 2 * 8)
        layers = 2 * (attention + projections + mlp + modulation)
        assert counted.flops == counted.useful_flops == layers + patch + time + final
        assert counted.scope("attention").flops == 2 * attention

    def test_full_size_agrees_with_the_paper(self):
        # arXiv 2212.09748 gives DiT-XL/2 at 512 x 512 pixels 524.60 "Gflops" (multiply-adds)
        forward, params = abstract(DiT, DiTConfig.preset("DiT-XL/2", sample_size=64))
        inputs = shape(1, 64, 64, 4), shape(1), shape(1, dtype="int32")
        assert cost(forward, params, {}, *inputs).flops / 2 == pytest.approx(524.60e9, rel=1e-3)


class SkipOdd(Wrapper):
    def __init__(self, inner, step):
        super().__init__(inner)
        self.step = nnx.data(step)
        self.output = State()

    def __call__(self, x):
        def run(self, x):
            self.output.write(self.inner(x))
            return self.output.get_value()

        def reuse(self, x):
            return self.output.read(x.shape, x.dtype)

        return switch(self.step % 2, {0: run, 1: reuse}, self, x)


def skip_odd(module, context):
    wrap(module, "blocks.0.attn", SkipOdd, context.step)


class TestSampler:
    def test_static_steps(self):
        config = DiTConfig(num_layers=1, num_heads=2, head_dim=8, num_classes=5, sample_size=8)
        forward, params = abstract(DiT, config)
        inputs = shape(4, 8, 8, 4), shape(4), shape(4, dtype="int32")
        call = cost(forward, params, {}, *inputs)
        sampler, labels = Sampler(DDIM(steps=5), guidance=4.0), shape(2, dtype="int32")
        dense = sampler_cost(sampler, forward, params, labels, distinct=lambda step: 0)
        assert dense == 5 * call

        skipping, traced = forward.patch(skip_odd), []
        counted = sampler_cost(
            sampler,
            skipping,
            params,
            labels,
            distinct=lambda step: traced.append(step) or step % 2,
            branch=99,  # no switch remains
        )
        projections = 4 * (2 * 4 * 16 * 16 * 16)
        assert counted.scope("attention") == 3 * call.scope("attention")
        assert counted.flops == dense.flops - 2 * (call.scope("attention").flops + projections)
        assert counted == sampler_cost(sampler, skipping, params, labels)
        assert traced == [0, 1, 2, 3, 4]
        unguided = sampler_cost(Sampler(DDIM(steps=5)), forward, params, labels)
        assert 2 * unguided.flops == dense.flops


class TestBytes:
    @pytest.mark.parametrize(
        ("dtype", "expected"),
        [("float32", 60), ("bfloat16", 30), ("bool", 15), ("int4", 8), ("float4_e2m1fn", 8)],
    )
    def test_logical_bytes(self, dtype, expected):
        assert array_bytes(shape(3, 5, dtype=dtype)) == expected

    def test_trees(self):
        _, params = abstract(DiT, DiTConfig(num_layers=1, num_heads=1, head_dim=4))
        assert weight_bytes(params) == 4 * parameter_count(params)
        assert state_bytes({"a": shape(3, dtype="bfloat16"), "b": jax.random.key(0)}) == 14
        assert state_bytes({}) == 0

    @pytest.mark.parametrize("wrapper", [jax.jit, lambda function: function])
    def test_compiled_memory(self, wrapper):
        memory = compiled_memory(wrapper(lambda x, w: jnp.sin(x @ w) @ w), SQUARE, SQUARE)
        assert memory["argument_bytes"] == 2 * 64
        assert memory["output_bytes"] == 64
        assert memory["peak_bytes"] >= 3 * 64
        assert all(isinstance(n, int) and math.isfinite(n) for n in memory.values())
