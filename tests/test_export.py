"""Compressed samplers leave as programs: what docs/export.md says, on every platform."""

import chex
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh

import effjax
from effjax.methods import dit_fast_attn, vidit_q
from effjax.models.pixart import PromptEmbeddings
from effjax.quant import Activations, QTensor, Quantizer, quantize_matrix
from effjax.quant.hadamard import Rotation
from effjax.testing import tiny_dit
from pallas_kernels import use_implementation

TRITON = export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def subject():
    return tiny_dit(steps=2, num_layers=1)


@pytest.fixture(scope="module")
def compressed(subject):
    """The program, jitted, and its arguments: sparse attention, kept outputs, W8A8."""
    sparse = dit_fast_attn.METHOD.ladder(subject)[-1]
    transform = effjax.chain(
        dit_fast_attn.transform(sparse), vidit_q.transform(vidit_q.uniform(8, alpha=None))
    )
    forward, params = transform(subject.forward, subject.params)
    program = jax.jit(lambda params, cond, key: subject.sampler(forward, params, cond, key))
    return program, (params, subject.cond, KEY)


def round_trip(exported):
    pytest.importorskip("flatbuffers", reason="serialized exports need flatbuffers")
    return export.deserialize(exported.serialize())


def test_a_program_for_this_machine_gives_the_same_samples(compressed):
    program, arguments = compressed
    shapes = jax.eval_shape(lambda *arguments: arguments, *arguments)
    again = round_trip(export.export(program, platforms=["cpu"])(*shapes))
    assert again.platforms == ("cpu",)
    assert np.array_equal(again.call(*arguments), program(*arguments))
    # Parameters are arguments, no part of the program.
    assert len(again.in_avals) == len(jax.tree.leaves(arguments))


def test_a_program_for_a_tpu(compressed):
    program, arguments = compressed
    exported = round_trip(export.export(program, platforms=["tpu"])(*arguments))
    assert exported.platforms == ("tpu",)
    assert "tpu_custom_call" in exported.mlir_module()
    with pytest.raises(ValueError, match="platform"):
        exported.call(*arguments)


def test_a_program_for_a_gpu(compressed):
    program, arguments = compressed
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        make = export.export(program, platforms=["cuda"], disabled_checks=[TRITON])
        exported = round_trip(make(*arguments))
    assert exported.platforms == ("cuda",)
    assert "triton" in exported.mlir_module()


def test_kernels_are_lowered_for_one_platform_at_a_time(compressed):
    program, arguments = compressed
    for platforms in (["cpu", "tpu"], ["tpu", "cuda"]):
        with pytest.raises(NotImplementedError, match=r"one program for each, or.*xla"):
            export.export(program, platforms=platforms)(*arguments)


def test_one_program_for_all_platforms(compressed):
    program, arguments = compressed
    platforms = ("cpu", "tpu", "cuda")
    with use_implementation("xla"):
        exported = round_trip(export.export(program, platforms=platforms)(*arguments))
    assert exported.platforms == platforms
    assert not any(kernel in exported.mlir_module() for kernel in ("tpu_custom_call", "triton"))
    # The compiler of this machine fuses it in another way.
    chex.assert_trees_all_close(exported.call(*arguments), program(*arguments), atol=1e-4)


@pytest.fixture
def symbols():
    """Annotations say int where an export may have a symbol."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield jax.ShapeDtypeStruct(export.symbolic_shape("b"), jnp.int32)
    jaxtyping.config.update("jaxtyping_disable", False)


def test_any_number_of_images(subject, symbols):
    """Where attention is dense; lists of blocks are made for a number."""
    forward, params = vidit_q.transform(vidit_q.uniform(8, alpha=None))(
        subject.forward, subject.params
    )
    program = jax.jit(lambda params, cond: subject.sampler(forward, params, cond, KEY))
    exported = export.export(program, platforms=["cpu", "tpu"])(params, symbols)
    three = jnp.arange(3, dtype=jnp.int32)
    assert np.array_equal(exported.call(params, three), program(params, three))


def test_sparse_attention_needs_a_number_of_images(compressed, symbols):
    program, (params, _, key) = compressed
    with pytest.raises(ValueError, match="sizes that are numbers"):
        export.export(program, platforms=["cpu"])(params, symbols, key)


def test_what_a_program_takes_survives_the_disk():
    w = np.linspace(-1, 1, 48, dtype=np.float32).reshape(12, 4)
    inputs = Activations(Quantizer(8, levels="n+1/2"))
    leaves = [
        quantize_matrix(jnp.asarray(w), activations=inputs, rotation=Rotation(12, seed=3)),
        quantize_matrix(jnp.asarray(w), Quantizer(4, symmetric=False), group_size=4),
        quantize_matrix(jnp.asarray(w).reshape(2, 2, 3, 4)),
    ]
    caption = PromptEmbeddings(jnp.ones((1, 2, 3)), jnp.ones((1, 2), bool))
    arguments = (leaves, caption)
    again = round_trip(export.export(jax.jit(lambda x: x), platforms=["cpu"])(arguments))
    assert again.in_tree == jax.tree.structure(((arguments,), {}))
    out, said = again.call(arguments)
    assert all(isinstance(leaf, QTensor) for leaf in out)
    assert isinstance(said, PromptEmbeddings)
