"""Kernels on a mesh: every device runs them on its own rows and heads, with equal results."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.cost import cost
from effjax.parallel import device_mesh
from pallas_kernels.arrow_attention import arrow_attention
from pallas_kernels.attention import dense_attention
from pallas_kernels.block_mask import Band, SinkLocal, from_map
from pallas_kernels.block_sparse_attention import block_sparse_attention
from pallas_kernels.on_mesh import Cut, by_device
from pallas_kernels.quantized_attention import quantized_attention
from pallas_kernels.residual_attention import dense_and_sparse_attention

BATCH, TOKENS, HEADS, WIDTH = 2, 256, 4, 16


def operands(heads=HEADS):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(BATCH, TOKENS, n, WIDTH) for n in (HEADS, heads, heads)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def by_head(q, k, v, **options):
    """Lists of every row and head, made at run time."""
    scores = jnp.arange(BATCH * HEADS * 4).reshape(BATCH, HEADS, 2, 2) % 3
    mask = from_map(scores != 1, TOKENS, block=128, width=2, listed=12)
    return block_sparse_attention(q, k, v, mask, **options)


def segments(q, k, v, **options):
    own = jnp.arange(TOKENS)[None] // jnp.array([[100], [200]])
    return block_sparse_attention(q, k, v, Band(64), segments=(own, own), **options)


CALLS = {
    "dense": dense_attention,
    "band": lambda q, k, v, **options: block_sparse_attention(q, k, v, Band(32), **options),
    "sinks by head": lambda q, k, v, **options: block_sparse_attention(
        q, k, v, SinkLocal((4, 8, 16, 32), (32,) * 4), **options
    ),
    "lists by head": by_head,
    "segments": segments,
    "residual": lambda q, k, v, **options: dense_and_sparse_attention(q, k, v, Band(32), **options),
    "windows": lambda q, k, v, **options: arrow_attention(q, k, v, [32, -1, 0, 64], **options),
    "windows as data": lambda q, k, v, **options: arrow_attention(
        q, k, v, jnp.array([32, -1, 0, 64]), widths=(-1, 0, 32, 64), **options
    ),
    "int8": lambda q, k, v, **options: quantized_attention(
        q, k, v, Band(64), values="int8", **options
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_kernel_gives_the_same_on_four_devices(name):
    call, given = CALLS[name], operands()
    kernel = {"implementation": "pallas_tpu", "interpret": True}
    want = jax.jit(lambda *x: call(*x, **kernel))(*given)
    mesh = device_mesh(data=2, model=2)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *x: call(*x, **kernel))(*jax.device_put(given, place))
    chex.assert_trees_all_close(got, want, atol=1e-6)
    if "by head" not in name and name != "windows":  # lists that are static lie whole
        chex.assert_equal(
            got[0].sharding.spec if name == "residual" else got.sharding.spec, place.spec
        )


def test_fewer_key_heads_than_devices_are_not_cut():
    given = operands(heads=1)
    want = dense_attention(*given, implementation="pallas_tpu", interpret=True)
    with jax.set_mesh(device_mesh(data=2, model=2)):
        got = dense_attention(*given, implementation="pallas_tpu", interpret=True)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=1e-6)


def test_all_devices_count():
    given = operands()
    alone = cost(dense_attention, *given, platform="tpu")
    with jax.set_mesh(device_mesh(data=2, model=2)):
        assert cost(dense_attention, *given, platform="tpu").flops == alone.flops


def test_what_can_be_cut():
    q = jnp.zeros((2, 8, 4, 16))
    assert by_device(None, q) is not None  # one device
    with jax.set_mesh(device_mesh(data=1, model=4)):
        assert by_device(None, q) is None
        assert by_device(Cut("b.h.", "b.h.", whole="h"), q) is None
        assert by_device(Cut("b.h.", "b.h."), q) is not None
        assert by_device(Cut("b.h.", "b.h."), q[:, :, :3]) is None
    with jax.set_mesh(device_mesh(rows=4)):
        assert by_device(Cut("b.h.", "b.h."), q) is None


def test_a_program_for_several_devices_needs_the_mesh():
    mesh = device_mesh(data=2, model=2)
    place = NamedSharding(mesh, PartitionSpec("data", None, "model"))
    given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in operands()]
    traced = jax.jit(dense_attention).trace(*given)
    with pytest.raises(NotImplementedError, match=r"within jax\.set_mesh"):
        traced.lower(lowering_platforms=("tpu",))
    with jax.set_mesh(mesh):
        text = jax.jit(dense_attention).trace(*given).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in text
