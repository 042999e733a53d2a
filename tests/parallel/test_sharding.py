"""Rules by role and path: the same results on four devices, with arrays cut where they can be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import converters
from effjax import testing
from effjax.generate import Reading
from effjax.methods import ada_kv, cskv, kivi, moa, round_to_nearest
from effjax.parallel import CACHES, device_mesh, leaf_sharding, shard, shardings, tensor_parallel
from effjax.quant import Activations, Quantizer, qdot, quantize_matrix
from effjax.samplers import sample_keys
from effjax.transform import identity
from tests.subjects.joint import tiny_joint

MESHES = [{"model": 4}, {"data": 2, "model": 2}, {"data": 4}]


def leaves(subject, bits):
    """The subject's model with weights of so many bits, inputs of int8 for W8."""
    if bits == 32:
        return subject.forward, subject.params
    inputs = 8 if bits == 8 else 16
    group = {} if bits == 8 else {"group_size": 32}
    plan = round_to_nearest.uniform(bits, inputs, **group)
    return round_to_nearest.transform(plan)(subject.forward, subject.params)


@pytest.mark.parametrize(
    ("mesh", "bits"), [(MESHES[0], 32), (MESHES[0], 4), (MESHES[1], 8), (MESHES[2], 32)], ids=str
)
def test_a_llama_on_four_devices(mesh, bits):
    subject = testing.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, num_kv_heads=4)
    forward, params = leaves(subject, bits)
    want, _ = jax.jit(forward)(params, {}, subject.cond)
    devices = device_mesh(**mesh)
    spread = shard(params, devices, tensor_parallel(forward))
    tokens = shard({"tokens": subject.cond}, devices, [("tokens", ("data", None))])["tokens"]
    got, _ = jax.jit(forward)(spread, {}, tokens)
    with jax.set_mesh(devices):  # as kernels need it; products with packed weights take no tiles
        chex.assert_trees_all_close(jax.jit(forward)(spread, {}, tokens)[0], got, atol=2e-5)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=2e-5)


@pytest.mark.parametrize("bits", [32, 8, 4])
def test_a_dit_on_four_devices(bits):
    subject = testing.tiny_dit(head_dim=16, num_heads=4)
    forward, params = leaves(subject, bits)
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 4))
    t, labels = jnp.array([3.0, 700.0]), jnp.array([1, 2])
    want, _ = jax.jit(forward)(params, {}, x, t, labels)
    got, _ = jax.jit(forward)(
        shard(params, device_mesh(model=4), tensor_parallel(forward)), {}, x, t, labels
    )
    if bits == 8:  # sums of parts round otherwise, and an input may fall on either side
        assert jnp.linalg.norm(got - want) < 1e-2 * jnp.linalg.norm(want)
    else:
        chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=2e-5)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_joint_transformer_on_four_devices(bits):
    """Layers of both streams are cut by their roles, whatever they are called."""
    subject = tiny_joint(head_dim=16, num_heads=4)
    forward, params = leaves(subject, bits)
    mesh, rules = device_mesh(model=4), tensor_parallel(forward)
    specs = jax.tree.map(lambda place: place.spec, shardings(subject.params, mesh, rules))
    block = specs["blocks"]["1"]
    for stream in ("image", "text"):
        attn, mlp = block["attn"][stream], block[f"mlp_{stream}"]
        assert attn["to_v"]["kernel"] == mlp["fc1"]["kernel"] == PartitionSpec(None, "model")
        assert attn["to_v"]["bias"] == mlp["fc1"]["bias"] == PartitionSpec("model")
        assert attn["to_out"]["kernel"] == mlp["fc2"]["kernel"] == PartitionSpec("model", None)
        assert attn["to_out"]["bias"] == mlp["fc2"]["bias"] == PartitionSpec(None)
        assert block[f"modulation_{stream}"]["kernel"] == PartitionSpec("model", None)
    assert specs["proj"]["kernel"] == PartitionSpec(None, "model")
    assert specs["caption_projection"]["kernel"] == PartitionSpec(None, None)
    own = [(r"blocks\.1\..*\.kernel", ("data", None)), *rules]  # rules of the user go first
    assert shardings(subject.params, mesh, own)["blocks"]["1"]["mlp_text"]["fc1"][
        "kernel"
    ].spec == PartitionSpec(None, None)
    inputs = (jnp.ones((2, 16, 16, 4)), jnp.array([10.0, 500.0]), subject.cond)
    want, _ = jax.jit(forward)(params, {}, *inputs)
    got, _ = jax.jit(forward)(shard(params, mesh, rules), {}, *inputs)
    chex.assert_trees_all_close(np.asarray(got), np.asarray(want), atol=2e-5)


