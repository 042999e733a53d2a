"""Which program runs, and what is said where none can."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from effjax.cost import cost
from pallas_kernels import use_implementation
from pallas_kernels.implementation import dispatch

X = jnp.arange(6.0).reshape(2, 3)


def kernel(x, *, interpret=False):
    """Doubles; on every platform that has Pallas."""

    def body(x_ref, out_ref):
        out_ref[...] = 2 * x_ref[...]

    return pl.pallas_call(
        body, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=interpret
    )(x)


def double(x, implementation=None, *, interpret=False, refusals=None):
    programs = {
        "reference": lambda x: x + x,
        "xla": lambda x: 2 * x,
        "pallas_tpu": partial(kernel, interpret=interpret),
    }
    return dispatch(
        "double", implementation, programs, x, refusal=(refusals or {}).get, interpret=interpret
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"implementation": "reference"},
        {"implementation": "xla"},
        {"implementation": "pallas_tpu", "interpret": True},
        {"refusals": {"pallas_tpu": "not today"}},
    ],
    ids=str,
)
def test_programs_agree(options):
    run = partial(double, **options)
    for function in (run, jax.jit(run), jax.vmap(run), jax.jit(jax.vmap(run))):
        assert np.array_equal(function(X), 2 * X)


def test_the_platform_is_that_of_the_lowering():
    traced = jax.jit(double).trace(X)
    assert "tpu_custom_call" in traced.lower(lowering_platforms=("tpu",)).as_text()
    assert "custom_call" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    refused = jax.jit(partial(double, refusals={"pallas_tpu": "not today"})).trace(X)
    assert "tpu_custom_call" not in refused.lower(lowering_platforms=("tpu",)).as_text()


def test_operations_without_a_name_follow_the_context():
    jitted = jax.jit(double)
    for name, kernels in ((None, True), ("xla", False), ("reference", False)):
        with use_implementation(name):
            text = jitted.trace(X).lower(lowering_platforms=("tpu",)).as_text()
        assert ("tpu_custom_call" in text) == kernels
    assert "tpu_custom_call" in jitted.trace(X).lower(lowering_platforms=("tpu",)).as_text()
    with use_implementation("xla"), use_implementation(None):
        assert "tpu_custom_call" in jitted.trace(X).lower(lowering_platforms=("tpu",)).as_text()
    # A name in the call stands.
    with use_implementation("xla"), pytest.raises(NotImplementedError, match="runs on tpu alone"):
        double(X, "pallas_tpu")


def test_several_platforms_at_once():
    for function in (double, jax.vmap(double)):
        with pytest.raises(NotImplementedError, match=r"double runs another kernel .*'cpu', 'tpu'"):
            jax.jit(function).trace(X).lower(lowering_platforms=("cpu", "tpu"))
    with use_implementation("xla"):
        jax.jit(double).trace(X).lower(lowering_platforms=("cpu", "tpu"))


def test_a_named_kernel_of_another_platform():
    named = partial(double, implementation="pallas_tpu")
    for function in (named, jax.jit(named), jax.vmap(named), jax.jit(jax.vmap(named))):
        with pytest.raises(NotImplementedError, match=r"double: .* runs on tpu alone\. Pass"):
            function(X)
    # Shapes are known all the same, and a program for its own platform can be made here.
    assert jax.eval_shape(jax.vmap(named), X).shape == X.shape
    lowered = jax.jit(named).trace(X).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_cost_knows_the_platform():
    def product(x, implementation):
        programs = {"xla": lambda x: x @ x, "pallas_tpu": lambda x: x @ x @ x}
        return dispatch("product", implementation, programs, x, refusal={}.get)

    x = jax.ShapeDtypeStruct((4, 4), jnp.float32)
    either = partial(product, implementation=None)
    assert cost(either, x, platform="cpu").flops == 2 * 4**3
    assert cost(either, x, platform="tpu").flops == 4 * 4**3
    named = partial(product, implementation="pallas_tpu")
    assert cost(named, x, platform="tpu").flops == 4 * 4**3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"implementation": "pallas_gpu"}, ValueError, "no implementation 'pallas_gpu'; there are"),
        ({"interpret": True}, ValueError, "interpret mode needs a named kernel"),
        (
            {"implementation": "pallas_tpu", "refusals": {"pallas_tpu": "not today"}},
            NotImplementedError,
            "double, implementation 'pallas_tpu': not today",
        ),
    ],
)
def test_errors(options, error, message):
    with pytest.raises(error, match=message):
        double(X, **options)


def test_the_context_takes_what_every_operation_has():
    with (
        pytest.raises(ValueError, match=r'takes "xla", "reference" or None.*got \'pallas_tpu\''),
        use_implementation("pallas_tpu"),
    ):
        pass