def spans(layout, bits=16):
    """MoA with two sizes of slots in each group of heads."""
    betas = ((0.5, 0.5, 0.9, 0.9),) * 2
    return moa.transform(
        moa.MoAPlan(((0.0,) * 4,) * 2, betas, block=2, sink=2, floor=4, layout=layout, bits=bits)
    )


KINDS = {
    "dense": identity,
    "ada_kv, 4 bits": ada_kv.transform(ada_kv.AdaKVPlan(press="knorm", bits=4)),
    "cskv": cskv.transform(cskv.CSKVPlan(0.5, 0.5, window=4)),
    "kivi": kivi.transform(kivi.KIVIPlan(4, 4, group=4)),
    "moa": spans("grouped"),
    "moa, 4 bits": spans("grouped", bits=4),
    "moa, flat, 4 bits": spans("flat", bits=4),
}


@pytest.mark.parametrize("kind", KINDS)
def test_caches_are_cut_by_rows_and_heads(kind):
    subject = testing.tiny_llama(num_heads=4, num_kv_heads=4)
    forward, params = KINDS[kind](subject.forward, subject.params)
    reading = Reading(prompt=12, new=2)
    texts = subject.cond[:, :14]
    mesh = device_mesh(data=2, model=2)
    carry = reading.init(forward, params, texts)
    spread = carry._replace(state=shard(carry.state, mesh, CACHES))

    @jax.jit
    def two(params, carry):
        for step in range(2):
            carry = reading.step(forward, params, carry, texts, None, step)
        return carry

    alone, together = two(params, carry), two(shard(params, mesh, tensor_parallel(forward)), spread)
    chex.assert_trees_all_close(np.asarray(together.x), np.asarray(alone.x), atol=2e-5)
    by_heads = {path: leaf for path, leaf in spread.state.items() if leaf.ndim == 4}
    assert by_heads or kind == "moa, flat, 4 bits"
    spec = PartitionSpec("data", None, "model")
    for path, leaf in by_heads.items():
        assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 4), path
    if kind == "dense":  # of others the compiler chooses where results lie
        for path, leaf in together.state.items():
            assert leaf.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 4), path


def test_what_a_device_holds():
    mesh = device_mesh(model=4)
    subject = testing.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, num_kv_heads=2)
    rules = tensor_parallel(subject.forward)
    specs = jax.tree.map(lambda s: s.spec, shardings(subject.params, mesh, rules))
    block = specs["blocks"]["0"]
    assert block["attn"]["to_q"]["kernel"] == PartitionSpec(None, "model")
    assert block["attn"]["to_out"]["kernel"] == PartitionSpec("model", None)
    assert block["mlp"]["down"]["kernel"] == PartitionSpec("model", None)
    assert specs["lm_head"]["kernel"] == PartitionSpec(None, None)  # nor do 50 outputs
    assert block["norm1"]["scale"] == PartitionSpec(None)
    assert specs["embed_tokens"] == PartitionSpec(None, None)  # 50 rows do not divide
    spread = shard(subject.params, mesh, rules)
    kernel = spread["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (64, 32)


@pytest.mark.parametrize(("groups", "cut"), [(1, None), (4, "model"), (2, None)])
def test_parts_of_a_quantized_leaf(groups, cut):
    w = jax.random.normal(jax.random.key(0), (128, 64))
    leaf = quantize_matrix(
        w,
        Quantizer(4, symmetric=False),
        group_size=128 // groups,
        smoothing_scale=jnp.ones(128),
        packed=True,
    )
    got = leaf_sharding(leaf, device_mesh(model=4), ("model", None))
    assert got.scale.spec == PartitionSpec(cut, None)
    assert got.zero_point.spec == PartitionSpec(cut, None)
    assert got.smoothing_scale.spec == PartitionSpec("model")
    assert all(plane.spec == PartitionSpec("model", None) for plane in got.qvalue)
    assert got.column_sums is None


def test_an_order_of_inputs_is_whole():
    """Rows that are cut over devices take inputs from all of them."""
    perm = jnp.asarray(np.random.default_rng(0).permutation(128))
    w = jax.random.normal(jax.random.key(0), (128, 64))
    leaf = quantize_matrix(w, Quantizer(4), group_size=32, perm=perm)
    places = leaf_sharding(leaf, device_mesh(model=4), ("model", None))
    assert places.perm.spec == PartitionSpec(None)
    x = jax.random.normal(jax.random.key(1), (3, 128))
    cut = jax.device_put(leaf, places)
    chex.assert_trees_all_close(jax.jit(qdot)(x, cut), qdot(x, leaf), atol=1e-5)


def test_static_activations_and_convolutions():
    how = Activations(Quantizer(8, symmetric=False), dynamic=False)
    w = jax.random.normal(jax.random.key(0), (64, 32))
    leaf = quantize_matrix(
        w, Quantizer(8), activations=how, input_range=(jnp.float32(-1), jnp.float32(2))
    )
    got = leaf_sharding(leaf, device_mesh(model=4), (None, "model"))
    assert got.input_scale.spec == PartitionSpec()
    assert got.column_sums.spec == PartitionSpec("model")
    kernel = quantize_matrix(jax.random.normal(jax.random.key(0), (3, 3, 8, 16)), Quantizer(8))
    got = leaf_sharding(kernel, device_mesh(model=4), (None, None, "model", "model"))
    assert got.qvalue.spec == PartitionSpec(None, "model")


def test_checkpoints_go_straight_to_their_devices(tmp_path):
    subject = testing.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, num_kv_heads=4)
    converters.save_pretrained(subject.forward, subject.params, tmp_path / "m", progress=False)
    mesh = device_mesh(model=4)
    places = shardings(subject.forward.abstract_params(), mesh, tensor_parallel(subject.forward))
    _, params = converters.from_pretrained(tmp_path / "m", sharding=places)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, params), subject.params)
    assert jax.tree.all(jax.tree.map(lambda a, s: a.sharding == s, params, places))


def test_quantized_checkpoints_are_cut_by_parts(tmp_path):
    subject = testing.tiny_llama(hidden_size=64, intermediate_size=128, head_dim=16, num_kv_heads=4)
    plan = round_to_nearest.uniform(4, 16, group_size=32)
    forward, params = round_to_nearest.transform(plan)(subject.forward, subject.params)
    converters.save_pretrained(forward, params, tmp_path / "m", progress=False)
    rules = tensor_parallel(subject.forward)
    places = shardings(subject.forward.abstract_params(), device_mesh(model=4), rules)
    _, spread = converters.from_pretrained(tmp_path / "m", sharding=places)
    down = spread["blocks"]["0"]["mlp"]["down"]["kernel"]
    assert down.scale.sharding.spec == PartitionSpec("model", None)  # four groups of inputs
    up = spread["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert up.scale.sharding.spec == PartitionSpec(None, "model")
    chex.assert_trees_all_equal(
        np.asarray(up.qvalues()), params["blocks"]["0"]["mlp"]["up"]["kernel"].qvalues()
    )


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"needs 3 devices, there are 4"):
        device_mesh(model=3)
    with pytest.raises(ValueError, match=r"cuts 1 dimensions as .*but embed_tokens is \[50, 16\]"):
        shardings(testing.tiny_llama().params, device_mesh(model=4), [("embed_tokens", ("model",))])


@pytest.mark.parametrize(
    ("make", "least"),
    [
        (lambda: testing.tiny_var(patch_nums=(1, 2), num_layers=1, batch=4), 0.3),
        (lambda: testing.tiny_llamagen(grid=2, num_layers=1, batch=4), 0.4),
    ],
    ids=["maps", "tokens"],
)
def test_images_as_sequences_on_four_devices(make, least):
    """Labels and a key of each sample, cut by rows: the same images, a part on each device."""
    subject, mesh = make(), device_mesh(data=4)
    loop, forward, labels = subject.sampler, subject.forward, subject.cond
    rules = [(".*", ("data",))]

    @jax.jit
    def run(params, rows):
        return loop.sample(forward, params, rows["cond"], rows["keys"])

    rows = {"cond": labels, "keys": sample_keys(jax.random.key(3), len(labels))}
    alone = run.lower(subject.params, rows).compile()
    spread = shard(subject.params, mesh, tensor_parallel(forward)), shard(rows, mesh, rules)
    together = run.lower(*spread).compile()
    (x, tokens), (got, drawn) = alone(subject.params, rows), together(*spread)
    chex.assert_trees_all_equal(np.asarray(drawn), np.asarray(tokens))
    chex.assert_trees_all_close(np.asarray(got), np.asarray(x), atol=1e-5)
    assert together.cost_analysis()["flops"] < least * alone.cost_analysis()["flops"]
    three = jax.tree.map(lambda row: row[:3], rows)  # four do not divide them: whole everywhere
    assert shard(three, mesh, rules)["cond"].sharding.is_fully_replicated
